// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package snapshot

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	modelspec "github.com/modelpack/model-spec/specs-go/v1"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
)

// layer puts the blob of a file into the content store.
func (n *node) layer(t *testing.T, name, data string) ocispec.Descriptor {
	t.Helper()
	l := pack.Layer{
		MediaType: modelspec.MediaTypeModelWeightRaw, Data: []byte(data),
		Annotations: map[string]string{modelspec.AnnotationFilepath: name},
	}
	a := pack.Artifact{Layers: []pack.Layer{l}}
	if _, err := a.WriteTo(n.content); err != nil {
		t.Fatal(err)
	}
	return ocispec.Descriptor{MediaType: l.MediaType, Digest: digest.FromString(data), Size: int64(len(data)), Annotations: l.Annotations}
}

// extract unpacks a layer on top of parent as containerd's unpacker does, and returns the name
// of the committed snapshot.
func (n *node) extract(t *testing.T, name, parent string, layer ocispec.Descriptor) string {
	t.Helper()
	key := behind("extract-1-x " + name)
	mounts, err := n.Prepare(ctx, key, parent, as(name))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Applier(n.root, n.views).Apply(ctx, layer, mounts); err != nil {
		t.Fatal(err)
	}
	if err := n.Commit(ctx, behind(name), key, as(name)); err != nil {
		t.Fatal(err)
	}
	return behind(name)
}

// files returns the files of a view, with their contents.
func files(t *testing.T, mounts []mount.Mount) map[string]string {
	t.Helper()
	all := map[string]string{}
	if err := mount.WithTempMount(ctx, mounts, func(root string) error {
		names, err := os.ReadDir(root)
		for _, name := range names {
			b, err := os.ReadFile(filepath.Join(root, name.Name()))
			if err != nil {
				return err
			}
			all[name.Name()] = string(b)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return all
}

func wantFiles(t *testing.T, got map[string]string, names ...string) {
	t.Helper()
	if len(got) != len(names) {
		t.Errorf("%v is shown, want %v", got, names)
	}
	for _, name := range names {
		if got[name] != "bytes of "+name {
			t.Errorf("%s reads %q", name, got[name])
		}
	}
}

// chained makes two layers on top of each other.
func (n *node) chained(t *testing.T) (lower, upper string) {
	t.Helper()
	lower = n.extract(t, "first", "", n.layer(t, "a", "bytes of a"))
	return lower, n.extract(t, "second", lower, n.layer(t, "b", "bytes of b"))
}

func TestAViewOfAChainHasTheFilesOfItsLayers(t *testing.T) {
	n := newNode(t)
	lower, upper := n.chained(t)
	for name, want := range map[string][]string{lower: {"a"}, upper: {"a", "b"}} {
		key := "view of " + name
		mounts, err := n.View(ctx, key, name)
		if err != nil {
			t.Fatal(err)
		}
		wantFiles(t, files(t, mounts), want...)
		view, err := n.Stat(ctx, key)
		if err != nil {
			t.Fatal(err)
		}
		of, err := n.Stat(ctx, name)
		if err != nil || of.Labels[LabelLayers] == "" || of.Labels[LabelLayers] != view.Labels[LabelLayers] || view.Labels[LabelArtifact] != "" {
			t.Errorf("%v: the labels are %v, those of the view %v", err, of.Labels, view.Labels)
		}
		if usage, err := n.Usage(ctx, key); err != nil || usage.Size == 0 {
			t.Errorf("the view takes %+v, %v", usage, err)
		}
		if _, err := n.Usage(ctx, name); err != nil {
			t.Error(err)
		}
	}
	if a, b := n.stat(t, lower), n.stat(t, upper); a.Labels[LabelLayers] == b.Labels[LabelLayers] {
		t.Error("both are the same layers")
	}
}

func (n *node) stat(t *testing.T, name string) snapshots.Info {
	t.Helper()
	info, err := n.Stat(ctx, name)
	if err != nil {
		t.Fatal(err)
	}
	return info
}

func TestAViewOfAChainNeedsNoBlobAndOutlivesAReboot(t *testing.T) {
	n := newNode(t)
	_, upper := n.chained(t)
	mounts, err := n.View(ctx, "view", upper)
	if err != nil {
		t.Fatal(err)
	}
	n.close(t)
	n.open(t)
	n.cleanup(t)
	wantFiles(t, files(t, mounts), "a", "b")

	n.close(t)
	if err := mount.UnmountRecursive(n.state, unix.MNT_DETACH); err != nil {
		t.Fatal(err)
	}
	for _, gone := range []string{n.content, filepath.Join(n.root, "boot")} { // as after a reboot
		if err := os.RemoveAll(gone); err != nil {
			t.Fatal(err)
		}
	}
	n.open(t)
	if mounts, err = n.Mounts(ctx, "view"); err != nil {
		t.Fatal(err)
	}
	wantFiles(t, files(t, mounts), "a", "b")
}

func TestAChainGoesWithItsSnapshots(t *testing.T) {
	n := newNode(t)
	lower, upper := n.chained(t)
	mounts, err := n.View(ctx, "view", upper)
	if err != nil {
		t.Fatal(err)
	}
	// Whoever uses a mount that was made from the view may not know of its removal.
	target := t.TempDir()
	if err := mount.All(mounts, target); err != nil {
		t.Fatal(err)
	}
	for i, name := range []string{"view", upper, lower} {
		if err := n.Remove(ctx, name); err != nil {
			t.Fatal(err)
		}
		n.cleanup(t)
		if i == 0 {
			if b, err := os.ReadFile(filepath.Join(target, "b")); err != nil || string(b) != "bytes of b" {
				t.Errorf("without the view its mount reads %q, %v", b, err)
			}
			if err := mount.UnmountAll(target, 0); err != nil {
				t.Fatal(err)
			}
		}
		trees, err := os.ReadDir(filepath.Join(n.root, "trees"))
		if want := max(0, 1-i); err != nil || len(trees) != want {
			t.Errorf("without %s there are the trees %v, %v, want %d", name, trees, err, want)
		}
		left, err := os.ReadDir(filepath.Join(n.root, "overlayfs", "snapshots"))
		if err != nil || len(left) != 2-i {
			t.Errorf("%d of the snapshots are left, %v", len(left), err)
		}
	}
}

func TestNothingElseGoesOnTopOfAChain(t *testing.T) {
	n := newNode(t)
	_, upper := n.chained(t)
	if _, err := n.Prepare(ctx, "container", upper); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "make a view") {
		t.Errorf("a container: %v", err)
	}
	// The differ of images unpacks this.
	key := behind("extract-1-x image")
	if _, err := n.Prepare(ctx, key, upper); err != nil {
		t.Fatal(err)
	}
	if err := n.Commit(ctx, "image", key); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "delete the image") {
		t.Errorf("a layer of an image: %v", err)
	}
	// If layers are unpacked in parallel, the parent is named only in Commit.
	key = behind("extract-1-x parallel")
	if _, err := n.Prepare(ctx, key, ""); err != nil {
		t.Fatal(err)
	}
	if err := n.Commit(ctx, "image", key, snapshots.WithParent(upper)); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a layer of an image, unpacked in parallel: %v", err)
	}
	if _, err := n.View(ctx, "view", upper); err != nil {
		t.Fatal(err)
	}
	if err := n.Commit(ctx, "image", "view"); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), `"view" is a view of the layers of an artifact`) {
		t.Errorf("a view: %v", err)
	}
}

func TestLayersOnTopOfOrdinaryOnesAreOrdinary(t *testing.T) {
	n := newNode(t)
	if _, err := n.Prepare(ctx, "extract-1-x image", ""); err != nil {
		t.Fatal(err)
	}
	if err := n.Commit(ctx, "image", "extract-1-x image"); err != nil {
		t.Fatal(err)
	}
	upper := n.extract(t, "upper", "image", n.layer(t, "a", "bytes of a"))
	if info := n.stat(t, upper); info.Labels[LabelLayers] != "" {
		t.Errorf("the labels are %v", info.Labels)
	}
	mounts, err := n.View(ctx, "view", upper)
	if err != nil {
		t.Fatal(err)
	}
	wantFiles(t, files(t, mounts), "a")
}

func TestRetainedLayersAreNotCommittedOnTopOfOrdinaryOnes(t *testing.T) {
	n := newNode(t)
	if _, err := n.Prepare(ctx, "extract-1-x image", ""); err != nil {
		t.Fatal(err)
	}
	if err := n.Commit(ctx, "image", "extract-1-x image"); err != nil {
		t.Fatal(err)
	}
	key := behind("extract-1-x parallel")
	mounts, err := n.Prepare(ctx, key, "")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Applier(n.root, n.views).Apply(ctx, n.layer(t, "a", "bytes of a"), mounts); err != nil {
		t.Fatal(err)
	}
	if err := n.Commit(ctx, "name", key, snapshots.WithParent("image")); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("%v", err)
	}
}

func TestAnImageVolumeOfAChainIsServedByItsManifest(t *testing.T) {
	n := newNode(t)
	_, upper := n.chained(t)
	d := n.pack(t)
	mounts, err := n.Prepare(ctx, key("pod", d), upper)
	if err != nil {
		t.Fatal(err)
	}
	if got := files(t, mounts); len(got) != 1 || got["weights"] != "bytes" {
		t.Errorf("%v is shown", got)
	}
}

func TestNoLabelMakesLayersOfAnOrdinarySnapshot(t *testing.T) {
	n := newNode(t)
	hostile := map[string]string{LabelLayers: digest.FromString("x").String()}
	if _, err := n.Prepare(ctx, "ordinary", "", snapshots.WithLabels(hostile)); err != nil {
		t.Fatal(err)
	}
	if info, err := n.Update(ctx, snapshots.Info{Name: "ordinary", Labels: hostile}); err != nil || info.Labels[LabelLayers] != "" {
		t.Errorf("%v, %v", info.Labels, err)
	}
	if err := n.Commit(ctx, "committed", "ordinary", snapshots.WithLabels(hostile)); err != nil {
		t.Fatal(err)
	}
	if err := n.Walk(ctx, func(_ context.Context, i snapshots.Info) error {
		if i.Labels[LabelLayers] != "" {
			t.Errorf("%s has the labels %v", i.Name, i.Labels)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	_, upper := n.chained(t)
	was := n.stat(t, upper).Labels[LabelLayers]
	if info, err := n.Update(ctx, snapshots.Info{Name: upper, Labels: hostile}, "labels"); err != nil || info.Labels[LabelLayers] != was {
		t.Errorf("%v, %v", info.Labels, err)
	}
}

// containerd finds a snapshot by the name that it was committed as. Snapshots with the same name
// may have different contents.
func TestANameIsOfOneArtifact(t *testing.T) {
	n := newNode(t)
	d := n.pack(t)
	n.extract(t, "sha256:chain", "", n.layer(t, "a", "bytes of a"))
	err := n.unpack(d, "sha256:chain")
	if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "sha256:chain is already that of") {
		t.Errorf("of other layers: %v", err)
	}
	if _, err := n.Prepare(ctx, "extract-1-x image", "", as("sha256:image")); err != nil {
		t.Fatal(err)
	}
	if err := n.Commit(ctx, "image", "extract-1-x image", as("sha256:image")); err != nil {
		t.Fatal(err)
	}
	err = n.unpack(d, "sha256:image")
	if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "an image") {
		t.Errorf("of an image: %v", err)
	}
	if err := n.Remove(ctx, "image"); err != nil {
		t.Fatal(err)
	}
	n.unpacked(t, d, "sha256:image")
}

// A pull reports what failed for which layer, and what to do, wherever the layer goes.
func TestAFullDiskIsExplainedForALayer(t *testing.T) {
	n := newNode(t)
	layer := n.layer(t, "a", "bytes of a")
	ours, err := n.Prepare(ctx, behind("extract-1-x layer"), "", as("layer"))
	if err != nil {
		t.Fatal(err)
	}
	for dir, mounts := range map[string][]mount.Mount{
		filepath.Join(n.root, "trees"): {{Type: "bind", Source: t.TempDir(), Options: []string{"rw", "rbind"}}},
		filepath.Dir(ours[0].Source):   ours,
	} {
		// A tmpfs whose only inode is that of its root.
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "nr_inodes=1"); err != nil {
			t.Fatal(err)
		}
		_, err := Applier(n.root, n.views).Apply(ctx, layer, mounts)
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
		if !errdefs.IsResourceExhausted(err) {
			t.Fatalf("%v, want a full disk", err)
		}
		for _, text := range []string{"layer 0 (", layer.Digest.String(), "mkdir ", "free space on the file system of the snapshotter's root"} {
			if !strings.Contains(err.Error(), text) {
				t.Errorf("%v does not say %q", err, text)
			}
		}
	}
}
