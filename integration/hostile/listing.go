// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package hostile

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
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Type is the type of an entry.
type Type string

// The types that a volume can contain.
const (
	Directory Type = "directory"
	File      Type = "file"
	Symlink   Type = "symlink"
)

// Entry is the actual or expected state of one path in a volume.
type Entry struct {
	Type      Type
	Mode      uint32 // permission, setuid, setgid and sticky bits
	UID, GID  uint32
	Sec, Nsec int64  // the modification time
	Size      int64  // of files
	SHA256    string // of files, in hex
	Target    string // of symlinks
	Xattrs    string // all that root can list, sorted, one name="value" per line
	// Raw marks the file of a raw layer, whose attributes some ways cannot provide.
	Raw bool
}

// Listing maps paths, as raw bytes, to entries.
type Listing map[string]Entry

// List lists dir as "." and everything below it. It uses directory descriptors, because
// paths may exceed PATH_MAX, and follows no symlink.
func List(dir string) (Listing, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	r := reader{Listing: Listing{}, names: make([]byte, 64<<10), values: make([]byte, 64<<10)}
	return r.Listing, r.add(root, "")
}

// reader makes a Listing. It reuses its buffers, which have the kernel's maximum size for
// extended attributes.
type reader struct {
	Listing
	names, values []byte
}

// add adds the directory root with the path prefix, and its content.
func (r reader) add(root *os.Root, prefix string) error {
	self, err := root.Open(".")
	if err != nil {
		return err
	}
	defer self.Close()
	fi, err := self.Stat()
	if err != nil {
		return err
	}
	e, err := entryOf(fi)
	if err != nil {
		return err
	}
	if e.Xattrs, err = r.xattrs(int(self.Fd())); err != nil {
		return err
	}
	name := strings.TrimSuffix(prefix, "/")
	if name == "" {
		name = "."
	}
	r.Listing[name] = e
	names, err := self.Readdirnames(-1)
	if err != nil {
		return err
	}
	for _, name := range names {
		if err := r.addEntry(root, prefix, name); err != nil {
			return fmt.Errorf("%.300q: %w", prefix+name, err)
		}
	}
	return nil
}

func (r reader) addEntry(root *os.Root, prefix, name string) error {
	fi, err := root.Lstat(name)
	if err != nil {
		return err
	}
	if fi.IsDir() {
		sub, err := root.OpenRoot(name)
		if err != nil {
			return err
		}
		defer sub.Close()
		return r.add(sub, prefix+name+"/")
	}
	e, err := entryOf(fi)
	if err != nil {
		return err
	}
	if e.Type == Symlink {
		if e.Target, err = root.Readlink(name); err != nil {
			return err
		}
		r.Listing[prefix+name] = e
		return nil
	}
	f, err := root.OpenFile(name, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	h := sha256.New()
	n, err := io.CopyBuffer(h, struct{ io.Reader }{f}, r.values) // io.CopyBuffer ignores the buffer if the reader has WriteTo, as os.File has
	if err != nil {
		return err
	}
	if n != e.Size {
		return fmt.Errorf("read %d bytes of %d", n, e.Size)
	}
	e.SHA256 = hex.EncodeToString(h.Sum(nil))
	if e.Xattrs, err = r.xattrs(int(f.Fd())); err != nil {
		return err
	}
	r.Listing[prefix+name] = e
	return nil
}

func entryOf(fi fs.FileInfo) (Entry, error) {
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok {
		return Entry{}, errors.New("no stat")
	}
	e := Entry{Mode: st.Mode & 0o7777, UID: st.Uid, GID: st.Gid, Sec: st.Mtim.Sec, Nsec: st.Mtim.Nsec}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		e.Type = Directory
	case unix.S_IFREG:
		e.Type, e.Size = File, st.Size
	case unix.S_IFLNK:
		e.Type = Symlink
	default:
		return e, fmt.Errorf("neither a file, a directory nor a symlink: mode %o", st.Mode)
	}
	return e, nil
}

// xattrs omits our internal attribute, which only root sees (unpack, aligned).
func (r reader) xattrs(fd int) (string, error) {
	n, err := unix.Flistxattr(fd, r.names)
	if errors.Is(err, unix.ENOTSUP) || n == 0 {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("list of extended attributes: %w", err)
	}
	found := map[string]string{}
	for name := range bytes.SplitSeq(bytes.TrimSuffix(r.names[:n], []byte{0}), []byte{0}) {
		n, err := unix.Fgetxattr(fd, string(name), r.values)
		if err != nil {
			return "", fmt.Errorf("extended attribute %q: %w", name, err)
		}
		found[string(name)] = string(r.values[:n])
	}
	delete(found, "trusted.artifact")
	return xattrs(found), nil
}

// xattrs formats extended attributes for an Entry. It hashes long values.
func xattrs(set map[string]string) string {
	var out strings.Builder
	for _, name := range slices.Sorted(maps.Keys(set)) {
		value := set[name]
		if len(value) > 64 {
			value = fmt.Sprintf("%d bytes, %s", len(value), sum(value))
		}
		fmt.Fprintf(&out, "%s=%q\n", name, value)
	}
	return out.String()
}

// on reduces a listing to what a way can provide. containerd merges the layers of an image
// itself, so the root and the times are not compared with Files.
func (l Listing) on(w Way) Listing {
	if w != Files {
		return l
	}
	l = maps.Clone(l)
	delete(l, ".")
	for name, e := range l {
		e.Sec, e.Nsec = 0, 0
		l[name] = e
	}
	return l
}

// like compares the actual entry with e. A hard link to a blob has the attributes of the
// blob.
func (e Entry) like(got Entry, w Way) bool {
	if e.Raw && w.Links() {
		e.Mode, e.UID, e.GID, e.Sec, e.Nsec = got.Mode, got.UID, got.GID, got.Sec, got.Nsec
	}
	e.Raw = false
	return e == got
}

// diff lists at most ten differences between got and l. It compares the root only if l
// lists it.
func (l Listing) diff(got Listing, w Way) string {
	var out strings.Builder
	lines := 0
	line := func(format string, args ...any) {
		if lines++; lines <= 10 {
			fmt.Fprintf(&out, format+"\n", args...)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(l)) {
		switch e, ok := got[name]; {
		case !ok:
			line("%.300q is missing", name)
		case !l[name].like(e, w):
			line("%.300q is\n\t%.2000q, want\n\t%.2000q", name, fmt.Sprintf("%+v", e), fmt.Sprintf("%+v", l[name]))
		}
	}
	for _, name := range slices.Sorted(maps.Keys(got)) {
		if _, ok := l[name]; !ok && name != "." {
			line("%.300q is unexpected: %+v", name, got[name])
		}
	}
	if lines > 10 {
		fmt.Fprintf(&out, "and %d more\n", lines-10)
	}
	return out.String()
}
