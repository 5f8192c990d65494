// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

// Command recorder serves one file and records every write and flush in order. The tests of
// power loss attach a loop device to the file, so they know everything that the disk was
// told. dm-log-writes does the same, but few kernels have it.
//
//	recorder FILE DIR LOG
//
// mounts a FUSE file system at DIR. Its only file, "disk", has the contents of FILE. For
// each write, LOG gets the offset and the length as big-endian 64-bit numbers, and the
// data; a flush is a write of length 0. The entry is in LOG before the write or flush is
// acknowledged.
//
// The command prints a line when it is ready and ends when DIR is unmounted. It is a
// separate module, so that the main module does not depend on a FUSE library.
package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"sync"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
)

func main() {
	if len(os.Args) != 4 {
		fmt.Fprintln(os.Stderr, "usage: recorder FILE DIR LOG")
		os.Exit(2)
	}
	if err := serve(os.Args[1], os.Args[2], os.Args[3]); err != nil {
		fmt.Fprintln(os.Stderr, "recorder:", err)
		os.Exit(1)
	}
}

func serve(file, dir, log string) (err error) {
	d := &disk{}
	if d.file, err = os.OpenFile(file, os.O_RDWR, 0); err != nil {
		return err
	}
	if d.log, err = os.OpenFile(log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600); err != nil {
		return err
	}
	root := &fs.Inode{}
	server, err := fs.Mount(dir, root, &fs.Options{
		OnAdd: func(ctx context.Context) {
			root.AddChild("disk", root.NewPersistentInode(ctx, d, fs.StableAttr{Mode: syscall.S_IFREG}), false)
		},
		MountOptions: fuse.MountOptions{DirectMountStrict: true, FsName: "disk", MaxWrite: 1 << 20},
	})
	if err != nil {
		return err
	}
	fmt.Println("serving")
	server.Wait()
	return nil
}

type disk struct {
	fs.Inode
	mu        sync.Mutex
	file, log *os.File
}

var (
	_ fs.NodeGetattrer = &disk{}
	_ fs.NodeOpener    = &disk{}
	_ fs.NodeReader    = &disk{}
	_ fs.NodeWriter    = &disk{}
	_ fs.NodeFsyncer   = &disk{}
)

// Getattr implements fs.NodeGetattrer.
func (d *disk) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	info, err := d.file.Stat()
	if err != nil {
		return syscall.EIO
	}
	out.Mode, out.Size = 0o600, uint64(info.Size())
	return 0
}

// Open implements fs.NodeOpener.
func (*disk) Open(context.Context, uint32) (fs.FileHandle, uint32, syscall.Errno) { return nil, 0, 0 }

// Read implements fs.NodeReader. It returns 0 bytes at the end of the file.
func (d *disk) Read(_ context.Context, _ fs.FileHandle, dest []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	n, err := d.file.ReadAt(dest, off)
	if info, serr := d.file.Stat(); n == 0 && err != nil && (serr != nil || off < info.Size()) {
		return nil, syscall.EIO
	}
	return fuse.ReadResultData(dest[:n]), 0
}

// Write implements fs.NodeWriter.
func (d *disk) Write(_ context.Context, _ fs.FileHandle, data []byte, off int64) (uint32, syscall.Errno) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if _, err := d.file.WriteAt(data, off); err != nil {
		return 0, syscall.EIO
	}
	return uint32(len(data)), d.record(off, data)
}

// Fsync implements fs.NodeFsyncer: a flush of the disk's cache.
func (d *disk) Fsync(context.Context, fs.FileHandle, uint32) syscall.Errno {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.record(0, nil)
}

func (d *disk) record(off int64, data []byte) syscall.Errno {
	entry := binary.BigEndian.AppendUint64(nil, uint64(off))
	entry = binary.BigEndian.AppendUint64(entry, uint64(len(data)))
	if _, err := d.log.Write(append(entry, data...)); err != nil {
		return syscall.EIO
	}
	return 0
}
