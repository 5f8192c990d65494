// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package measure

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Disk is a directory with a new ext4 mounted in it. The file system must be new: before
// ext4 allocates an inode it skips every inode that was deleted in the last minutes
// (fs/ext4/ialloc.c, recently_deleted), so creating thousands of files after deleting
// thousands is many times slower.
type Disk string

// Lazy initialization would write in the background during the measurements. Without direct
// I/O the page cache would hold every byte twice: once for the file, once for the disk
// image.
const mountDisk = `truncate --size "$1" "$0/ext4.img"
mkfs.ext4 -q -F -E lazy_itable_init=0,lazy_journal_init=0 "$0/ext4.img"
mkdir "$0/m"
mount -o loop "$0/ext4.img" "$0/m"
losetup --direct-io=on "$(findmnt --noheadings --output SOURCE "$0/m")"`

// NewDisk makes a disk below dir, or below the temporary directory if dir is "". The size
// is in the syntax of truncate(1). The image is sparse.
func NewDisk(ctx context.Context, dir, size string) Disk {
	if os.Geteuid() != 0 {
		Check(errors.New("the benchmarks need root: run them with sudo"))
	}
	d := Disk(Must(os.MkdirTemp(dir, "b-"))) // short, because the paths of containerd's sockets are below it and limited to 107 bytes
	if out, err := exec.CommandContext(ctx, "sh", "-ec", mountDisk, string(d), size).CombinedOutput(); err != nil {
		Tidy(d.Remove)
		Check(fmt.Errorf("make an ext4 on a loop device: %w: %s", err, out))
	}
	return d
}

// Root is where the disk is mounted.
func (d Disk) Root() string { return filepath.Join(string(d), "m") }

// Remove unmounts and deletes the disk. Nothing may use it any more.
func (d Disk) Remove() error {
	// EINVAL: not mounted; ENOENT: not created yet.
	if err := unix.Unmount(d.Root(), 0); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unmount %s: %w", d.Root(), err)
	}
	return os.RemoveAll(string(d))
}

// Used returns the allocated bytes: blocks, and 256 bytes per used inode. ext4 allocates
// its inodes at mkfs, but other file systems allocate them when used.
func (d Disk) Used() float64 {
	d.Sync()
	var st unix.Statfs_t
	Check(unix.Statfs(d.Root(), &st))
	return float64(int64(st.Blocks-st.Bfree)*st.Bsize + int64(st.Files-st.Ffree)*256)
}

// Sync writes out dirty pages, so that their writeback does not disturb the next
// measurement.
func (d Disk) Sync() {
	f := Must(os.Open(d.Root()))
	defer f.Close()
	Check(unix.Syncfs(int(f.Fd())))
}
