// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

// Package plugin connects the snapshotter with containerd: its configuration,
// the gRPC server of the proxy plugin, and, for a containerd that is compiled
// with
//
//	import _ "github.com/artifact-snapshotter/artifact-snapshotter/plugin"
//
// the registration as snapshotter "artifact". It also plants the empty blob,
// without which containerd cannot pull an artifact that has an empty file, and
// watches containerd's images, so that no artifact is shown for another; and it is
// the plugin of NRI (package nri) for runtimes that ask no snapshotter.
//
// What an artifact is and how it is shown is the business of the packages
// below; flags are that of cmd/artifact-snapshotter.
package plugin

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/blobs"
	"github.com/artifact-snapshotter/artifact-snapshotter/images"
	"github.com/artifact-snapshotter/artifact-snapshotter/nri"
	"github.com/artifact-snapshotter/artifact-snapshotter/snapshot"
	"github.com/artifact-snapshotter/artifact-snapshotter/store"
)

// dirMode lets the mapped ids of a pod with a user namespace search the
// directories above what is mounted into it, and nothing more; containerd's
// own root and state have it, too.
const dirMode = 0o711

// socketInterval is how often awaitSocket looks.
const socketInterval = 200 * time.Millisecond

// Open opens the snapshotter that cfg describes, which is a diff.Applier, too, and starts what runs beside
// it: the sweep of unused artifacts, the watch of containerd's images and the
// planting of the empty blob. They run until Close, or until ctx ends.
//
// One root, and one state directory, belong to one process at a time: another one gets
// errdefs.ErrFailedPrecondition. Close leaves alone what running pods read.
func Open(ctx context.Context, cfg Config) (snapshots.Snapshotter, error) {
	s, err := open(ctx, cfg, newMetrics(""), nil)
	if err != nil {
		return nil, err
	}
	return s, nil
}

// open is Open with metrics, and for a daemon. Who is told whether a runtime has taken the
// plugin of NRI may be nil.
func open(ctx context.Context, cfg Config, m *metrics, connected func(bool)) (_ *opened, err error) {
	cfg = cfg.Discover(ctx)
	if err := cfg.validateSnapshotter(); err != nil {
		return nil, err
	}
	modes, err := cfg.modes()
	if err != nil {
		return nil, err
	}
	s := &opened{}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	// Two on one state directory would unmount what the other's pods are shown.
	for _, d := range []struct{ what, path, lock string }{{"root", cfg.Root, "lock"}, {"state directory", cfg.State, "state.lock"}} {
		if err := store.MakeDir(d.path, dirMode); err != nil {
			return nil, fmt.Errorf("create %s: %w", d.what, err)
		}
		lock, err := lockDir(d.what, d.path, d.lock)
		if err != nil {
			return nil, err
		}
		s.closers = append(s.closers, lock.Close)
	}

	watcher := images.NewWatcher(cfg.ContainerdAddress, blobs.Dir(cfg.ContentRoot))
	views, err := store.Open(ctx, store.Config{
		Root:             cfg.Root,
		State:            cfg.State,
		Content:          cfg.Blobs(),
		Modes:            modes,
		DirectIO:         cfg.NeedsDirectIO(),
		Limits:           cfg.Limits(),
		DecompressOnPull: cfg.DecompressOnPull,
		Images:           watcher,
		Observer:         m.observer(),
	})
	if err != nil {
		return nil, err
	}
	s.closers = append(s.closers, views.Close)
	if s.Snapshotter, err = snapshot.New(cfg.Root, views, cfg.Overlayfs.options()...); err != nil {
		return nil, fmt.Errorf("open the snapshots in %s: %w", cfg.Root, err)
	}
	m.watch(views, watcher)
	s.closers = append(s.closers, s.Snapshotter.Close)
	s.Applier = snapshot.Applier(cfg.Root, views)
	var door *nri.Plugin
	if cfg.NRI.Enabled {
		if door, err = nri.New(ctx, nri.Config{
			Socket: cfg.NRI.Socket, Index: cfg.NRI.Index, Name: cfg.NRI.Name,
			Root:              cfg.Root,
			Views:             views,
			Blobs:             cfg.Blobs(),
			Layouts:           cfg.Blobs()[1:],
			ContainerdAddress: cfg.ContainerdAddress,
			Passthrough:       cfg.NRI.OnError == onErrorPassthrough,
			Observer:          nri.Observer{Connected: connected},
		}); err != nil {
			return nil, err
		}
	} else if err := nri.Keep(ctx, cfg.Root, views); err != nil {
		return nil, err
	}

	ctx, cancel := context.WithCancel(ctx)
	var background sync.WaitGroup
	background.Go(func() { views.Run(ctx) })
	background.Go(func() {
		if door != nil && !awaitSocket(ctx, cfg.ContainerdAddress) {
			return
		}
		var containerd sync.WaitGroup
		containerd.Go(func() { watcher.Run(ctx) })
		containerd.Go(func() { keepEmptyBlobs(ctx, cfg.ContainerdAddress, cfg.Namespaces, emptyBlobInterval) })
		containerd.Wait()
	})
	if door != nil {
		background.Go(func() { door.Run(ctx) })
	}
	s.closers = append(s.closers, func() error {
		cancel()
		background.Wait()
		return nil
	})
	return s, nil
}

// awaitSocket waits until there is a socket, or ctx ends. With a plugin of NRI the node may
// have no containerd, and nobody would want to read that it cannot be reached. If there is
// one by NRI, the plugin says so.
func awaitSocket(ctx context.Context, address string) bool {
	for {
		if _, err := os.Stat(address); err == nil {
			return true
		}
		select {
		case <-ctx.Done():
			return false
		case <-time.After(socketInterval):
		}
	}
}

// opened is a snapshotter and its differ, with everything that Open opened for
// them.
type opened struct {
	snapshots.Snapshotter
	diff.Applier
	closers []func() error // to be called in reverse order, once
	once    sync.Once
}

// Cleanup implements snapshots.Cleaner, which embedding a Snapshotter hides.
func (s *opened) Cleanup(ctx context.Context) error {
	return cleanup(ctx, s.Snapshotter)
}

// Close implements snapshots.Snapshotter.
func (s *opened) Close() (err error) {
	s.once.Do(func() {
		for i := len(s.closers) - 1; i >= 0; i-- {
			err = errors.Join(err, s.closers[i]())
		}
	})
	return err
}

// lockDir takes the lock of a directory of the daemon. It is held until the file is
// closed, so it cannot outlive the process.
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
