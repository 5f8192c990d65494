// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

// Command bench measures on a real node what the snapshotter promises about
// speed and memory, and prints it as a table. docs/benchmarks.md has the method
// and the results. A promise that is not kept is a "NO" in the table and not a
// failure: what fails a change is a test, never the clock.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// status is what the program ends with.
var status int

func main() {
	// Held to the end, so that a second Ctrl-C does not interrupt the cleaning up.
	ctx, _ := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	run(ctx)
	os.Exit(status)
}

func run(ctx context.Context) {
	defer func() {
		if r := recover(); r != nil {
			f, ok := r.(failure)
			if !ok {
				panic(r)
			}
			fmt.Fprintln(os.Stderr, "bench:", f.error)
			status = 1
		}
	}()
	r := newReport()
	r.disk = makeDisk(ctx)
	defer tidy(r.disk.remove)
	measurePrepare(ctx, r)
	measurePods(ctx, r)
	measureKubelet(ctx, r)
	r.print()
}

// failure ends the program by a panic, so that on the way all that was deferred
// cleans up.
type failure struct{ error }

func check(err error) {
	if err != nil {
		panic(failure{err})
	}
}

func must[T any](v T, err error) T {
	check(err)
	return v
}

// tidy is for defer: cleaning up goes on after an error.
func tidy(f func() error) {
	if err := f(); err != nil {
		progress("cleaning up: %v", err)
		status = 1
	}
}

// progress goes where it does not get into the table.
func progress(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "==> "+format+"\n", args...)
}

// disk is a directory with a new ext4 in m, for one run. Nothing is ever
// deleted on it before the end: ext4 walks past each inode that was deleted in
// the last minutes before it allocates a new one (fs/ext4/ialloc.c,
// recently_deleted), so that building a Tree where a large one has just gone
// takes many times as long.
type disk string

// Without lazy initialization no kernel thread writes beside the measurements;
// without direct I/O the page cache has every byte twice, of the file and of
// the image.
const mountDisk = `truncate --size 32G "$0/ext4.img"
mkfs.ext4 -q -F -E lazy_itable_init=0,lazy_journal_init=0 "$0/ext4.img"
mkdir "$0/m"
mount -o loop "$0/ext4.img" "$0/m"
losetup --direct-io=on "$(findmnt --noheadings --output SOURCE "$0/m")"`

// makeDisk lets all temporary files, those of nodes included, go to the disk.
func makeDisk(ctx context.Context) disk {
	if os.Geteuid() != 0 {
		check(errors.New("the benchmarks need root: run them with sudo"))
	}
	dir := disk(must(os.MkdirTemp("", "b-"))) // short: containerd's sockets are below it
	progress("making an ext4 on a loop device in %s", dir)
	if out, err := exec.CommandContext(ctx, "sh", "-ec", mountDisk, string(dir)).CombinedOutput(); err != nil {
		tidy(dir.remove)
		check(fmt.Errorf("make an ext4 on a loop device: %w: %s", err, out))
	}
	check(os.Setenv("TMPDIR", dir.root()))
	return dir
}

func (d disk) root() string { return filepath.Join(string(d), "m") }

// remove wants what was on the disk to have been stopped.
func (d disk) remove() error {
	// It may not be mounted, EINVAL, or not even be there.
	if err := unix.Unmount(d.root(), 0); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unmount %s: %w", d.root(), err)
	}
	return os.RemoveAll(string(d))
}

// used is what is allocated, in bytes: blocks, and 256 bytes for each inode,
// which ext4 has from the beginning but other filesystems allocate.
func (d disk) used() float64 {
	d.sync()
	var st unix.Statfs_t
	check(unix.Statfs(d.root(), &st))
	return float64(int64(st.Blocks-st.Bfree)*st.Bsize + int64(st.Files-st.Ffree)*256)
}

// sync writes out what is dirty, so that nobody else's write is measured.
func (d disk) sync() {
	f := must(os.Open(d.root()))
	defer f.Close()
	check(unix.Syncfs(int(f.Fd())))
}
