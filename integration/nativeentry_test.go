// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"os"
	"strings"
	"testing"

	"github.com/containerd/platforms"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/treelist"
)

// oneEntry is the documented configuration for every containerd: one entry for artifacts
// instead of that for images.
func oneEntry(t *testing.T) node.Options {
	t.Helper()
	text, err := os.ReadFile("../docs/native-unpack.md")
	check(t, err)
	_, section, _ := strings.Cut(string(text), "### One entry\n")
	_, block, _ := strings.Cut(section, "```toml\n")
	block, _, found := strings.Cut(block, "```\n")
	if !found {
		t.Fatal("docs/native-unpack.md has no section One entry with a configuration")
	}
	return node.Options{ContainerdConfig: strings.ReplaceAll(block, "linux/amd64", platforms.DefaultString())}
}

func TestOneEntryUnpacksADockerModel(t *testing.T) {
	n := node.ForTest(t, oneEntry(t))
	before := daemonUsage(t, n)
	src := writeModel(t)
	model, err := pack.Model(src, pack.Options{Form: pack.Docker})
	check(t, err)
	got := mustPullNatively(t, n, model, "artifact", "", "raw")
	want, err := treelist.List(src)
	check(t, err)
	wantSnapshot(t, n, got.last(), atTheEpoch(want))
	files := retainedFiles(t, n)
	for _, l := range got.manifest.Layers {
		if l.Size > 0 && files[stat(t, blobPath(n, l.Digest.Encoded())).Ino] == "" {
			t.Errorf("the blob %s was copied", l.Digest)
		}
	}
	wantGone(t, n, got, before)
}

func TestOneEntryAndPullsOfCRI(t *testing.T) {
	n := node.ForTest(t, oneEntry(t))
	src := writeModel(t)
	modelPack := pulled(t, n, src, pack.TarZstd)
	docker := pulled(t, n, src, pack.Docker)
	if len(layers(t, n)) == 0 {
		t.Error("CRI's pull did not unpack a Docker model")
	}
	ref, layer := guestImage(t, n, "lazy")
	_, err := n.Pull(ref)
	check(t, err)
	if snapshotsIn(t, n, "artifact")[layer.String()] != "" {
		t.Error("the pull unpacked a container image")
	}
	pod, err := n.RunPod(node.PodSpec{
		Containers: []node.Container{{Name: "main", Image: ref}},
		Volumes:    []node.Volume{{Image: modelPack, Path: "/model"}},
	})
	check(t, err)
	if snapshotsIn(t, n, "artifact")[layer.String()] != "Committed" {
		t.Errorf("the image was not unpacked for its container: %v", snapshotsIn(t, n, "artifact"))
	}
	wantWritable(t, pod, "/name")
	wantVolume(t, pod, "main", "/model", wantTree(t, src, pack.TarZstd))
	check(t, pod.Remove())

	_, err = n.RunPod(node.PodSpec{Volumes: []node.Volume{{Image: docker, Path: "/model"}}})
	if err == nil || !strings.Contains(err.Error(), "mismatched image rootfs and manifest layers") {
		t.Errorf("a volume of a Docker model: %v", err)
	}
}

// These are the documented limits.
func TestOneEntryAndTheLayersOfOthers(t *testing.T) {
	n := node.ForTest(t, oneEntry(t))
	model, err := pack.Model(writeModel(t), pack.Options{Form: pack.Docker})
	check(t, err)
	push := func(a pack.Artifact, tag string) string {
		t.Helper()
		_, err := a.Push(t.Context(), n.Registry, "models/others", tag)
		check(t, err)
		return n.Registry + "/models/others:" + tag
	}
	unknown := *model
	unknown.Layers = append([]pack.Layer{}, model.Layers...)
	unknown.Layers[0].MediaType = "application/vnd.docker.ai.unknown"
	for _, pull := range []func(string) error{
		func(ref string) error { return pullNatively(n, "artifact", "", ref) },
		func(ref string) error { _, err := n.Pull(ref); return err },
	} {
		err = pull(push(unknown, "unknown"))
		if err == nil || !strings.Contains(err.Error(), "number of layers and diffIDs don't match") {
			t.Errorf("a layer that is not in layer_types: %v", err)
		}
	}

	other := *model
	other.ConfigType = "" // ModelPack's
	ref := push(other, "other")
	_, err = n.Pull(ref)
	check(t, err)
	_, err = n.RunPod(node.PodSpec{Volumes: []node.Volume{{Image: ref, Path: "/model"}}})
	if err == nil || !strings.Contains(err.Error(), "its blob is not in") {
		t.Errorf("another config type: %v", err)
	}
}
