// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package snapshot

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay"
	"golang.org/x/sys/unix"
)

// committed commits a snapshot as name on top of parent, whose root directory is owned by uid.
func (n *node) committed(t *testing.T, name, parent string, uid int) {
	t.Helper()
	mounts, err := n.Prepare(ctx, name+" active", parent)
	if err != nil {
		t.Fatal(err)
	}
	if err := mount.WithTempMount(ctx, mounts, func(root string) error { return os.Chown(root, uid, uid) }); err != nil {
		t.Fatal(err)
	}
	if err := n.Commit(ctx, name, name+" active"); err != nil {
		t.Fatal(err)
	}
}

func TestOrdinarySnapshotsHaveTheOptionsOfOverlayfs(t *testing.T) {
	const label = "containerd.io/snapshot/overlay.upperdir"
	n := newNode(t, overlay.WithMountOptions([]string{"volatile"}), overlay.WithUpperdirLabel)
	n.committed(t, "a", "", 0)
	mounts, err := n.Prepare(ctx, "container", "a")
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Contains(mounts[0].Options, "volatile") {
		t.Errorf("the mount has the options %q, want volatile among them", mounts[0].Options)
	}
	view := key("pod", n.pack(t))
	if _, err := n.Prepare(ctx, view, ""); err != nil {
		t.Fatal(err)
	}
	labels := map[string]string{}
	if err := n.Walk(ctx, func(_ context.Context, i snapshots.Info) error {
		labels[i.Name] = i.Labels[label]
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"a", "container", view} {
		info, err := n.Stat(ctx, name)
		if err != nil {
			t.Fatal(err)
		}
		updated, err := n.Update(ctx, info)
		if err != nil {
			t.Fatal(err)
		}
		for by, dir := range map[string]string{"Stat": info.Labels[label], "Update": updated.Labels[label], "Walk": labels[name]} {
			if _, err := os.Stat(dir); name != view && err != nil || name == view && dir != "" {
				t.Errorf("by %s the snapshot %s has its changes in %q: %v", by, name, dir, err)
			}
		}
	}
}

func TestDirectoriesAreRemovedAtOnceIfAsked(t *testing.T) {
	for _, sync := range []bool{false, true} {
		options := []overlay.Opt{overlay.AsynchronousRemove}
		if sync {
			options = nil
		}
		n := newNode(t, options...)
		if _, err := n.Prepare(ctx, "container", ""); err != nil {
			t.Fatal(err)
		}
		if err := n.Remove(ctx, "container"); err != nil {
			t.Fatal(err)
		}
		left, err := os.ReadDir(filepath.Join(n.root, "overlayfs", "snapshots"))
		if err != nil || (len(left) == 0) != sync {
			t.Errorf("synchronously: %t; left are %v, %v", sync, left, err)
		}
	}
}

// The kernel maps the owners of layers for a user namespace, unless containerd has already
// changed them in a copy of the layers.
func TestTheOwnersOfLayersAreMappedOnce(t *testing.T) {
	const base = 200000
	ids := snapshots.WithLabels(map[string]string{
		snapshots.LabelSnapshotUIDMapping: "0:200000:65536", snapshots.LabelSnapshotGIDMapping: "0:200000:65536",
	})
	n := newNode(t)
	n.committed(t, "image", "", 0)
	n.committed(t, "another's", "", base+65536)
	n.committed(t, "copy", "image", base)
	prepare := func(key, parent string) ([]mount.Mount, error) { return n.Prepare(ctx, key, parent, ids) }
	view := func(key, parent string) ([]mount.Mount, error) { return n.View(ctx, key, parent, ids) }
	for how, do := range map[string]func(key, parent string) ([]mount.Mount, error){"Prepare": prepare, "View": view} {
		for parent, mapped := range map[string]bool{"image": true, "another's": true, "copy": false, "": true} {
			key := how + " on " + parent
			mounts, err := do(key, parent)
			if err != nil {
				t.Fatal(err)
			}
			again, err := n.Mounts(ctx, key)
			if err != nil {
				t.Fatal(err)
			}
			for _, m := range [][]mount.Mount{mounts, again} {
				if got := slices.Contains(m[0].Options, "uidmap=0:200000:65536"); got != mapped {
					t.Errorf("%s: mapped: %t, want %t: %q", key, got, mapped, m[0].Options)
				}
			}
			if how == "View" {
				continue
			}
			// The container's root owns what the container writes, whoever has changed the layers.
			upper := mounts[0].Source
			for _, option := range mounts[0].Options {
				if dir, ok := strings.CutPrefix(option, "upperdir="); ok {
					upper = dir
				}
			}
			var st unix.Stat_t
			if err := unix.Stat(upper, &st); err != nil || st.Uid != base || st.Gid != base {
				t.Errorf("%s: the directory of its changes is owned by %d:%d, want %d: %v", key, st.Uid, st.Gid, base, err)
			}
		}
	}
}
