// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Shift makes from t, whose owners are not shifted, the Tree for a pod with a
// user namespace, in dir, which must not exist. It is metadata: the content of
// every file is linked from t, that of extracted ones too, and the new Tree does
// not need t any more. Only a Tree of the rung Overlay can be shifted; another
// one is errdefs.ErrFailedPrecondition.
func (t *Tree) Shift(ctx context.Context, dir string, owners IDMap) (*Tree, error) {
	if t.Rung != Overlay {
		return nil, fmt.Errorf("the tree of artifact %s is laid out by %q and has no owners to shift: %w", t.Manifest, t.Rung, errdefs.ErrFailedPrecondition)
	}
	shifted := &Tree{Manifest: t.Manifest, Rung: t.Rung, Source: t.Source, dir: dir}
	return shifted, shifted.make(Options{Rung: t.Rung, Owners: owners}, func(w *writer) error {
		from := filepath.Join(t.dir, fsDir)
		linked := map[uint64]string{} // the names of files with several, by inode
		err := filepath.WalkDir(from, func(p string, _ fs.DirEntry, err error) error {
			if err := errors.Join(err, ctx.Err()); err != nil {
				return err
			}
			name, err := filepath.Rel(from, p)
			if err != nil {
				return err
			}
			return w.copyEntry(t, p, name, linked)
		})
		return errors.Join(err, w.finish())
	})
}

// copyEntry makes the entry name like that at the path p of the Tree t.
func (w *writer) copyEntry(t *Tree, p, name string, linked map[uint64]string) error {
	var st unix.Stat_t
	if err := unix.Lstat(p, &st); err != nil {
		return &fs.PathError{Op: "lstat", Path: p, Err: err}
	}
	a := attrs{mode: goMode(st.Mode), uid: st.Uid, gid: st.Gid, mtime: time.Unix(st.Mtim.Unix())}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		n, err := w.mkdir(name, 0)
		if err != nil {
			return err
		}
		n.attrs = a
		return w.copyXattrs(p, name)
	case unix.S_IFLNK:
		target, err := os.Readlink(p)
		if err != nil {
			return err
		}
		dir, base, err := w.at(name)
		if err != nil {
			return err
		}
		if err := unix.Symlinkat(target, dir, base); err != nil {
			return &fs.PathError{Op: "symlink", Path: name, Err: err}
		}
		return w.setAttrs(name, symlink, a)
	}
	if first, ok := linked[st.Ino]; ok {
		return w.root.Link(in(first), in(name))
	}
	if st.Nlink > 1 {
		linked[st.Ino] = name
	}
	f, err := w.create(name, a.mode)
	if err != nil {
		return err
	}
	if st.Size > 0 {
		err = w.copyContent(t, f, p, st)
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := w.copyXattrs(p, name); err != nil {
		return err
	}
	return w.setAttrs(name, regular, a)
}

// copyContent gives the file f the content of that at p of the Tree t: the same
// blob, or the extracted file itself as if it were one.
func (w *writer) copyContent(t *Tree, f *os.File, p string, st unix.Stat_t) error {
	redirect := make([]byte, 256)
	n, err := unix.Lgetxattr(p, xattrRedirect, redirect)
	var name, content string
	switch {
	case err == nil:
		name = strings.TrimPrefix(string(redirect[:n]), "/")
		content = filepath.Join(t.dir, dataDir, name)
	case errors.Is(err, unix.ENODATA):
		name, content = "f"+strconv.FormatUint(st.Ino, 10), p
	default:
		return &fs.PathError{Op: "getxattr " + xattrRedirect, Path: p, Err: err}
	}
	if err := os.Link(content, filepath.Join(w.dir, dataDir, name)); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	return makeMetacopy(f, name, st.Size)
}

// copyXattrs copies the extended attributes of the user namespace, all that an
// extracted file can have.
func (w *writer) copyXattrs(p, name string) error {
	const limit = 64 << 10 // XATTR_LIST_MAX, XATTR_SIZE_MAX
	list, value := w.buf[:limit], w.buf[limit:2*limit]
	n, err := unix.Llistxattr(p, list)
	if err != nil {
		return &fs.PathError{Op: "listxattr", Path: p, Err: err}
	}
	for attr := range strings.SplitSeq(string(list[:n]), "\x00") {
		if !strings.HasPrefix(attr, "user.") {
			continue
		}
		n, err := unix.Lgetxattr(p, attr, value)
		if err != nil {
			return &fs.PathError{Op: "getxattr " + attr, Path: p, Err: err}
		}
		if err := w.setXattr(name, attr, value[:n]); err != nil {
			return err
		}
	}
	return nil
}

// goMode is the reverse of unixMode.
func goMode(mode uint32) fs.FileMode {
	m := fs.FileMode(mode & 0o777)
	for u, bit := range specialBits {
		if mode&u != 0 {
			m |= bit
		}
	}
	return m
}
