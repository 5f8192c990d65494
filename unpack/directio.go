// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"unsafe"

	"golang.org/x/sys/unix"
)

// writeBlob writes a file like the runtime's blobs. containerd enables fs-verity for its
// blobs on every file system that has it (plugins/content/local/writer.go), and ext4 and
// btrfs do not do direct I/O to such files but read them through the page cache.
func writeBlob(path, content string) error {
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		return err
	}
	_ = enableVerity(path) // where this fails, containerd's blobs have none either
	return nil
}

func enableVerity(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
		return os.NewSyscallError("fstatfs", err)
	}
	arg := unix.FsverityEnableArg{Version: 1, Hash_algorithm: unix.FS_VERITY_HASH_ALG_SHA256, Block_size: uint32(min(int(st.Bsize), os.Getpagesize()))}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.FS_IOC_ENABLE_VERITY, uintptr(unsafe.Pointer(&arg))); errno != 0 { //nolint:gosec // the kernel reads it within the call
		return os.NewSyscallError("ioctl FS_IOC_ENABLE_VERITY", errno)
	}
	return nil
}

// errNoDirectIO says that a mode works, but not with O_DIRECT.
var errNoDirectIO = errors.New("its files cannot be read with O_DIRECT")

// readDirect checks that file has this content when it is opened with O_DIRECT, and when
// fcntl(2) sets O_DIRECT after opening. overlayfs accepts either, even if the file below it
// does not (fs/overlayfs/file.c: ovl_open_realfile, ovl_change_flags).
func readDirect(file, content string) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("%w: %w", errNoDirectIO, err)
		}
	}()
	buffer, err := alignedBuffer(len(content))
	if err != nil {
		return err
	}
	defer func() { _ = unix.Munmap(buffer) }()
	for _, flag := range []int{unix.O_DIRECT, 0} {
		f, err := os.OpenFile(file, os.O_RDONLY|flag, 0)
		if err != nil {
			return err
		}
		defer f.Close()
		if flag == 0 {
			if _, err := unix.FcntlInt(f.Fd(), unix.F_SETFL, unix.O_DIRECT); err != nil {
				return os.NewSyscallError("fcntl F_SETFL O_DIRECT", err)
			}
		}
		n, err := f.ReadAt(buffer, 0)
		if err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		if string(buffer[:n]) != content {
			return fmt.Errorf("%s has other bytes than were written", filepath.Base(file))
		}
	}
	return nil
}

// alignedBuffer returns a buffer of more than size bytes in whole pages, whose alignment
// suits every disk. The caller unmaps it.
func alignedBuffer(size int) ([]byte, error) {
	size = os.Getpagesize() * (size/os.Getpagesize() + 1)
	buffer, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	return buffer, os.NewSyscallError("mmap", err)
}

// sectors tries to read 512 bytes at an offset of 512 by direct I/O, as modes do for
// members that begin there.
func sectors(root string) (err error) {
	f, err := os.CreateTemp(root, ProbeDirs)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close(), os.Remove(f.Name())) }()
	if _, err := f.Write(make([]byte, 16*tarBlock)); err != nil { // a hole would not be read from the disk
		return err
	}
	if _, err := unix.FcntlInt(f.Fd(), unix.F_SETFL, unix.O_DIRECT); err != nil {
		return os.NewSyscallError("fcntl F_SETFL O_DIRECT", err)
	}
	buffer, err := alignedBuffer(tarBlock)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Munmap(buffer) }()
	_, err = f.ReadAt(buffer[:tarBlock], tarBlock)
	return err
}

// throughCache reports whether root's file system does direct I/O through the page cache,
// and whether the reason is fs-verity. It returns false where that cannot be found out:
// before Linux 6.5, and for file systems in memory.
func throughCache(root string) (cached, verity bool, err error) {
	dir, err := os.MkdirTemp(root, ProbeDirs)
	if err != nil {
		return false, false, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	path, content := filepath.Join(dir, "blob"), make([]byte, 64<<10) // too large to be inlined into the inode
	if err := writeBlob(path, string(content)); err != nil {
		return false, false, err
	}
	f, err := os.Open(path)
	if err != nil {
		return false, false, err
	}
	defer f.Close()
	var st unix.Statx_t
	err = errors.Join(
		unix.Statx(int(f.Fd()), "", unix.AT_EMPTY_PATH, unix.STATX_BASIC_STATS, &st),
		f.Sync(), unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED),
	)
	if err != nil {
		return false, false, err
	}
	before, err := cachedPages(f)
	if err != nil || before > 0 {
		return false, false, err
	}
	if err := readDirect(path, string(content)); err != nil {
		return false, false, err
	}
	after, err := cachedPages(f)
	return after > 0, st.Attributes&unix.STATX_ATTR_VERITY != 0, err
}

func cachedPages(f *os.File) (uint64, error) {
	var stat unix.Cachestat_t
	err := unix.Cachestat(uint(f.Fd()), &unix.CachestatRange{}, &stat, 0)
	return stat.Cache, os.NewSyscallError("cachestat", err)
}
