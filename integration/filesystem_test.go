// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"golang.org/x/sys/unix"
)

// Directories on new file systems of any kind, removed at the end of the test.

// fileSystem is a kind of file system.
type fileSystem struct {
	name   string   // as in docs/support.md
	fsType string   // for mount(2)
	mkfs   []string // makes one in the file whose name is appended; nil if it needs no disk
	debian string   // the package that has mkfs
}

var (
	ext4          = fileSystem{"ext4", "ext4", []string{"mkfs.ext4", "-q"}, "e2fsprogs"}
	ext4Small     = fileSystem{"ext4 with blocks of 1 KiB", "ext4", []string{"mkfs.ext4", "-q", "-b", "1024"}, "e2fsprogs"}
	xfs           = fileSystem{"xfs", "xfs", []string{"mkfs.xfs", "-q", "-m", "reflink=1"}, "xfsprogs"}
	xfsUnlinked   = fileSystem{"xfs without reflinks", "xfs", []string{"mkfs.xfs", "-q", "-m", "reflink=0"}, "xfsprogs"}
	btrfs         = fileSystem{"btrfs", "btrfs", []string{"mkfs.btrfs", "-q"}, "btrfs-progs"}
	tmpfs         = fileSystem{name: "tmpfs", fsType: "tmpfs"}
	overlayOnExt4 = fileSystem{name: "overlay on ext4", fsType: "overlay"}
)

// diskSize is the size of the disks, which are sparse files. An xfs needs at least 300 MiB.
const diskSize = 2 << 30

// mounted returns a directory with a new file system of the kind. Call it before the node
// that uses it is started.
func (k fileSystem) mounted(t *testing.T) string {
	t.Helper()
	if k.fsType == "overlay" {
		disk := ext4.mounted(t)
		var options []string
		for _, name := range []string{"lowerdir", "upperdir", "workdir"} {
			dir := filepath.Join(disk, name)
			check(t, os.Mkdir(dir, 0o755))
			options = append(options, name+"="+dir)
		}
		return mounted(t, k.fsType, strings.Join(options, ","))
	}
	if k.mkfs == nil {
		return mounted(t, k.fsType, "")
	}
	disk := filepath.Join(mounted(t, "tmpfs", ""), "disk") // in memory, for speed
	check(t, os.WriteFile(disk, nil, 0o600))
	check(t, os.Truncate(disk, diskSize))
	if _, err := exec.LookPath(k.mkfs[0]); err != nil {
		t.Fatalf("%v: install the package %s, or run `make packages`", err, k.debian)
	}
	if out, err := exec.Command(k.mkfs[0], append(k.mkfs[1:len(k.mkfs):len(k.mkfs)], disk)...).CombinedOutput(); err != nil {
		t.Fatalf("%q: %v: %s", k.mkfs, err, out)
	}
	loop, err := mount.SetupLoop(disk, mount.LoopParams{Autoclear: true})
	check(t, err)
	defer loop.Close() // the mount keeps it attached
	dir := mountedFrom(t, loop.Name(), k.fsType, "")
	t.Cleanup(func() { // runs before the unmount
		if left := loopDevicesIn(t, dir); len(left) > 0 {
			t.Errorf("the files %q still have loop devices", left)
		}
	})
	return dir
}

// mounted returns a directory with a new file system of a type that needs no disk.
func mounted(t *testing.T, fsType, options string) string {
	t.Helper()
	return mountedFrom(t, fsType, fsType, options)
}

func mountedFrom(t *testing.T, source, fsType, options string) string {
	t.Helper()
	dir := shortDir(t)
	err := unix.Mount(source, dir, fsType, unix.MS_NOSUID|unix.MS_NODEV, options)
	if errors.Is(err, unix.ENODEV) {
		t.Skipf("NOT TESTED: the kernel has no %s", fsType)
	}
	check(t, err)
	unmountLater(t, dir)
	check(t, os.Chmod(dir, 0o711)) // user namespaces must be able to pass through
	return dir
}

// shortDir is t.TempDir without the name of the test, for paths whose length is limited:
// mount(2) has a page for its options, and a socket's path has 107 bytes.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "")
	check(t, err)
	t.Cleanup(func() { check(t, os.RemoveAll(dir)) })
	return dir
}

// unmountLater unmounts dir at the end of the test, which fails if our processes still use
// it. Other programs may open files there at any time, which keeps it busy for a while.
func unmountLater(t *testing.T, dir string) {
	t.Cleanup(func() {
		err := unix.Unmount(dir, unix.UMOUNT_NOFOLLOW)
		for deadline := time.Now().Add(2 * time.Minute); errors.Is(err, unix.EBUSY) && time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
			err = unix.Unmount(dir, unix.UMOUNT_NOFOLLOW)
		}
		if err == nil {
			return
		}
		if others := holders(dir); len(others) > 0 && errors.Is(err, unix.EBUSY) {
			t.Logf("%s will be unmounted when other processes have closed it: %q", dir, others)
		} else {
			t.Errorf("unmount %s: %v", dir, err)
		}
		check(t, unix.Unmount(dir, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH))
	})
}

// holders returns the other processes that have something open at or below dir.
func holders(dir string) (found []string) {
	fds, _ := filepath.Glob("/proc/[0-9]*/fd/*") // the pattern is not malformed
	for _, fd := range fds {
		target, err := os.Readlink(fd)
		if err != nil || target != dir && !strings.HasPrefix(target, dir+"/") {
			continue
		}
		pid := strings.Split(fd, "/")[2]
		if pid == strconv.Itoa(os.Getpid()) {
			continue
		}
		command, _ := os.ReadFile(filepath.Join("/proc", pid, "comm")) // the process may have ended
		found = append(found, fmt.Sprintf("%s (%s): %s", strings.TrimSpace(string(command)), pid, target))
	}
	return found
}

// loopDevicesIn returns the files below dir that have a loop device.
func loopDevicesIn(t *testing.T, dir string) (found []string) {
	t.Helper()
	all, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	check(t, err)
	for _, name := range all {
		if text, err := os.ReadFile(name); err == nil && strings.HasPrefix(string(text), dir+"/") {
			found = append(found, strings.TrimSpace(string(text)))
		}
	}
	return found
}

// usedBytes returns the allocated bytes of dir's file system, after a sync.
func usedBytes(t *testing.T, dir string) int64 {
	t.Helper()
	f, err := os.Open(dir)
	check(t, err)
	defer f.Close()
	check(t, unix.Syncfs(int(f.Fd())))
	var st unix.Statfs_t
	check(t, unix.Fstatfs(int(f.Fd()), &st))
	return int64(st.Blocks-st.Bfree) * st.Bsize
}
