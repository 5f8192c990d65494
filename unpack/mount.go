// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"sync"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"
)

// Mount mounts the tree at target, an existing directory, with the options in
// mountoptions.go. It also mounts something below the tree's directory for a moment, which a
// crash may leave there.
func (t *Tree) Mount(ctx context.Context, target string) (err error) {
	defer func() {
		if err != nil {
			if errors.Is(err, unix.ENOSPC) { // fs/namespace.c, count_mounts
				err = fmt.Errorf("%v: the node has as many mounts as the kernel parameter fs.mount-max allows: %w", err, errdefs.ErrResourceExhausted)
			}
			// A bind mount becomes read-only in a second step, which may have failed.
			err = errors.Join(err, mount.UnmountAll(target, 0))
			err = fmt.Errorf("cannot mount the tree of artifact %s (%s, %s) at %s: %w", t.Manifest, t.Modes.Raw, t.Modes.Tar, target, err)
		}
	}()
	fs, data := filepath.Join(t.dir, fsDir), filepath.Join(t.dir, dataDir)
	if t.Image {
		var devices []string
		for _, name := range t.Devices {
			devices = append(devices, filepath.Join(t.dir, name))
		}
		if err := mountImage(ctx, t.Modes.Tar, filepath.Join(t.dir, imageFile), devices, fs); err != nil {
			return err
		}
		// The mount that follows keeps the file system alive.
		defer func() { err = errors.Join(err, unix.Unmount(fs, unix.MNT_DETACH)) }()
	}
	if t.Redirects {
		m := overlayMount(fs, data)
		return m.Mount(target)
	}
	m := Bind(fs)
	return m.Mount(target)
}

// mountImage mounts an EROFS image with its extra devices, in the image's order, in the way
// of the mode.
func mountImage(ctx context.Context, r Mode, image string, devices []string, target string) error {
	files := append([]string{image}, devices...)
	if r == EROFSLoop {
		for i, f := range files {
			loop, err := mount.SetupLoop(f, mount.LoopParams{Readonly: true, Autoclear: true, Direct: true})
			if err != nil {
				return err
			}
			// The mount keeps the device; without a mount the device clears itself.
			defer loop.Close()
			files[i] = loop.Name()
		}
		if err := setReadAhead(filepath.Join("/sys/block", filepath.Base(files[0]), "queue")); err != nil {
			log.G(ctx).WithError(err).Debug("cannot set the read-ahead of a loop device")
		}
		return mountEROFS(files, r, target)
	}
	// Read-ahead is a setting of the superblock, and nothing tells its number in sysfs: it
	// is the one that was not there before.
	readAhead.Lock()
	defer readAhead.Unlock()
	before, err := backingDevices()
	if err != nil {
		return err
	}
	if err := mountEROFS(files, r, target); err != nil {
		return err
	}
	after, err := backingDevices()
	if err != nil {
		return err
	}
	var added []string
	for dir := range after {
		if !before[dir] {
			added = append(added, dir)
		}
	}
	// If another process has mounted an EROFS at the same time, leave both as they are.
	if len(added) != 1 {
		err = fmt.Errorf("%d superblocks have appeared instead of one", len(added))
	} else {
		err = setReadAhead(added[0])
	}
	if err != nil {
		log.G(ctx).WithError(err).Warn("cannot set the read-ahead of an EROFS: cold sequential reads will be slower")
	}
	return nil
}

// readAhead is held while mountImage looks for the superblock that it has made.
var readAhead sync.Mutex

// readAheadKiB is how far the kernel reads ahead in an EROFS. Direct I/O to the file below
// does not queue requests as a disk does: with the usual 128 KiB, sequential reads have
// half the speed of the file below, with this the same (docs/benchmarks.md).
const readAheadKiB = 2048

func setReadAhead(dir string) error {
	return os.WriteFile(filepath.Join(dir, "read_ahead_kb"), []byte(strconv.Itoa(readAheadKiB)), 0)
}

// backingDevices returns the sysfs directories of all EROFS superblocks without a block
// device (mm/backing-dev.c; fs/super.c, super_setup_bdi).
func backingDevices() (map[string]bool, error) {
	dirs, err := filepath.Glob("/sys/class/bdi/erofs-*")
	if err != nil {
		return nil, err
	}
	set := map[string]bool{}
	for _, d := range dirs {
		set[d] = true
	}
	return set, nil
}

// mountEROFS mounts the image files[0] with the extra devices files[1:], through the mount
// API that takes any number of them (fsopen, fsconfig, fsmount).
func mountEROFS(files []string, r Mode, target string) error {
	fd, err := unix.Fsopen("erofs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return os.NewSyscallError("fsopen erofs", err)
	}
	defer func() { _ = unix.Close(fd) }()
	key := "source"
	for _, f := range files {
		if len(f) > maxConfigValue { // the magic link works as well while the image is being mounted
			file, err := os.Open(f)
			if err != nil {
				return err
			}
			defer file.Close()
			f = fmt.Sprintf("/proc/self/fd/%d", file.Fd())
		}
		if err := unix.FsconfigSetString(fd, key, f); err != nil {
			return configError(fd, key, err)
		}
		key = "device"
	}
	for _, option := range erofsOptions(r) {
		if err := unix.FsconfigSetFlag(fd, option); err != nil {
			return configError(fd, option, err)
		}
	}
	if err := unix.FsconfigCreate(fd); err != nil {
		return configError(fd, "create", err)
	}
	m, err := unix.Fsmount(fd, unix.FSMOUNT_CLOEXEC, attributes)
	if err != nil {
		return os.NewSyscallError("fsmount erofs", err)
	}
	defer func() { _ = unix.Close(m) }()
	return os.NewSyscallError("move_mount", unix.MoveMount(m, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH))
}

// configError adds the kernel's message to an error of fsconfig.
func configError(fd int, key string, err error) error {
	err = fmt.Errorf("fsconfig erofs %s: %w", key, err)
	message := make([]byte, 1024)
	if n, rerr := unix.Read(fd, message); rerr == nil && n > 0 {
		err = fmt.Errorf("%w: %s", err, bytes.TrimSpace(message[:n]))
	}
	return err
}
