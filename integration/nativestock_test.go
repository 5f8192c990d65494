// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"archive/tar"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	modelspec "github.com/modelpack/model-spec/specs-go/v1"
	"github.com/opencontainers/go-digest"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/treelist"
)

// overlayfsConfig makes containerd unpack Docker models into its own overlayfs snapshotter.
const overlayfsConfig = `
[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
  platform = "linux"
  snapshotter = "artifact"
  differ = "walking"
[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
  platform = "linux"
  snapshotter = "overlayfs"
  differ = "walking"
[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
  platform = "linux(+docker-model)"
  snapshotter = "overlayfs"
  differ = "artifact-diff"
  config_type = "application/vnd.docker.ai.model.config.v0.1+json"
  layer_types = ["application/vnd.docker.ai.license", "application/vnd.docker.ai.safetensors", "application/vnd.docker.ai.model.file", "application/vnd.docker.ai.dir.tar"]
`

func TestTheDifferUnpacksForStockOverlayfs(t *testing.T) {
	n := nativeNode(t, node.Options{ContainerdConfig: overlayfsConfig})
	if n == nil {
		return
	}
	src := writeModel(t)
	files, err := treelist.List(src)
	check(t, err)
	for _, e := range files {
		if e.Type == "file" && e.Size == 0 { // refused, because a container image can have an empty layer
			check(t, os.WriteFile(filepath.Join(src, e.Path), []byte("#"), 0o644))
		}
	}
	model, err := pack.Model(src, pack.Options{Form: pack.Docker})
	check(t, err)
	dir := t.TempDir()
	check(t, os.WriteFile(filepath.Join(dir, "packed"), []byte("in a tar"), 0o640))
	check(t, os.Chown(filepath.Join(dir, "packed"), 12, 34))
	packed, err := treelist.List(dir)
	check(t, err)
	model.Layers = append(model.Layers, tarred(t, dir, "gzip").Layers...)
	image := mustPullNatively(t, n, model, "overlayfs", dockerPlatform, "stock")
	target := t.TempDir()
	commands, err := n.Ctr("snapshots", "--snapshotter", "overlayfs", "view", "--target", target, "view", image.last())
	check(t, err)
	_, err = n.Tool("sh", "-e", "-c", commands)
	check(t, err)
	got, err := treelist.List(target)
	check(t, errors.Join(err, mount.Unmount(target, 0)))
	want, err := treelist.List(src)
	check(t, err)
	// On a file system without reflinks a raw layer is a hard link to its blob, with the
	// blob's attributes.
	attributes := map[string]treelist.Entry{}
	for _, e := range got {
		attributes[e.Path] = e
	}
	for i, e := range want {
		if e.Type == "file" && e.Size > 0 {
			e.Mode, e.UID, e.GID, e.ModTime = attributes[e.Path].Mode, attributes[e.Path].UID, attributes[e.Path].GID, attributes[e.Path].ModTime
		}
		want[i] = e
	}
	if diff := treelist.Diff(append(atTheEpoch(want), packed...), got); diff != "" {
		t.Errorf("the view differs from the source:\n%s", diff)
	}
	_, err = n.Ctr("snapshots", "--snapshotter", "overlayfs", "rm", "view")
	check(t, err)

	inodes := map[uint64]bool{}
	check(t, filepath.WalkDir(filepath.Join(n.Root, "io.containerd.snapshotter.v1.overlayfs"), func(path string, _ fs.DirEntry, err error) error {
		if err == nil {
			inodes[stat(t, path).Ino] = true
		}
		return err
	}))
	for _, l := range image.manifest.Layers[:len(image.manifest.Layers)-1] {
		if l.Size > 0 && !inodes[stat(t, blobPath(n, l.Digest.Encoded())).Ino] {
			t.Errorf("the blob %s was copied", l.Digest)
		}
	}
	removeImage(t, n, image.ref)
	if left := snapshotsIn(t, n, "overlayfs"); len(left) > 0 {
		t.Errorf("snapshots were not removed: %v", left)
	}
}

// A snapshot of stock overlayfs does not tell that it belongs to an artifact, and has the
// name of an image layer with the same content.
func TestNoImageHasALayerOfAnArtifact(t *testing.T) {
	n := nativeNode(t, node.Options{ContainerdConfig: overlayfsConfig})
	if n == nil {
		return
	}
	ref, layer := guestImage(t, n, "victim")
	program, err := n.GuestProgram()
	check(t, err)
	text, err := pack.TarOf(
		pack.Member{Header: tar.Header{Name: "guest", Mode: 0o755}, Data: program},
		pack.Member{Header: tar.Header{Name: "name", Mode: 0o644}, Data: []byte("victim")},
	)
	check(t, err)
	if digest.FromBytes(text) != layer {
		t.Fatal("the digest differs from the image's layer, so the test proves nothing")
	}
	attack := pack.Artifact{ConfigType: pack.DockerConfigType, Layers: []pack.Layer{{
		MediaType: "application/vnd.docker.ai.safetensors", Data: text,
		Annotations: map[string]string{modelspec.AnnotationFilepath: "etc/ld.so.preload"},
	}}}
	_, err = attack.Push(t.Context(), n.Registry, "models/native", "attack")
	check(t, err)
	err = pullNatively(n, "overlayfs", dockerPlatform, n.Registry+"/models/native:attack")
	if err == nil || !strings.Contains(err.Error(), "its file is an archive") {
		t.Errorf("the pull ended with %v, want a refusal", err)
	}

	// As a tar, the same content gives the same files for an artifact and for an image.
	attack.Layers[0] = pack.Layer{MediaType: "application/vnd.docker.ai.dir.tar", Data: text}
	mustPullNatively(t, n, &attack, "overlayfs", dockerPlatform, "tar")
	check(t, pullNatively(n, "overlayfs", "linux", ref))
	target := t.TempDir()
	commands, err := n.Ctr("snapshots", "--snapshotter", "overlayfs", "view", "--target", target, "view", layer.String())
	check(t, err)
	_, err = n.Tool("sh", "-e", "-c", commands)
	check(t, err)
	name, err := os.ReadFile(filepath.Join(target, "name"))
	check(t, errors.Join(err, mount.Unmount(target, 0)))
	if string(name) != "victim" {
		t.Errorf("the image's file has the content %q", name)
	}
}
