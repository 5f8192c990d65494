// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package store

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/unpack"
)

// Run collects garbage until ctx ends: when Wake asks for it, when the runtime deletes a blob,
// and every minute. containerd tells a snapshotter to clean up only after a garbage
// collection that removed one of its snapshots, and deleting the image of an artifact removes
// none.
func (s *Store) Run(ctx context.Context) {
	deleted := s.watch(ctx)
	tick := time.NewTicker(collectEvery)
	defer tick.Stop()
	for {
		if err := s.CollectGarbage(ctx); err != nil && ctx.Err() == nil {
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

// Wake asks Run to collect garbage soon. It does not wait.
func (s *Store) Wake() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// look notes which directories of blobs are there.
func (s *Store) look() {
	for _, dir := range s.blobDirs() {
		if _, err := os.Stat(dir); err == nil {
			s.seen.Store(dir, true)
		}
	}
}

// CollectGarbage unmounts every tree that nothing uses, and removes those of them whose
// manifest the runtime has deleted or whose owners are shifted. It also removes the trash, and
// shared contents that no tree links to. It asks all References; if one fails, nothing is
// removed.
func (s *Store) CollectGarbage(ctx context.Context) error {
	began := time.Now()
	done := &Collection{}
	done.Err = s.collectAll(ctx, done)
	done.Duration = time.Since(began)
	if s.observer.Collected != nil {
		s.observer.Collected(*done)
	}
	return done.Err
}

// collectAll collects garbage, and counts in done what it removes.
func (s *Store) collectAll(ctx context.Context, done *Collection) error {
	trash, trees, err := s.collect(ctx)
	done.Trees = trees
	// Removing a large tree takes time. Pods do not wait for it: s.mu is not held.
	for _, name := range trash {
		dir := filepath.Join(s.trees, name)
		bytes := freed(dir)
		if rerr := os.RemoveAll(dir); rerr != nil {
			err = errors.Join(err, rerr)
			continue
		}
		done.Freed += bytes
	}
	if err != nil {
		return err
	}
	bytes, err := s.collectShared()
	done.Freed += bytes
	return err
}

// collect unmounts trees and moves them to the trash. It returns the names of what to remove
// from the disk, and how many trees were moved.
func (s *Store) collect(ctx context.Context) (trash []string, removed int, err error) {
	used, retained, err := s.used(ctx)
	if err != nil {
		return nil, 0, err
	}
	defer s.mu.Unlock()
	s.look()
	mounts, err := list(s.mounts)
	if err != nil {
		return nil, 0, err
	}
	for _, name := range mounts {
		if used[name] {
			continue
		}
		if uerr := s.unmount(name); uerr != nil {
			err = errors.Join(err, uerr)
			used[name] = true // its tree is still mounted
		} else if e := s.entries[name]; e != nil {
			e.enter(unknown)
		}
	}
	trees, lerr := list(s.trees)
	err = errors.Join(err, lerr)
	for _, name := range trees {
		if m := manifest(name); m != "" && !used[name] && !retained[name] && s.useless(name, m) {
			aerr := s.moveToTrash(filepath.Join(s.trees, name))
			if aerr == nil {
				removed++
				log.G(ctx).WithFields(log.Fields{"artifact": m, "tree": name}).Info("removed a tree whose pod is gone, or whose artifact the runtime has deleted")
			}
			err = errors.Join(err, aerr)
		}
	}
	trees, lerr = list(s.trees)
	there := map[string]bool{}
	for _, name := range trees {
		there[name] = true
		if manifest(name) == "" && !s.reserved[name] {
			trash = append(trash, name)
		}
	}
	for name, e := range s.entries {
		// Whoever pulls the artifact again is not to be told of an old failure.
		if f := e.failure; f != nil && (s.now().Sub(f.at) >= tellFailure || s.deleted(e.id.Manifest)) {
			e.forgetFailure()
		}
		if e.held == 0 && e.failure == nil && !there[name] {
			delete(s.entries, name)
		}
	}
	return trash, removed, errors.Join(err, lerr)
}

// deleted reports whether the runtime has deleted the blob, and no other runtime has it. It
// cannot tell, and returns false, if a directory of blobs cannot be read, if one has
// disappeared, as on a disk that was unmounted, or if there is none. A directory that has
// never been there belongs to a runtime that is not on this node.
func (s *Store) deleted(m digest.Digest) bool {
	there := false
	for _, content := range s.content.All() {
		blob := content.Path(m)
		_, err := os.Stat(filepath.Dir(blob))
		_, seen := s.seen.Load(filepath.Dir(blob))
		switch {
		case errors.Is(err, os.ErrNotExist) && !seen:
			continue
		case err != nil:
			return false
		}
		there = true
		if _, err := os.Lstat(blob); !errors.Is(err, os.ErrNotExist) {
			return false
		}
	}
	return there
}

// useless reports whether a tree that nothing uses is of no use to the next pod either: no
// other pod has its owners, or the runtime has deleted the manifest m. If the runtime has
// pulled it again since, the tree would be a second copy of it on the disk.
func (s *Store) useless(name string, m digest.Digest) bool {
	if isShifted(name) || s.deleted(m) {
		return true
	}
	e := s.entry(ID{Manifest: m})
	if e.source == nil {
		read, err := unpack.Load(filepath.Join(s.trees, name))
		if err != nil {
			return true // another version of this program built it
		}
		e.source = &unpack.Tree{Manifest: read.Manifest, Source: read.Source} // the rest may be large
	}
	return e.source.Stale(s.content)
}

// used returns the names of all trees that are in use or claimed, and of those that are
// retained. If there is no error, it returns with s.mu held.
//
// The References are asked without s.mu, because they may list many trees, and pods wait for
// it. No use is missed: a claim ends only after the ID is listed, and s.taken has the names of
// all claims meanwhile.
func (s *Store) used(ctx context.Context) (used, retained map[string]bool, err error) {
	s.collecting.Lock()
	defer s.collecting.Unlock()
	used, retained = map[string]bool{}, map[string]bool{}
	s.mu.Lock()
	s.taken = map[string]bool{}
	for name, e := range s.entries {
		if e.held > 0 {
			s.taken[name] = true
		}
	}
	references, retainers := s.references, s.retained
	s.mu.Unlock()
	for _, asked := range []struct {
		references []References
		names      map[string]bool
	}{{references, used}, {retainers, retained}} {
		for _, list := range asked.references {
			ids, lerr := list(ctx)
			if lerr != nil {
				err = fmt.Errorf("cannot tell which trees are in use: %w", lerr)
			}
			for _, id := range ids {
				asked.names[id.name()] = true
			}
		}
	}
	s.mu.Lock()
	maps.Copy(used, s.taken)
	s.taken = nil
	if err != nil {
		s.mu.Unlock()
		return nil, nil, err
	}
	return used, retained, nil
}

// sharedDir is the directory of the contents that trees share.
func (s *Store) sharedDir() string { return filepath.Join(string(s.shared), "blobs") }

// collectShared removes the contents that no tree links to, and then the symlinks to them. A
// build that is about to link to one makes it again. It returns how many bytes of the disk
// this freed.
func (s *Store) collectShared() (bytes int64, err error) {
	algorithms, err := list(s.sharedDir())
	if err != nil {
		return 0, err
	}
	var symlinks []string
	for _, algorithm := range algorithms {
		dir := filepath.Join(s.sharedDir(), algorithm)
		names, err := list(dir)
		if err != nil {
			return bytes, err
		}
		for _, name := range names {
			p := filepath.Join(dir, name)
			fi, err := os.Lstat(p)
			switch {
			case errors.Is(err, os.ErrNotExist): // another garbage collection was quicker
			case err != nil:
				return bytes, fmt.Errorf("cannot clean up: %w", err)
			case fi.Mode().Type() == os.ModeSymlink:
				symlinks = append(symlinks, p)
			default:
				if linkCount(p) != 1 {
					continue
				}
				size := freed(p)
				if err := removeIf(p, func() bool { return linkCount(p) == 1 }); err != nil {
					return bytes, err
				}
				bytes += size
			}
		}
	}
	for _, p := range symlinks {
		if err := removeIf(p, func() bool { _, err := os.Stat(p); return errors.Is(err, os.ErrNotExist) }); err != nil {
			return bytes, err
		}
	}
	return bytes, nil
}

func linkCount(p string) uint64 {
	var st unix.Stat_t
	if err := unix.Lstat(p, &st); err != nil {
		return 0
	}
	return uint64(st.Nlink) //nolint:unconvert // it is 32 bits wide on arm64
}

func removeIf(p string, unused func() bool) error {
	if !unused() {
		return nil
	}
	if err := os.Remove(p); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("cannot clean up: %w", err)
	}
	return nil
}
