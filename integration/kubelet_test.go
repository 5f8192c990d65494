// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	modelspec "github.com/modelpack/model-spec/specs-go/v1"
	"github.com/opencontainers/go-digest"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/treelist"
)

// TestKubelet runs static pods of a real kubelet on one node. Most run concurrently,
// because kubelet retries only every ten seconds.
func TestKubelet(t *testing.T) {
	t.Parallel()
	// The slow builds consist of zeros, and start only when a pod needs them.
	n := node.ForTest(t, node.Options{Kubelet: true, DaemonConfig: "max_expansion = 100000\ndecompress_on_pull = false\n"})
	check(t, n.StartKubelet(nil))
	type tests []struct {
		name string
		run  func(*testing.T, *node.Node)
	}
	t.Run("pods", func(t *testing.T) {
		for _, test := range (tests{
			{"volumes", testKubeletVolumes},
			{"pull policies and a moved tag", testKubeletPullPolicies},
			{"a refusal and its end", testKubeletRefusal},
		}) {
			t.Run(test.name, func(t *testing.T) {
				t.Parallel()
				test.run(t, n)
			})
		}
	})
	for _, test := range (tests{ // these stop something or delete images
		{"a slow build", testKubeletSlowBuild},
		{"a slow build that kubelet gives up", testKubeletGivesUp},
		{"a restart", testKubeletRestart},
		{"image garbage collection", testKubeletCollectsImages},
	}) {
		t.Run(test.name, func(t *testing.T) { test.run(t, n) })
	}
}

// pushTo packs src, pushes it as repository:latest and returns its reference.
func pushTo(t *testing.T, n *node.Node, repository, src string, form pack.Form) string {
	t.Helper()
	model, err := pack.Model(src, pack.Options{Form: form, Scratch: t.TempDir()})
	check(t, err)
	_, err = model.Push(t.Context(), n.Registry, repository, "latest")
	check(t, err)
	return n.Registry + "/" + repository + ":latest"
}

// startStatic runs a static pod and returns it when its containers run. The pod is removed
// at the end of the test.
func startStatic(t *testing.T, n *node.Node, spec node.PodSpec) node.StaticPod {
	t.Helper()
	addStatic(t, n, spec)
	return waitForStatic(t, n, spec.Name)
}

// addStatic adds a static pod, which is removed at the end of the test.
func addStatic(t *testing.T, n *node.Node, spec node.PodSpec) {
	t.Helper()
	check(t, n.RunStaticPod(spec))
	t.Cleanup(func() { check(t, n.RemoveStaticPod(spec.Name)) })
}

func waitForStatic(t *testing.T, n *node.Node, name string) (pod node.StaticPod) {
	t.Helper()
	waitForPod(t, n, name, "run", func(p node.StaticPod) bool {
		for _, c := range p.Status {
			if !c.Running {
				return false
			}
		}
		pod = p
		return len(p.Status) > 0
	})
	return pod
}

// waitForPod waits until ok returns true; kubelet may need several attempts.
func waitForPod(t *testing.T, n *node.Node, name, what string, ok func(node.StaticPod) bool) {
	t.Helper()
	var last node.StaticPod
	for deadline := time.Now().Add(5 * time.Minute); ; time.Sleep(100 * time.Millisecond) {
		pods, err := n.StaticPods()
		check(t, err)
		if last = pods[name]; ok(last) {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("pod %s did not %s; its containers: %+v", name, what, last.Status)
		}
	}
}

// Raw and compressed layers; the whole volume and a sub path, twice in one pod; and a pod
// with a user namespace that kubelet chooses.
func testKubeletVolumes(t *testing.T, n *node.Node) {
	src := writeModel(t)
	for _, form := range []pack.Form{pack.Raw, pack.TarGzip} {
		name := "volumes-" + strings.ReplaceAll(string(form), "+", "-")
		ref := pushTo(t, n, "models/"+name, src, form)
		pod := startStatic(t, n, node.PodSpec{
			Name: name,
			Volumes: []node.Volume{
				{Image: ref, Path: "/model"},
				{Image: ref, Path: "/again"},
				{Image: ref, Path: "/deep", SubPath: "tokenizer/deep"},
			},
		})
		want := wantTree(t, src, form)
		wantVolume(t, &pod.Pod, "main", "/model", want)
		wantVolume(t, &pod.Pod, "main", "/again", want)
		wantVolume(t, &pod.Pod, "main", "/deep", below(want, "tokenizer/deep/"))
		mapped := startStatic(t, n, node.PodSpec{
			Name:          "mapped-" + name,
			Volumes:       []node.Volume{{Image: ref, Path: "/model"}},
			OwnNetwork:    true,
			UserNamespace: true,
		})
		ids, err := os.ReadFile(filepath.Join("/proc", pid(t, n, &mapped.Pod), "uid_map"))
		check(t, err)
		if fields := strings.Fields(string(ids)); len(fields) != 3 || fields[0] != "0" || fields[1] == "0" {
			t.Errorf("the user namespace of the pod has the map %q", ids)
		}
		wantVolume(t, &mapped.Pod, "main", "/model", want)
	}
}

// below returns the entries of a sub path, which ends in a slash.
func below(entries []treelist.Entry, dir string) (found []treelist.Entry) {
	for _, e := range entries {
		if rest, ok := strings.CutPrefix(e.Path, dir); ok {
			e.Path = rest
			found = append(found, e)
		}
	}
	return found
}

func testKubeletPullPolicies(t *testing.T, n *node.Node) {
	const repository = "models/policies"
	before, after := writeModel(t), writeModel(t, "README.md")
	ref := pushTo(t, n, repository, before, pack.Raw)
	wantBefore, wantAfter := wantTree(t, before, pack.Raw), wantTree(t, after, pack.Raw)
	spec := func(name, policy string) node.PodSpec {
		return node.PodSpec{Name: name, Volumes: []node.Volume{{Image: ref, Path: "/model", PullPolicy: policy}}}
	}

	addStatic(t, n, spec("never", "Never"))
	waitForPod(t, n, "never", "say that the artifact is absent", func(p node.StaticPod) bool {
		c := p.Status["main"]
		return c.Reason == "ErrImageNeverPull" && strings.Contains(c.Message, ref) && strings.Contains(c.Message, "is not present with pull policy of Never")
	})
	present := startStatic(t, n, spec("if-not-present", "IfNotPresent"))
	always := startStatic(t, n, spec("always", "Always"))
	never := waitForStatic(t, n, "never") // the artifact has been pulled by the other pods

	pushTo(t, n, repository, after, pack.Raw)
	presentLater := startStatic(t, n, spec("if-not-present-later", "IfNotPresent"))
	wantVolume(t, &presentLater.Pod, "main", "/model", wantBefore)
	alwaysLater := startStatic(t, n, spec("always-later", "Always"))
	wantVolume(t, &alwaysLater.Pod, "main", "/model", wantAfter)
	for _, old := range []node.StaticPod{present, always, never, presentLater} {
		wantVolume(t, &old.Pod, "main", "/model", wantBefore)
	}
}

func testKubeletRefusal(t *testing.T, n *node.Node) {
	const name, repository = "refused", "models/refused"
	bad := hostile{}.raw("../escaped")
	model := refusal{layers: []pack.Layer{bad}}.artifact()
	_, err := model.Push(t.Context(), n.Registry, repository, "latest")
	check(t, err)
	ref := n.Registry + "/" + repository + ":latest"
	addStatic(t, n, node.PodSpec{Name: name, Volumes: []node.Volume{{Image: ref, Path: "/model", PullPolicy: "Always"}}})
	wanted := []string{"ImageVolumeMountFailed", "layer 1 (" + bad.MediaType, digest.FromBytes(bad.Data).String(), `"../escaped"`, `contains ".."`}
	waitForPod(t, n, name, fmt.Sprintf("say all of %q", wanted), func(p node.StaticPod) bool {
		c := p.Status["main"]
		for _, want := range wanted {
			if !strings.Contains(c.Message, want) {
				return false
			}
		}
		return !c.Running && c.Reason != ""
	})
	src := writeModel(t)
	pushTo(t, n, repository, src, pack.Raw)
	pod := waitForStatic(t, n, name)
	wantVolume(t, &pod.Pod, "main", "/model", wantTree(t, src, pack.Raw))
}

// The daemon is stopped with SIGSTOP during a build, until the request has timed out.
// Otherwise only an archive of about 10 GiB would take so long.
func testKubeletSlowBuild(t *testing.T, n *node.Node) {
	slow := startSlowBuild(t, n, "slow")
	time.Sleep(20 * time.Second) // longer than a request waits; nothing shows that it has timed out
	slow.goOn(t)
	unpacked := regexp.MustCompile(`ImageVolumeMountFailed.*still being unpacked.*try again`)
	waitForPod(t, n, slow.name, "get the error that it is being unpacked", func(p node.StaticPod) bool {
		return unpacked.MatchString(p.Status["main"].Message)
	})
	slow.wantServed(t)
}

// A build also continues if kubelet gives up the request.
func testKubeletGivesUp(t *testing.T, n *node.Node) {
	restartKubelet(t, n, map[string]any{"runtimeRequestTimeout": "2s"})
	slow := startSlowBuild(t, n, "given-up")
	waitForPod(t, n, slow.name, "be given up by kubelet", func(p node.StaticPod) bool {
		return p.Status["main"].Reason == "CreateContainerError"
	})
	slow.goOn(t)
	slow.wantServed(t)
	restartKubelet(t, n, nil)
}

// slowBuild is a pod whose model is being unpacked by a stopped daemon.
type slowBuild struct {
	node *node.Node
	name string
	want []treelist.Entry
}

func startSlowBuild(t *testing.T, n *node.Node, name string) slowBuild {
	t.Helper()
	layer, want := zeros(t, name)
	model := &pack.Artifact{ArtifactType: modelspec.ArtifactTypeModelManifest, Layers: []pack.Layer{layer}}
	_, err := model.Push(t.Context(), n.Registry, "models/"+name, "latest")
	check(t, err)
	addStatic(t, n, node.PodSpec{Name: name, Volumes: []node.Volume{{Image: n.Registry + "/models/" + name + ":latest", Path: "/model"}}})
	waitFor(t, "the start of the build", func() bool {
		return len(halfDone(t, n)) > 0
	})
	check(t, syscall.Kill(n.DaemonPID(), syscall.SIGSTOP))
	return slowBuild{n, name, []treelist.Entry{want}}
}

// zeros returns a tar+gzip layer of one file of 512 MiB, and the entry of the file. It
// consists of a few repeated gzip members, so that compressing takes no time.
func zeros(t *testing.T, name string) (pack.Layer, treelist.Entry) {
	t.Helper()
	const pieces, size = 32, 16 << 20
	piece := make([]byte, size)
	var header bytes.Buffer
	check(t, tar.NewWriter(&header).WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: pieces * size, ModTime: pack.Created}))
	compressed := func(data []byte) []byte {
		out, err := pack.Gzip(data)
		check(t, err)
		return out
	}
	content, archive := sha256.New(), digest.Canonical.Digester()
	layer := pack.Layer{MediaType: modelspec.MediaTypeModelWeightGzip, Data: compressed(header.Bytes())}
	archive.Hash().Write(header.Bytes())
	member := compressed(piece)
	for range pieces {
		content.Write(piece)
		archive.Hash().Write(piece)
		layer.Data = append(layer.Data, member...)
	}
	end := piece[:1024] // the end marker of the archive
	archive.Hash().Write(end)
	layer.Data = append(layer.Data, compressed(end)...)
	layer.DiffID = archive.Digest()
	return layer, treelist.Entry{
		Path: name, Type: "file", Mode: 0o644, Size: pieces * size,
		ModTime: pack.Created.UnixNano(), SHA256: hex.EncodeToString(content.Sum(nil)),
	}
}

func (s slowBuild) goOn(t *testing.T) {
	t.Helper()
	check(t, syscall.Kill(s.node.DaemonPID(), syscall.SIGCONT))
}

// wantServed waits until the pod runs. The model must have been unpacked exactly once.
func (s slowBuild) wantServed(t *testing.T) {
	t.Helper()
	pod := waitForStatic(t, s.node, s.name)
	wantVolume(t, &pod.Pod, "main", "/model", s.want)
	manifest := manifestOf(t, s.node, s.node.Registry+"/models/"+s.name+":latest")
	builds := 0
	for line := range strings.Lines(daemonLog(t, s.node)) {
		if strings.Contains(line, "building the tree") && strings.Contains(line, manifest) {
			builds++
		}
	}
	if builds != 1 {
		t.Errorf("the model was unpacked %d times, want once", builds)
	}
}

func mustStatic(t *testing.T, n *node.Node, name string) node.StaticPod {
	t.Helper()
	pods, err := n.StaticPods()
	check(t, err)
	return pods[name]
}

// restartKubelet restarts kubelet with another configuration.
func restartKubelet(t *testing.T, n *node.Node, config map[string]any) {
	t.Helper()
	check(t, n.StopKubelet())
	check(t, n.StartKubelet(config))
}

func testKubeletRestart(t *testing.T, n *node.Node) {
	src := writeModel(t)
	want := wantTree(t, src, pack.Raw)
	spec := reading(pushTo(t, n, "models/restart", src, pack.Raw))
	spec.Name = "before"
	before := startStatic(t, n, spec)
	check(t, n.StopKubelet())
	spec.Name = "meanwhile"
	addStatic(t, n, spec)
	wantVolume(t, &before.Pod, "main", "/model", want)
	check(t, n.StartKubelet(nil))
	meanwhile := waitForStatic(t, n, "meanwhile")
	wantVolume(t, &meanwhile.Pod, "main", "/model", want)
	again := waitForStatic(t, n, "before")
	for name, was := range before.Status {
		if is := again.Status[name]; is.ID != was.ID || is.Restarts != 0 {
			t.Errorf("container %s is %+v, want %+v", name, is, was)
		}
	}
	wantVolume(t, &before.Pod, "main", "/model", want)
}

// kubelet deletes unused images when the disk is fuller than its threshold, which is always
// exceeded here. It never evicts a static pod for that.
func testKubeletCollectsImages(t *testing.T, n *node.Node) {
	src := writeModel(t)
	want := wantTree(t, src, pack.Raw)
	used := pushTo(t, n, "models/used", src, pack.Raw)
	check(t, n.RunStaticPod(node.PodSpec{Name: "user", Volumes: []node.Volume{{Image: used, Path: "/model"}}}))
	pod := waitForStatic(t, n, "user")
	// The files must differ so that the configs differ: for kubelet and CRI, artifacts with
	// one config are one image.
	unused := []string{
		pushTo(t, n, "models/unused-raw", writeModel(t, "README.md"), pack.Raw),
		pushTo(t, n, "models/unused-compressed", src, pack.TarGzip),
	}
	manifests := map[string]string{}
	for i, ref := range unused {
		check(t, n.RunStaticPod(node.PodSpec{Name: fmt.Sprintf("former-user-%d", i), Volumes: []node.Volume{{Image: ref, Path: "/model"}}}))
	}
	for i, ref := range unused {
		name := fmt.Sprintf("former-user-%d", i)
		waitForStatic(t, n, name)
		check(t, n.RemoveStaticPod(name))
		manifests[ref] = manifestOf(t, n, ref)
	}
	manifests[used] = manifestOf(t, n, used)
	gone := func(ref string) {
		t.Helper()
		waitFor(t, "kubelet to delete "+ref, func() bool {
			_, err := os.Stat(blobPath(n, manifests[ref]))
			return os.IsNotExist(err) && len(trees(t, n, manifests[ref])) == 0
		})
	}
	restartKubelet(t, n, map[string]any{
		"evictionHard":      map[string]string{"imagefs.available": "99.9%"},
		"imageMinimumGCAge": "1ms",
	})
	for _, ref := range unused {
		gone(ref)
	}
	// When this image is gone, a second round of garbage collection has ended.
	_, err := n.Pull(pushTo(t, n, "models/never-used", src, pack.Generic))
	check(t, err)
	waitFor(t, "kubelet to delete an image that no pod ever used", func() bool {
		out, err := n.Crictl("images")
		return err == nil && !strings.Contains(out, "models/never-used")
	})
	_, err = os.Stat(blobPath(n, manifests[used]))
	check(t, err)
	if found := trees(t, n, manifests[used]); len(found) != 1 {
		t.Errorf("the model in use has the trees %q, want one", found)
	}
	wantVolume(t, &pod.Pod, "main", "/model", want)
	if is := mustStatic(t, n, "user").Status["main"]; is.ID != pod.Status["main"].ID {
		t.Errorf("the pod's container is %+v, want %+v", is, pod.Status["main"])
	}
	check(t, n.RemoveStaticPod("user"))
	gone(used)
}
