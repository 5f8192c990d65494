// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"archive/tar"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/treelist"
)

// One runtime handler uses the snapshotter, and the default handler stays unchanged: pods
// of both, side by side, with the same images.

// snapshotters are those of the handler and of the node.
var snapshotters = []string{"artifact", "overlayfs"}

// snapshotsIn returns the kinds of all snapshots of a snapshotter, by key.
func snapshotsIn(t *testing.T, n *node.Node, snapshotter string) map[string]string {
	t.Helper()
	out, err := n.Ctr("snapshots", "--snapshotter", snapshotter, "ls")
	check(t, err)
	found := map[string]string{}
	for line := range strings.Lines(out) { // KEY PARENT KIND; the parent may be missing
		if fields := strings.Fields(line); len(fields) > 1 {
			found[fields[0]] = fields[len(fields)-1]
		}
	}
	delete(found, "KEY")
	return found
}

// wantUnpacked checks for which snapshotters an image is unpacked. The digest is the DiffID
// of its only layer.
func wantUnpacked(t *testing.T, n *node.Node, layer digest.Digest, want ...string) {
	t.Helper()
	var got []string
	for _, snapshotter := range snapshotters {
		// The chain ID of one layer is its DiffID.
		if snapshotsIn(t, n, snapshotter)[layer.String()] == "Committed" {
			got = append(got, snapshotter)
		}
	}
	if strings.Join(got, " ") != strings.Join(want, " ") {
		t.Errorf("the image is unpacked for %q, want %q", got, want)
	}
}

// wantSnapshots checks that all snapshots of the pod, with its image volumes, are in one
// snapshotter and none in the other.
func wantSnapshots(t *testing.T, n *node.Node, pod *node.Pod, want string, volumes int) {
	t.Helper()
	for _, snapshotter := range snapshotters {
		roots, vols := 0, 0
		for key := range snapshotsIn(t, n, snapshotter) {
			switch {
			case key == pod.ID || key == pod.Containers["main"]:
				roots++
			case strings.Contains(key, "/image-volumes/"+pod.ID+"/"):
				vols++
			}
		}
		wantRoots, wantVols := 0, 0
		if snapshotter == want {
			wantRoots, wantVols = 2, volumes // the sandbox and its container
		}
		if roots != wantRoots || vols != wantVols {
			t.Errorf("the pod has %d root file systems and %d volumes in %s, want %d and %d", roots, vols, snapshotter, wantRoots, wantVols)
		}
	}
}

// guestImage pushes an image for containers that has the guest and a file with its name, so
// that it differs from all other images. It returns the DiffID.
func guestImage(t *testing.T, n *node.Node, name string, members ...pack.Member) (ref string, layer digest.Digest) {
	t.Helper()
	program, err := n.GuestProgram()
	check(t, err)
	text, err := pack.TarOf(append([]pack.Member{
		{Header: tar.Header{Name: "guest", Mode: 0o755}, Data: program},
		{Header: tar.Header{Name: "name", Mode: 0o644}, Data: []byte(name)},
	}, members...)...)
	check(t, err)
	image, err := pack.Image(ocispec.ImageConfig{Entrypoint: []string{node.Guest}, Cmd: []string{"pause"}}, true, text)
	check(t, err)
	_, err = image.Push(t.Context(), n.Registry, "images/"+name, "latest")
	check(t, err)
	return n.Registry + "/images/" + name + ":latest", digest.FromBytes(text)
}

func wantWritable(t *testing.T, pod *node.Pod, path string) {
	t.Helper()
	out, err := pod.Exec("main", node.Guest, "write", path)
	check(t, err)
	if out != "written\n" {
		t.Errorf("writing %s: %q", path, out)
	}
}

func TestOneRuntimeHandlerHasTheSnapshotter(t *testing.T) {
	t.Parallel()
	n := node.ForTest(t, node.Options{HandlerScope: true})
	src := writeModel(t)
	layer, err := pack.TarDir(src)
	check(t, err)
	image, err := pack.Image(ocispec.ImageConfig{}, true, layer)
	check(t, err)
	_, err = image.Push(t.Context(), n.Registry, "images/tiny", "latest")
	check(t, err)
	imageRef := n.Registry + "/images/tiny:latest"
	_, err = n.Pull(imageRef)
	check(t, err)
	wantImage, err := treelist.List(src)
	check(t, err)

	for _, form := range []pack.Form{pack.Raw, pack.TarGzip} {
		t.Run(string(form), func(t *testing.T) {
			model := pulled(t, n, src, form)
			spec := node.PodSpec{Volumes: []node.Volume{{Image: model, Path: "/model"}, {Image: imageRef, Path: "/image"}}}
			run := func(handler string) *node.Pod {
				spec.RuntimeHandler = handler
				pod, err := n.RunPod(spec)
				check(t, err)
				return pod
			}
			wantModel := map[string][]treelist.Entry{"artifact": wantTree(t, src, form), "overlayfs": nil}
			want := func(pod *node.Pod, snapshotter string) {
				t.Helper()
				wantVolume(t, pod, "main", "/model", wantModel[snapshotter])
				wantVolume(t, pod, "main", "/image", wantImage)
				wantWritable(t, pod, "/file")
				wantSnapshots(t, n, pod, snapshotter, len(spec.Volumes))
			}
			ours, theirs := run(node.ArtifactHandler), run("")
			want(ours, "artifact")
			want(theirs, "overlayfs")
			wantUnpacked(t, n, digest.FromBytes(layer), snapshotters...)

			// Each pod keeps running without the other and can be started again.
			check(t, theirs.Remove())
			want(ours, "artifact")
			theirs = run("")
			check(t, ours.Remove())
			want(theirs, "overlayfs")
			ours = run(node.ArtifactHandler)
			want(ours, "artifact")
			want(theirs, "overlayfs")
			check(t, ours.Remove())
			check(t, theirs.Remove())
			if mounts, err := node.Mounts(filepath.Join(n.State, "io.containerd.grpc.v1.cri", "image-volumes")); err != nil || len(mounts) > 0 {
				t.Errorf("containerd has not removed the image volumes %q: %v", mounts, err)
			}
		})
	}
}

// Pods of the default handler depend on nothing of ours.
func TestPodsOfTheDefaultHandlerDoNotNeedTheDaemon(t *testing.T) {
	n := node.ForTest(t, node.Options{HandlerScope: true})
	src := writeModel(t)
	model := pulled(t, n, src, pack.Raw)
	spec := node.PodSpec{Volumes: []node.Volume{{Image: model, Path: "/model"}}, RuntimeHandler: node.ArtifactHandler}
	ours, err := n.RunPod(spec)
	check(t, err)

	check(t, n.StopDaemon())
	ref, layer := guestImage(t, n, "plain")
	_, err = n.Pull(ref)
	check(t, err)
	theirs, err := n.RunPod(node.PodSpec{Containers: []node.Container{{Image: ref}}})
	check(t, err)
	wantWritable(t, theirs, "/file")
	check(t, theirs.Remove())
	_, err = n.Crictl("rmi", ref)
	check(t, err)
	if pod, err := n.RunPod(spec); err == nil {
		t.Errorf("the handler's pod %s runs without the daemon", pod.ID)
	}

	check(t, n.StartDaemon())
	waitForDaemon(t, n)
	wantVolume(t, ours, "main", "/model", wantTree(t, src, pack.Raw))
	again, err := n.RunPod(spec)
	check(t, err)
	wantVolume(t, again, "main", "/model", wantTree(t, src, pack.Raw))
	wantUnpacked(t, n, layer) // its removal during the daemon's stop is completed
}

// podConfig returns the file that tells a pull its runtime handler. kubelet passes the
// handler itself; crictl can only pass this annotation.
func podConfig(t *testing.T, handler string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "pod.json")
	check(t, os.WriteFile(path, []byte(`{"metadata": {"name": "p", "namespace": "default", "uid": "p"},
		"annotations": {"io.containerd.cri.runtime-handler": "`+handler+`"}}`), 0o600))
	return path
}

func TestAnImagePulledForOneHandlerIsUnpackedForTheOther(t *testing.T) {
	n := node.ForTest(t, node.Options{HandlerScope: true})
	src := writeModel(t)
	for _, tt := range []struct {
		name            string
		pullFor, runFor string // handlers
		pulled          string // the snapshotter of the pull
	}{
		{"default", "", node.ArtifactHandler, "overlayfs"},
		{"handler", node.ArtifactHandler, "", "artifact"},
	} {
		t.Run("pulled for the "+tt.name, func(t *testing.T) {
			pull := []string{"pull"}
			if tt.pullFor != "" {
				pull = append(pull, "--pod-config", podConfig(t, tt.pullFor))
			}
			ref, layer := guestImage(t, n, "for-"+tt.name)
			pushModel(t, n, src, pack.Raw, tt.name)
			model := n.Registry + "/models/tiny:" + tt.name
			for _, ref := range []string{ref, model} {
				_, err := n.Crictl(append(pull, ref)...)
				check(t, err)
			}
			after := snapshotters
			if tt.pullFor != "" && older(t, n, 3, "a pull for a runtime handler unpacks for the node's snapshotter, unless runtime_platforms names the handler") {
				tt.pulled, after = "overlayfs", []string{"overlayfs"}
			}
			wantUnpacked(t, n, layer, tt.pulled)

			spec := node.PodSpec{
				RuntimeHandler: tt.runFor,
				Volumes:        []node.Volume{{Image: model, Path: "/model"}},
				Containers:     []node.Container{{Image: ref}},
			}
			pod, err := n.RunPod(spec)
			check(t, err)
			wantUnpacked(t, n, layer, after...)
			wantWritable(t, pod, "/file")
			check(t, pod.Remove())

			// containerd does not unpack a model, so it can be pulled for either handler.
			spec.RuntimeHandler = node.ArtifactHandler
			pod, err = n.RunPod(spec)
			check(t, err)
			wantVolume(t, pod, "main", "/model", wantTree(t, src, pack.Raw))
			check(t, pod.Remove())

			// Removing an image removes it from both snapshotters.
			_, err = n.Crictl("rmi", ref, model)
			check(t, err)
			wantUnpacked(t, n, layer)
		})
	}
}

// docs/support.md recommends this for a containerd before 2.3.
func TestRuntimePlatformsNameTheSnapshotterOfAPullForAHandler(t *testing.T) {
	n := node.ForTest(t, node.Options{HandlerScope: true, ContainerdConfig: `[plugins.'io.containerd.cri.v1.images'.runtime_platforms.artifact]
  platform = "` + platforms.DefaultString() + `"
  snapshotter = "artifact"
`})
	ref, layer := guestImage(t, n, "for-handler")
	_, err := n.Crictl("pull", "--pod-config", podConfig(t, node.ArtifactHandler), ref)
	check(t, err)
	wantUnpacked(t, n, layer, "artifact")
}

func TestImagesOfOneHandlerAreRemovedWithoutTheOthers(t *testing.T) {
	n := node.ForTest(t, node.Options{HandlerScope: true})
	src := writeModel(t)
	type side struct {
		handler, snapshotter string
		pod                  *node.Pod
		ref                  string
		layer                digest.Digest
	}
	sides := []side{{handler: node.ArtifactHandler, snapshotter: "artifact"}, {snapshotter: "overlayfs"}}
	model := pulled(t, n, src, pack.TarGzip)
	for i := range sides {
		s := &sides[i]
		s.ref, s.layer = guestImage(t, n, "of-"+s.snapshotter)
		_, err := n.Pull(s.ref)
		check(t, err)
	}
	start := func(s *side) {
		t.Helper()
		var err error
		s.pod, err = n.RunPod(node.PodSpec{
			RuntimeHandler: s.handler,
			Volumes:        []node.Volume{{Image: model, Path: "/model"}},
			Containers:     []node.Container{{Image: s.ref}},
		})
		check(t, err)
	}
	wantRunning := func(s side) {
		t.Helper()
		var want []treelist.Entry
		if s.snapshotter == "artifact" {
			want = wantTree(t, src, pack.TarGzip)
		}
		wantVolume(t, s.pod, "main", "/model", want)
		wantWritable(t, s.pod, "/file")
	}
	for i := range sides {
		start(&sides[i])
	}
	for i := range sides {
		gone, stays := &sides[i], sides[1-i]
		check(t, gone.pod.Remove())
		_, err := n.Crictl("rmi", gone.ref)
		check(t, err)
		wantUnpacked(t, n, gone.layer)
		wantRunning(stays)
		_, err = n.Pull(gone.ref)
		check(t, err)
		start(gone)
		wantRunning(*gone)
		wantRunning(stays)
	}

	// Delete the model's image while both pods use it.
	_, err := n.Crictl("rmi", model)
	check(t, err)
	for _, s := range sides {
		wantRunning(s)
	}
	check(t, sides[0].pod.Remove())
	wantRunning(sides[1])
	wantUsage(t, n, usage{files: []string{filepath.Join(n.DaemonRoot, "trees")}})
}

// With discard_unpacked_layers containerd deletes a layer after unpacking it, so it cannot
// unpack it for a second snapshotter. This does not apply to the layers of a model.
func TestDiscardedLayersAreMissingForTheOtherHandlerButNotForModels(t *testing.T) {
	const discard = "[plugins.'io.containerd.cri.v1.images']\n  discard_unpacked_layers = true\n"
	src := writeModel(t)
	for _, handler := range []string{node.ArtifactHandler, ""} {
		t.Run("handler "+handler, func(t *testing.T) {
			n := node.ForTest(t, node.Options{HandlerScope: handler != "", ContainerdConfig: discard})
			model := pulled(t, n, src, pack.Raw)
			image, _ := pulledManifest(t, n, n.GuestImage)
			waitFor(t, "containerd to discard the layer of the sandbox image", func() bool {
				_, err := os.Stat(blobPath(n, image.Layers[0].Digest.Encoded()))
				return os.IsNotExist(err)
			})
			pod, err := n.RunPod(node.PodSpec{RuntimeHandler: handler, Volumes: []node.Volume{{Image: model, Path: "/model"}}})
			if handler != "" {
				missing := "content digest " + image.Layers[0].Digest.String() + ": not found"
				if err == nil || !strings.Contains(err.Error(), missing) {
					t.Errorf("got %v, want %q", err, missing)
				}
				return
			}
			check(t, err)
			wantVolume(t, pod, "main", "/model", wantTree(t, src, pack.Raw))
			check(t, pod.Remove())
		})
	}
}
