// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package snapshot

import (
	"context"
	"path/filepath"

	"github.com/containerd/containerd/v2/core/snapshots"
	"golang.org/x/sys/unix"
)

// chowned removes the ID map from the snapshot of a container if the layers below it already
// have the owners of the user namespace. If the snapshotter is not known to map owners,
// containerd copies the layers and changes their owners (resolveSnapshotOptions in
// client/snapshotter_opts_unix.go), but passes on the map all the same. The kernel would map
// the owners twice.
func (s *snapshotter) chowned(parent subject, opts []snapshots.Opt) ([]snapshots.Opt, error) {
	base, err := apply(opts)
	if err != nil {
		return nil, err
	}
	uid, gid, mapped, err := owners(base).Root()
	if err != nil || !mapped || parent.id == "" {
		return opts, err
	}
	var st unix.Stat_t
	if dir := filepath.Join(s.dir(parent.id), "fs"); unix.Stat(dir, &st) != nil || st.Uid != uid || st.Gid != gid {
		return opts, nil
	}
	return append(opts, func(i *snapshots.Info) error {
		delete(i.Labels, snapshots.LabelSnapshotUIDMapping)
		delete(i.Labels, snapshots.LabelSnapshotGIDMapping)
		return nil
	}), nil
}

// Stat implements snapshots.Snapshotter.
func (s *snapshotter) Stat(ctx context.Context, key string) (snapshots.Info, error) {
	info, err := s.Snapshotter.Stat(ctx, key)
	return withoutUpperdir(info), err
}

// Walk implements snapshots.Snapshotter.
func (s *snapshotter) Walk(ctx context.Context, fn snapshots.WalkFunc, filters ...string) error {
	return s.Snapshotter.Walk(ctx, func(ctx context.Context, info snapshots.Info) error {
		return fn(ctx, withoutUpperdir(info))
	}, filters...)
}

// withoutUpperdir removes the label of overlay.WithUpperdirLabel from a snapshot of an artifact,
// which has no such directory.
func withoutUpperdir(i snapshots.Info) snapshots.Info {
	if _, ok := treeOf(i); ok {
		delete(i.Labels, "containerd.io/snapshot/overlay.upperdir")
	}
	return i
}
