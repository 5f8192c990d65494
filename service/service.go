// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

// Package service puts the parts of one node together: one store of artifacts, containerd's
// Snapshotter and diff.Applier on top of it, and a watcher of containerd's images, so that
// an artifact is refused if containerd may have mistaken another image for it.
//
// Package plugin runs a Service inside containerd, package daemon runs one in a process of
// its own. How it is configured, served and observed is their business: this package knows
// no TOML, flags, gRPC servers, metrics exporters, NRI or CSI.
package service

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/blobs"
	"github.com/artifact-snapshotter/artifact-snapshotter/images"
	"github.com/artifact-snapshotter/artifact-snapshotter/internal/retry"
	"github.com/artifact-snapshotter/artifact-snapshotter/snapshot"
	"github.com/artifact-snapshotter/artifact-snapshotter/store"
)

// DirMode is the mode of the directories above mounts: the mapped IDs of a pod with a user
// namespace may search them, and nothing more. containerd's own root and state have it, too.
const DirMode = 0o711

// socketInterval is the time between two checks for containerd's socket.
const socketInterval = 200 * time.Millisecond

// Service is a Snapshotter and a diff.Applier with everything that they need on a node.
type Service struct {
	snapshot.Snapshotter
	diff.Applier

	config     Config
	store      *store.Store
	watcher    *images.Watcher
	background sync.WaitGroup
	closers    []func() error // Close calls them in reverse order, once
	once       sync.Once
}

// Open opens the service that cfg describes. Nothing runs in the background before Start.
//
// One root, and one state directory, belong to one process at a time: for a second process
// the error is errdefs.ErrFailedPrecondition.
func Open(ctx context.Context, cfg Config, observer store.Observer) (_ *Service, err error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	modes, err := cfg.modes()
	if err != nil {
		return nil, err
	}
	s := &Service{config: cfg}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	// A second process on the state directory would unmount the volumes of the first
	// one's pods.
	for _, d := range []struct{ what, path, lock string }{{"root", cfg.Root, "lock"}, {"state directory", cfg.State, "state.lock"}} {
		if err := store.MakeDir(d.path, DirMode); err != nil {
			return nil, fmt.Errorf("create %s: %w", d.what, err)
		}
		lock, err := lockDir(d.what, d.path, d.lock)
		if err != nil {
			return nil, err
		}
		s.closers = append(s.closers, lock.Close)
	}

	s.watcher = images.NewWatcher(cfg.ContainerdAddress, blobs.Dir(cfg.ContentRoot))
	content := cfg.Blobs()
	if cfg.Pulled != "" {
		content = append(content, cfg.Pulled)
	}
	s.store, err = store.Open(ctx, store.Config{
		Root:             cfg.Root,
		State:            cfg.State,
		Content:          content,
		Modes:            modes,
		DirectIO:         cfg.NeedsDirectIO(),
		Limits:           cfg.Limits(),
		DecompressOnPull: cfg.DecompressOnPull,
		Images:           s.watcher,
		Observer:         observer,
	})
	if err != nil {
		return nil, err
	}
	s.closers = append(s.closers, s.store.Close)
	s.Snapshotter, err = snapshot.New(cfg.Root, s.store, cfg.Overlayfs.Options()...)
	if err != nil {
		return nil, fmt.Errorf("open the snapshots in %s: %w", cfg.Root, err)
	}
	s.closers = append(s.closers, s.Snapshotter.Close)
	s.Applier = snapshot.Applier(cfg.Root, s.store)
	return s, nil
}

// Start starts the background work: garbage collection, the watcher of containerd's images,
// the loop that pre-creates the empty blob, and the frontEnds. It runs until Close, or until
// ctx ends. The References of every front end must have been added to the store before.
//
// If containerd is optional, its socket need not exist on this node: as long as it does not,
// nothing is logged and Watcher().Running() is false.
func (s *Service) Start(ctx context.Context, containerdOptional bool, frontEnds ...func(context.Context)) {
	ctx, cancel := context.WithCancel(ctx)
	for _, run := range frontEnds {
		s.background.Go(func() { run(ctx) })
	}
	s.background.Go(func() { s.store.Run(ctx) })
	s.background.Go(func() {
		if containerdOptional && !awaitSocket(ctx, s.config.ContainerdAddress) {
			return
		}
		s.background.Go(func() { s.watcher.Run(ctx) })
		s.background.Go(func() {
			images.KeepEmptyBlob(ctx, s.config.ContainerdAddress, s.config.Namespaces, images.EmptyBlobInterval)
		})
	})
	s.closers = append(s.closers, func() error {
		cancel()
		s.background.Wait()
		return nil
	})
}

// awaitSocket waits until the socket exists, and returns false if ctx ends before.
func awaitSocket(ctx context.Context, address string) bool {
	for {
		if _, err := os.Stat(address); err == nil {
			return true
		}
		if retry.Sleep(ctx, socketInterval) != nil {
			return false
		}
	}
}

// Store returns the node's store, for further front ends and for metrics.
func (s *Service) Store() *store.Store { return s.store }

// Watcher returns the watcher of containerd's images.
func (s *Service) Watcher() *images.Watcher { return s.watcher }

// Close ends the background work and closes the snapshotter and the store. Mounts stay, so
// that running pods can read on.
func (s *Service) Close() (err error) {
	s.once.Do(func() {
		for i := len(s.closers) - 1; i >= 0; i-- {
			err = errors.Join(err, s.closers[i]())
		}
	})
	return err
}

// lockDir takes the lock of a directory. It is held until the file is closed, so it cannot
// outlive the process.
func lockDir(what, path, name string) (*os.File, error) {
	lock, err := os.OpenFile(filepath.Join(path, name), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock %s: %w", what, err)
	}
	err = unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		err = fmt.Errorf("%s %s belongs to another running artifact-snapshotter; stop it, or choose another %s: %w",
			what, path, what, errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		return nil, errors.Join(err, lock.Close())
	}
	return lock, nil
}
