// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

//go:build amd64

package crash

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// A disk is an emulated one that remembers every write and every flush of its cache in
// their order, as dm-log-writes does where the kernel has it: a loop device over a
// file of a FUSE file system that this process serves. What the disk holds after its
// power has been cut at any moment can be told afterwards, as often as one likes.

const (
	diskSize = 96 << 20
	// sector is what a disk writes whole or not at all: the block of the file system,
	// which the journal relies on.
	sector = 4096
)

type disk struct {
	fs.Inode
	dir     string // of its files
	base    string // what it held in the beginning
	mounted string // where its file system is
	server  *fuse.Server

	mu      sync.Mutex
	current *os.File
	log     []write
}

// write is one in the log; one without data is a flush.
type write struct {
	off  int64
	data []byte
}

var (
	_ fs.NodeGetattrer = &disk{}
	_ fs.NodeOpener    = &disk{}
	_ fs.NodeReader    = &disk{}
	_ fs.NodeWriter    = &disk{}
	_ fs.NodeFsyncer   = &disk{}
)

// newDisk makes a disk with an empty ext4, mounted below dir.
func newDisk(dir string) (_ *disk, err error) {
	d := &disk{dir: dir, base: filepath.Join(dir, "base"), mounted: filepath.Join(dir, "disk")}
	current, files := filepath.Join(dir, "current"), filepath.Join(dir, "fuse")
	if err := errors.Join(os.MkdirAll(d.mounted, 0o755), os.Mkdir(files, 0o755)); err != nil {
		return nil, err
	}
	if err := makeFS(d.base); err != nil {
		return nil, err
	}
	if err := copySparse(current, d.base); err != nil {
		return nil, err
	}
	if d.current, err = os.OpenFile(current, os.O_RDWR, 0); err != nil {
		return nil, err
	}
	root := &fs.Inode{}
	d.server, err = fs.Mount(files, root, &fs.Options{
		OnAdd: func(ctx context.Context) {
			root.AddChild("disk", root.NewPersistentInode(ctx, d, fs.StableAttr{Mode: syscall.S_IFREG}), false)
		},
		MountOptions: fuse.MountOptions{DirectMountStrict: true, FsName: "disk", MaxWrite: 1 << 20},
	})
	if err != nil {
		return nil, err
	}
	// A transaction is committed each second, when nobody asks for it: things change
	// on the disk while the daemon works.
	return d, mountFS(filepath.Join(files, "disk"), d.mounted, "commit=1")
}

func makeFS(image string) error {
	f, err := os.Create(image)
	if err != nil {
		return err
	}
	if err := errors.Join(f.Truncate(diskSize), f.Close()); err != nil {
		return err
	}
	if out, err := exec.Command("mkfs.ext4", "-q", "-b", fmt.Sprint(sector), "-E", "lazy_itable_init=0,lazy_journal_init=0", image).CombinedOutput(); err != nil {
		return fmt.Errorf("mkfs.ext4: %w\n%s", err, out)
	}
	return nil
}

// mountFS mounts the ext4 in a file by a loop device, which goes with the mount.
func mountFS(image, target, options string) error {
	loop, err := mount.SetupLoop(image, mount.LoopParams{Autoclear: true})
	if err != nil {
		return err
	}
	defer loop.Close()
	return unix.Mount(loop.Name(), target, "ext4", 0, options)
}

// position is how much there is in the log.
func (d *disk) position() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.log)
}

// close ends the disk, with what is mounted.
func (d *disk) close() error {
	errs := []error{unmountFS(d.mounted)}
	if d.server != nil {
		errs = append(errs, d.server.Unmount())
	}
	return errors.Join(append(errs, d.current.Close())...)
}

// unmountFS unmounts a file system whose users are about to go.
func unmountFS(target string) (err error) {
	for range 100 {
		if err = unix.Unmount(target, 0); !errors.Is(err, unix.EBUSY) {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	return os.NewSyscallError("umount "+target, err)
}

// cut is a moment at which the power is cut: behind so many entries of the log. Of
// what was written since the last flush a disk with a cache may have stored anything:
// all of it, or the sectors that seed chooses.
type cut struct {
	position int
	some     bool
	seed     uint64
}

// after makes image what the disk holds after the cut.
func (d *disk) after(c cut, image string) error {
	if err := copySparse(image, d.base); err != nil {
		return err
	}
	f, err := os.OpenFile(image, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	d.mu.Lock()
	log := d.log[:c.position]
	d.mu.Unlock()
	flushed := len(log)
	for flushed > 0 && log[flushed-1].data != nil {
		flushed--
	}
	random := rand.New(rand.NewPCG(c.seed, 0))
	for i, w := range log {
		if i < flushed || !c.some {
			if _, err := f.WriteAt(w.data, w.off); err != nil {
				return err
			}
			continue
		}
		for n := 0; n < len(w.data); n += sector {
			if random.IntN(2) == 0 {
				continue
			}
			if _, err := f.WriteAt(w.data[n:min(n+sector, len(w.data))], w.off+int64(n)); err != nil {
				return err
			}
		}
	}
	return nil
}

// copySparse copies a file without its holes.
func copySparse(target, source string) error {
	if out, err := exec.Command("cp", "--sparse=always", source, target).CombinedOutput(); err != nil {
		return fmt.Errorf("cp: %w\n%s", err, out)
	}
	return nil
}

// Getattr implements fs.NodeGetattrer.
func (*disk) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	out.Mode, out.Size = 0o600, diskSize
	return 0
}

// Open implements fs.NodeOpener.
func (*disk) Open(context.Context, uint32) (fs.FileHandle, uint32, syscall.Errno) { return nil, 0, 0 }

// Read implements fs.NodeReader.
func (d *disk) Read(_ context.Context, _ fs.FileHandle, dest []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	n, err := d.current.ReadAt(dest, off)
	if n == 0 && err != nil && off < diskSize {
		return nil, syscall.EIO
	}
	return fuse.ReadResultData(dest[:n]), 0
}

// Write implements fs.NodeWriter.
func (d *disk) Write(_ context.Context, _ fs.FileHandle, data []byte, off int64) (uint32, syscall.Errno) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.log = append(d.log, write{off, bytes.Clone(data)})
	if _, err := d.current.WriteAt(data, off); err != nil {
		return 0, syscall.EIO
	}
	return uint32(len(data)), 0
}

// Fsync implements fs.NodeFsyncer: the disk is told to flush its cache.
func (d *disk) Fsync(context.Context, fs.FileHandle, uint32) syscall.Errno {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.log = append(d.log, write{})
	return 0
}

// A disk that forgets must be told from one that does not, or nothing below proves
// anything.
func TestADiskForgetsWhatWasNotFlushed(t *testing.T) {
	dir := t.TempDir()
	d, err := newDisk(dir)
	check(t, err)
	defer func() { check(t, d.close()) }()
	name := filepath.Join(d.mounted, "file")
	check(t, os.WriteFile(name, []byte("not synced"), 0o644))
	before := d.position()
	f, err := os.OpenFile(name, os.O_WRONLY, 0)
	check(t, err)
	check(t, errors.Join(f.Sync(), f.Close()))
	synced := d.position()
	for _, c := range []struct {
		cut
		want string
	}{
		{cut{before, false, 0}, ""},
		{cut{synced, false, 0}, "not synced"},
		{cut{synced, true, 1}, "not synced"},
	} {
		image, target := filepath.Join(dir, "image"), filepath.Join(dir, "after")
		check(t, d.after(c.cut, image))
		check(t, os.MkdirAll(target, 0o755))
		check(t, mountFS(image, target, ""))
		got, err := os.ReadFile(filepath.Join(target, "file"))
		if string(got) != c.want {
			t.Errorf("after a cut at %+v the file has %q, %v; want %q", c.cut, got, err, c.want)
		}
		check(t, errors.Join(unmountFS(target), os.Remove(image)))
	}
}
