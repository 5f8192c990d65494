// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package store

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
	"github.com/artifact-snapshotter/artifact-snapshotter/unpack"
)

// source is what a Tree is built from: an artifact, whose blobs are the runtime's
// unless snapshots keep them.
type source struct {
	*artifact.Artifact
	// kept are the directories of those snapshots; nil if they are the runtime's.
	retained []string
}

// progress is how many bytes of an artifact's blobs a build has done.
type progress struct {
	done  atomic.Int64
	total int64
}

// unfinished says how far the build of id is, for somebody who cannot wait, or why the
// one before it failed if nobody has been told.
func (s *Store) unfinished(id ID, why error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	far, before := "", ""
	if p := s.progress[id.Manifest]; p != nil && p.total > 0 {
		far = fmt.Sprintf(" (%d %% of %.1f MiB)", 100*p.done.Load()/p.total, float64(p.total)/(1<<20))
	}
	if f := s.failed[id.name()]; f != nil && s.now().Sub(f.at) < keepFailure {
		if !f.told {
			f.told = true
			return f.err
		}
		before = fmt.Sprintf(", after a try that failed (%v)", f.err)
	}
	return &UnfinishedError{fmt.Errorf("artifact %s is still being unpacked%s%s, which goes on; try again: %w", id.Manifest, far, before, why)}
}

// failure is why a build failed, after all who had asked for it had given up.
type failure struct {
	err  error
	at   time.Time
	told bool
}

// keepFailure is for how long it is told: kubelet asks again within 5 minutes
// (pkg/kubelet/kubelet.go, MaxCrashLoopBackOff).
const keepFailure = 5 * time.Minute

// UnfinishedError is the error of a request that could not wait until a Tree was
// built. The build goes on.
type UnfinishedError struct{ err error }

// Error implements error.
func (e *UnfinishedError) Error() string { return e.err.Error() }

// Unwrap returns why the request could not wait: the error of its context, or
// errdefs.ErrUnavailable.
func (e *UnfinishedError) Unwrap() error { return errors.Unwrap(e.err) }

// served is a Tree that is mounted.
type served struct {
	modes unpack.Modes
	built *Build // nil if it was there
}

// serve mounts the Tree of id for all who wait for it, and keeps the reason if
// it cannot: they may have given up by then.
func (s *Store) serve(ctx context.Context, id ID, from *source) (_ served, err error) {
	if !s.begin() {
		return served{}, fmt.Errorf("the snapshotter is shutting down: %w", errdefs.ErrUnavailable)
	}
	defer s.running.Done()
	defer s.hold(id.name())(false) // also when all who asked have given up
	defer func() {
		if err == nil {
			s.forgetFailure(id.name()) // of an earlier one
		} else if s.closing.Err() == nil {
			// Who asks, or asks again, is told, and tells it at a level that is read.
			log.G(ctx).WithError(err).WithField("artifact", id.Manifest).Debug("cannot show an artifact")
			s.mu.Lock()
			s.failed[id.name()] = &failure{err: err, at: s.now()}
			s.mu.Unlock()
		}
	}()
	return s.mount(ctx, id, from)
}

// forgetFailure is called when the reason is known, or of no interest any more.
func (s *Store) forgetFailure(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.failed, name)
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

// load returns the Tree of id, nil if there is none, and whether one is mounted. If there
// is none and one is mounted, another version of this program made it, and it stays until
// its last pod ends.
func (s *Store) load(id ID) (t *unpack.Tree, mounted bool, err error) {
	t, lerr := unpack.Load(s.path(id))
	mounted, err = s.mounted(id.name())
	if lerr == nil || err != nil {
		return t, mounted, err
	}
	if errors.Is(lerr, os.ErrNotExist) {
		// Whatever is mounted shows another Tree, one that has been deleted.
		return nil, false, s.unmount(id.name())
	}
	return nil, mounted, nil
}

// mount makes sure that the Tree of id is there and mounted. What it is built from
// may be nil if the Tree was there when it was taken hold of.
func (s *Store) mount(ctx context.Context, id ID, from *source) (done served, err error) {
	t, mounted, err := s.load(id)
	switch {
	case err != nil:
		return done, err
	case t == nil && mounted:
		return done, nil
	case t == nil:
		if t, done.built, err = s.build(ctx, id, from, nil); err != nil {
			return done, err
		}
	}
	done.modes = t.Modes
	if mounted {
		return done, nil
	}
	target := s.mountpoint(id.name())
	if err := MakeDir(target, 0o711); err != nil {
		return done, unpack.OutOfSpace(err, "the snapshotter's state directory")
	}
	ctx, end := span(ctx, "tree.mount", id.Manifest)
	err = t.Mount(ctx, target)
	end(err)
	return done, err
}

// build makes the Tree of id. await, if it is not nil, waits for blobs that the
// runtime may not have yet: the build is an early one.
func (s *Store) build(ctx context.Context, id ID, from *source, await func(context.Context, digest.Digest) error) (t *unpack.Tree, b *Build, err error) {
	if from == nil { // somebody has deleted it by hand
		return nil, nil, fmt.Errorf("the tree of artifact %s has just gone, try again: %w", id.Manifest, errdefs.ErrUnavailable)
	}
	ctx, end := span(ctx, "tree.build", id.Manifest)
	b = &Build{Modes: s.modes, OnPull: await != nil}
	began := time.Now()
	t, b.Bytes, err = s.make(ctx, id, from, await)
	b.Duration, b.Err = time.Since(began), err
	end(err)
	s.observe(ctx, id, *b)
	return t, b, err
}

// make is build. It also returns how many bytes it has come by.
func (s *Store) make(ctx context.Context, id ID, from *source, await func(context.Context, digest.Digest) error) (*unpack.Tree, map[unpack.Retention]int64, error) {
	if id.shifted() && s.modes.Raw == unpack.Overlay && s.modes.Tar == unpack.Extract {
		t, err := s.shift(ctx, id, from)
		return t, nil, err
	}
	far := &progress{}
	for _, l := range from.Layers {
		far.total += l.Descriptor.Size
	}
	s.mu.Lock()
	s.progress[id.Manifest] = far
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.progress, id.Manifest)
	}()
	log.G(ctx).WithField("artifact", id.Manifest).Debug("building the tree")
	got := newCounts()
	t, err := s.publish(id, func(dir string) error {
		o := s.options(id)
		o.Progress = func(n int64) { far.done.Add(n) }
		o.Await = await
		o.Counted = func(how unpack.Retention, n int64) {
			got[how].Add(n)
			s.counted(how, n)
		}
		return s.layOut(ctx, dir, from, o)
	})
	return t, got.bytes(), err
}

func (s *Store) options(id ID) unpack.Options {
	return unpack.Options{Modes: s.modes, Blobs: s.content, Shared: s.shared, Budget: s.budget, Owners: id.Owners, Counted: s.counted}
}

func (s *Store) counted(how unpack.Retention, n int64) {
	if s.observer.Counted != nil {
		s.observer.Counted(how, n)
	}
}

// shift makes the Tree of id from the one whose owners are not shifted, which is
// built if it is not there, by whoever needs it first: tars are extracted once.
func (s *Store) shift(ctx context.Context, id ID, from *source) (*unpack.Tree, error) {
	plain := ID{Manifest: id.Manifest}
	defer s.hold(plain.name())(false)
	_, err, _ := s.builds.Do(plain.name(), func() (any, error) { // or a request for the plain one that we join
		t, mounted, err := s.load(plain)
		if t == nil && !mounted && err == nil {
			_, _, err = s.build(ctx, plain, from, nil)
		}
		return nil, err
	})
	if err != nil {
		return nil, err
	}
	unshifted, _, err := s.load(plain)
	if err != nil {
		return nil, err
	}
	return s.publish(id, func(dir string) error {
		if unshifted != nil && unshifted.CanShift() {
			_, err := unshifted.Shift(ctx, dir, s.options(id))
			return err
		}
		return s.layOut(ctx, dir, from, s.options(id)) // it is of before a change of the modes or of the format, and still shown
	})
}

func (s *Store) path(id ID) string { return filepath.Join(s.trees, id.name()) }

// reserve returns the path of a directory to be made beside the Trees, which the
// sweep leaves alone until done.
func (s *Store) reserve() (dir string, done func()) {
	tmp := newTrashName()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.building[tmp] = true
	return filepath.Join(s.trees, tmp), func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.building, tmp)
	}
}

// publish has a Tree made beside the others and renames it into place complete. It
// never takes the place of one that is mounted: pods read its files.
func (s *Store) publish(id ID, build func(dir string) error) (_ *unpack.Tree, err error) {
	dir, done := s.reserve()
	defer done()
	defer func() {
		if err != nil {
			err = steady{err}
		}
	}()
	if err := build(dir); err != nil {
		return nil, err
	}
	if mounted, err := s.mounted(id.name()); err != nil {
		return nil, err
	} else if mounted {
		return nil, fmt.Errorf("pods still show another tree of artifact %s; delete them and try again: %w", id.Manifest, errdefs.ErrFailedPrecondition)
	}
	if err := s.moveToTrash(s.path(id)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	if err := os.Rename(dir, s.path(id)); err != nil {
		return nil, err
	}
	s.mu.Lock()
	delete(s.sources, id.name())
	s.mu.Unlock()
	return unpack.Load(s.path(id))
}

// steady is an error of a build, whose directory has another name at each try: Kubernetes
// counts errors with one text as one event.
type steady struct{ error }

var trashName = regexp.MustCompile(`\bnew-[a-z2-7]{26}\b`) // rand.Text is base 32

func (e steady) Error() string { return trashName.ReplaceAllString(e.error.Error(), "new-*") }

func (e steady) Unwrap() error { return e.error }
