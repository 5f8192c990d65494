// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package measure

import (
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// buffer is shared by all readers, so that its allocation is not measured.
var buffer = make([]byte, MiB)

// Read reads a file with read(2), 1 MiB at a time: all of it, or only the first limit bytes
// if limit is not 0. It must not be called concurrently.
func Read(path string, limit int64) {
	f := Must(os.Open(path))
	defer f.Close()
	in := io.Reader(f)
	if limit > 0 {
		in = io.LimitReader(f, limit)
	}
	for {
		if _, err := in.Read(buffer); errors.Is(err, io.EOF) {
			return
		} else if err != nil {
			Check(err)
		}
	}
}

// Evict removes a file from the page cache.
func Evict(path string) {
	f := Must(os.Open(path))
	defer f.Close()
	Check(unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED))
	if left := Cached(path); left > 0.01 {
		Check(fmt.Errorf("%.3f GiB of %s remain in the page cache", left, path))
	}
}

// DropCaches drops clean pages, inodes and dentries of all file systems; call Sync first,
// because dirty pages stay. It returns false where this is not permitted.
func DropCaches() bool { return os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0) == nil }

// Cached returns how much of a file is in the page cache, in GiB.
func Cached(path string) float64 {
	f := Must(os.Open(path))
	defer f.Close()
	var st unix.Cachestat_t
	Check(os.NewSyscallError("cachestat", unix.Cachestat(uint(f.Fd()), &unix.CachestatRange{}, &st, 0))) // Linux 6.5
	return float64(st.Cache) * float64(os.Getpagesize()) / GiB
}
