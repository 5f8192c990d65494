// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package snapshot

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/testsuite"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/blobs"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
	"github.com/artifact-snapshotter/artifact-snapshotter/store"
)

var ctx = context.Background()

// node is a snapshotter and a content store in temporary directories.
type node struct {
	snapshots.Snapshotter
	content, root, state string
	options              []overlay.Opt
	views                *store.Store
	images               store.Images
	observer             store.Observer
}

func newNode(t *testing.T, options ...overlay.Opt) *node {
	t.Helper()
	n := &node{content: t.TempDir(), root: t.TempDir(), state: t.TempDir(), options: options}
	t.Cleanup(func() {
		if err := mount.UnmountRecursive(n.state, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	n.open(t)
	return n
}

// open opens the snapshotter, as after a restart of the daemon.
func (n *node) open(t *testing.T) {
	t.Helper()
	var err error
	if n.views, err = store.Open(ctx, store.Config{Root: n.root, State: n.state, Content: blobs.Dir(n.content), Images: n.images, Observer: n.observer}); err != nil {
		t.Fatal(err)
	}
	if n.Snapshotter, err = New(n.root, n.views, n.options...); err != nil {
		t.Fatal(err)
	}
	opened, views := n.Snapshotter, n.views
	t.Cleanup(func() { errors.Join(opened.Close(), views.Close()) })
}

func (n *node) close(t *testing.T) {
	t.Helper()
	if err := errors.Join(n.Close(), n.views.Close()); err != nil {
		t.Fatal(err)
	}
}

func (n *node) cleanup(t *testing.T) {
	t.Helper()
	if err := n.Snapshotter.(snapshots.Cleaner).Cleanup(ctx); err != nil {
		t.Fatal(err)
	}
}

// pack puts an artifact of one file into the content store.
func (n *node) pack(t *testing.T) ocispec.Descriptor {
	t.Helper()
	d, err := pack.File("weights", "bytes").WriteTo(n.content)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// key returns containerd's key for an image volume of the pod.
func key(pod string, d ocispec.Descriptor) string {
	return "k8s.io/7//run/containerd/io.containerd.grpc.v1.cri/image-volumes/" + pod + "/" + d.Digest.Encoded()
}

func TestContainerdsOwnSuite(t *testing.T) {
	// Without its flag the suite skips every test that needs root.
	if err := flag.Set("test.root", "true"); err != nil {
		t.Fatal(err)
	}
	// By this name it leaves out the one rename that overlayfs cannot do.
	testsuite.SnapshotterSuite(t, "overlayfs", func(_ context.Context, root string) (snapshots.Snapshotter, func() error, error) {
		views, err := store.Open(ctx, store.Config{
			Root: root, State: filepath.Join(root, "state"), Content: blobs.Dir(filepath.Join(root, "content")),
		})
		if err != nil {
			return nil, nil, err
		}
		s, err := New(root, views)
		if err != nil {
			return nil, nil, err
		}
		return s, func() error { return errors.Join(s.Close(), views.Close()) }, nil
	})
}

func TestAnImageVolumeOfAnArtifactIsAView(t *testing.T) {
	n := newNode(t)
	d := n.pack(t)
	mounts, err := n.Prepare(ctx, key("pod", d), "")
	if err != nil {
		t.Fatal(err)
	}
	again, err := n.Mounts(ctx, key("pod", d))
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range [][]mount.Mount{mounts, again} {
		target := t.TempDir()
		if err := mount.All(m, target); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(filepath.Join(target, "weights"))
		if err != nil || string(b) != "bytes" {
			t.Errorf("%q, %v", b, err)
		}
		if err := os.WriteFile(filepath.Join(target, "new"), nil, 0o600); !errors.Is(err, unix.EROFS) {
			t.Errorf("writing gives %v, want %v", err, unix.EROFS)
		}
		var st unix.Statfs_t
		if err := unix.Statfs(target, &st); err != nil {
			t.Fatal(err)
		}
		if want := int64(unix.ST_RDONLY | unix.ST_NOSUID | unix.ST_NODEV); st.Flags&want != want {
			t.Errorf("mount flags %#x lack some of %#x", st.Flags, want)
		}
		if err := mount.UnmountAll(target, 0); err != nil {
			t.Fatal(err)
		}
	}
	info, err := n.Stat(ctx, key("pod", d))
	if err != nil || info.Kind != snapshots.KindActive || info.Labels[LabelArtifact] != d.Digest.String() {
		t.Errorf("%+v, %v", info, err)
	}
	usage, err := n.Usage(ctx, key("pod", d))
	if err != nil || usage.Size == 0 || usage.Size > 64<<10 || usage.Inodes == 0 {
		t.Errorf("usage %+v, %v: want the tree's own few kilobytes", usage, err)
	}
	if _, err := n.Prepare(ctx, key("pod", d), ""); !errdefs.IsAlreadyExists(err) {
		t.Errorf("preparing again gives %v", err)
	}
	if err := n.Commit(ctx, "name", key("pod", d)); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("committing gives %v", err)
	}
}

func TestWalkListsBothKinds(t *testing.T) {
	n := newNode(t)
	d := n.pack(t)
	if _, err := n.Prepare(ctx, key("pod", d), ""); err != nil {
		t.Fatal(err)
	}
	if _, err := n.Prepare(ctx, "ordinary", ""); err != nil {
		t.Fatal(err)
	}
	walk := func(filters ...string) (names []string) {
		t.Helper()
		if err := n.Walk(ctx, func(_ context.Context, i snapshots.Info) error {
			names = append(names, i.Name)
			return nil
		}, filters...); err != nil {
			t.Fatal(err)
		}
		return names
	}
	if got := walk(); len(got) != 2 {
		t.Errorf("Walk shows %v, want both", got)
	}
	if got := walk(`labels."` + LabelArtifact + `"==` + d.Digest.String()); len(got) != 1 || got[0] != key("pod", d) {
		t.Errorf("a filter on the label shows %v", got)
	}
}

func TestTheLastRemoveTakesTheMount(t *testing.T) {
	n := newNode(t)
	d := n.pack(t)
	var source string
	for _, pod := range []string{"a", "b"} {
		mounts, err := n.Prepare(ctx, key(pod, d), "")
		if err != nil {
			t.Fatal(err)
		}
		source = mounts[0].Source
	}
	for pod, want := range map[int]string{0: "a", 1: "b"} {
		_ = pod
		if err := n.Remove(ctx, key(want, d)); err != nil {
			t.Fatal(err)
		}
		n.cleanup(t)
		_, err := os.Stat(filepath.Join(source, "weights"))
		left := 0
		n.Walk(ctx, func(context.Context, snapshots.Info) error { left++; return nil })
		if shown := err == nil; shown != (left > 0) {
			t.Errorf("with %d pods left the volume is mounted: %v", left, shown)
		}
	}
	if err := n.Remove(ctx, key("a", d)); !errdefs.IsNotFound(err) {
		t.Errorf("removing twice gives %v", err)
	}
}

func TestViewsSurviveARestartAndARebootOfTheNode(t *testing.T) {
	n := newNode(t)
	d := n.pack(t)
	mounts, err := n.Prepare(ctx, key("pod", d), "")
	if err != nil {
		t.Fatal(err)
	}
	n.close(t)
	n.open(t)
	n.cleanup(t)
	if _, err := os.Stat(filepath.Join(mounts[0].Source, "weights")); err != nil {
		t.Errorf("after a restart: %v", err)
	}
	n.close(t)
	if err := mount.UnmountRecursive(n.state, unix.MNT_DETACH); err != nil { // as a reboot does
		t.Fatal(err)
	}
	n.open(t)
	if mounts, err = n.Mounts(ctx, key("pod", d)); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(mounts[0].Source, "weights")); err != nil {
		t.Errorf("after a reboot: %v", err)
	}
}

func TestUpdateDoesNotChangeTheArtifactOfAView(t *testing.T) {
	n := newNode(t)
	d := n.pack(t)
	mapping := map[string]string{snapshots.LabelSnapshotUIDMapping: "0:1000:10", snapshots.LabelSnapshotGIDMapping: "0:1000:10"}
	if _, err := n.Prepare(ctx, key("pod", d), "", snapshots.WithLabels(mapping)); err != nil {
		t.Fatal(err)
	}
	for _, paths := range [][]string{nil, {"labels"}, {"labels.note", "labels." + LabelArtifact}} {
		info, err := n.Update(ctx, snapshots.Info{Name: key("pod", d), Labels: map[string]string{"note": "x", LabelArtifact: "sha256:0"}}, paths...)
		if err != nil {
			t.Fatal(err)
		}
		if info.Labels["note"] != "x" || info.Labels[LabelArtifact] != d.Digest.String() ||
			info.Labels[snapshots.LabelSnapshotUIDMapping] != mapping[snapshots.LabelSnapshotUIDMapping] {
			t.Errorf("field paths %v: labels %v", paths, info.Labels)
		}
	}
}

func TestNoLabelShiftsTheOwnersOfAView(t *testing.T) {
	n := newNode(t)
	d := n.pack(t)
	if _, err := n.Prepare(ctx, key("pod", d), ""); err != nil {
		t.Fatal(err)
	}
	info, err := n.Update(ctx, snapshots.Info{Name: key("pod", d), Labels: map[string]string{snapshots.LabelSnapshotUIDMapping: "0:1:2"}}, "labels")
	if err != nil || info.Labels[snapshots.LabelSnapshotUIDMapping] != "" {
		t.Errorf("%v, %v", info.Labels, err)
	}
}

func TestNoLabelMakesAnOrdinarySnapshotAView(t *testing.T) {
	n := newNode(t)
	hostile := map[string]string{LabelArtifact: "sha256:" + strings.Repeat("0", 64)}
	if _, err := n.Prepare(ctx, "ordinary", "", snapshots.WithLabels(hostile)); err != nil {
		t.Fatal(err)
	}
	if info, err := n.Update(ctx, snapshots.Info{Name: "ordinary", Labels: hostile}); err != nil || info.Labels[LabelArtifact] != "" {
		t.Errorf("%v, %v", info.Labels, err)
	}
	if info, err := n.Stat(ctx, "ordinary"); err != nil || info.Labels[LabelArtifact] != "" {
		t.Errorf("%v, %v", info.Labels, err)
	}
	if err := n.Commit(ctx, "committed", "ordinary", snapshots.WithLabels(hostile)); err != nil {
		t.Fatal(err)
	}
	if info, err := n.Stat(ctx, "committed"); err != nil || info.Labels[LabelArtifact] != "" {
		t.Errorf("%v, %v", info.Labels, err)
	}
}

func TestAnImageVolumeOfAnImageIsOverlayfs(t *testing.T) {
	n := newNode(t)
	image, err := pack.Image(ocispec.ImageConfig{}, false)
	if err != nil {
		t.Fatal(err)
	}
	d, err := image.WriteTo(n.content)
	if err != nil {
		t.Fatal(err)
	}
	mounts, err := n.Prepare(ctx, key("pod", d), "")
	if err != nil || !strings.HasPrefix(mounts[0].Source, filepath.Join(n.root, "overlayfs")) {
		t.Errorf("%v, %v", mounts, err)
	}
}

func TestARefusedVolumeLeavesNoSnapshot(t *testing.T) {
	n := newNode(t)
	if _, err := n.Prepare(ctx, "ordinary", ""); err != nil { // an empty database cannot be walked
		t.Fatal(err)
	}
	missing := ocispec.Descriptor{Digest: "sha256:" + ocispecHex}
	if _, err := n.Prepare(ctx, key("pod", missing), ""); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), n.content) {
		t.Errorf("%v does not say that the manifest is not in the content root", err)
	}
	d, err := pack.File("../escape", "x").WriteTo(n.content)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := n.Prepare(ctx, key("pod", d), ""); !errdefs.IsInvalidArgument(err) {
		t.Errorf("%v, want an invalid argument", err)
	}
	if err := n.Walk(ctx, func(_ context.Context, i snapshots.Info) error {
		if i.Name != "ordinary" {
			t.Errorf("left: %s", i.Name)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}

const ocispecHex = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"

// A crash after overlayfs made the directory of a snapshot leaves it without a record.
func TestADirectoryWithoutARecordIsNotInTheWayOfTheNextSnapshot(t *testing.T) {
	n := newNode(t)
	dir := filepath.Join(n.root, "overlayfs", "snapshots")
	for i, name := range []string{"1", "2"} { // there is no database yet, and there is one
		n.close(t)
		if err := os.MkdirAll(filepath.Join(dir, name, "fs"), 0o755); err != nil {
			t.Fatal(err)
		}
		n.open(t)
		if _, err := n.Prepare(ctx, fmt.Sprint("active", i), ""); err != nil {
			t.Errorf("with a directory %s: %v", name, err)
		}
		n.cleanup(t)
		if dirs, err := os.ReadDir(dir); err != nil || len(dirs) != i+1 {
			t.Errorf("%d snapshots have the directories %v, %v", i+1, dirs, err)
		}
	}
}

// containerd asks for the usage every few seconds, and logs each error.
func TestWhatAnotherVersionHasMadeHasNoUsageAndNoError(t *testing.T) {
	n := newNode(t)
	d := n.pack(t)
	if _, err := n.Prepare(ctx, key("pod", d), ""); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(store.TreeDir(n.root, d.Digest), "tree.json"), []byte(`{"format": 1}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if usage, err := n.Usage(ctx, key("pod", d)); err != nil || usage != (snapshots.Usage{}) {
		t.Errorf("%+v, %v; want nothing", usage, err)
	}
}
