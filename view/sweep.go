// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package view

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/log"
	"github.com/fsnotify/fsnotify"
	"golang.org/x/sys/unix"
)

const (
	// sweepEvery is how long something unused can stay when no event tells of
	// it: the blob directory did not exist yet, or a watch overflowed.
	sweepEvery = time.Minute
	// settle is how long the sweep waits for more events after one. A garbage
	// collection deletes blobs by the hundred.
	settle = 200 * time.Millisecond
)

// Run sweeps until ctx ends: when Wake asks for it, when the runtime deletes a
// blob, and every minute. containerd tells a snapshotter to clean up only after
// a garbage collection that removed one of its snapshots, and deleting the
// image of an artifact removes none.
func (s *Store) Run(ctx context.Context) {
	deleted := s.watch(ctx)
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	for {
		if err := s.Sweep(ctx); err != nil && ctx.Err() == nil {
			log.G(ctx).WithError(err).Error("cannot clean up; trying again")
		}
		select {
		case <-ctx.Done():
			return
		case <-s.wake:
		case <-deleted:
			select {
			case <-time.After(settle):
			case <-ctx.Done():
				return
			}
		case <-tick.C:
		}
	}
}

// Wake asks Run for a sweep soon. It does not wait.
func (s *Store) Wake() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// watch tells, until ctx ends, that blobs have been deleted. A directory that
// does not exist yet is looked for every minute: until there is a blob there is
// nothing to sweep.
func (s *Store) watch(ctx context.Context) <-chan struct{} {
	deleted := make(chan struct{}, 1)
	go func() {
		w, err := fsnotify.NewWatcher()
		if err != nil {
			log.G(ctx).WithError(err).Warn("cannot watch for deleted blobs; looking every minute")
			return
		}
		defer func() { _ = w.Close() }()
		tick := time.NewTicker(sweepEvery)
		defer tick.Stop()
		for {
			for _, algorithm := range []string{"sha256", "sha384", "sha512"} {
				// Adding a watch again changes nothing, and there is no
				// directory of an algorithm that nobody uses.
				_ = w.Add(filepath.Join(string(s.content), "blobs", algorithm))
			}
			if !forward(ctx, w, tick.C, deleted) {
				return
			}
		}
	}()
	return deleted
}

// forward passes deletions on until the tick or, then returning false, the end.
func forward(ctx context.Context, w *fsnotify.Watcher, tick <-chan time.Time, deleted chan<- struct{}) bool {
	for {
		select {
		case <-ctx.Done():
			return false
		case <-tick:
			return true
		case e := <-w.Events:
			if !e.Has(fsnotify.Remove) && !e.Has(fsnotify.Rename) {
				continue
			}
		case <-w.Errors: //nolint:errcheck // an overflow: something may have been missed
		}
		select {
		case deleted <- struct{}{}:
		default:
		}
	}
}

// Sweep unmounts every Tree that nobody shows and removes those of them whose
// manifest the runtime has deleted, then the copies of blobs that no Tree
// retains. It asks all Users; if one cannot tell, nothing is removed.
func (s *Store) Sweep(ctx context.Context) error {
	s.mu.Lock()
	trash, err := s.sweep(ctx)
	s.mu.Unlock()
	// Deleting a large Tree takes time that no pod should wait for.
	for _, dir := range trash {
		err = errors.Join(err, os.RemoveAll(dir))
	}
	if err != nil {
		return err
	}
	return s.sweepCopies()
}

// sweep moves what goes aside, and returns where.
func (s *Store) sweep(ctx context.Context) (trash []string, err error) {
	used, err := s.used(ctx)
	if err != nil {
		return nil, err
	}
	mounts, err := list(s.mounts)
	if err != nil {
		return nil, err
	}
	for _, name := range mounts {
		if !used[name] {
			err = errors.Join(err, s.unmount(name))
		}
	}
	trees, lerr := list(s.trees)
	if err := errors.Join(err, lerr); err != nil {
		return nil, err
	}
	for _, name := range trees {
		m := manifest(name)
		if used[name] || m == "" {
			continue
		}
		if _, err := os.Lstat(s.content.Path(m)); !errors.Is(err, os.ErrNotExist) {
			continue // there, or nobody can tell: an unreadable directory deletes nothing
		}
		dir, err := os.MkdirTemp(s.trees, "new-")
		if err != nil {
			return trash, err
		}
		trash = append(trash, dir)
		if err := os.Rename(filepath.Join(s.trees, name), filepath.Join(dir, "tree")); err != nil {
			return trash, err
		}
		log.G(ctx).WithField("artifact", m).Info("removed the tree of an artifact that the runtime has deleted")
	}
	return trash, nil
}

// used is the names of all Trees that somebody shows or is about to. The caller
// holds s.mu: a claim ends only after its user is listed, so nobody is missed.
func (s *Store) used(ctx context.Context) (map[string]bool, error) {
	used := map[string]bool{}
	for name := range s.held {
		used[name] = true
	}
	for _, users := range s.users {
		ids, err := users(ctx)
		if err != nil {
			return nil, fmt.Errorf("cannot tell which artifacts are in use: %w", err)
		}
		for _, id := range ids {
			used[id.name()] = true
		}
	}
	return used, nil
}

// sweepCopies removes the copies that only this directory links to. A build
// that is about to link to one finds it gone and copies again.
func (s *Store) sweepCopies() error {
	names, err := list(s.copies)
	if err != nil {
		return err
	}
	for _, name := range names {
		p := filepath.Join(s.copies, name)
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			return &os.PathError{Op: "lstat", Path: p, Err: err}
		}
		if st.Nlink > 1 {
			continue
		}
		if err := os.Remove(p); err != nil {
			return err
		}
	}
	return nil
}
