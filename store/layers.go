// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package store

import (
	"context"
	"os"

	"github.com/opencontainers/go-digest"

	"github.com/artifact-snapshotter/artifact-snapshotter/blobs"
	"github.com/artifact-snapshotter/artifact-snapshotter/unpack"
	"github.com/artifact-snapshotter/artifact-snapshotter/unpack/differ"
)

// AcquireLayers is Acquire for the layers that the snapshots in dirs keep
// (differ.Retained), the lowest first. The chain is their ID and must be that of no
// other layers and of no manifest; in the ID of the view it stands for the
// manifest.
func (s *Store) AcquireLayers(ctx context.Context, chain digest.Digest, dirs []string, owners unpack.IDMap) (*Reference, error) {
	id := ID{Manifest: chain, Owners: owners}
	release := s.hold(id.name())
	var from *source
	if !s.has(id) {
		a, err := differ.Chain(chain, dirs)
		if err != nil {
			release(false)
			return nil, err
		}
		from = &source{Artifact: a, retained: dirs}
	}
	return s.acquire(ctx, id, from, release)
}

// AddRetained excludes the Trees of AcquireLayers that k lists from the sweep even when
// nobody shows them: a mount that was made from a view may outlive the view.
func (s *Store) AddRetained(r References) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.retained = append(s.retained, r)
}

// layOut makes a Tree in dir.
func (s *Store) layOut(ctx context.Context, dir string, from *source, o unpack.Options) error {
	if from.retained != nil {
		dir, done, err := s.scratch()
		if err != nil {
			return err
		}
		defer done()
		o.Blobs = blobs.Dir(dir)
		if err := differ.LinkRetained(blobs.Dir(dir), from.retained); err != nil {
			return err
		}
	}
	_, err := unpack.Build(ctx, dir, from.Artifact, o)
	return err
}

// scratch makes an empty directory beside the Trees, to be removed by done, or
// after a crash by the sweep.
func (s *Store) scratch() (dir string, done func(), err error) {
	dir, free := s.reserve()
	done = func() {
		os.RemoveAll(dir)
		free()
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		done()
		return "", nil, err
	}
	return dir, done, nil
}

// Applier unpacks layers within the limits of the store, and keeps them in the
// snapshots of the snapshotter that has its own in dir; see [differ.Applier].
func (s *Store) Applier(dir string) *differ.Applier {
	return &differ.Applier{Snapshots: dir, Options: s.options(ID{}), Scratch: s.scratch}
}
