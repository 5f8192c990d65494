// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package client

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// resolve makes a target absolute and follows its symlinks. The last element need not exist.
func resolve(target string) (string, error) {
	if target == "" {
		return "", fmt.Errorf("the target is empty: %w", errdefs.ErrInvalidArgument)
	}
	abs, err := filepath.Abs(target)
	if err != nil {
		return "", err
	}
	path, err := filepath.EvalSymlinks(abs)
	if err == nil || !errors.Is(err, os.ErrNotExist) {
		return path, err
	}
	parent, err := filepath.EvalSymlinks(filepath.Dir(abs))
	if errors.Is(err, os.ErrNotExist) {
		return "", fmt.Errorf("the directory %s above the target does not exist: %w", filepath.Dir(abs), errdefs.ErrInvalidArgument)
	}
	if err != nil {
		return "", fmt.Errorf("the directory above target %s must exist: %w", target, err)
	}
	return filepath.Join(parent, filepath.Base(abs)), nil
}

// makeTarget makes the directory target unless it exists, and reports whether it has. It
// refuses a target that cannot be mounted on. Until dir is closed, makeTarget refuses the
// target to other callers and processes.
func makeTarget(target string) (made bool, dir *os.File, err error) {
	err = os.Mkdir(target, 0o755)
	made = err == nil
	if err != nil && !errors.Is(err, os.ErrExist) {
		return false, nil, err
	}
	defer func() {
		if err != nil && made {
			_ = os.Remove(target)
		}
	}()
	dir, err = os.OpenFile(target, unix.O_DIRECTORY, 0)
	if errors.Is(err, unix.ENOTDIR) {
		return made, nil, fmt.Errorf("target %s is not a directory: %w", target, errdefs.ErrInvalidArgument)
	}
	if err != nil {
		return made, nil, err // a dangling symlink, for example
	}
	if err := checkTarget(target, dir); err != nil {
		_ = dir.Close()
		return made, nil, err
	}
	return made, dir, nil
}

// checkTarget locks dir, which was at target, and refuses it if target is a mount point by now,
// or if it is not empty.
func checkTarget(target string, dir *os.File) error {
	if err := lockTarget(target, dir); err != nil {
		return err
	}
	mounted, err := mountinfo.Mounted(target)
	if err != nil {
		return err
	}
	if mounted {
		return fmt.Errorf("target %s is already a mount point; choose another directory, or unmount it: %w", target, errdefs.ErrInvalidArgument)
	}
	switch _, err := dir.Readdirnames(1); {
	case err == nil:
		return fmt.Errorf("target %s is not empty; choose an empty directory, or one that does not exist yet: %w", target, errdefs.ErrInvalidArgument)
	case errors.Is(err, io.EOF):
		return nil
	default:
		return err
	}
}

// lockTarget locks dir, which was at target, until it is closed. It does not wait.
func lockTarget(target string, dir *os.File) error {
	err := unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return fmt.Errorf("another process is about to mount at %s, or has locked it; try again: %w", target, errdefs.ErrUnavailable)
	}
	if err != nil {
		return fmt.Errorf("lock %s: %w", target, err)
	}
	return nil
}

// isBindOf reports whether target is a bind of the artifact's mount.
func isBindOf(target string, mounts []mount.Mount) bool {
	var at, from unix.Stat_t
	return len(mounts) == 1 && unix.Stat(target, &at) == nil && unix.Stat(mounts[0].Source, &from) == nil &&
		at.Dev == from.Dev && at.Ino == from.Ino
}

// isMounted reports whether something is mounted at the path, also if it cannot be read
// because a disk has failed. Since Linux 5.6 this needs no list of all mounts.
func isMounted(path string) (bool, error) {
	if mounted, sure, err := mountinfo.MountedFast(path); sure && err == nil {
		return mounted, nil
	}
	found, err := mountinfo.GetMounts(mountinfo.SingleEntryFilter(path))
	if err != nil {
		return false, fmt.Errorf("list the mounts of the node: %w", err)
	}
	return len(found) > 0, nil
}
