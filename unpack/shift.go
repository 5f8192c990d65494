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

// Shift makes from t, whose owners are not shifted, the Tree for a pod with the
// user namespace of o.Owners, in dir, which must not exist. No content is copied:
// every file is linked from t, extracted ones too, and the new Tree does not need
// t any more. It is for what Build would copy: a Tree of files with redirects.
// Another one is errdefs.ErrFailedPrecondition.
func (t *Tree) Shift(ctx context.Context, dir string, o Options) (*Tree, error) {
	if !t.CanShift() {
		return nil, fmt.Errorf("the tree of artifact %s is laid out by %q and %q and cannot be shifted: %w", t.Manifest, t.Modes.Raw, t.Modes.Tar, errdefs.ErrFailedPrecondition)
	}
	s, err := o.Owners.parse()
	if err != nil {
		return nil, err
	}
	shifted := &Tree{Format: format, Manifest: t.Manifest, Modes: t.Modes, Redirects: true, Source: t.Source, dir: dir}
	return shifted, shifted.make(func() error {
		if t.Inodes > smallPlan {
			release, err := o.Budget.largePlan(ctx)
			if err != nil {
				return err
			}
			defer release()
		}
		o.Modes = t.Modes
		cs := newContents(filepath.Join(dir, dataDir), nil, o)
		p := newPlan(time.Time{}, nil)
		from := filepath.Join(t.dir, fsDir)
		files := map[uint64]*node{} // by inode, for those with several names
		if err := filepath.WalkDir(from, func(path string, _ fs.DirEntry, err error) error {
			if err := errors.Join(err, ctx.Err()); err != nil {
				return err
			}
			name, err := filepath.Rel(from, path)
			if err != nil {
				return err
			}
			return cs.addEntry(t, p, path, name, files)
		}); err != nil {
			return err
		}
		err := buildDirectory(ctx, filepath.Join(dir, fsDir), p, cs, s)
		shifted.Size, shifted.Inodes = cs.size, cs.inodes
		return err
	})
}

// CanShift reports whether Shift makes another Tree of t.
func (t *Tree) CanShift() bool { return !t.Image && t.Modes.Raw == Overlay }

// addEntry plans the entry name, which is at path in the Tree t.
func (cs *contents) addEntry(t *Tree, p *plan, path, name string, files map[uint64]*node) error {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return pathError("lstat", path, err)
	}
	n := &node{attrs: attrs{mode: goMode(st.Mode), uid: st.Uid, gid: st.Gid, mtime: time.Unix(st.Mtim.Unix())}}
	var err error
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		n.kind = directory
		n.xattrs, err = listUserXattrs(path)
	case unix.S_IFLNK:
		n.kind = symlink
		n.target, err = os.Readlink(path)
	default:
		if other, ok := files[st.Ino]; ok {
			n = other
			break
		}
		files[st.Ino] = n
		n.kind = regular
		if n.xattrs, err = listUserXattrs(path); err == nil && st.Size > 0 {
			n.bytes, err = cs.shared(t, path, st)
		}
	}
	if err != nil {
		return err
	}
	return p.add(name, n)
}

// shared is the content of the file at path of the Tree t, linked from there: a
// content of t, or the extracted file itself as if it were one.
func (cs *contents) shared(t *Tree, path string, st unix.Stat_t) (extent, error) {
	redirect := make([]byte, 256)
	n, err := unix.Lgetxattr(path, xattrRedirect, redirect)
	name, from := "f"+strconv.FormatUint(st.Ino, 10), path
	switch {
	case err == nil:
		name = strings.TrimPrefix(string(redirect[:n]), "/")
		from = filepath.Join(t.dir, dataDir, name)
	case !errors.Is(err, unix.ENODATA):
		return extent{}, pathError("getxattr "+xattrRedirect, path, err)
	}
	c := &content{name: name, path: filepath.Join(cs.dir, name)}
	if err := os.Link(from, c.path); err != nil && !errors.Is(err, os.ErrExist) {
		return extent{}, err
	}
	return extent{content: c, size: st.Size}, nil
}

// listUserXattrs are the extended attributes of the user namespace, all that a
// file of a Tree can have beside those of overlayfs.
func listUserXattrs(path string) (map[string]string, error) {
	n, err := unix.Llistxattr(path, nil)
	if n == 0 || err != nil {
		return nil, pathError("listxattr", path, err)
	}
	const limit = 64 << 10 // XATTR_LIST_MAX, XATTR_SIZE_MAX
	list, value := make([]byte, limit), make([]byte, limit)
	if n, err = unix.Llistxattr(path, list); err != nil {
		return nil, pathError("listxattr", path, err)
	}
	var attrs map[string]string
	for attr := range strings.SplitSeq(string(list[:n]), "\x00") {
		if !strings.HasPrefix(attr, "user.") {
			continue
		}
		n, err := unix.Lgetxattr(path, attr, value)
		if err != nil {
			return nil, pathError("getxattr "+attr, path, err)
		}
		if attrs == nil {
			attrs = map[string]string{}
		}
		attrs[attr] = string(value[:n])
	}
	return attrs, nil
}
