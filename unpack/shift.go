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

	"github.com/containerd/continuity/sysx"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Shift makes, in dir, which must not exist, the tree for a pod whose user namespace has
// the ID mapping o.Owners, from t, a tree without one. It copies no content: every file is
// linked from t, extracted ones too, and the new tree does not depend on t. It is for trees
// that Build would have to copy: trees of files with redirects. For other trees it returns
// errdefs.ErrFailedPrecondition.
func (t *Tree) Shift(ctx context.Context, dir string, o Options) (*Tree, error) {
	if !t.CanShift() {
		return nil, fmt.Errorf("the tree of artifact %s has the modes %q and %q, whose owners cannot be shifted: %w", t.Manifest, t.Modes.Raw, t.Modes.Tar, errdefs.ErrFailedPrecondition)
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
		files := map[uint64]*node{} // by inode, for files with several names
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

// CanShift reports whether Shift works for t.
func (t *Tree) CanShift() bool { return !t.Image && t.Modes.Raw == Overlay }

// addEntry adds the entry name, which is at path in the tree t, to the plan.
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

// shared returns the content of the file at path in the tree t, linked from there: a
// content of t, or the extracted file itself as a content.
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

// listUserXattrs returns the extended attributes user.* of a file, which are all that a
// file of a tree can have besides those of overlayfs.
func listUserXattrs(path string) (map[string]string, error) {
	names, err := sysx.LListxattr(path)
	if err != nil {
		return nil, pathError("listxattr", path, err)
	}
	var attrs map[string]string
	for _, name := range names {
		if !strings.HasPrefix(name, "user.") {
			continue
		}
		value, err := sysx.LGetxattr(path, name)
		if err != nil {
			return nil, pathError("getxattr "+name, path, err)
		}
		if attrs == nil {
			attrs = map[string]string{}
		}
		attrs[name] = string(value)
	}
	return attrs, nil
}
