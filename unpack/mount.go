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
	"strings"
	"sync"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"
)

// Mount shows the Tree at target, an existing directory: read-only, nosuid and
// nodev. What it needs on the way is mounted below the Tree's directory and does
// not stay there; after a crash it may.
func (t *Tree) Mount(ctx context.Context, target string) (err error) {
	defer func() {
		if err != nil {
			if errors.Is(err, unix.ENOSPC) { // fs/namespace.c, count_mounts
				err = fmt.Errorf("%v: the node has as many mounts as the kernel parameter fs.mount-max allows: %w", err, errdefs.ErrResourceExhausted)
			}
			// A bind is made read-only by a second step.
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
		// The mounts below keep what is mounted here.
		defer func() { err = errors.Join(err, unix.Unmount(fs, unix.MNT_DETACH)) }()
	}
	if t.Redirects {
		m := overlayMount(fs, data)
		return m.Mount(target)
	}
	m := mount.Mount{Type: "bind", Source: fs, Options: []string{"bind", "ro", "nosuid", "nodev"}}
	return m.Mount(target)
}

// overlayMount is a read-only overlay of lower whose files take their content
// from data, a data-only lower layer (Documentation/filesystems/overlayfs.rst,
// "Data-only lower layers", Linux 6.5). Two paths never come near the page
// that mount(2) allows for options.
func overlayMount(lower, data string) mount.Mount {
	return mount.Mount{Type: "overlay", Source: "overlay", Options: []string{
		"ro", "nosuid", "nodev",
		"lowerdir=" + escapeOverlay.Replace(lower) + "::" + escapeOverlay.Replace(data),
		"metacopy=on", "redirect_dir=follow", "index=off", "nfs_export=off",
	}}
}

// escapeOverlay escapes what overlayfs gives a meaning in the value of
// lowerdir= (fs/overlayfs/params.c: ovl_next_opt, ovl_parse_param_split_lowerdirs).
var escapeOverlay = strings.NewReplacer(`\`, `\\`, `:`, `\:`, `,`, `\,`)

// mountImage mounts an EROFS image and its extra devices, in the image's order,
// in the way of the mode r.
func mountImage(ctx context.Context, r Mode, image string, devices []string, target string) error {
	files := append([]string{image}, devices...)
	if r == EROFSLoop {
		for i, f := range files {
			loop, err := mount.SetupLoop(f, mount.LoopParams{Readonly: true, Autoclear: true, Direct: true})
			if err != nil {
				return err
			}
			// The mount holds it, and without one it clears itself.
			defer loop.Close()
			files[i] = loop.Name()
		}
		if err := setReadAhead(filepath.Join("/sys/block", filepath.Base(files[0]), "queue")); err != nil {
			log.G(ctx).WithError(err).Debug("cannot set the read-ahead of a loop device")
		}
		return mountEROFS(files, false, target)
	}
	// Read-ahead belongs to the superblock, whose number in sysfs nobody tells:
	// it is the one that was not there before.
	readAhead.Lock()
	defer readAhead.Unlock()
	before, err := backingDevices()
	if err != nil {
		return err
	}
	if err := mountEROFS(files, r == EROFS, target); err != nil {
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
	// Another process may have mounted an EROFS, too, which is not ours to tune.
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

// readAhead is held while the superblocks of this process are told apart.
var readAhead sync.Mutex

// readAheadKiB is how far the kernel reads ahead in an EROFS. Direct I/O to the
// file below does not queue as a disk does: with the usual 128 KiB sequential
// reads have half the speed of that file's, with this the same
// (docs/benchmarks.md).
const readAheadKiB = 2048

func setReadAhead(dir string) error {
	return os.WriteFile(filepath.Join(dir, "read_ahead_kb"), []byte(strconv.Itoa(readAheadKiB)), 0)
}

// backingDevices is the directories of all EROFS superblocks without a block
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

// mountEROFS mounts the image files[0] with the extra devices files[1:], through
// the API that takes any number of them (fsopen, fsconfig, fsmount).
func mountEROFS(files []string, direct bool, target string) error {
	fd, err := unix.Fsopen("erofs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return os.NewSyscallError("fsopen erofs", err)
	}
	defer func() { _ = unix.Close(fd) }()
	key := "source"
	for _, f := range files {
		if len(f) > maxConfigValue { // the magic link is as good, until the image is mounted
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
	if direct {
		if err := unix.FsconfigSetFlag(fd, "directio"); err != nil {
			return configError(fd, "directio", err)
		}
	}
	if err := unix.FsconfigSetFlag(fd, "ro"); err != nil {
		return configError(fd, "ro", err)
	}
	if err := unix.FsconfigCreate(fd); err != nil {
		return configError(fd, "create", err)
	}
	m, err := unix.Fsmount(fd, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_RDONLY|unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV)
	if err != nil {
		return os.NewSyscallError("fsmount erofs", err)
	}
	defer func() { _ = unix.Close(m) }()
	return os.NewSyscallError("move_mount", unix.MoveMount(m, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH))
}

// maxConfigValue is the longest string that fsconfig(2) takes (fs/fsopen.c).
const maxConfigValue = 255

// configError adds to an error of fsconfig what the kernel has to say about it.
func configError(fd int, key string, err error) error {
	err = fmt.Errorf("fsconfig erofs %s: %w", key, err)
	message := make([]byte, 1024)
	if n, rerr := unix.Read(fd, message); rerr == nil && n > 0 {
		err = fmt.Errorf("%w: %s", err, bytes.TrimSpace(message[:n]))
	}
	return err
}
