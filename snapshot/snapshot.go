// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

// Package snapshot is the front end for containerd: a complete Snapshotter. The image volume
// of an artifact is a read-only view of its tree in package store. An artifact that a client
// unpacked is a committed snapshot without files (UnpackKey), or, unpacked by containerd
// itself, a chain of snapshots that retain its layers (chain.go). Every other snapshot is one
// of containerd's own overlayfs snapshotter.
//
// All kinds of snapshots are records in one database, overlayfs's own. One of an artifact has
// a label that names it. Keys, labels, kinds, Walk and its filters work the same for
// all, because the same code does them.
package snapshot

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
	"github.com/artifact-snapshotter/artifact-snapshotter/store"
	"github.com/artifact-snapshotter/artifact-snapshotter/unpack"
)

// LabelArtifact is the label with the digest of the artifact's manifest. Every view and every
// committed snapshot of an artifact has it. It does not begin with "containerd.io/snapshot/",
// the prefix of the labels that containerd passes to a snapshotter
// (snapshots.FilterInheritedLabels). Some of those come from the annotations of an image that
// is pulled, so an image could otherwise claim to be a view.
const LabelArtifact = "artifact-snapshotter/artifact"

const digestHex = `([0-9a-f]{64}|[0-9a-f]{96}|[0-9a-f]{128})`

// The keys that ask for an artifact, beside those of image volumes (store.ParseVolume). A proxy
// snapshotter sees them behind the namespace and a number (core/metadata/snapshot.go,
// createKey). The key of an extraction ends in a digest from the image's config, so only its
// beginning can be trusted.
var (
	// unpackKey and mountKey match the keys of UnpackKey and MountKey.
	unpackKey = regexp.MustCompile(`^(?:[^/]+/\d+/)?` + unpackPrefix + `[^/]+/` + digestHex + `$`)
	mountKey  = regexp.MustCompile(`^(?:[^/]+/\d+/)?` + mountPrefix + `[^/]+$`)
	// extraction matches the key with which containerd unpacks a layer
	// (snapshots.UnpackKeyFormat).
	extraction = regexp.MustCompile(`^(?:[^/]+/\d+/)?` + snapshots.UnpackKeyPrefix + `-`)
)

const (
	unpackPrefix = "artifact-unpack/"
	mountPrefix  = "artifact-mount/"
)

// UnpackKey returns a key, different for each caller, that makes Prepare unpack the artifact
// whose manifest or index is target, as remote snapshotters do: the label
// containerd.io/snapshot.ref is the name of the committed snapshot, and success is
// errdefs.ErrAlreadyExists. If a snapshot of that name has other content, the error is
// errdefs.ErrFailedPrecondition. If unpacking takes longer than a call should, it is
// errdefs.ErrUnavailable, and the caller is to try again.
func UnpackKey(caller string, target digest.Digest) string {
	return unpackPrefix + url.PathEscape(caller) + "/" + target.Encoded()
}

// LabelTarget is the label of the views of MountKey with the digest of the artifact's manifest
// or index. containerd passes it on because of its prefix. Images can have the label, too, but
// not the key.
const LabelTarget = "containerd.io/snapshot/artifact-target"

// MountKey returns the key of the view that is mounted at the path. The view is of the
// artifact that LabelTarget names.
func MountKey(path string) string { return mountPrefix + url.PathEscape(path) }

// ParseMountKey returns the path in a key of MountKey, as containerd's clients see it; false if
// it is not one.
func ParseMountKey(key string) (path string, ok bool) {
	if !mountKey.MatchString(key) || !strings.HasPrefix(key, mountPrefix) {
		return "", false
	}
	path, err := url.PathUnescape(strings.TrimPrefix(key, mountPrefix))
	return path, err == nil
}

type snapshotter struct {
	snapshots.Snapshotter        // overlayfs, for every snapshot that is not a view
	root                  string // of overlayfs
	ms                    *storage.MetaStore
	trees                 *store.Store
}

// Snapshotter has Cleanup in its interface, so that embedding one promotes it.
type Snapshotter interface {
	snapshots.Snapshotter
	snapshots.Cleaner
}

// New returns a Snapshotter that keeps ordinary snapshots in root/overlayfs, with the options,
// and the trees of its views in the store. It tells the store which trees its views use, so it
// must be called before Store.Run. Close does not close the store, and keeps all mounts.
func New(root string, trees *store.Store, options ...overlay.Opt) (Snapshotter, error) {
	root = filepath.Join(root, "overlayfs")
	// overlayfs itself would make it 0700, and a pod with a user namespace could not reach its
	// root file system.
	if err := os.MkdirAll(root, 0o711); err != nil {
		return nil, err
	}
	ms, err := storage.NewMetaStore(filepath.Join(root, "metadata.db"))
	if err != nil {
		return nil, err
	}
	// The capability that containerd is told of decides whether it asks for ID maps
	// (Capabilities). A snapshot that needs none loses it, see chowned.
	o, err := overlay.NewSnapshotter(root, append(options, overlay.WithMetaStore(ms), overlay.WithRemapIDs)...)
	if err != nil {
		return nil, errors.Join(err, ms.Close())
	}
	if err := moveToTrash(root, ms); err != nil {
		return nil, errors.Join(explainInvalid(root, err), o.Close())
	}
	s := &snapshotter{Snapshotter: o, root: root, ms: ms, trees: trees}
	trees.AddReferences(func(ctx context.Context) ([]store.ID, error) {
		return s.list(ctx, func(i snapshots.Info) bool { return i.Kind != snapshots.KindCommitted })
	})
	trees.AddRetained(func(ctx context.Context) ([]store.ID, error) {
		return s.list(ctx, func(i snapshots.Info) bool { return i.Labels[LabelLayers] != "" })
	})
	return explaining{s}, nil
}

// moveToTrash renames the directories of snapshots that have no record, as a crash leaves them,
// so that the next Cleanup removes them. Otherwise overlayfs would give the number of one of
// them to the next snapshot, and fail; views have numbers from the same sequence.
func moveToTrash(root string, ms *storage.MetaStore) error {
	var recorded map[string]string
	err := ms.WithTransaction(context.Background(), false, func(ctx context.Context) (err error) {
		recorded, err = storage.IDMap(ctx)
		return err
	})
	if err != nil && !errdefs.IsNotFound(err) { // no snapshot has ever been made
		return err
	}
	dirs, err := os.ReadDir(snapshotsDir(root))
	if err != nil {
		return err
	}
	for _, d := range dirs {
		if _, ok := recorded[d.Name()]; ok || strings.HasPrefix(d.Name(), "new-") {
			continue
		}
		dir := filepath.Join(snapshotsDir(root), d.Name())
		if err := os.Rename(dir, filepath.Join(snapshotsDir(root), "new-"+rand.Text())); err != nil {
			return err
		}
	}
	return nil
}

// Prepare makes a view if key is that of the image volume of an artifact, unpacks an artifact
// for UnpackKey, and makes an ordinary active snapshot otherwise.
func (s *snapshotter) Prepare(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	if m := unpackKey.FindStringSubmatch(key); m != nil && parent == "" {
		return nil, s.unpack(ctx, key, m[1], opts)
	}
	mounts, err := s.createView(ctx, snapshots.KindActive, key, parent, opts)
	if !errors.Is(err, artifact.ErrNotArtifact) {
		return mounts, err
	}
	of, err := s.subjectOf(ctx, parent)
	switch {
	case err != nil:
		return nil, err
	case of.artifact != "", of.layers != "" && !extraction.MatchString(key):
		return nil, fmt.Errorf("snapshot %q is %s, which cannot be written to or be the root of a container; make a view of it, or if an image has this snapshot, delete the image of the artifact (artifact-snapshotter ls) and pull that image again: %w", parent, of, errdefs.ErrFailedPrecondition)
	}
	if opts, err = s.chowned(of, opts); err != nil {
		return nil, err
	}
	return s.Snapshotter.Prepare(ctx, key, parent, append(opts, withoutLabel)...)
}

// View makes a view for MountKey and of a snapshot that is an artifact, and an ordinary
// read-only snapshot otherwise.
func (s *snapshotter) View(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	mounts, err := s.createView(ctx, snapshots.KindView, key, parent, opts)
	if !errors.Is(err, artifact.ErrNotArtifact) {
		return mounts, err
	}
	of, err := s.subjectOf(ctx, parent)
	if err != nil {
		return nil, err
	}
	if opts, err = s.chowned(of, opts); err != nil {
		return nil, err
	}
	return s.Snapshotter.View(ctx, key, parent, append(opts, withoutLabel)...)
}

// createView makes a view and its record. It returns artifact.ErrNotArtifact for a snapshot that
// overlayfs is to make. The claim on the tree ends, because the record protects the tree now.
func (s *snapshotter) createView(ctx context.Context, kind snapshots.Kind, key, parent string, opts []snapshots.Opt) ([]mount.Mount, error) {
	base, err := apply(opts)
	if err != nil {
		return nil, err
	}
	of, err := s.subjectOf(ctx, parent)
	if err != nil {
		return nil, err
	}
	var ref *store.Reference
	if volume := parseVolume(key); volume != nil {
		volume.Owners = owners(base)
		if parent != "" && of.ordinary() {
			volume.Unpacked = store.IsUnpacked
		}
		ref, err = s.trees.MountVolume(ctx, volume, func(ctx context.Context, ref *store.Reference) error {
			return s.record(ctx, kind, key, parent, opts, withLabel(ref.ID.Manifest))
		})
		if err != nil {
			return nil, fmt.Errorf("image volume: %w", err)
		}
	} else {
		want, err := s.wanted(kind, key, parent, of, base)
		if err != nil {
			return nil, err
		}
		if ref, err = s.acquireFor(ctx, key, want, owners(base)); err != nil {
			return nil, ordinary(want.Descriptor, err)
		}
		if err := s.record(ctx, kind, key, parent, opts, want.label(ref)); err != nil {
			ref.Release()
			return nil, err
		}
	}
	ref.Listed()
	return []mount.Mount{unpack.Bind(ref.Path)}, nil
}

// record creates the record of a view. The label names its artifact or layers.
func (s *snapshotter) record(ctx context.Context, kind snapshots.Kind, key, parent string, opts []snapshots.Opt, label snapshots.Opt) error {
	err := s.ms.WithTransaction(ctx, true, func(ctx context.Context) error {
		_, err := storage.CreateSnapshot(ctx, kind, key, parent, append(opts, withoutLabel, label)...)
		return err
	})
	if err != nil {
		return fmt.Errorf("failed to create snapshot: %w", err)
	}
	return nil
}

// wanted returns what a view that is not an image volume is to be of.
func (s *snapshotter) wanted(kind snapshots.Kind, key, parent string, of subject, base snapshots.Info) (want wanted, err error) {
	switch {
	case kind != snapshots.KindView, of.ordinary() && (parent != "" || !mountKey.MatchString(key)):
		return want, artifact.ErrNotArtifact
	case parent != "":
		return wanted{ocispec.Descriptor{Digest: of.artifact}, of.layers, parent}, nil
	}
	target, err := digest.Parse(base.Labels[LabelTarget])
	if err != nil {
		return want, fmt.Errorf("snapshot %q: the label %s must name the artifact: %v: %w", key, LabelTarget, err, errdefs.ErrInvalidArgument)
	}
	want.Descriptor, err = s.trees.Find(target.Encoded())
	return want, err
}

// unpack makes the committed snapshot of an artifact; see UnpackKey. The snapshot is only a
// record: its tree lives as long as the manifest, and is built again for a view if a reboot has
// removed it.
func (s *snapshotter) unpack(ctx context.Context, key, hex string, opts []snapshots.Opt) error {
	base, err := apply(opts)
	if err != nil {
		return err
	}
	ref := base.Labels[snapshots.LabelSnapshotRef]
	if ref == "" {
		return fmt.Errorf("snapshot %q: the label %s must name the snapshot to be: %w", key, snapshots.LabelSnapshotRef, errdefs.ErrInvalidArgument)
	}
	target, err := s.trees.Find(hex)
	if err != nil {
		return err
	}
	v, err := s.acquireSoon(ctx, wanted{Descriptor: target}, unpack.IDMap{})
	if err != nil {
		return ordinary(target, err)
	}
	defer v.Release()
	err = s.ms.WithTransaction(ctx, true, func(ctx context.Context) error {
		if there, err := committed(ctx, ref, v.ID.Manifest); there || err != nil {
			return err
		}
		opts = append(opts, withLabel(v.ID.Manifest))
		if _, err := storage.CreateSnapshot(ctx, snapshots.KindActive, key, "", opts...); err != nil {
			return err
		}
		_, err := storage.CommitActive(ctx, key, key+"/committed", snapshots.Usage{}, opts...)
		return err
	})
	if err != nil {
		return fmt.Errorf("failed to create snapshot: %w", err)
	}
	return fmt.Errorf("snapshot %s: %w", ref, errdefs.ErrAlreadyExists)
}

// acquireFor is acquire for the snapshot key. The caller of MountKey asks again.
func (s *snapshotter) acquireFor(ctx context.Context, key string, want wanted, owners unpack.IDMap) (*store.Reference, error) {
	if mountKey.MatchString(key) {
		return s.acquireSoon(ctx, want, owners)
	}
	return s.acquire(ctx, want, owners)
}

// acquireSoon is acquire for a caller that asks again. It does not wait long, because
// containerd holds a lock meanwhile (see Rules in docs/design.md) that other pods wait for.
func (s *snapshotter) acquireSoon(ctx context.Context, want wanted, owners unpack.IDMap) (*store.Reference, error) {
	building, cancel := context.WithTimeout(ctx, unpackWait)
	defer cancel()
	v, err := s.acquire(building, want, owners)
	if err != nil && building.Err() != nil && ctx.Err() == nil {
		err = fmt.Errorf("%v: %w", err, errdefs.ErrUnavailable)
	}
	return v, err
}

// ordinary returns the error for a caller that asked for an artifact by a key of ours.
func ordinary(target ocispec.Descriptor, err error) error {
	if errors.Is(err, artifact.ErrNotArtifact) {
		return fmt.Errorf("%s is a container image: %w", target.Digest, errdefs.ErrInvalidArgument)
	}
	return err
}

// committed reports whether a snapshot of the manifest is committed as ref, without a parent.
// If one with other content is, in whatever namespace, the error is
// errdefs.ErrFailedPrecondition: containerd takes the first one that it finds
// (core/metadata/snapshot.go, createSnapshot).
func committed(ctx context.Context, ref string, manifest digest.Digest) (there bool, err error) {
	err = storage.WalkInfo(ctx, func(_ context.Context, i snapshots.Info) error {
		if i.Kind != snapshots.KindCommitted || i.Parent != "" || i.Labels[snapshots.LabelSnapshotRef] != ref {
			return nil
		}
		if i.Labels[LabelArtifact] == manifest.String() {
			there = true
			return nil
		}
		what := "the layer of an image"
		if id, ok := treeOf(i); ok {
			what = "artifact " + id.Manifest.String()
		}
		return fmt.Errorf("snapshot %s is already that of %s, which has the same content: %w", ref, what, errdefs.ErrFailedPrecondition)
	})
	if errdefs.IsNotFound(err) { // no snapshot has ever been made
		err = nil
	}
	return there, err
}

// parseVolume returns nil if the key is not that of an image volume.
func parseVolume(key string) *store.Volume {
	if v, sub, ok := store.ParseVolume(key); ok && sub == "" {
		return &v
	}
	return nil
}

// apply returns what the options set.
func apply(opts []snapshots.Opt) (base snapshots.Info, err error) {
	for _, opt := range opts {
		if err := opt(&base); err != nil {
			return base, err
		}
	}
	return base, nil
}

// withLabel marks a snapshot as one of an artifact. withoutLabel removes our labels, which a
// caller may have set.
func withLabel(manifest digest.Digest) snapshots.Opt {
	return snapshots.WithLabels(map[string]string{LabelArtifact: manifest.String()})
}

func withoutLabel(i *snapshots.Info) error {
	delete(i.Labels, LabelArtifact)
	delete(i.Labels, LabelLayers)
	return nil
}

// owners returns the user namespace that the snapshot is for.
func owners(i snapshots.Info) unpack.IDMap {
	return unpack.IDMap{UID: i.Labels[snapshots.LabelSnapshotUIDMapping], GID: i.Labels[snapshots.LabelSnapshotGIDMapping]}
}

// treeOf returns the tree of a view or of a committed snapshot; false if the snapshot is an
// ordinary one.
func treeOf(i snapshots.Info) (store.ID, bool) {
	label, ok := i.Labels[LabelArtifact]
	if !ok {
		label, ok = i.Labels[LabelLayers]
	}
	return store.ID{Manifest: digest.Digest(label), Owners: owners(i)}, ok
}

// list returns the trees of those views and committed snapshots for which wanted returns true.
func (s *snapshotter) list(ctx context.Context, wanted func(snapshots.Info) bool) (ids []store.ID, err error) {
	err = s.ms.WithTransaction(ctx, false, func(ctx context.Context) error {
		return storage.WalkInfo(ctx, func(_ context.Context, i snapshots.Info) error {
			if id, ok := treeOf(i); ok && wanted(i) {
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

// Mounts mounts the tree of a view again if a reboot has removed the mount.
func (s *snapshotter) Mounts(ctx context.Context, key string) ([]mount.Mount, error) {
	info, err := s.Stat(ctx, key)
	if err != nil {
		return nil, err
	}
	id, ok := treeOf(info)
	if !ok {
		return s.Snapshotter.Mounts(ctx, key)
	}
	want := wanted{ocispec.Descriptor{Digest: id.Manifest}, digest.Digest(info.Labels[LabelLayers]), info.Parent}
	volume := parseVolume(key)
	if volume != nil {
		ctx = volume.WithLogger(ctx)
	}
	v, err := s.acquireFor(ctx, key, want, id.Owners)
	if err != nil {
		err = fmt.Errorf("snapshot %q: %w", key, err)
		if volume != nil {
			s.trees.LogRefused(ctx, volume, err)
		}
		return nil, err
	}
	if _, err := s.Stat(ctx, key); err != nil { // it has been removed meanwhile
		v.Release()
		return nil, err
	}
	v.Listed()
	return []mount.Mount{unpack.Bind(v.Path)}, nil
}

// Usage of a view is what its tree adds to the disk, including copies of blobs. The blobs
// themselves are counted by the content store.
func (s *snapshotter) Usage(ctx context.Context, key string) (snapshots.Usage, error) {
	info, err := s.Stat(ctx, key)
	if err != nil {
		return snapshots.Usage{}, err
	}
	id, ok := treeOf(info)
	switch {
	case !ok:
		return s.Snapshotter.Usage(ctx, key)
	case info.Kind == snapshots.KindCommitted && info.Labels[LabelLayers] != "":
		return s.retainedUsage(ctx, key)
	}
	tree, err := s.trees.Tree(id)
	if errdefs.IsNotFound(err) || errdefs.IsFailedPrecondition(err) {
		// A reboot has removed it, and nobody has asked since; or another version of this
		// program built it, which may have counted differently.
		return snapshots.Usage{}, nil
	}
	if err != nil {
		return snapshots.Usage{}, err
	}
	return snapshots.Usage{Size: tree.Size, Inodes: tree.Inodes}, nil
}

// Update does not change the labels that name the artifact of a view, and does not let others
// set them.
func (s *snapshotter) Update(ctx context.Context, info snapshots.Info, fieldpaths ...string) (snapshots.Info, error) {
	old, err := s.Stat(ctx, info.Name)
	if err != nil {
		return snapshots.Info{}, err
	}
	info.Labels = maps.Clone(info.Labels)
	delete(info.Labels, LabelArtifact)
	delete(info.Labels, LabelLayers)
	if _, ok := treeOf(old); ok {
		if info.Labels == nil {
			info.Labels = map[string]string{}
		}
		for _, label := range []string{LabelArtifact, LabelLayers, snapshots.LabelSnapshotUIDMapping, snapshots.LabelSnapshotGIDMapping} {
			delete(info.Labels, label)
			if value, ok := old.Labels[label]; ok {
				info.Labels[label] = value
			}
		}
	}
	updated, err := s.Snapshotter.Update(ctx, info, fieldpaths...)
	return withoutUpperdir(updated), err
}

// Commit refuses a view, which is read-only. It labels a snapshot that retains layers.
func (s *snapshotter) Commit(ctx context.Context, name, key string, opts ...snapshots.Opt) error {
	info, err := s.Stat(ctx, key)
	if err != nil {
		return err
	}
	if of := subjectIn(info.Labels); !of.ordinary() {
		return fmt.Errorf("snapshot %q is a view of %s and cannot be committed: %w", key, of, errdefs.ErrFailedPrecondition)
	}
	base, err := apply(opts)
	if err != nil {
		return err
	}
	label, err := s.committing(ctx, key, cmp.Or(info.Parent, base.Parent))
	if err != nil {
		return err
	}
	return s.Snapshotter.Commit(ctx, name, key, append(opts, withoutLabel, label)...)
}

// Remove removes the record. The store soon unmounts the tree if no other view uses it.
func (s *snapshotter) Remove(ctx context.Context, key string) error {
	info, statErr := s.Stat(ctx, key)
	if err := s.Snapshotter.Remove(ctx, key); err != nil {
		return err
	}
	s.trees.Wake()
	if statErr != nil {
		return nil
	}
	if id, ok := treeOf(info); ok && info.Kind != snapshots.KindCommitted {
		if volume := parseVolume(key); volume != nil {
			volume.LogUnmounted(ctx, id.Manifest)
		}
	}
	return nil
}

// Cleanup removes from the disk what no snapshot of either kind uses.
func (s *snapshotter) Cleanup(ctx context.Context) error {
	return errors.Join(s.Snapshotter.(snapshots.Cleaner).Cleanup(ctx), s.trees.CollectGarbage(ctx))
}
