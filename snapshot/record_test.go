// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package snapshot

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
	"github.com/artifact-snapshotter/artifact-snapshotter/store"
)

// behind returns the key as containerd passes it on.
func behind(key string) string { return "k8s.io/8/" + key }

// as sets the name of the committed snapshot, as containerd does.
func as(ref string) snapshots.Opt {
	return snapshots.WithLabels(map[string]string{snapshots.LabelSnapshotRef: ref})
}

// unpack asks for the committed snapshot of d as containerd does, again while the artifact is
// still being laid out: a call waits for unpackWait only.
func (n *node) unpack(d ocispec.Descriptor, ref string) error {
	for {
		_, err := n.Prepare(ctx, behind(UnpackKey("caller", d.Digest)), "", as(ref))
		if !errdefs.IsUnavailable(err) {
			return err
		}
	}
}

// unpacked makes the committed snapshot of d, and returns its name as containerd finds it.
func (n *node) unpacked(t *testing.T, d ocispec.Descriptor, ref string) (name string) {
	t.Helper()
	if err := n.unpack(d, ref); !errdefs.IsAlreadyExists(err) {
		t.Fatalf("unpacking gives %v", err)
	}
	if err := n.Walk(ctx, func(_ context.Context, i snapshots.Info) error {
		if i.Kind == snapshots.KindCommitted {
			name = i.Name
		}
		return nil
	}, `labels."`+snapshots.LabelSnapshotRef+`"==`+ref+`,parent==""`); err != nil || name == "" {
		t.Fatalf("no snapshot of that name, %v", err)
	}
	return name
}

// read returns the content of the file weights in the mounts.
func read(t *testing.T, mounts []mount.Mount) string {
	t.Helper()
	target := t.TempDir()
	if err := mount.All(mounts, target); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(target, "weights"))
	if err := errors.Join(err, mount.UnmountAll(target, 0)); err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestAnArtifactIsACommittedSnapshot(t *testing.T) {
	n := newNode(t)
	d := n.pack(t)
	name := n.unpacked(t, d, "sha256:chain")
	for range 2 { // the first time, and when it is there already
		if again := n.unpacked(t, d, "sha256:chain"); again != name {
			t.Errorf("unpacked again it is %s, and was %s", again, name)
		}
	}
	if dirs, err := os.ReadDir(filepath.Join(n.root, "overlayfs", "snapshots")); err != nil || len(dirs) > 0 {
		t.Errorf("a record has directories: %v, %v", dirs, err)
	}
	info, err := n.Stat(ctx, name)
	if err != nil || info.Kind != snapshots.KindCommitted || info.Parent != "" || info.Labels[LabelArtifact] != d.Digest.String() {
		t.Errorf("%+v, %v", info, err)
	}
	n.cleanup(t) // nothing uses it: it is unmounted
	if left, err := os.ReadDir(filepath.Join(n.state, "mounts")); err != nil || len(left) > 0 {
		t.Errorf("mounted: %v, %v", left, err)
	}
	mounts, err := n.View(ctx, "view", name)
	if err != nil {
		t.Fatal(err)
	}
	n.cleanup(t)
	if got := read(t, mounts); got != "bytes" {
		t.Errorf("the view shows %q", got)
	}
	if err := n.Remove(ctx, name); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("removing what a view shows gives %v", err)
	}
	n.close(t)
	if err := mount.UnmountRecursive(n.state, unix.MNT_DETACH); err != nil { // as a reboot does
		t.Fatal(err)
	}
	n.open(t)
	if mounts, err = n.Mounts(ctx, "view"); err != nil {
		t.Fatal(err)
	}
	if got := read(t, mounts); got != "bytes" {
		t.Errorf("after a reboot the view shows %q", got)
	}
	for _, key := range []string{"view", name} {
		if err := n.Remove(ctx, key); err != nil {
			t.Error(err)
		}
	}
}

func TestAViewOfMountKeyHasTheFilesOfTheArtifact(t *testing.T) {
	n := newNode(t)
	d := n.pack(t)
	key := MountKey("/mnt/a model")
	mounts, err := n.View(ctx, behind(key), "", targeting(d.Digest))
	if err != nil {
		t.Fatal(err)
	}
	if got := read(t, mounts); got != "bytes" {
		t.Errorf("the view shows %q", got)
	}
	if path, ok := ParseMountKey(key); path != "/mnt/a model" || !ok {
		t.Errorf("the key %s is of %q, %v", key, path, ok)
	}
	for _, other := range []string{"", "view", "x/" + key, mountPrefix + "x/y", key + "/" + d.Digest.Encoded(), UnpackKey("/mnt", d.Digest), behind(key)} {
		if path, ok := ParseMountKey(other); ok {
			t.Errorf("the key %q is of %q", other, path)
		}
	}
}

// targeting sets the artifact of a view of MountKey.
func targeting(target digest.Digest) snapshots.Opt {
	return snapshots.WithLabels(map[string]string{LabelTarget: target.String()})
}

func TestOneNameIsOneArtifact(t *testing.T) {
	n := newNode(t)
	n.unpacked(t, n.pack(t), "sha256:chain")
	d, err := pack.File("another name", "bytes").WriteTo(n.content)
	if err != nil {
		t.Fatal(err)
	}
	err = n.unpack(d, "sha256:chain")
	if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "sha256:chain is already that of artifact") {
		t.Errorf("%v", err)
	}
	n.unpacked(t, d, "sha256:other")
}

func TestNothingGoesOnTopOfAnArtifact(t *testing.T) {
	n := newNode(t)
	name := n.unpacked(t, n.pack(t), "sha256:chain")
	if _, err := n.Prepare(ctx, "k8s.io/9/container", name); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a container's root gives %v", err)
	}
	if _, err := n.Prepare(ctx, "k8s.io/9/extract-1 sha256:next", name); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a layer on top gives %v", err)
	}
}

// Images choose chain IDs, and the keys of extractions end in chain IDs.
func TestNoImageAsksForAnArtifact(t *testing.T) {
	n := newNode(t)
	d := n.pack(t)
	for _, asking := range []string{UnpackKey("x", d.Digest), MountKey("/x"), "/image-volumes/x/" + d.Digest.Encoded(), "/" + key("x", d)} {
		extract := "k8s.io/9/extract-1-abcd " + asking
		for kind, create := range map[string]func(context.Context, string, string, ...snapshots.Opt) ([]mount.Mount, error){"prepare": n.Prepare, "view": n.View} {
			mounts, err := create(ctx, extract+kind, "", as(asking), targeting(d.Digest))
			if err != nil {
				t.Fatal(err)
			}
			if !strings.HasPrefix(mounts[0].Source, n.root) {
				t.Errorf("%s of %q shows %v", kind, extract, mounts)
			}
			info, err := n.Stat(ctx, extract+kind)
			if err != nil || info.Labels[LabelArtifact] != "" {
				t.Errorf("%s of %q: %+v, %v", kind, extract, info, err)
			}
		}
	}
}

func TestWhatCannotBeUnpackedLeavesNothing(t *testing.T) {
	n := newNode(t)
	image, err := pack.Image(ocispec.ImageConfig{}, false)
	if err != nil {
		t.Fatal(err)
	}
	ordinary, err := image.WriteTo(n.content)
	if err != nil {
		t.Fatal(err)
	}
	missing := digest.Digest("sha256:" + ocispecHex)
	unnamed := n.pack(t)
	for _, c := range []struct {
		name string
		make func() ([]mount.Mount, error)
		is   func(error) bool
		says string
	}{
		{"an image", func() ([]mount.Mount, error) { return n.Prepare(ctx, UnpackKey("x", ordinary.Digest), "", as("ref")) }, errdefs.IsInvalidArgument, "container image"},
		{"the mount of an image", func() ([]mount.Mount, error) { return n.View(ctx, MountKey("/x"), "", targeting(ordinary.Digest)) }, errdefs.IsInvalidArgument, "container image"},
		{"what is not there", func() ([]mount.Mount, error) { return n.Prepare(ctx, UnpackKey("x", missing), "", as("ref")) }, errdefs.IsNotFound, n.content},
		{"the mount of what is not there", func() ([]mount.Mount, error) { return n.View(ctx, MountKey("/x"), "", targeting(missing)) }, errdefs.IsNotFound, n.content},
		{"the mount of nothing", func() ([]mount.Mount, error) { return n.View(ctx, MountKey("/x"), "") }, errdefs.IsInvalidArgument, LabelTarget},
		{"no name", func() ([]mount.Mount, error) { return n.Prepare(ctx, UnpackKey("x", unnamed.Digest), "") }, errdefs.IsInvalidArgument, snapshots.LabelSnapshotRef},
	} {
		if _, err := c.make(); !c.is(err) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	if err := n.Walk(ctx, func(_ context.Context, i snapshots.Info) error {
		t.Errorf("left: %s", i.Name)
		return nil
	}); err != nil && !errdefs.IsNotFound(err) {
		t.Error(err)
	}
}

// guard is a store.Images that knows no names.
type guard func(namespace string, target digest.Digest) error

func (g guard) Check(_ context.Context, namespace string, target digest.Digest) error {
	return g(namespace, target)
}

func (guard) Name(string, digest.Digest) string { return "" }

func TestAVolumeThatImagesObjectToIsRefused(t *testing.T) {
	n := newNode(t)
	d := n.pack(t)
	var asked []string
	n.close(t)
	n.images = guard(func(namespace string, target digest.Digest) error {
		asked = append(asked, namespace+" "+target.String())
		return errdefs.ErrFailedPrecondition
	})
	n.open(t)
	_, err := n.Prepare(ctx, key("pod", d), "")
	if _, check := errors.AsType[*store.CheckError](err); !check || !errdefs.IsFailedPrecondition(err) {
		t.Errorf("%v", err)
	}
	if want := []string{"k8s.io " + d.Digest.String()}; !slices.Equal(asked, want) {
		t.Errorf("asked %q, want %q", asked, want)
	}
}
