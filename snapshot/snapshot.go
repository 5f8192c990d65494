// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

// Package snapshot serves artifacts to containerd: a complete Snapshotter in
// which the image volume of an artifact is a read-only view of the artifact's
// files, and everything else is containerd's own overlayfs snapshotter.
//
// Both kinds of snapshot are records of one database, overlayfs's own. A view
// is a record with a label that names its artifact; keys, labels, kinds, Walk
// and its filters are the same for both because they are the same code.
package snapshot

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay/overlayutils"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
	"github.com/artifact-snapshotter/artifact-snapshotter/unpack"
	"github.com/artifact-snapshotter/artifact-snapshotter/view"
)

// LabelArtifact is on every view: the digest of the artifact's manifest. It
// does not begin with "containerd.io/snapshot/", the prefix of the labels that
// containerd hands on to a snapshotter (snapshots.FilterInheritedLabels), some
// of which come from the annotations of a pulled image; so no image can claim
// to be a view.
const LabelArtifact = "artifact-snapshotter/artifact"

// imageVolume matches the key with which containerd's CRI plugin prepares an
// image volume, as a proxy snapshotter sees it: the path of the mount, which
// ends in the digest of the image's target
// (internal/cri/server/container_image_mount.go).
var imageVolume = regexp.MustCompile(`/image-volumes/[^/]+/([0-9a-f]{64}|[0-9a-f]{96}|[0-9a-f]{128})$`)

type snapshotter struct {
	snapshots.Snapshotter // overlayfs, for all that is no view
	ms                    *storage.MetaStore
	views                 *view.Store
}

// New returns a Snapshotter that keeps ordinary snapshots in root/overlayfs and
// its views in the store, and tells the store which artifacts they show. Close
// closes neither the store nor any view.
func New(root string, views *view.Store) (snapshots.Snapshotter, error) {
	root = filepath.Join(root, "overlayfs")
	// overlayfs itself would make it 0700, and a pod with a user namespace
	// could not reach its root file system.
	if err := os.MkdirAll(root, 0o711); err != nil {
		return nil, err
	}
	ms, err := storage.NewMetaStore(filepath.Join(root, "metadata.db"))
	if err != nil {
		return nil, err
	}
	opts := []overlay.Opt{overlay.WithMetaStore(ms), overlay.AsynchronousRemove}
	if ok, err := overlayutils.SupportsIDMappedMounts(); err == nil && ok {
		opts = append(opts, overlay.WithRemapIDs)
	}
	o, err := overlay.NewSnapshotter(root, opts...)
	if err != nil {
		return nil, errors.Join(err, ms.Close())
	}
	s := &snapshotter{Snapshotter: o, ms: ms, views: views}
	views.AddUsers(s.users)
	return s, nil
}

// Prepare makes a view if key is the image volume of an artifact, else an
// ordinary active snapshot.
func (s *snapshotter) Prepare(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	mounts, err := s.createView(ctx, snapshots.KindActive, key, parent, opts)
	if errors.Is(err, artifact.ErrNotArtifact) {
		return s.Snapshotter.Prepare(ctx, key, parent, append(opts, withoutLabel)...)
	}
	return mounts, err
}

// View is Prepare, but for an ordinary snapshot that is read-only.
func (s *snapshotter) View(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	mounts, err := s.createView(ctx, snapshots.KindView, key, parent, opts)
	if errors.Is(err, artifact.ErrNotArtifact) {
		return s.Snapshotter.View(ctx, key, parent, append(opts, withoutLabel)...)
	}
	return mounts, err
}

// createView returns artifact.ErrNotArtifact for what overlayfs is to serve.
func (s *snapshotter) createView(ctx context.Context, kind snapshots.Kind, key, parent string, opts []snapshots.Opt) ([]mount.Mount, error) {
	volume := imageVolume.FindStringSubmatch(key)
	if parent != "" || volume == nil {
		return nil, artifact.ErrNotArtifact
	}
	var base snapshots.Info
	for _, opt := range opts {
		if err := opt(&base); err != nil {
			return nil, err
		}
	}
	target, err := s.views.Find(volume[1])
	if err != nil {
		return nil, fmt.Errorf("image volume: %w", err)
	}
	v, err := s.views.Acquire(ctx, target, owners(base))
	if err != nil {
		return nil, fmt.Errorf("image volume: %w", err)
	}
	defer v.Release()
	err = s.ms.WithTransaction(ctx, true, func(ctx context.Context) error {
		_, err := storage.CreateSnapshot(ctx, kind, key, "", append(opts, withLabel(v.ID.Manifest))...)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("failed to create snapshot: %w", err)
	}
	return bind(v), nil
}

func bind(v *view.View) []mount.Mount {
	return []mount.Mount{{Type: "bind", Source: v.Path, Options: []string{"bind", "ro", "nosuid", "nodev"}}}
}

// withLabel marks a snapshot as a view, withoutLabel one that is none, whatever
// the caller says.
func withLabel(manifest digest.Digest) snapshots.Opt {
	return snapshots.WithLabels(map[string]string{LabelArtifact: manifest.String()})
}

func withoutLabel(i *snapshots.Info) error {
	delete(i.Labels, LabelArtifact)
	return nil
}

// owners is the user namespace for which CRI asks for the snapshot.
func owners(i snapshots.Info) unpack.IDMap {
	return unpack.IDMap{UID: i.Labels[snapshots.LabelSnapshotUIDMapping], GID: i.Labels[snapshots.LabelSnapshotGIDMapping]}
}

// shown is what the view of i shows; false if i is no view.
func shown(i snapshots.Info) (view.ID, bool) {
	label, ok := i.Labels[LabelArtifact]
	return view.ID{Manifest: digest.Digest(label), Owners: owners(i)}, ok
}

// users lists what the views show.
func (s *snapshotter) users(ctx context.Context) (ids []view.ID, err error) {
	err = s.ms.WithTransaction(ctx, false, func(ctx context.Context) error {
		return storage.WalkInfo(ctx, func(_ context.Context, i snapshots.Info) error {
			if id, ok := shown(i); ok {
				ids = append(ids, id)
			}
			return nil
		})
	})
	if errdefs.IsNotFound(err) { // no snapshot has ever been made
		return nil, nil
	}
	return ids, err
}

// Mounts mounts the artifact of a view again if a reboot has taken the mount.
func (s *snapshotter) Mounts(ctx context.Context, key string) ([]mount.Mount, error) {
	info, err := s.Stat(ctx, key)
	if err != nil {
		return nil, err
	}
	id, ok := shown(info)
	if !ok {
		return s.Snapshotter.Mounts(ctx, key)
	}
	v, err := s.views.Acquire(ctx, ocispec.Descriptor{Digest: id.Manifest}, id.Owners)
	if err != nil {
		return nil, fmt.Errorf("image volume: %w", err)
	}
	defer v.Release()
	return bind(v), nil
}

// Usage of a view is what its Tree adds to the disk: the artifact's bytes are
// the content store's, and counted there.
func (s *snapshotter) Usage(ctx context.Context, key string) (snapshots.Usage, error) {
	info, err := s.Stat(ctx, key)
	if err != nil {
		return snapshots.Usage{}, err
	}
	id, ok := shown(info)
	if !ok {
		return s.Snapshotter.Usage(ctx, key)
	}
	tree, err := s.views.Tree(id)
	if errdefs.IsNotFound(err) { // gone with a reboot, and not asked for since
		return snapshots.Usage{}, nil
	}
	if err != nil {
		return snapshots.Usage{}, err
	}
	return snapshots.Usage{Size: tree.Size, Inodes: tree.Inodes}, nil
}

// Update keeps the labels of a view that say what it shows, and keeps ours from
// everything else.
func (s *snapshotter) Update(ctx context.Context, info snapshots.Info, fieldpaths ...string) (snapshots.Info, error) {
	old, err := s.Stat(ctx, info.Name)
	if err != nil {
		return snapshots.Info{}, err
	}
	info.Labels = maps.Clone(info.Labels)
	delete(info.Labels, LabelArtifact)
	if _, ok := shown(old); ok {
		if info.Labels == nil {
			info.Labels = map[string]string{}
		}
		for _, label := range []string{LabelArtifact, snapshots.LabelSnapshotUIDMapping, snapshots.LabelSnapshotGIDMapping} {
			delete(info.Labels, label)
			if value, ok := old.Labels[label]; ok {
				info.Labels[label] = value
			}
		}
	}
	return s.Snapshotter.Update(ctx, info, fieldpaths...)
}

// Commit refuses a view: there is nothing to commit in what nobody can write.
func (s *snapshotter) Commit(ctx context.Context, name, key string, opts ...snapshots.Opt) error {
	info, err := s.Stat(ctx, key)
	if err != nil {
		return err
	}
	if id, ok := shown(info); ok {
		return fmt.Errorf("snapshot %q shows artifact %s and cannot be committed: %w", key, id.Manifest, errdefs.ErrFailedPrecondition)
	}
	return s.Snapshotter.Commit(ctx, name, key, append(opts, withoutLabel)...)
}

// Remove removes the record; the store soon drops what no other view shows.
func (s *snapshotter) Remove(ctx context.Context, key string) error {
	if err := s.Snapshotter.Remove(ctx, key); err != nil {
		return err
	}
	s.views.Wake()
	return nil
}

// Cleanup removes what nothing uses from the disk, of both kinds.
func (s *snapshotter) Cleanup(ctx context.Context) error {
	return errors.Join(s.Snapshotter.(snapshots.Cleaner).Cleanup(ctx), s.views.Sweep(ctx))
}
