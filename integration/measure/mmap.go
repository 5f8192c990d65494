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

// HugePage is what a mapping must begin at a multiple of, for the kernel to map 2 MiB of
// the page cache by one entry of the page table. The value is that of amd64, and of arm64
// with pages of 4 KiB.
const HugePage = 2 * MiB

// Map maps files with mmap(2) and the kernel's default read-ahead, as programs that load
// models do, for as long as use takes. The kernel chooses the addresses; with aligned they
// are multiples of 2 MiB. A page that cannot be read is an error of the file system, not
// the end of the program.
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
	// A reservation in which an aligned address is certain to be, and then the file at it.
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
	runtime.KeepAlive(sum) // or the compiler may leave the reads out
}

// Copy copies every byte, 1 MiB at a time to the same place, which is what read(2) does.
// It is not to be called concurrently.
func Copy(text []byte) {
	for at := 0; at < len(text); at += len(buffer) {
		copy(buffer, text[at:])
	}
}

// Faults is how many page faults a call of f causes in its thread that read nothing from
// the disk.
func Faults(f func()) float64 {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var before, after unix.Rusage
	Check(os.NewSyscallError("getrusage", unix.Getrusage(unix.RUSAGE_THREAD, &before)))
	f()
	Check(os.NewSyscallError("getrusage", unix.Getrusage(unix.RUSAGE_THREAD, &after)))
	return float64(after.Minflt - before.Minflt)
}
