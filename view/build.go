// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package view

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"sync/atomic"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
	"github.com/artifact-snapshotter/artifact-snapshotter/unpack"
)

// progress is how many bytes of an artifact's blobs a build has done.
type progress struct {
	done  atomic.Int64
	total int64
}

// unfinished says how far the build of id is, for somebody who cannot wait.
func (s *Store) unfinished(id ID, why error) error {
	s.mu.Lock()
	p := s.progress[id.name()]
	s.mu.Unlock()
	far := ""
	if p != nil && p.total > 0 {
		far = fmt.Sprintf(" (%d %% of %d MiB)", 100*p.done.Load()/p.total, p.total>>20)
	}
	return fmt.Errorf("artifact %s is still being unpacked%s, which goes on; try again: %w", id.Manifest, far, why)
}

// serve mounts the Tree of id for all who wait for it, and keeps the reason if
// it cannot: they may have given up by then. A panic, of a decoder that has met
// what its authors have not thought of, must not end the daemon.
func (s *Store) serve(id ID, a *artifact.Artifact) (err error) {
	if !s.begin() {
		return fmt.Errorf("the snapshotter is shutting down: %w", errdefs.ErrUnavailable)
	}
	defer s.running.Done()
	defer s.hold(id.name())() // also when all who asked have given up
	defer func() {
		if p := recover(); p != nil {
			log.L.WithField("artifact", id.Manifest).Errorf("panic: %v\n%s", p, debug.Stack())
			err = fmt.Errorf("artifact %s: the snapshotter has failed, please report it with its log: panic: %v: %w", id.Manifest, p, errdefs.ErrInternal)
		}
		if err != nil && s.closing.Err() == nil {
			log.L.WithError(err).WithField("artifact", id.Manifest).Warn("cannot show an artifact")
			s.mu.Lock()
			s.failed[id.name()] = err
			s.mu.Unlock()
		}
	}()
	return s.mount(s.closing, id, a)
}

// takeFailure returns why the last build failed, once, if nobody has been told.
func (s *Store) takeFailure(name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	err := s.failed[name]
	delete(s.failed, name)
	return err
}

// begin counts a build, unless the store is closing.
func (s *Store) begin() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing.Err() != nil {
		return false
	}
	s.running.Add(1)
	return true
}

// mount makes sure that the Tree of id is there and mounted. The artifact may be
// nil if the Tree was there when it was taken hold of.
func (s *Store) mount(ctx context.Context, id ID, a *artifact.Artifact) error {
	name := id.name()
	t, err := unpack.Load(filepath.Join(s.trees, name))
	if err != nil {
		// Whatever is mounted shows another Tree, one that has been deleted.
		if err := s.unmount(name); err != nil {
			return err
		}
		if t, err = s.build(ctx, id, a); err != nil {
			return err
		}
	}
	if s.mounted(name) {
		return nil
	}
	target := s.mountpoint(name)
	if err := makeDir(target, 0o711); err != nil {
		return err
	}
	return t.Mount(target)
}

// build makes a Tree beside the others and renames it into place complete.
func (s *Store) build(ctx context.Context, id ID, a *artifact.Artifact) (*unpack.Tree, error) {
	if a == nil { // somebody has deleted it by hand
		return nil, fmt.Errorf("the tree of artifact %s has just gone, try again: %w", id.Manifest, errdefs.ErrUnavailable)
	}
	log.G(ctx).WithField("artifact", id.Manifest).Debug("building the tree")
	tmp, far := aside(), &progress{}
	for _, l := range a.Layers {
		far.total += l.Descriptor.Size
	}
	s.mu.Lock()
	s.building[tmp], s.progress[id.name()] = true, far
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.building, tmp)
		delete(s.progress, id.name())
	}()
	dir, final := filepath.Join(s.trees, tmp), filepath.Join(s.trees, id.name())
	if _, err := unpack.Build(ctx, dir, a, unpack.Options{
		Rung: s.rung, Blobs: s.content, Copies: s.copies, Owners: id.Owners,
		Progress: func(n int64) { far.done.Add(n) },
	}); err != nil {
		return nil, err
	}
	if err := s.setAside(final); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	if err := os.Rename(dir, final); err != nil {
		return nil, err
	}
	return unpack.Load(final)
}
