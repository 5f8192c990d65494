// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package store

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/blobs"
	"github.com/artifact-snapshotter/artifact-snapshotter/unpack"
)

// Open opens the store in c.Root, and repairs what a crash or a reboot left. Trees of an
// earlier boot are removed, with what they share, because they were never synced to the disk;
// so are mounts whose trees are gone. Other mounts stay, and the first garbage collection
// unmounts those that nothing uses. A configured mode that does not work here is an error.
func Open(ctx context.Context, c Config) (*Store, error) {
	s := &Store{
		trees:    filepath.Join(c.Root, "trees"),
		mounts:   filepath.Join(c.State, "mounts"),
		content:  c.Content,
		shared:   blobs.Dir(c.Root),
		modes:    c.Modes,
		directIO: c.DirectIO,
		budget:   unpack.NewBudget(c.Limits),
		images:   c.Images,
		observer: c.Observer,
		maxWait:  MaxWait,
		now:      time.Now,
		wake:     make(chan struct{}, 1),
		onPull:   c.DecompressOnPull,
		entries:  map[string]*entry{},
		reserved: map[string]bool{},
		change:   make(chan struct{}),
		opened:   time.Now(),
	}
	s.closing, s.close = context.WithCancel(context.WithoutCancel(ctx))
	// The users of a pod with a user namespace must be able to search every directory above
	// what is mounted into the pod, but not what is behind a mount.
	for _, d := range []struct {
		path string
		mode os.FileMode
	}{{c.Root, 0o711}, {s.trees, 0o700}, {c.State, 0o711}, {s.mounts, 0o711}} {
		if err := MakeDir(d.path, d.mode); err != nil {
			return nil, err
		}
	}
	removeProbes(ctx, c.Root)
	err := s.start(ctx, filepath.Join(c.Root, "boot"))
	if errdefs.IsResourceExhausted(err) || errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		// Garbage collection, which would free space, has not begun.
		log.G(ctx).WithError(err).Warn("the disk is full; emptying the trash and trying again")
		err = errors.Join(s.emptyTrash(), s.start(ctx, filepath.Join(c.Root, "boot")))
	}
	if err != nil {
		return nil, err
	}
	return s, nil
}

// removeProbes removes what probes of modes have left in root, unless another process may
// be probing now.
func removeProbes(ctx context.Context, root string) {
	dirs, err := filepath.Glob(filepath.Join(root, unpack.ProbeDirs))
	for _, dir := range dirs {
		if fi, lerr := os.Lstat(dir); lerr == nil && time.Since(fi.ModTime()) > probeAge {
			err = errors.Join(err, mount.UnmountRecursive(dir, unix.MNT_DETACH), os.RemoveAll(dir))
		}
	}
	if err != nil {
		log.G(ctx).WithError(err).Warn("cannot remove what a probe of modes has left")
	}
}

func (s *Store) start(ctx context.Context, marker string) error {
	// A crash while a tree is mounted, or during a probe, leaves a mount in its directory.
	if err := mount.UnmountRecursive(s.trees, unix.MNT_DETACH); err != nil {
		return err
	}
	if err := s.chooseModes(ctx); err != nil {
		return err
	}
	return s.recover(ctx, marker)
}

// emptyTrash removes everything in trees that is not a tree, while nothing is built.
func (s *Store) emptyTrash() error {
	names, err := list(s.trees)
	if err != nil {
		return err
	}
	for _, name := range names {
		if manifest(name) == "" {
			err = errors.Join(err, os.RemoveAll(filepath.Join(s.trees, name)))
		}
	}
	return err
}

// MakeDir makes dir with that mode, whatever the umask, unless it is there: a pod with a user
// namespace must be able to reach its volumes.
func MakeDir(dir string, mode os.FileMode) error {
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return err
	}
	err := os.Mkdir(dir, mode)
	if errors.Is(err, os.ErrExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return os.Chmod(dir, mode)
}

func (s *Store) chooseModes(ctx context.Context) error {
	modes, why := unpack.Probe(ctx, s.trees, s.modes, s.directIO)
	if modes == (unpack.Modes{}) {
		return fmt.Errorf("layers cannot be laid out: %w", why)
	}
	logger := log.G(ctx).WithFields(log.Fields{"raw": modes.Raw, "tar": modes.Tar})
	if why != nil {
		logger.WithError(why).Warn("layers are laid out by a fallback mode; `artifact-snapshotter doctor` says more")
	} else {
		logger.Info("layers are laid out")
	}
	s.modes = modes
	return nil
}

// recover moves to the trash what cannot be used after a crash, a reboot or a change of the
// modes. marker is the file with the boot ID of the last start.
func (s *Store) recover(ctx context.Context, marker string) error {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return fmt.Errorf("cannot tell whether the node was rebooted since the last start: %w", err)
	}
	last, err := os.ReadFile(marker)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	rebooted := !bytes.Equal(boot, last)
	names, err := list(s.trees)
	if err != nil {
		return err
	}
	for _, name := range names {
		if manifest(name) == "" {
			continue // trash
		}
		if !rebooted {
			if t, err := unpack.Load(filepath.Join(s.trees, name)); err == nil && t.Modes == s.modes {
				continue
			}
			mounted, err := s.mounted(name)
			if err != nil { // pods may use it, and others need the daemon
				log.G(ctx).WithError(err).WithField("tree", name).Warn("keeping a tree that cannot be used")
			}
			if mounted || err != nil {
				continue
			}
		}
		log.G(ctx).WithField("tree", name).Info("removing a tree of an earlier boot or of other modes")
		err := s.unmount(name)
		if err == nil {
			err = s.moveToTrash(filepath.Join(s.trees, name))
		}
		if err != nil {
			return fmt.Errorf("cannot remove the tree %s: %w", name, err)
		}
	}
	if rebooted {
		if err := s.moveToTrash(s.sharedDir()); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	if err := MakeDir(s.sharedDir(), 0o700); err != nil {
		return err
	}
	// A mount without its tree is an empty directory: somebody has removed the root, or
	// configured another one.
	mounts, err := list(s.mounts)
	if err != nil {
		return err
	}
	for _, name := range mounts {
		if _, err := os.Lstat(filepath.Join(s.trees, name)); errors.Is(err, os.ErrNotExist) {
			if err := s.unmount(name); err != nil {
				return err
			}
		}
	}
	if !rebooted {
		return nil
	}
	return os.WriteFile(marker, boot, 0o600)
}

// moveToTrash renames p, so that the next garbage collection removes it. Removing it takes
// time, and space that a full disk may not have; renaming does not.
func (s *Store) moveToTrash(p string) error {
	return os.Rename(p, filepath.Join(s.trees, newTrashName()))
}

// newTrashName returns a new name in trees that is not the name of a tree.
func newTrashName() string { return "new-" + strings.ToLower(rand.Text()) }
