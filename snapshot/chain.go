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

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
	"github.com/artifact-snapshotter/artifact-snapshotter/store"
	"github.com/artifact-snapshotter/artifact-snapshotter/unpack"
	"github.com/artifact-snapshotter/artifact-snapshotter/unpack/differ"
)

// LabelLayers is the label with the ID of a chain of layers. Every committed snapshot that
// retains layers of an artifact instead of having files (differ.Retained), and every view of
// one, has it. Like LabelArtifact it cannot come from an image.
const LabelLayers = "artifact-snapshotter/layers"

// Applier returns the differ with which containerd's own unpacker unpacks artifacts into the
// snapshots of New(root, trees, …), and into those of other snapshotters.
func Applier(root string, trees *store.Store) diff.Applier {
	return &differ.Applier{
		Snapshots: snapshotsDir(filepath.Join(root, "overlayfs")),
		Options:   trees.Options(),
		Scratch:   trees.Scratch,
	}
}

// snapshotsDir is the directory of the snapshots of the overlayfs snapshotter in root, which
// are named by their IDs.
func snapshotsDir(root string) string { return filepath.Join(root, "snapshots") }

// subject is what a snapshot is of.
type subject struct {
	// artifact is the digest of a manifest, layers the ID of a chain of retained layers. Both
	// are "" for an ordinary snapshot.
	artifact, layers digest.Digest
	// id is the ID of the snapshot in the database.
	id string
}

// ordinary reports whether overlayfs alone serves the snapshot.
func (s subject) ordinary() bool { return s.artifact == "" && s.layers == "" }

func (s subject) String() string {
	if s.artifact != "" {
		return fmt.Sprintf("artifact %s", s.artifact)
	}
	return fmt.Sprintf("the layers of an artifact (%s)", s.layers)
}

// subjectIn returns what the labels of a snapshot say, which is all but the ID.
func subjectIn(labels map[string]string) subject {
	return subject{artifact: digest.Digest(labels[LabelArtifact]), layers: digest.Digest(labels[LabelLayers])}
}

// subjectOf returns what the snapshot is of. The name may be "".
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

// chain returns the directories of the committed snapshot and of all below it, the lowest
// first.
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

// wanted is what a view is to be of: a manifest or an index; or, if layers is set, the chain of
// layers with that ID, which the snapshot parent and those below it retain.
type wanted struct {
	ocispec.Descriptor
	layers digest.Digest
	parent string
}

func (s *snapshotter) acquire(ctx context.Context, want wanted, owners unpack.IDMap) (*store.Reference, error) {
	if want.layers == "" {
		return s.trees.Acquire(ctx, want.Descriptor, owners)
	}
	dirs, err := s.chain(ctx, want.parent)
	if err != nil {
		return nil, err
	}
	return s.trees.AcquireLayers(ctx, want.layers, differ.Contents(dirs), owners, func(context.Context) (*artifact.Artifact, error) {
		return differ.Chain(want.layers, dirs)
	})
}

// label returns the label for the view of the tree.
func (want wanted) label(v *store.Reference) snapshots.Opt {
	if want.layers == "" {
		return withLabel(v.ID.Manifest)
	}
	return withLayers(want.layers)
}

func withLayers(id digest.Digest) snapshots.Opt {
	return snapshots.WithLabels(map[string]string{LabelLayers: id.String()})
}

// layersOf returns the ID of the layers that the active snapshot retains together with those of
// its parent; "" if it retains none.
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
	// No manifest has this digest, because the text is not JSON.
	return digest.FromString(fmt.Sprintf("layers %s %s", below.layers, own)), nil
}

// committing checks that the snapshot may be committed on top of parent, and returns the label
// that it needs.
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
		return nil, fmt.Errorf("snapshot %q is on top of %s, where layers of an image cannot be; delete the image of the artifact and pull again: %w", key, below, errdefs.ErrFailedPrecondition)
	case parent != "" && below.ordinary():
		return nil, fmt.Errorf("snapshot %q retains layers of an artifact, which cannot be on top of those of an image; delete that image and pull again: %w", key, errdefs.ErrFailedPrecondition)
	}
	return withLayers(layers), nil
}

// retainedUsage returns what the committed snapshot and the layers that it retains add to the
// disk.
func (s *snapshotter) retainedUsage(ctx context.Context, key string) (usage snapshots.Usage, err error) {
	of, err := s.subjectOf(ctx, key)
	if err != nil {
		return usage, err
	}
	if usage, err = s.Snapshotter.Usage(ctx, key); err != nil {
		return usage, err
	}
	retained, _, err := differ.LoadRetained(s.dir(of.id))
	if err != nil {
		return usage, err
	}
	return snapshots.Usage{Size: usage.Size + retained.Size, Inodes: usage.Inodes + retained.Inodes}, nil
}
