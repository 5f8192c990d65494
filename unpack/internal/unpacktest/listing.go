// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package unpacktest

import (
	"crypto/sha256"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/continuity/sysx"
	"golang.org/x/sys/unix"
)

// Entry is a file, directory or symlink of a directory tree, as it is or as it should
// be.
type Entry struct {
	Kind     string // "directory", "file" or "symlink"
	Mode     uint32 // permissions; of a directory also setuid, setgid and sticky
	UID, GID uint32
	Sec      int64
	Nsec     int
	Size     int64  // of a file
	Sum      string // SHA-256 of a file's content
	Target   string
	Xattrs   string // the attributes user.*, as fmt prints a map
}

// Listing has entries by their clean paths, with "." for the root.
type Listing map[string]Entry

// At sets the modification time.
func (s *Entry) At(t time.Time) { s.Sec, s.Nsec = t.Unix(), t.Nanosecond() }

// List lists the directory dir, with everything in it.
func List(t *testing.T, dir string) Listing {
	t.Helper()
	l := Listing{}
	err := filepath.WalkDir(dir, func(p string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(dir, p)
		if err != nil {
			return err
		}
		l[name], err = entryAt(p)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func entryAt(p string) (Entry, error) {
	var st unix.Stat_t
	if err := unix.Lstat(p, &st); err != nil {
		return Entry{}, err
	}
	e := Entry{Mode: st.Mode & 0o7777, UID: st.Uid, GID: st.Gid}
	e.At(time.Unix(st.Mtim.Unix()))
	var err error
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		e.Kind = "directory"
	case unix.S_IFLNK:
		e.Kind = "symlink"
		e.Target, err = os.Readlink(p)
	case unix.S_IFREG:
		e.Kind = "file"
		e.Size, e.Sum, err = sumOf(p)
		if err == nil && e.Size != st.Size {
			err = fmt.Errorf("%s holds %d bytes and says %d", p, e.Size, st.Size)
		}
	}
	if err != nil {
		return e, err
	}
	xattrs := map[string]string{}
	if e.Kind != "symlink" {
		names, err := sysx.LListxattr(p)
		if err != nil {
			return e, err
		}
		for _, name := range names {
			if !strings.HasPrefix(name, "user.") {
				continue
			}
			value, err := sysx.LGetxattr(p, name)
			if err != nil {
				return e, err
			}
			xattrs[name] = string(value)
		}
	}
	e.Xattrs = fmt.Sprint(xattrs)
	return e, nil
}

func sumOf(p string) (int64, string, error) {
	f, err := os.Open(p)
	if err != nil {
		return 0, "", err
	}
	defer f.Close()
	sum := sha256.New()
	n, err := io.Copy(sum, f)
	return n, fmt.Sprintf("%x", sum.Sum(nil)), err
}

// Diff says how l differs from want, by at most ten entries; "" if it does not.
func (l Listing) Diff(want Listing) string {
	var out strings.Builder
	lines := 0
	for _, name := range slices.Compact(slices.Sorted(func(yield func(string) bool) {
		for _, names := range []Listing{want, l} {
			for name := range names {
				if !yield(name) {
					return
				}
			}
		}
	})) {
		got, ok := l[name]
		if wanted, wantedOK := want[name]; ok != wantedOK || !got.like(wanted) {
			if lines++; lines > 10 {
				return out.String() + "and more\n"
			}
			fmt.Fprintf(&out, "%.60q: %+v, want %+v\n", name, got, wanted)
		}
	}
	return out.String()
}

// like is equality, where an entry without Xattrs has none.
func (s Entry) like(want Entry) bool {
	if want.Xattrs == "" {
		want.Xattrs = fmt.Sprint(map[string]string{})
	}
	return s == want
}
