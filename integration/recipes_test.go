// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/treelist"
)

// TestKubeletRecipes runs the recipes of docs/kubernetes.md for pods on a real kubelet. The
// pods are static, so everything that needs the API server is missing, such as pull
// secrets.
func TestKubeletRecipes(t *testing.T) {
	t.Parallel()
	dir, config := verifiers(t, "2m")
	n := node.ForTest(t, node.Options{Kubelet: true, ContainerdConfig: config})
	check(t, n.StartKubelet(nil))
	type tests []struct {
		name string
		run  func(*testing.T, *node.Node)
	}
	t.Run("pods", func(t *testing.T) {
		for _, test := range (tests{
			{"a manifest", testKubeletManifest},
			{"a DaemonSet", testKubeletDaemonSet},
			{"a digest", testKubeletDigest},
			{"a restricted pod", testKubeletRestricted},
			{"why a container waits", testKubeletReasons},
		}) {
			t.Run(test.name, func(t *testing.T) {
				t.Parallel()
				test.run(t, n)
			})
		}
	})
	for _, test := range (tests{ // these change the node
		{"a verifier", func(t *testing.T, n *node.Node) { testKubeletVerifier(t, n, dir) }},
		{"credentials", testKubeletCredentials},
		{"a pinned model", testKubeletPinned},
	}) {
		t.Run(test.name, func(t *testing.T) { test.run(t, n) })
	}
}

// staticModel is a static pod with a model at /model.
func staticModel(name, ref, policy string) node.PodSpec {
	return node.PodSpec{Name: name, Volumes: []node.Volume{{Image: ref, Path: "/model", PullPolicy: policy}}}
}

// waitForMessage waits until kubelet's message about a waiting container contains all
// texts.
func waitForMessage(t *testing.T, n *node.Node, pod string, wanted ...string) {
	t.Helper()
	waitForPod(t, n, pod, "get a message with "+strings.Join(wanted, ", "), func(p node.StaticPod) bool {
		c := p.Status["main"]
		for _, want := range wanted {
			if !strings.Contains(c.Message, want) {
				return false
			}
		}
		if c.Running || c.Reason == "" {
			return false
		}
		t.Logf("%s: %s: %s", pod, c.Reason, c.Message)
		return true
	})
}

// startManifest runs a static pod from its manifest and returns it when it runs. The pod is
// removed at the end of the test. Its image is replaced by the test image, and it uses the
// host's network.
func startManifest(t *testing.T, n *node.Node, name, text, image string) node.StaticPod {
	t.Helper()
	text = strings.ReplaceAll(text, image, n.GuestImage)
	text = strings.Replace(text, "\nspec:\n", "\nspec:\n  hostNetwork: true\n", 1)
	check(t, n.RunStaticManifest(name, text))
	t.Cleanup(func() { check(t, n.RemoveStaticPod(name)) })
	return waitForStatic(t, n, name)
}

// The pod of docs/kubernetes.md: a model by tag, and a sub path of one by digest.
func testKubeletManifest(t *testing.T, n *node.Node) {
	src := writeModel(t)
	llama := n.Registry + "/models/tiny@" + pushModel(t, n, src, pack.Raw, "manifest").String()
	gemma := pushTo(t, n, "models/gemma", src, pack.TarGzip)
	pod := startManifest(t, n, "server", recipe(t, "pod",
		"registry.example.com/models/llama@sha256:2474bb134cd4c0a60a7cfd91447fc1858bee9e3f6d983e0691b1d7eb07f187a3", llama,
		"registry.example.com/models/gemma:v1", gemma,
		`args: ["--model=/models/llama"]`, `args: ["pause"]`,
	), "registry.example.com/inference/server:v1")
	want := wantTree(t, src, pack.Raw)
	container := strings.Join(slices.Collect(maps.Keys(pod.Containers)), "")
	wantVolume(t, &pod.Pod, container, "/models/llama", want)
	wantVolume(t, &pod.Pod, container, "/tokenizer", below(wantTree(t, src, pack.TarGzip), "tokenizer/"))
}

// The pod template of a DaemonSet that has a model on every node.
func testKubeletDaemonSet(t *testing.T, n *node.Node) {
	src := writeModel(t, "README.md")
	ref := pushTo(t, n, "models/preloaded", src, pack.TarGzip)
	_, template, found := strings.Cut(recipe(t, "daemonset", "registry.example.com/models/llama:v1", ref), "\n  template:\n    metadata:\n")
	if !found {
		t.Fatal("the DaemonSet has no template")
	}
	// The volume is read-only without readOnly too.
	template = strings.Replace(template, "          readOnly: true\n", "", 1)
	text := "apiVersion: v1\nkind: Pod\nmetadata:\n  name: preload\n" + strings.ReplaceAll("\n"+template, "\n    ", "\n")
	pod := startManifest(t, n, "preload", text, "registry.example.com/tools/pause:v1")
	container := strings.Join(slices.Collect(maps.Keys(pod.Containers)), "")
	wantVolume(t, &pod.Pod, container, "/model", wantTree(t, src, pack.TarGzip))
	out, err := pod.Exec(container, node.Guest, "write", "/model/config.json")
	check(t, err)
	if out != "EROFS\n" || strings.Contains(text, "readOnly") {
		t.Errorf("writing to the volume: %q", out)
	}
	// The decompressed layers are available for later pods.
	if found := trees(t, n, manifestOf(t, n, ref)); len(found) != 1 {
		t.Errorf("the preloaded model has the trees %q, want one", found)
	}
}

// A tag can move, a digest cannot.
func testKubeletDigest(t *testing.T, n *node.Node) {
	const repository = "models/digest"
	tag, manifest, before := pushText(t, n, repository, "before")
	pinned := n.Registry + "/" + repository + "@" + manifest.String()
	pod := startStatic(t, n, staticModel("digest", pinned, ""))
	wantVolume(t, &pod.Pod, "main", "/model", before)
	always, ifNotPresent := staticModel("restarted-always", tag, "Always"), staticModel("restarted-if-not-present", tag, "IfNotPresent")
	startStatic(t, n, always)
	startStatic(t, n, ifNotPresent)
	_, _, after := pushText(t, n, repository, "after")
	// A container that ends is restarted in its pod, and the tag is resolved again: by the
	// registry, or by an image that another pod has pulled.
	for _, restart := range []struct {
		pod  string
		want []treelist.Entry
	}{{ifNotPresent.Name, before}, {always.Name, after}, {ifNotPresent.Name, after}} {
		old := mustStatic(t, n, restart.pod)
		_, err := n.Crictl("stop", old.Containers["main"])
		check(t, err)
		waitForPod(t, n, restart.pod, "restart its container", func(p node.StaticPod) bool {
			return p.Status["main"].Running && p.Status["main"].ID != old.Status["main"].ID
		})
		again := mustStatic(t, n, restart.pod)
		wantVolume(t, &again.Pod, "main", "/model", restart.want)
	}
	for name, test := range map[string]struct {
		ref  string
		want []treelist.Entry
	}{
		"by-tag":            {tag, after},
		"by-digest":         {pinned, before},
		"by-tag-and-digest": {tag + "@" + manifest.String(), before},
	} {
		pod := startStatic(t, n, staticModel(name, test.ref, "Always"))
		wantVolume(t, &pod.Pod, "main", "/model", test.want)
	}
	wantVolume(t, &pod.Pod, "main", "/model", before)
}

// A pod with everything that the Kubernetes profile "restricted" requires, and with an
// fsGroup, which does not apply to image volumes.
func testKubeletRestricted(t *testing.T, n *node.Node) {
	ref, _, want := pushText(t, n, "models/restricted", "restricted")
	spec := staticModel("restricted", ref, "")
	spec.SecurityContext = map[string]any{
		"runAsNonRoot": true, "runAsUser": 1000, "fsGroup": 2000,
		"seccompProfile": map[string]string{"type": "RuntimeDefault"},
	}
	spec.Containers = []node.Container{{SecurityContext: map[string]any{
		"allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true,
		"capabilities": map[string]any{"drop": []string{"ALL"}},
	}}}
	pod := startStatic(t, n, spec)
	wantVolume(t, &pod.Pod, "main", "/model", want)
	out, err := pod.Exec("main", node.Guest, "write", "/model/text")
	check(t, err)
	if out != "EROFS\n" {
		t.Errorf("writing to the volume: %q", out)
	}
}

// The reasons in docs/kubernetes.md, as in `kubectl describe pod`.
func testKubeletReasons(t *testing.T, n *node.Node) {
	refused := refusal{layers: []pack.Layer{hostile{}.raw("../escaped")}}.artifact()
	_, err := refused.Push(t.Context(), n.Registry, "models/escaped", "latest")
	check(t, err)
	whole, _, _ := pushText(t, n, "models/whole", "whole")
	for _, test := range []struct {
		name, ref, policy, subPath string
		reasons                    []string // kubelet alternates between them
		message                    string
	}{
		{"why-refused", n.Registry + "/models/escaped:latest", "Always", "", []string{"CreateContainerError"}, `ImageVolumeMountFailed: failed to prepare for image volume`},
		{"why-no-sub-path", whole, "Always", "nothing", []string{"CreateContainerError"}, `failed to ensure image subpath "nothing"`},
		{"why-absent", n.Registry + "/models/absent:v1", "IfNotPresent", "", []string{"ErrImagePull", "ImagePullBackOff"}, "models/absent:v1: not found"},
		{"why-never", n.Registry + "/models/absent:v1", "Never", "", []string{"ErrImageNeverPull"}, "is not present with pull policy of Never"},
	} {
		spec := staticModel(test.name, test.ref, test.policy)
		spec.Volumes[0].SubPath = test.subPath
		addStatic(t, n, spec)
		waitForMessage(t, n, test.name, test.message)
		if is := mustStatic(t, n, test.name).Status["main"]; !slices.Contains(test.reasons, is.Reason) {
			t.Errorf("%s waits with the reason %q, want one of %q", test.name, is.Reason, test.reasons)
		}
	}
	// kubelet does not recognise containerd's errors and counts these volumes as mounted.
	metrics, err := n.KubeletMetrics()
	check(t, err)
	if !strings.Contains(metrics, "\nkubelet_image_volume_mounted_errors_total 0\n") {
		t.Error("kubelet counts refused volumes, but docs/kubernetes.md says that it does not")
	}
}

func testKubeletVerifier(t *testing.T, n *node.Node, dir string) {
	list := filepath.Join(t.TempDir(), "allowed-digests")
	check(t, os.WriteFile(list, nil, 0o600))
	addVerifier(t, dir, "allowed-digests", recipe(t, "allowed digests", "/etc/containerd/allowed-digests", list))
	ref, manifest, want := pushText(t, n, "models/verified", "verified")
	addStatic(t, n, staticModel("verified", ref, ""))
	waitForMessage(t, n, "verified", "image verifier bindir blocked pull of "+ref, manifest.String()+" is not in "+list)
	check(t, os.WriteFile(list, []byte(manifest.String()+"\n"), 0o600))
	pod := waitForStatic(t, n, "verified")
	wantVolume(t, &pod.Pod, "main", "/model", want)
	check(t, os.RemoveAll(dir))
}

func testKubeletCredentials(t *testing.T, n *node.Node) {
	private, err := n.StartPrivateRegistry()
	check(t, err)
	provided, want := privateModel(t, n, private, "provided")
	preloaded, wantPreloaded := privateModel(t, n, private, "preloaded")

	addStatic(t, n, staticModel("provided", provided, ""))
	waitForMessage(t, n, "provided", "no basic auth credentials")
	check(t, n.ProvideCredentials(recipe(t, "provider configuration", "registry.example.com", private),
		"model-credentials", recipe(t, "provider", "registry.example.com", private)))
	restartKubelet(t, n, nil)
	pod := waitForStatic(t, n, "provided")
	want(t, &pod.Pod)

	// Images that kubelet pulled with a provider's credentials, and images that kubelet did
	// not pull, are available to every pod.
	n.WithdrawCredentials()
	_, err = n.Crictl("pull", "--creds", node.PrivateUser+":"+node.PrivatePassword, preloaded)
	check(t, err)
	restartKubelet(t, n, nil)
	pod = startStatic(t, n, staticModel("provided-later", provided, "IfNotPresent"))
	want(t, &pod.Pod)
	pod = startStatic(t, n, staticModel("preloaded", preloaded, "IfNotPresent"))
	wantPreloaded(t, &pod.Pod)
	addStatic(t, n, staticModel("preloaded-always", preloaded, "Always"))
	waitForMessage(t, n, "preloaded-always", "no basic auth credentials")

	// Now kubelet trusts only images that it has pulled itself, and the image of the pods'
	// containers.
	restartKubelet(t, n, map[string]any{
		"imagePullCredentialsVerificationPolicy": "NeverVerifyAllowlistedImages",
		"preloadedImagesVerificationAllowlist":   []string{n.Registry + "/test/guest"},
	})
	addStatic(t, n, staticModel("preloaded-verified", preloaded, "IfNotPresent"))
	waitForMessage(t, n, "preloaded-verified", "no basic auth credentials")
	pod = startStatic(t, n, staticModel("provided-verified", provided, "IfNotPresent"))
	want(t, &pod.Pod)
	restartKubelet(t, n, nil)
}

func testKubeletPinned(t *testing.T, n *node.Node) {
	kept := pushTo(t, n, "models/kept", writeModel(t, "config.json"), pack.TarGzip)
	pull := func(ref string) {
		t.Helper()
		_, err := n.Pull(ref)
		check(t, err)
	}
	pull(kept)
	runRecipe(t, n, t.TempDir(), "pin", "registry.example.com/models/llama:v1", kept)
	restartKubelet(t, n, map[string]any{
		"evictionHard":      map[string]string{"imagefs.available": "99.9%"}, // the disk is always too full
		"imageMinimumGCAge": "1ms",
	})
	for _, name := range []string{"first", "second"} { // in the second round nothing else can be deleted
		ref, _, _ := pushText(t, n, "models/unused-"+name, name)
		pull(ref)
		waitFor(t, "kubelet to delete "+ref, func() bool {
			out, err := n.Crictl("images")
			return err == nil && !strings.Contains(out, "models/unused-"+name)
		})
	}
	if !pinned(t, n, kept) {
		t.Errorf("%s is no longer pinned", kept)
	}
	restartKubelet(t, n, nil)
	wantServed(t, n, kept, wantTree(t, writeModel(t, "config.json"), pack.TarGzip))
}
