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
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"

	"github.com/artifact-snapshotter/artifact-snapshotter/unpack"
)

// build builds the tree of e. p is nil unless the runtime still receives the blobs.
func (s *Store) build(ctx context.Context, e *entry, from *source, p *pull) (t *unpack.Tree, b *Build, err error) {
	a, err := from.get(ctx)
	if err != nil {
		return nil, nil, err
	}
	ctx, end := span(ctx, "tree.build", e.id.Manifest)
	b = &Build{Modes: s.modes, OnPull: p != nil}
	began := time.Now()
	o := s.Options()
	o.Owners = e.id.Owners
	if e.id.shifted() && s.modes.Raw == unpack.Overlay && s.modes.Tar == unpack.Extract {
		t, err = s.shift(ctx, e.id, from, o)
	} else {
		far := &progress{}
		for _, l := range a.Layers {
			far.total += l.Descriptor.Size
		}
		o.Progress = func(n int64) { far.done.Add(n) }
		var mu sync.Mutex // guards b.Bytes until all goroutines of the build have ended
		b.Bytes = map[unpack.Retention]int64{}
		o.Counted = func(how unpack.Retention, n int64) {
			mu.Lock()
			b.Bytes[how] += n
			mu.Unlock()
			s.counted(how, n)
		}
		if p != nil {
			o.Await = func(ctx context.Context, blob digest.Digest) error { return s.await(ctx, p, blob) }
		}
		log.G(ctx).WithField("artifact", e.id.Manifest).Debug("building the tree")
		s.setProgress(e, far)
		t, err = s.publish(e.id, func(dir string) (*unpack.Tree, error) { return s.layOut(ctx, dir, from, o) })
		s.setProgress(e, nil)
	}
	b.Duration, b.Err = time.Since(began), err
	end(err)
	s.observe(ctx, e.id, *b)
	return t, b, err
}

// layOut makes a tree in dir.
func (s *Store) layOut(ctx context.Context, dir string, from *source, o unpack.Options) (*unpack.Tree, error) {
	if from.blobs != nil {
		o.Blobs = from.blobs
	}
	return unpack.Build(ctx, dir, from.artifact, o)
}

func (s *Store) setProgress(e *entry, p *progress) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e.progress = p
}

// Options are those of the trees that the store builds, without owners. Whatever else uses
// them is within the store's limits and counted.
func (s *Store) Options() unpack.Options {
	return unpack.Options{Modes: s.modes, Blobs: s.content, Shared: s.shared, Budget: s.budget, Counted: s.counted}
}

func (s *Store) counted(how unpack.Retention, n int64) {
	if s.observer.Counted != nil {
		s.observer.Counted(how, n)
	}
}

// shift makes the tree of id from the one whose owners are not shifted, so that archives are
// extracted once. That one is built first if it is not there.
func (s *Store) shift(ctx context.Context, id ID, from *source, o unpack.Options) (*unpack.Tree, error) {
	plain := id.plain()
	defer s.hold(plain)(false)
	s.mu.Lock()
	w, err := s.begin(ctx, s.entry(plain), from, false, nil)
	s.mu.Unlock()
	if err != nil {
		return nil, err
	}
	if <-w.done; w.err != nil {
		return nil, w.err
	}
	unshifted, err := unpack.Load(s.path(plain))
	return s.publish(id, func(dir string) (*unpack.Tree, error) {
		if err == nil && unshifted.CanShift() {
			return unshifted.Shift(ctx, dir, o)
		}
		return s.layOut(ctx, dir, from, o) // it is in use, and of another version or of other modes
	})
}

// mount mounts the tree of id for all who use it.
func (s *Store) mount(ctx context.Context, id ID, t *unpack.Tree) error {
	target := s.mountpoint(id.name())
	if err := MakeDir(target, 0o711); err != nil {
		return unpack.OutOfSpace(err, "the snapshotter's state directory")
	}
	ctx, end := span(ctx, "tree.mount", id.Manifest)
	err := t.Mount(ctx, target)
	end(err)
	return err
}

func (s *Store) path(id ID) string { return filepath.Join(s.trees, id.name()) }

// reserve returns the path of a directory to be made beside the trees. Garbage collection
// leaves it alone until done is called.
func (s *Store) reserve() (dir string, done func()) {
	name := newTrashName()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.reserved[name] = true
	return filepath.Join(s.trees, name), func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.reserved, name)
	}
}

// Scratch makes an empty directory for temporary files beside the trees. done removes it, or
// after a crash garbage collection does.
func (s *Store) Scratch() (dir string, done func(), err error) {
	dir, free := s.reserve()
	done = func() {
		os.RemoveAll(dir)
		free()
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		done()
		return "", nil, steady{fmt.Errorf("no directory for temporary files: %w", unpack.OutOfSpace(err, "the snapshotter's root"))}
	}
	return dir, done, nil
}

// publish lets build make a tree beside the others, and renames it into place when it is
// complete. It never replaces a tree that is mounted, because pods read its files.
func (s *Store) publish(id ID, build func(dir string) (*unpack.Tree, error)) (t *unpack.Tree, err error) {
	dir, done := s.reserve()
	defer done()
	defer func() {
		if err != nil {
			err = steady{err}
		}
	}()
	if t, err = build(dir); err != nil {
		return nil, err
	}
	if isMounted, err := s.mounted(id.name()); err != nil {
		return nil, err
	} else if isMounted {
		return nil, fmt.Errorf("pods still use another tree of artifact %s; delete them and try again: %w", id.Manifest, errdefs.ErrFailedPrecondition)
	}
	if err := s.moveToTrash(s.path(id)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	if err := t.Rename(s.path(id)); err != nil {
		return nil, err
	}
	s.mu.Lock()
	s.entry(id).source = nil
	s.mu.Unlock()
	return t, nil
}

// steady is an error of a build, whose directory has another name at each try. Kubernetes
// counts errors with the same text as one event.
type steady struct{ error }

var trashName = regexp.MustCompile(`\bnew-[a-z2-7]{26}\b`) // rand.Text is base 32

func (e steady) Error() string { return trashName.ReplaceAllString(e.error.Error(), "new-*") }

func (e steady) Unwrap() error { return e.error }
