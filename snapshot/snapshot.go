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
	"time"

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

// LabelArtifact is on every view, and on every committed snapshot, of an artifact:
// the digest of the artifact's manifest. It does not begin with
// "containerd.io/snapshot/", the prefix of the labels that containerd hands on to a
// snapshotter (snapshots.FilterInheritedLabels), some of which come from the
// annotations of a pulled image; so no image can claim to be a view.
const LabelArtifact = "artifact-snapshotter/artifact"

const digestHex = `([0-9a-f]{64}|[0-9a-f]{96}|[0-9a-f]{128})`

// The keys that ask for an artifact, as a proxy snapshotter sees them: behind the
// namespace and a number (core/metadata/snapshot.go, createKey). Keys of
// extraction end in what an image's config says, so only the beginning tells who
// asks.
var (
	// unpackKey and mountKey are those of UnpackKey and MountKey.
	unpackKey = regexp.MustCompile(`^(?:[^/]+/\d+/)?` + unpackPrefix + `[^/]+/` + digestHex + `$`)
	mountKey  = regexp.MustCompile(`^(?:[^/]+/\d+/)?` + mountPrefix + `[^/]+(?:/` + digestHex + `)?$`)
	// extraction is the key with which containerd unpacks a layer
	// (snapshots.UnpackKeyFormat).
	extraction = regexp.MustCompile(`^(?:[^/]+/\d+/)?` + snapshots.UnpackKeyPrefix + `-`)
)

const (
	unpackPrefix = "artifact-unpack/"
	mountPrefix  = "artifact-mount/"
)

// UnpackKey is a key, different for each caller, that makes Prepare unpack the
// artifact whose manifest or index is target, in the way of the remote
// snapshotters: the label containerd.io/snapshot.ref is the name of the committed
// snapshot, and success is errdefs.ErrAlreadyExists. If a snapshot of that name
// shows another artifact it is errdefs.ErrFailedPrecondition, and if unpacking
// takes longer than a call should, errdefs.ErrUnavailable: then try again.
func UnpackKey(caller string, target digest.Digest) string {
	return unpackPrefix + url.PathEscape(caller) + "/" + target.Encoded()
}

// LabelTarget is on the views of MountKey: the digest of the manifest or index that
// they show. containerd hands it on because of its prefix. Images can have it, too, but
// no such key.
const LabelTarget = "containerd.io/snapshot/artifact-target"

// MountKey is the key of the view that shows at the path the artifact that LabelTarget
// names. What is at a path is found without a look at what is elsewhere.
func MountKey(path string) string { return mountPrefix + url.PathEscape(path) }

// OldMountKey is the key that a view for the artifact whose manifest or index is target
// had before there was LabelTarget.
func OldMountKey(path string, target digest.Digest) string {
	return MountKey(path) + "/" + target.Encoded()
}

// ParseMountKey returns the path of MountKey and of OldMountKey, for a key as
// containerd's clients see it; false if it is neither.
func ParseMountKey(key string) (path string, ok bool) {
	if !mountKey.MatchString(key) || !strings.HasPrefix(key, mountPrefix) {
		return "", false
	}
	path, err := url.PathUnescape(strings.Split(key, "/")[1])
	return path, err == nil
}

// unpackWait is how long a call waits for UnpackKey and MountKey: who asks can ask again.
const unpackWait = time.Second

type snapshotter struct {
	snapshots.Snapshotter        // overlayfs, for all that is no view
	root                  string // overlayfs's
	ms                    *storage.MetaStore
	views                 *store.Store
}

// New returns a Snapshotter that keeps ordinary snapshots in root/overlayfs, with the
// options, and its views in the store, and tells the store which artifacts they show.
// Close closes neither the store nor any view.
func New(root string, views *store.Store, options ...overlay.Opt) (snapshots.Snapshotter, error) {
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
	// Whether the kernel can map the owners of layers is for whoever tells containerd that it
	// can; an ID map is only kept on a snapshot that needs it, see chowned.
	o, err := overlay.NewSnapshotter(root, append(options, overlay.WithMetaStore(ms), overlay.WithRemapIDs)...)
	if err != nil {
		return nil, errors.Join(err, ms.Close())
	}
	if err := moveToTrash(root, ms); err != nil {
		return nil, errors.Join(err, o.Close())
	}
	s := &snapshotter{Snapshotter: o, root: root, ms: ms, views: views}
	views.AddReferences(func(ctx context.Context) ([]store.ID, error) {
		return s.list(ctx, func(i snapshots.Info) bool { return i.Kind != snapshots.KindCommitted })
	})
	views.AddRetained(func(ctx context.Context) ([]store.ID, error) {
		return s.list(ctx, func(i snapshots.Info) bool { return i.Labels[LabelLayers] != "" })
	})
	return explaining{s}, nil
}

// moveToTrash renames the directories of snapshots that no record names, which a crash
// leaves, to what the next Cleanup removes. overlayfs would number the next snapshot
// like the first of them, and fail, and views are numbered like it, too.
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

// Prepare makes a view if key is the image volume of an artifact, and unpacks an
// artifact for UnpackKey; else it makes an ordinary active snapshot.
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
	case !of.ordinary() && !extraction.MatchString(key):
		return nil, fmt.Errorf("snapshot %q shows %s, which cannot be written to or be the root of a container; make a view of it, or if an image has this snapshot, delete the image of the artifact (artifact-snapshotter ls) and pull that image again: %w", parent, of, errdefs.ErrFailedPrecondition)
	}
	if err := s.extend(of); err != nil {
		return nil, err
	}
	if opts, err = s.chowned(of, opts); err != nil {
		return nil, err
	}
	return s.Snapshotter.Prepare(ctx, key, parent, append(opts, withoutLabel)...)
}

// View makes a view for MountKey and of a snapshot that is an artifact, else an
// ordinary snapshot that is read-only.
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

// createView returns artifact.ErrNotArtifact for what overlayfs serves. The claim of the
// store's Reference ends: the record of the view protects it from garbage collection.
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
		ref, err = s.views.MountVolume(ctx, volume, func(ctx context.Context, ref *store.Reference) error {
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
	return bind(ref), nil
}

// record creates the record of a view, with the label that names what it is of.
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

// wanted is what a new snapshot that is no image volume is to show.
func (s *snapshotter) wanted(kind snapshots.Kind, key, parent string, of subject, base snapshots.Info) (want wanted, err error) {
	mounted := mountKey.FindStringSubmatch(key)
	switch {
	case kind != snapshots.KindView, of.ordinary() && (parent != "" || mounted == nil):
		return want, artifact.ErrNotArtifact
	case parent != "":
		return wanted{ocispec.Descriptor{Digest: of.artifact}, of.layers, parent}, nil
	}
	hex := mounted[1]
	if hex == "" {
		target, err := digest.Parse(base.Labels[LabelTarget])
		if err != nil {
			return want, fmt.Errorf("snapshot %q: the label %s must name the artifact: %v: %w", key, LabelTarget, err, errdefs.ErrInvalidArgument)
		}
		hex = target.Encoded()
	}
	want.Descriptor, err = s.views.Find(hex)
	return want, err
}

// unpack makes the committed snapshot of an artifact; see UnpackKey. The snapshot
// is a record: its Tree lives as long as the manifest, and is made again for a
// view if a reboot has taken it.
func (s *snapshotter) unpack(ctx context.Context, key, hex string, opts []snapshots.Opt) error {
	base, err := apply(opts)
	if err != nil {
		return err
	}
	ref := base.Labels[snapshots.LabelSnapshotRef]
	if ref == "" {
		return fmt.Errorf("snapshot %q: the label %s must name the snapshot to be: %w", key, snapshots.LabelSnapshotRef, errdefs.ErrInvalidArgument)
	}
	target, err := s.views.Find(hex)
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

// acquireFor is acquire for the snapshot key: whoever asks for MountKey asks again.
func (s *snapshotter) acquireFor(ctx context.Context, key string, want wanted, owners unpack.IDMap) (*store.Reference, error) {
	if mountKey.MatchString(key) {
		return s.acquireSoon(ctx, want, owners)
	}
	return s.acquire(ctx, want, owners)
}

// acquireSoon is acquire for a caller that asks again: containerd holds a lock meanwhile
// (see Rules in docs/design.md), for which other pods wait.
func (s *snapshotter) acquireSoon(ctx context.Context, want wanted, owners unpack.IDMap) (*store.Reference, error) {
	building, cancel := context.WithTimeout(ctx, unpackWait)
	defer cancel()
	v, err := s.acquire(building, want, owners)
	if err != nil && building.Err() != nil && ctx.Err() == nil {
		err = fmt.Errorf("%v: %w", err, errdefs.ErrUnavailable)
	}
	return v, err
}

// ordinary returns err as an error of who asked for an artifact by a key of ours.
func ordinary(target ocispec.Descriptor, err error) error {
	if errors.Is(err, artifact.ErrNotArtifact) {
		return fmt.Errorf("%s is an ordinary image: %w", target.Digest, errdefs.ErrInvalidArgument)
	}
	return err
}

// committed reports whether a snapshot shows the manifest that was committed as ref
// on top of nothing. One that shows anything else, in whatever namespace, is
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
		if id, ok := shown(i); ok {
			what = "artifact " + id.Manifest.String()
		}
		return fmt.Errorf("snapshot %s already shows %s, which has the same content: %w", ref, what, errdefs.ErrFailedPrecondition)
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

// apply is what opts say.
func apply(opts []snapshots.Opt) (base snapshots.Info, err error) {
	for _, opt := range opts {
		if err := opt(&base); err != nil {
			return base, err
		}
	}
	return base, nil
}

func bind(v *store.Reference) []mount.Mount {
	return []mount.Mount{{Type: "bind", Source: v.Path, Options: []string{"bind", "ro", "nosuid", "nodev"}}}
}

// withLabel marks a snapshot as one of an artifact, withoutLabel one that is none,
// whatever the caller says.
func withLabel(manifest digest.Digest) snapshots.Opt {
	return snapshots.WithLabels(map[string]string{LabelArtifact: manifest.String()})
}

func withoutLabel(i *snapshots.Info) error {
	delete(i.Labels, LabelArtifact)
	delete(i.Labels, LabelLayers)
	return nil
}

// owners is the user namespace for which CRI asks for the snapshot.
func owners(i snapshots.Info) unpack.IDMap {
	return unpack.IDMap{UID: i.Labels[snapshots.LabelSnapshotUIDMapping], GID: i.Labels[snapshots.LabelSnapshotGIDMapping]}
}

// shown is what i shows, a view or a committed snapshot of an artifact or of layers
// of one; false if it is neither.
func shown(i snapshots.Info) (store.ID, bool) {
	label, ok := i.Labels[LabelArtifact]
	if !ok {
		label, ok = i.Labels[LabelLayers]
	}
	return store.ID{Manifest: digest.Digest(label), Owners: owners(i)}, ok
}

// list is what those of the views and of the committed snapshots show that are
// wanted.
func (s *snapshotter) list(ctx context.Context, wanted func(snapshots.Info) bool) (ids []store.ID, err error) {
	err = s.ms.WithTransaction(ctx, false, func(ctx context.Context) error {
		return storage.WalkInfo(ctx, func(_ context.Context, i snapshots.Info) error {
			if id, ok := shown(i); ok && wanted(i) {
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
	want := wanted{ocispec.Descriptor{Digest: id.Manifest}, digest.Digest(info.Labels[LabelLayers]), info.Parent}
	volume := parseVolume(key)
	if volume != nil {
		ctx = volume.WithLogger(ctx)
	}
	v, err := s.acquireFor(ctx, key, want, id.Owners)
	if err != nil {
		err = fmt.Errorf("snapshot %q: %w", key, err)
		if volume != nil {
			s.views.LogRefused(ctx, volume, err)
		}
		return nil, err
	}
	if _, err := s.Stat(ctx, key); err != nil { // it has gone meanwhile
		v.Release()
		return nil, err
	}
	v.Listed()
	return bind(v), nil
}

// Usage of a view is what its Tree adds to the disk, copies of blobs included: the
// blobs themselves are the content store's, and counted there.
func (s *snapshotter) Usage(ctx context.Context, key string) (snapshots.Usage, error) {
	info, err := s.Stat(ctx, key)
	if err != nil {
		return snapshots.Usage{}, err
	}
	id, ok := shown(info)
	switch {
	case !ok:
		return s.Snapshotter.Usage(ctx, key)
	case info.Kind == snapshots.KindCommitted && info.Labels[LabelLayers] != "":
		return s.retainedUsage(ctx, key)
	}
	tree, err := s.views.Tree(id)
	if errdefs.IsNotFound(err) || errdefs.IsFailedPrecondition(err) {
		// Gone with a reboot, and not asked for since; or made by another version of
		// this program, which may have counted otherwise.
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
	delete(info.Labels, LabelLayers)
	if _, ok := shown(old); ok {
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

// Commit refuses a view: there is nothing to commit in what nobody can write. It
// labels a snapshot that keeps layers.
func (s *snapshotter) Commit(ctx context.Context, name, key string, opts ...snapshots.Opt) error {
	info, err := s.Stat(ctx, key)
	if err != nil {
		return err
	}
	if of := subjectIn(info.Labels); !of.ordinary() {
		return fmt.Errorf("snapshot %q shows %s and cannot be committed: %w", key, of, errdefs.ErrFailedPrecondition)
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

// Remove removes the record. The store unmounts what no other view needs soon.
func (s *snapshotter) Remove(ctx context.Context, key string) error {
	info, statErr := s.Stat(ctx, key)
	if err := s.Snapshotter.Remove(ctx, key); err != nil {
		return err
	}
	s.views.Wake()
	if statErr != nil {
		return nil
	}
	if id, ok := shown(info); ok && info.Kind != snapshots.KindCommitted {
		if volume := parseVolume(key); volume != nil {
			volume.LogUnmounted(ctx, id.Manifest)
		}
	}
	return nil
}

// Cleanup removes what nothing uses from the disk, of both kinds.
func (s *snapshotter) Cleanup(ctx context.Context) error {
	return errors.Join(s.Snapshotter.(snapshots.Cleaner).Cleanup(ctx), s.views.CollectGarbage(ctx))
}
