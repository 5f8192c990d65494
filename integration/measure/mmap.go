// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package measure

import (
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"unsafe"

	"golang.org/x/sys/unix"
)

// HugePage is the alignment that lets the kernel map 2 MiB of page cache with one page
// table entry. The value is correct for amd64, and for arm64 with pages of 4 KiB.
const HugePage = 2 * MiB

// Map maps files with mmap(2) and the default read-ahead, as programs that load models do,
// and calls use. The kernel chooses the addresses; with aligned they are multiples of 2
// MiB. A page that cannot be read is reported as an error and does not crash the program.
func Map(paths []string, aligned bool, use func(texts [][]byte)) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if r := recover(); r != nil {
			if fault, ok := r.(interface{ Addr() uintptr }); ok {
				Check(fmt.Errorf("a page of %s cannot be read: %v", paths, fault))
			}
			panic(r)
		}
	}()
	var texts [][]byte
	for _, path := range paths {
		text, unmap := mapFile(path, aligned)
		defer Tidy(unmap)
		texts = append(texts, text)
	}
	use(texts)
}

func mapFile(path string, aligned bool) (text []byte, unmap func() error) {
	f := Must(os.Open(path))
	defer f.Close()
	size := Must(f.Stat()).Size()
	if !aligned {
		text := Must(unix.Mmap(int(f.Fd()), 0, int(size), unix.PROT_READ, unix.MAP_SHARED))
		return text, func() error { return unix.Munmap(text) }
	}
	// Reserve an area that is certain to contain an aligned address, then map the file
	// there.
	reserved := uintptr(size) + HugePage
	area := Must(unix.MmapPtr(-1, 0, nil, reserved, unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE))
	at := unsafe.Add(area, (HugePage-uintptr(area)%HugePage)%HugePage)
	Must(unix.MmapPtr(int(f.Fd()), 0, at, uintptr(size), unix.PROT_READ, unix.MAP_SHARED|unix.MAP_FIXED))
	return unsafe.Slice((*byte)(at), size), func() error { return unix.MunmapPtr(area, reserved) }
}

// Touch reads a byte of every page.
func Touch(text []byte) {
	var sum byte
	for at := 0; at < len(text); at += os.Getpagesize() {
		sum += text[at]
	}
	runtime.KeepAlive(sum) // keeps the compiler from removing the reads
}

// Copy copies every byte, 1 MiB at a time into the same buffer, as read(2) does. It must
// not be called concurrently.
func Copy(text []byte) {
	for at := 0; at < len(text); at += len(buffer) {
		copy(buffer, text[at:])
	}
}

// Faults returns the number of minor page faults (those without disk I/O) that f causes in
// its thread.
func Faults(f func()) float64 {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var before, after unix.Rusage
	Check(os.NewSyscallError("getrusage", unix.Getrusage(unix.RUSAGE_THREAD, &before)))
	f()
	Check(os.NewSyscallError("getrusage", unix.Getrusage(unix.RUSAGE_THREAD, &after)))
	return float64(after.Minflt - before.Minflt)
}
