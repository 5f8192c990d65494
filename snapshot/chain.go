// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package snapshot

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/artifact-snapshotter/artifact-snapshotter/store"
	"github.com/artifact-snapshotter/artifact-snapshotter/unpack"
	"github.com/artifact-snapshotter/artifact-snapshotter/unpack/differ"
)

// LabelLayers is on every committed snapshot that keeps layers of an artifact
// instead of having files (differ.Retained), and on every view of one: the ID of the
// chain of layers. Like LabelArtifact it cannot come from an image.
const LabelLayers = "artifact-snapshotter/layers"

// Applier is the differ by which containerd's own unpacker unpacks artifacts into
// the snapshots of New(root, views, …), and into those of other snapshotters.
func Applier(root string, views *store.Store) diff.Applier {
	return views.Applier(snapshotsDir(filepath.Join(root, "overlayfs")))
}

// snapshotsDir is where the overlayfs snapshotter in root has its snapshots, by
// their IDs.
func snapshotsDir(root string) string { return filepath.Join(root, "snapshots") }

// subject is what a committed snapshot shows.
type subject struct {
	// artifact is the manifest of one; layers is the ID of a chain.
	artifact, layers digest.Digest
	// id is the snapshot's in the database.
	id string
}

// ordinary reports whether it is what overlayfs serves.
func (s subject) ordinary() bool { return s.artifact == "" && s.layers == "" }

func (s subject) String() string {
	if s.artifact != "" {
		return fmt.Sprintf("artifact %s", s.artifact)
	}
	return fmt.Sprintf("the layers of an artifact (%s)", s.layers)
}

// subjectIn is what the labels of a snapshot say; the ID is not in them.
func subjectIn(labels map[string]string) subject {
	return subject{artifact: digest.Digest(labels[LabelArtifact]), layers: digest.Digest(labels[LabelLayers])}
}

// subjectOf is what the snapshot name shows; name may be "".
func (s *snapshotter) subjectOf(ctx context.Context, name string) (of subject, err error) {
	if name == "" {
		return of, nil
	}
	err = s.ms.WithTransaction(ctx, false, func(ctx context.Context) error {
		id, info, _, err := storage.GetInfo(ctx, name)
		of = subjectIn(info.Labels)
		of.id = id
		return err
	})
	return of, err
}

func (s *snapshotter) dir(id string) string { return filepath.Join(snapshotsDir(s.root), id) }

// chain is the directories of the committed snapshot name and of all below it, the
// lowest first.
func (s *snapshotter) chain(ctx context.Context, name string) (dirs []string, err error) {
	err = s.ms.WithTransaction(ctx, false, func(ctx context.Context) error {
		for name != "" {
			id, info, _, err := storage.GetInfo(ctx, name)
			if err != nil {
				return err
			}
			dirs, name = append(dirs, s.dir(id)), info.Parent
		}
		return nil
	})
	slices.Reverse(dirs)
	return dirs, err
}

// wanted is what a view is to show: a manifest or an index; or, if layers is set,
// all that the snapshot parent and those below it keep, which has that ID.
type wanted struct {
	ocispec.Descriptor
	layers digest.Digest
	parent string
}

func (s *snapshotter) acquire(ctx context.Context, want wanted, owners unpack.IDMap) (*store.Reference, error) {
	if want.layers == "" {
		return s.views.Acquire(ctx, want.Descriptor, owners)
	}
	dirs, err := s.chain(ctx, want.parent)
	if err != nil {
		return nil, err
	}
	return s.views.AcquireLayers(ctx, want.layers, dirs, owners)
}

// label marks a snapshot as a view that is v.
func (want wanted) label(v *store.Reference) snapshots.Opt {
	if want.layers == "" {
		return withLabel(v.ID.Manifest)
	}
	return withLayers(want.layers)
}

func withLayers(id digest.Digest) snapshots.Opt {
	return snapshots.WithLabels(map[string]string{LabelLayers: id.String()})
}

// extend prepares the snapshot of an artifact for layers on top of it, for which
// overlayfs and the Applier look at its directory. It has none before.
func (s *snapshotter) extend(of subject) error {
	if of.artifact == "" {
		return nil
	}
	dir := s.dir(of.id)
	if err := os.MkdirAll(filepath.Join(dir, "fs"), 0o755); err != nil {
		return err
	}
	return differ.Promise(dir, of.artifact)
}

// layersOf is the ID of the layers that the active snapshot key keeps together with
// those of its parent; "" if it keeps none.
func (s *snapshotter) layersOf(ctx context.Context, key string, below subject) (digest.Digest, error) {
	active, err := s.subjectOf(ctx, key)
	if err != nil {
		return "", err
	}
	_, own, err := differ.LoadRetained(s.dir(active.id))
	if errors.Is(err, os.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	// No manifest has such a digest: this is no JSON.
	return digest.FromString(fmt.Sprintf("layers %s%s %s", below.artifact, below.layers, own)), nil
}

// committing checks what may be committed on top of parent, and returns an option
// with the label that belongs on it.
func (s *snapshotter) committing(ctx context.Context, key, parent string) (snapshots.Opt, error) {
	below, err := s.subjectOf(ctx, parent)
	if err != nil {
		return nil, err
	}
	layers, err := s.layersOf(ctx, key, below)
	switch {
	case err != nil:
		return nil, err
	case layers == "" && below.ordinary():
		return func(*snapshots.Info) error { return nil }, nil
	case layers == "":
		return nil, fmt.Errorf("snapshot %q is on top of %s, which the layers of an image cannot be; delete the image of the artifact and pull again: %w", key, below, errdefs.ErrFailedPrecondition)
	case parent != "" && below.ordinary():
		return nil, fmt.Errorf("snapshot %q keeps layers of an artifact, which cannot be on top of those of an image; delete that image and pull again: %w", key, errdefs.ErrFailedPrecondition)
	}
	return withLayers(layers), nil
}

// retainedUsage is what the committed snapshot key keeps adds to the disk.
func (s *snapshotter) retainedUsage(ctx context.Context, key string) (usage snapshots.Usage, err error) {
	of, err := s.subjectOf(ctx, key)
	if err != nil {
		return usage, err
	}
	if usage, err = s.Snapshotter.Usage(ctx, key); err != nil {
		return usage, err
	}
	kept, _, err := differ.LoadRetained(s.dir(of.id))
	if err != nil {
		return usage, err
	}
	return snapshots.Usage{Size: usage.Size + kept.Size, Inodes: usage.Inodes + kept.Inodes}, nil
}
