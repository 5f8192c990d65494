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

// Open opens the store in c.Root and puts right what a crash or a reboot left.
// Trees of an earlier boot go, with what they share, since they were never synced
// to the disk; so do mounts of Trees that are no more. Mounts that are still there
// are kept; the first sweep takes those that nobody shows, and whatever is to be
// removed. A mode that does not work here is an error.
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
		opened:   time.Now(),
	}
	s.closing, s.close = context.WithCancel(context.WithoutCancel(ctx))
	// Everything above what is mounted into a pod with a user namespace must
	// be searchable by its users; what is behind a mount need not be.
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
		// What fills the disk may be what the sweep would remove.
		log.G(ctx).WithError(err).Warn("the disk is full; removing what was set aside and trying again")
		err = errors.Join(s.emptyTrash(), s.start(ctx, filepath.Join(c.Root, "boot")))
	}
	if err != nil {
		return nil, err
	}
	return s, nil
}

// removeProbes removes what is left in root of trying modes, but for what may be
// of a process that is trying now.
func removeProbes(ctx context.Context, root string) {
	dirs, err := filepath.Glob(filepath.Join(root, unpack.ProbeDirs))
	for _, dir := range dirs {
		if fi, lerr := os.Lstat(dir); lerr == nil && time.Since(fi.ModTime()) > probeAge {
			err = errors.Join(err, mount.UnmountRecursive(dir, unix.MNT_DETACH), os.RemoveAll(dir))
		}
	}
	if err != nil {
		log.G(ctx).WithError(err).Warn("cannot remove what is left of trying modes")
	}
}

func (s *Store) start(ctx context.Context, marker string) error {
	// A crash in the middle of mounting a Tree, or of a probe, leaves a mount in
	// its directory.
	if err := mount.UnmountRecursive(s.trees, unix.MNT_DETACH); err != nil {
		return err
	}
	if err := s.chooseModes(ctx); err != nil {
		return err
	}
	return s.recover(ctx, marker)
}

// emptyTrash removes all that is in trees and not a Tree, while nothing builds.
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

// MakeDir makes dir, with that mode whatever the umask, unless it is there: a pod with a
// user namespace has to get through to its volumes.
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
		logger.WithError(why).Warn("layers are laid out in a lesser way than could be; `artifact-snapshotter doctor` says more")
	} else {
		logger.Info("layers are laid out")
	}
	s.modes = modes
	return nil
}

// recover sets aside what cannot be used after a crash, a reboot or a change of
// the mode. marker is a file that holds the boot of the last time.
func (s *Store) recover(ctx context.Context, marker string) error {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return fmt.Errorf("cannot tell whether the node was booted since the last start: %w", err)
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
			continue // the sweep's
		}
		if !rebooted {
			if t, err := unpack.Load(filepath.Join(s.trees, name)); err == nil && t.Modes == s.modes {
				continue
			}
			mounted, err := s.mounted(name)
			if err != nil { // pods may show it, and others need the daemon
				log.G(ctx).WithError(err).WithField("tree", name).Warn("keeping a tree that cannot be used")
			}
			if mounted || err != nil {
				continue
			}
		}
		log.G(ctx).WithField("tree", name).Info("removing a tree of an earlier boot or of another mode")
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
	// A mount without its Tree shows an empty directory: somebody has removed
	// the root, or given the daemon another one.
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

// moveToTrash renames p to what the next sweep removes: at once, where removing it
// takes time, or space that a full disk does not have.
func (s *Store) moveToTrash(p string) error {
	return os.Rename(p, filepath.Join(s.trees, newTrashName()))
}

// aside is a new name in trees that is not one of a Tree.
func newTrashName() string { return "new-" + strings.ToLower(rand.Text()) }
