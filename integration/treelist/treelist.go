// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

// Package treelist lists everything below a directory, so that tests can compare a volume
// in a pod with its source on the host: the guest program of the test image runs the same
// code. It is for tests only and reads every byte of every file.
package treelist

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Entry is one file, directory or other entry below the listed directory.
type Entry struct {
	Path    string            `json:"path"`             // relative to the listed directory, slash-separated
	Type    string            `json:"type"`             // "file", "dir", "symlink", "fifo", "socket", "char" or "block"
	Mode    uint32            `json:"mode"`             // permission, setuid, setgid and sticky bits as in st_mode
	UID     uint32            `json:"uid"`              // as seen by the caller's user namespace
	GID     uint32            `json:"gid"`              //
	Size    int64             `json:"size"`             // bytes; files only, because file systems differ for other types
	ModTime int64             `json:"mtime"`            // nanoseconds since the epoch
	SHA256  string            `json:"sha256,omitempty"` // hex, of the content; files only
	Target  string            `json:"target,omitempty"` // symlinks only
	Xattrs  map[string][]byte `json:"xattrs,omitempty"` // those the caller may list
}

// List returns every entry below dir in lexical order, without dir itself.
func List(dir string) ([]Entry, error) {
	entries := []Entry{} // never nil, so that an empty directory is [] in JSON
	err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if err != nil || path == dir {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		entry, err := describe(path)
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		entry.Path = filepath.ToSlash(rel)
		entries = append(entries, entry)
		return nil
	})
	return entries, err
}

var types = map[uint32]string{
	unix.S_IFREG:  "file",
	unix.S_IFDIR:  "dir",
	unix.S_IFLNK:  "symlink",
	unix.S_IFIFO:  "fifo",
	unix.S_IFSOCK: "socket",
	unix.S_IFCHR:  "char",
	unix.S_IFBLK:  "block",
}

func describe(path string) (Entry, error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return Entry{}, err
	}
	e := Entry{
		Type:    types[st.Mode&unix.S_IFMT],
		Mode:    st.Mode & 0o7777,
		UID:     st.Uid,
		GID:     st.Gid,
		ModTime: time.Unix(st.Mtim.Unix()).UnixNano(),
	}
	var err error
	switch e.Type {
	case "file":
		e.Size = st.Size
		if e.SHA256, err = hash(path); err != nil {
			return Entry{}, err
		}
	case "symlink":
		if e.Target, err = os.Readlink(path); err != nil {
			return Entry{}, err
		}
	}
	e.Xattrs, err = xattrs(path)
	return e, err
}

func hash(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

func xattrs(path string) (map[string][]byte, error) {
	buf := make([]byte, 64<<10) // the kernel's limit for both a list and a value
	n, err := unix.Llistxattr(path, buf)
	if errors.Is(err, unix.ENOTSUP) || n == 0 {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list xattrs: %w", err)
	}
	found := map[string][]byte{}
	for name := range strings.SplitSeq(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00") {
		value := make([]byte, 64<<10)
		n, err := unix.Lgetxattr(path, name, value)
		if err != nil {
			return nil, fmt.Errorf("xattr %s: %w", name, err)
		}
		found[name] = value[:n]
	}
	return found, nil
}

// Diff describes the differences line by line, or returns "" if there are none.
func Diff(want, got []Entry) string {
	index := func(entries []Entry) map[string]Entry {
		m := make(map[string]Entry, len(entries))
		for _, e := range entries {
			m[e.Path] = e
		}
		return m
	}
	wanted, gotten := index(want), index(got)
	var out strings.Builder
	for _, path := range slices.Sorted(maps.Keys(wanted)) {
		w := wanted[path]
		g, ok := gotten[path]
		if !ok {
			fmt.Fprintf(&out, "%s: missing\n", path)
			continue
		}
		differ := func(field string, want, got any) {
			if want != got {
				fmt.Fprintf(&out, "%s: %s is %v, want %v\n", path, field, got, want)
			}
		}
		differ("type", w.Type, g.Type)
		differ("mode", fmt.Sprintf("%04o", w.Mode), fmt.Sprintf("%04o", g.Mode))
		differ("uid", w.UID, g.UID)
		differ("gid", w.GID, g.GID)
		differ("size", w.Size, g.Size)
		differ("mtime", time.Unix(0, w.ModTime).UTC(), time.Unix(0, g.ModTime).UTC())
		differ("sha256", w.SHA256, g.SHA256)
		differ("symlink target", w.Target, g.Target)
		if !maps.EqualFunc(w.Xattrs, g.Xattrs, bytes.Equal) {
			fmt.Fprintf(&out, "%s: xattrs are %q, want %q\n", path, g.Xattrs, w.Xattrs)
		}
	}
	for _, path := range slices.Sorted(maps.Keys(gotten)) {
		if _, ok := wanted[path]; !ok {
			fmt.Fprintf(&out, "%s: unexpected %s\n", path, gotten[path].Type)
		}
	}
	return out.String()
}
