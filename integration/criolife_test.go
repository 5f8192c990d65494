// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	modelspec "github.com/modelpack/model-spec/specs-go/v1"
	"github.com/opencontainers/go-digest"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/treelist"
)

// Restarts, deletions and garbage collection under CRI-O.

// With crioRequired, CRI-O creates no container without the plugin. With crioValidated,
// this applies to pods with the annotation requiring.
const (
	crioValidated = `[crio.nri.default_validator]
nri_enable_default_validator = true
`
	crioRequired = crioValidated + `nri_validator_required_plugins = ["artifact-snapshotter"]
`
)

var requiring = map[string]string{"required-plugins.noderesource.dev": `["artifact-snapshotter"]`}

func TestAPodGoesOnReadingWhenThePluginOrCRIOEnds(t *testing.T) {
	n := crioNode(t, node.Options{})
	src := writeModel(t)
	before := daemonUsage(t, n)
	for _, form := range []pack.Form{pack.Raw, pack.TarGzip} {
		ref := pulled(t, n, src, form)
		want := wantTree(t, src, form)
		pod, err := n.RunPod(reading(ref))
		check(t, err)
		for _, c := range []struct {
			name       string
			end, start func() error
		}{
			{"daemon, SIGTERM", n.StopDaemon, n.StartDaemon},
			{"daemon, SIGKILL", n.KillDaemon, n.StartDaemon},
			{"CRI-O, SIGTERM", n.StopCRIO, n.StartCRIO},
			{"CRI-O, SIGKILL", n.KillCRIO, n.StartCRIO},
		} {
			t.Run(string(form)+", "+c.name, func(t *testing.T) {
				check(t, c.end())
				wantReading(t, pod) // conmon writes the log
				check(t, c.start())
				check(t, n.WaitForNRI())
				wantReading(t, pod)
				wantVolume(t, pod, "main", "/model", want)
				next, err := n.RunPod(node.PodSpec{Volumes: []node.Volume{{Image: ref, Path: "/model"}}})
				check(t, err)
				wantVolume(t, next, "main", "/model", want)
				check(t, next.Remove())
				wantReading(t, pod)
			})
		}
		check(t, pod.Remove())
		_, err = n.Crictl("rmi", ref)
		check(t, err)
	}
	wantUsage(t, n, before)
}

// A container that ends while the daemon is not running does not retain anything.
func TestAContainerThatEndsWithoutThePluginRetainsNothing(t *testing.T) {
	n := crioNode(t, node.Options{})
	before := daemonUsage(t, n)
	ref := pulled(t, n, writeModel(t), pack.Raw)
	pod, err := n.RunPod(node.PodSpec{Volumes: []node.Volume{{Image: ref, Path: "/model"}}})
	check(t, err)
	check(t, n.KillDaemon())
	check(t, pod.Remove())
	_, err = n.Crictl("rmi", ref)
	check(t, err)
	check(t, n.StartDaemon())
	wantUsage(t, n, before)
}

// CRI-O does not remove an image that a container mounts, with the plugin or without it.
func TestCRIOKeepsImagesInUse(t *testing.T) {
	n := crioNode(t, node.Options{})
	src := writeModel(t)
	before := daemonUsage(t, n)
	for _, form := range []pack.Form{pack.Raw, pack.TarGzip} {
		t.Run(string(form), func(t *testing.T) {
			ref := pulled(t, n, src, form)
			pod, err := n.RunPod(reading(ref))
			check(t, err)
			wantCollectable(t, n, pod, ref)
			if _, err = n.Crictl("rmi", ref); err == nil || !strings.Contains(err.Error(), "the image is in use by") {
				t.Errorf("got %v, want the error that the image is in use", err)
			}
			wantReading(t, pod)
			check(t, pod.Remove())
			_, err = n.Crictl("rmi", ref)
			check(t, err)
			wantUsage(t, n, before)
		})
	}
}

// wantCollectable checks the conditions for kubelet's image garbage collection: the
// artifact is not pinned, and the pod's container lists it as a mount
// (pkg/kubelet/images/image_gc_manager.go, handleImageVolumes).
func wantCollectable(t *testing.T, n *node.Node, pod *node.Pod, ref string) {
	t.Helper()
	out, err := n.Crictl("images", "--output", "json", ref)
	check(t, err)
	var list struct {
		Images []struct {
			ID     string
			Pinned bool
		}
	}
	check(t, json.Unmarshal([]byte(out), &list))
	if len(list.Images) != 1 || list.Images[0].Pinned {
		t.Fatalf("the images of %s: want one that is not pinned:\n%s", ref, out)
	}
	out, err = n.Crictl("inspect", "--output", "json", pod.Containers["main"])
	check(t, err)
	var container struct {
		Status struct {
			Mounts []struct{ Image struct{ Image string } }
		}
	}
	check(t, json.Unmarshal([]byte(out), &container))
	for _, m := range container.Status.Mounts {
		if m.Image.Image == list.Images[0].ID {
			return
		}
	}
	t.Errorf("kubelet would not find the image %s in the mounts of the container: %+v", list.Images[0].ID, container.Status.Mounts)
}

// A running pod keeps reading after the blobs of its artifact were deleted.
func TestCRIOPodKeepsItsBlobs(t *testing.T) {
	n := crioNode(t, node.Options{})
	src := writeModel(t)
	ref := pulled(t, n, src, pack.Raw)
	pod, err := n.RunPod(reading(ref))
	check(t, err)
	blobs := filepath.Join(n.ContentRoot, "blobs", "sha256")
	entries, err := os.ReadDir(blobs)
	check(t, err)
	for _, e := range entries {
		check(t, os.Remove(filepath.Join(blobs, e.Name())))
	}
	wantReading(t, pod)
	wantVolume(t, pod, "main", "/model", wantTree(t, src, pack.Raw))
	check(t, pod.Remove())
	wantUsage(t, n, usage{files: []string{filepath.Join(n.DaemonRoot, "trees")}})
}

// After a tag has moved, the old pod keeps the old model and a new pod gets the new one.
func TestCRIOMovedTag(t *testing.T) {
	n := crioNode(t, node.Options{})
	before, after := writeModel(t), writeModel(t, "README.md")
	volumes := []node.Volume{{Image: pulled(t, n, before, pack.Raw), Path: "/model"}}
	old, err := n.RunPod(node.PodSpec{Volumes: volumes})
	check(t, err)
	pulled(t, n, after, pack.Raw)
	young, err := n.RunPod(node.PodSpec{Volumes: volumes})
	check(t, err)
	wantVolume(t, young, "main", "/model", wantTree(t, after, pack.Raw))
	wantVolume(t, old, "main", "/model", wantTree(t, before, pack.Raw))
	check(t, old.Remove())
	check(t, young.Remove())
}

func TestCRIOPodsInTurnLeaveNothing(t *testing.T) {
	n := crioNode(t, node.Options{})
	before := daemonUsage(t, n)
	ref := pulled(t, n, writeModel(t), pack.Raw)
	spec := node.PodSpec{Volumes: []node.Volume{{Image: ref, Path: "/model"}}}
	run := func() {
		pod, err := n.RunPod(spec)
		check(t, err)
		check(t, pod.Remove())
	}
	run()
	idle := daemonUsage(t, n)
	idle.mounts = nil
	wantUsage(t, n, idle)
	waitForWatch(t, n)
	files := openFiles(t, n)
	for range 20 {
		run()
	}
	wantUsage(t, n, idle)
	waitFor(t, fmt.Sprintf("the daemon to have no more than %d open files", files), func() bool {
		return openFiles(t, n) <= files
	})
	_, err := n.Crictl("rmi", ref)
	check(t, err)
	wantUsage(t, n, before)
}

// The reason of a refusal is in the error that kubelet puts into the pod's event, and
// nothing is left over.
func TestCRIOArtifactThatBreaksARuleIsRefused(t *testing.T) {
	n := crioNode(t, node.Options{})
	pod, err := n.RunSandbox(node.PodSpec{})
	check(t, err)
	before := daemonUsage(t, n)
	h := hostile{t, t.TempDir()}
	named := func(l pack.Layer) pack.Layer { // otherwise CRI-O mounts only the good layer
		l.Annotations = map[string]string{modelspec.AnnotationFilepath: "named"}
		return l
	}
	for name, r := range map[string]struct {
		layers []pack.Layer
		reason string
	}{
		"dot dot in a tar":                   {[]pack.Layer{named(h.tar(file("a/../b")))}, `path "a/../b" contains ".."`},
		"a device in a tar":                  {[]pack.Layer{named(h.tar(special('3')))}, `member "special": a character device cannot be in a volume`},
		"not a tar":                          {[]pack.Layer{named(pack.Layer{MediaType: modelspec.MediaTypeModelWeightGzip, Data: []byte("text")})}, "its media type says that it is gzip, and its bytes are not compressed"},
		"a wrong DiffID":                     {[]pack.Layer{named(h.stream(stream{mediaType: modelspec.MediaTypeModelWeightGzip, wrong: true})[0])}, "the config lists the DiffID"},
		"bad metadata":                       {h.described(`{"mode": 65536}`), "mode 65536 is not a Unix file mode"},
		"a name that only the daemon checks": {[]pack.Layer{h.tar(directory("a/.."))}, `contains ".."`},
	} {
		t.Run(name, func(t *testing.T) {
			ref := push(t, n, strings.ReplaceAll(strings.ToLower(name), " ", "-"), append([]pack.Layer{goodLayer()}, r.layers...)...)
			for range 2 {
				err := pod.Start(node.Container{Name: "refused", Volumes: []node.Volume{{Image: ref, Path: "/model"}}})
				if err == nil {
					t.Fatal("a container started")
				}
				if got := answer(t, err); !strings.Contains(got, r.reason) || !strings.Contains(got, "artifact-snapshotter") {
					t.Errorf("the error does not contain %q: %s", r.reason, got)
				}
			}
			_, err := n.Crictl("rmi", ref)
			check(t, err)
			wantUsage(t, n, before)
		})
	}
	check(t, pod.Remove())
}

// CRI-O names the artifact of a volume in an annotation of the container, and does not
// mount layers without a name. A pod with an annotation of that key gets no artifact, and
// in particular not another pod's artifact that has the same named layer.
func TestCRIOAPodCannotNameAnotherArtifact(t *testing.T) {
	n := crioNode(t, node.Options{})
	own := push(t, n, "own", goodLayer())
	h := hostile{t, t.TempDir()}
	secret := &pack.Artifact{ArtifactType: modelspec.ArtifactTypeModelManifest, Layers: []pack.Layer{goodLayer(), h.tar(file("secret"))}}
	d, err := secret.Push(t.Context(), n.Registry, "models/secret", "latest")
	check(t, err)
	_, err = n.Pull(n.Registry + "/models/secret:latest")
	check(t, err)
	forged := fmt.Sprintf(`[{"container_path": "/model", "host_path": %q, "image": {"image": %q}}]`,
		filepath.Join(n.ContentRoot, "blobs/sha256", digest.FromBytes(goodLayer().Data).Encoded()), d.Encoded())
	volumes := []node.Volume{{Image: own, Path: "/model"}}
	_, err = n.RunPod(node.PodSpec{Volumes: volumes, Annotations: map[string]string{"io.kubernetes.cri-o.Volumes": forged}})
	if err == nil || !strings.Contains(err.Error(), "the pod has the annotation io.kubernetes.cri-o.Volumes") {
		t.Errorf("the error is %v, want one that names the annotation", err)
	}
	pod, err := n.RunPod(node.PodSpec{Volumes: volumes})
	check(t, err)
	wantVolume(t, pod, "main", "/model", []treelist.Entry{fileEntry("good.txt", goodLayer().Data)})
	check(t, pod.Remove())
}

// wantAsCRIOMounts checks the volume that CRI-O itself makes of a raw artifact: files of
// root, with the mode and time of the blobs.
func wantAsCRIOMounts(t *testing.T, pod *node.Pod, want []treelist.Entry) {
	t.Helper()
	entries, err := pod.Tree("main", "/model")
	check(t, err)
	if got := filesOf(want, seen{entries: entries}); got != "yes" {
		t.Errorf("the files: %s", got)
	}
	if got := attributesOf(want, seen{entries: entries}); got == "yes" {
		t.Error("the attributes are those of the artifact, which CRI-O does not know")
	}
}

// Without the daemon a container gets the mounts of CRI-O, unless CRI-O is configured to
// require the plugin: for all pods, or for pods with an annotation.
func TestCRIOWithoutThePlugin(t *testing.T) {
	for _, c := range []struct {
		name, config string
		annotations  map[string]string
		refused      bool
	}{
		{"not required", "", nil, false},
		{"required for all pods", crioRequired, nil, true},
		{"required by the pod", crioValidated, requiring, true},
		{"not required by the pod", crioValidated, nil, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := crioNode(t, node.Options{CRIOConfig: c.config})
			src := writeModel(t)
			spec := node.PodSpec{Annotations: c.annotations, Volumes: []node.Volume{{Image: pulled(t, n, src, pack.Raw), Path: "/model"}}}
			want := wantTree(t, src, pack.Raw)
			check(t, n.StopDaemon())
			pod, err := n.RunPod(spec)
			if !c.refused {
				check(t, err)
				wantAsCRIOMounts(t, pod, want)
				check(t, pod.Remove())
			} else if err == nil || !strings.Contains(answer(t, err), notPresent) {
				t.Errorf("got %v, want %s", err, notPresent)
			}
			check(t, n.StartDaemon())
			check(t, n.WaitForNRI())
			pod, err = n.RunPod(spec)
			check(t, err)
			wantVolume(t, pod, "main", "/model", want)
			check(t, pod.Remove())
		})
	}
}

// CRI-O stores the manifest after all layers. From then on the daemon builds the tree of an
// artifact with compressed layers; it does not wait for a pod.
func TestCRIOCompressedLayersAreUnpackedAfterThePull(t *testing.T) {
	n := crioNode(t, node.Options{})
	manifest := manifestOf(t, n, pulled(t, n, writeModel(t), pack.TarGzip))
	waitFor(t, "the tree", func() bool { return len(trees(t, n, manifest)) == 1 })
}

// NRI removes a plugin that does not answer in time and continues without it. So the plugin
// must answer in time, with a refusal.
func TestCRIOSlowBuildIsRefusedUntilItIsDone(t *testing.T) {
	n := crioNode(t, node.Options{DaemonConfig: "max_expansion = 100000\ndecompress_on_pull = false\n"})
	var layers []pack.Layer
	var want []treelist.Entry
	for i := range 4 { // each takes about a second on an idle core
		name := fmt.Sprintf("zeros-%d", i)
		layer, file := zeros(t, name)
		layer.Annotations = map[string]string{modelspec.AnnotationFilepath: name}
		layers, want = append(layers, layer), append(want, file)
	}
	ref := push(t, n, "slow", layers...)
	pod, err := n.RunSandbox(node.PodSpec{Volumes: []node.Volume{{Image: ref, Path: "/model"}}})
	check(t, err)
	refused := 0
	waitFor(t, "start of the container", func() bool {
		err := pod.Start(node.Container{})
		if err == nil {
			return true
		}
		if !strings.Contains(err.Error(), "still being unpacked") {
			t.Fatalf("got %v, want the error that the model is still being unpacked", err)
		}
		refused++
		return false
	})
	if refused == 0 {
		t.Error("the container was never refused, so the build is not slow")
	}
	wantVolume(t, pod, "main", "/model", want)
	wantMounts(t, pod, "main", "/model")
	check(t, pod.Remove())
}

func TestCRIOPassthroughLeavesCRIOsMounts(t *testing.T) {
	n := crioNode(t, node.Options{NRIConfig: "on_error = 'passthrough'\n"})
	good, bad := goodLayer(), rawLayer("bad", []byte("bad"))
	bad.Annotations[modelspec.AnnotationFileMetadata] = `{"mode": 65536}`
	ref := push(t, n, "bad", good, bad)
	pod, err := n.RunPod(node.PodSpec{Volumes: []node.Volume{{Image: ref, Path: "/model"}}})
	check(t, err)
	wantAsCRIOMounts(t, pod, []treelist.Entry{fileEntry("good.txt", good.Data), fileEntry("bad", bad.Data)})
	check(t, pod.Remove())
	for _, want := range []string{"refused an image volume", "mode 65536 is not a Unix file mode"} {
		if !strings.Contains(daemonLog(t, n), want) {
			t.Errorf("the log does not contain %q", want)
		}
	}
}
