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

// Disk is a directory with a new ext4 in it. New, because ext4 walks past each
// inode that was deleted in the last minutes before it allocates another one
// (fs/ext4/ialloc.c, recently_deleted), so that making thousands of files where
// thousands have just gone takes many times as long.
type Disk string

// Without lazy initialization no kernel thread writes beside the measurements;
// without direct I/O the page cache has every byte twice, of the file and of
// the image.
const mountDisk = `truncate --size "$1" "$0/ext4.img"
mkfs.ext4 -q -F -E lazy_itable_init=0,lazy_journal_init=0 "$0/ext4.img"
mkdir "$0/m"
mount -o loop "$0/ext4.img" "$0/m"
losetup --direct-io=on "$(findmnt --noheadings --output SOURCE "$0/m")"`

// NewDisk makes a disk of a size that truncate(1) understands below dir, or
// below the temporary directory if dir is "". It takes the space only of what
// is written to it.
func NewDisk(ctx context.Context, dir, size string) Disk {
	if os.Geteuid() != 0 {
		Check(errors.New("the benchmarks need root: run them with sudo"))
	}
	d := Disk(Must(os.MkdirTemp(dir, "b-"))) // short: containerd's sockets are below it
	if out, err := exec.CommandContext(ctx, "sh", "-ec", mountDisk, string(d), size).CombinedOutput(); err != nil {
		Tidy(d.Remove)
		Check(fmt.Errorf("make an ext4 on a loop device: %w: %s", err, out))
	}
	return d
}

// Root is where the disk is mounted.
func (d Disk) Root() string { return filepath.Join(string(d), "m") }

// Remove wants what was on the disk to have been stopped.
func (d Disk) Remove() error {
	// It may not be mounted, EINVAL, or not even be there.
	if err := unix.Unmount(d.Root(), 0); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unmount %s: %w", d.Root(), err)
	}
	return os.RemoveAll(string(d))
}

// Used is what is allocated, in bytes: blocks, and 256 bytes for each inode,
// which ext4 has from the beginning but other filesystems allocate.
func (d Disk) Used() float64 {
	d.Sync()
	var st unix.Statfs_t
	Check(unix.Statfs(d.Root(), &st))
	return float64(int64(st.Blocks-st.Bfree)*st.Bsize + int64(st.Files-st.Ffree)*256)
}

// Sync writes out what is dirty, so that nobody else's write is measured.
func (d Disk) Sync() {
	f := Must(os.Open(d.Root()))
	defer f.Close()
	Check(unix.Syncfs(int(f.Fd())))
}
