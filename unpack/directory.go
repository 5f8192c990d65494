// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"slices"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// writer creates the files of a plan below a directory. Only here does a name from an
// artifact become a file: every access goes through root, which no name and no symlink
// leaves, and every name has passed artifact.CleanPath.
type writer struct {
	*contents
	root  *os.Root
	plan  *plan
	shift shift
	// parent is the open directory of the last entry. Files come directory by directory,
	// and each walk from root would open one directory per level.
	parent     *os.File
	parentName string
	// first has the first name of each file, for hard links to it.
	first map[*node]string
	// whole, if it is not nil, creates a file whose bytes are all of a content.
	whole func(ctx context.Context, name string, n *node) error
}

// buildDirectory writes the plan to dir, an empty directory.
func buildDirectory(ctx context.Context, dir string, p *plan, cs *contents, s shift) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	w := &writer{contents: cs, root: root, plan: p, shift: s}
	return w.write(ctx)
}

// write writes the plan. Its directories may exist already.
func (w *writer) write(ctx context.Context) error {
	p := w.plan
	w.first = map[*node]string{}
	defer func() {
		if w.parent != nil {
			w.parent.Close()
		}
	}()
	names := p.sorted()
	for _, name := range names {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := w.entry(ctx, name, p.nodes[name]); err != nil {
			return p.wrap(name, outOfSpace(err))
		}
	}
	// Directories get their attributes last, children before parents: every new entry
	// changes the directory's time.
	for _, name := range slices.Backward(names) {
		if n := p.nodes[name]; n.kind == directory {
			if err := w.setAttrs(name, n); err != nil {
				return p.wrap(name, outOfSpace(err))
			}
		}
	}
	return nil
}

// entry creates one entry; its parent exists.
func (w *writer) entry(ctx context.Context, name string, n *node) error {
	if name == "." {
		return nil
	}
	dir, base, err := w.at(name)
	if err != nil {
		return err
	}
	switch n.kind {
	case directory:
		if err := unix.Mkdirat(dir, base, 0o700); !errors.Is(err, unix.EEXIST) {
			return pathError("mkdir", name, err)
		}
		return nil
	case symlink:
		if err := unix.Symlinkat(n.target, dir, base); errors.Is(err, unix.ENAMETOOLONG) {
			return fmt.Errorf("the target of the symlink %s has %d bytes, more than the file system of the snapshotter's root can store (xfs: 1023; ext4: a block); move root to btrfs, or to ext4 with blocks of 4 KiB: %w", name, len(n.target), errdefs.ErrFailedPrecondition)
		} else if err != nil {
			return pathError("symlink", name, err)
		}
		return w.setAttrs(name, n)
	default:
		return w.file(ctx, name, n)
	}
}

// file creates a regular file, or another name of one that exists.
func (w *writer) file(ctx context.Context, name string, n *node) error {
	if first, ok := w.first[n]; ok {
		// The file system limits how many names a file has; the others share another copy.
		if err := w.root.Link(first, name); !errors.Is(err, unix.EMLINK) {
			return err
		}
	}
	w.first[n] = name
	c := n.bytes.content
	if c != nil && !n.bytes.member && w.whole != nil {
		return w.whole(ctx, name, n)
	}
	if c != nil && !n.bytes.member && (w.Modes.Raw == Link || c.own && w.Modes.Raw == Copy) {
		dir, base, err := w.at(name)
		if err != nil {
			return err
		}
		err = unix.Linkat(unix.AT_FDCWD, c.path, dir, base, 0)
		switch {
		case errors.Is(err, unix.EMLINK) && c.own:
			return w.copyOwn(ctx, name, n)
		case errors.Is(err, unix.EMLINK):
		case err != nil:
			return &os.LinkError{Op: "link", Old: c.path, New: name, Err: err}
		case c.own:
			return w.setAttrs(name, n)
		default:
			return nil // it has the attributes of the runtime's blob, which must not change
		}
	}
	f, err := w.create(name, n.attrs.mode)
	if err != nil {
		return err
	}
	if err := errors.Join(w.bytes(ctx, f, n.bytes), f.Close()); err != nil {
		return err
	}
	return w.setAttrs(name, n)
}

// bytes writes the content of the empty file f.
func (w *writer) bytes(ctx context.Context, f *os.File, e extent) error {
	switch c := e.content; {
	case c == nil:
		return nil
	case e.member:
		if err := w.Budget.room(f, e.size); err != nil {
			return err
		}
		archive, err := os.Open(c.path)
		if err != nil {
			return err
		}
		defer archive.Close()
		written, err := copySparse(f, reader{ctx, io.NewSectionReader(archive, e.offset, e.size), nil}, e.size, e.size)
		w.counted(Copied, written)
		return err
	case w.Modes.Raw == Overlay:
		return makeMetacopy(f, c.name, e.size)
	default:
		blob := c.layer.Descriptor
		blob.Size = e.size // another layer may claim another size
		_, err := w.fill(ctx, f, blob)
		return err
	}
}

// The attributes by which overlayfs finds the content of a file (fs/overlayfs/overlayfs.h).
const (
	xattrMetacopy = "trusted.overlay.metacopy"
	xattrRedirect = "trusted.overlay.redirect"
)

// metacopy returns the attributes by which overlayfs combines a file's own attributes and
// size with the content of data/<target> in a data-only layer
// (Documentation/filesystems/overlayfs.rst, "Metadata only copy up" and "Data-only lower
// layers"). An empty metacopy attribute asks for no fs-verity digest.
func metacopy(target string) map[string]string {
	return map[string]string{xattrMetacopy: "", xattrRedirect: "/" + target}
}

// makeMetacopy gives the empty file f a size and the attributes of metacopy.
func makeMetacopy(f *os.File, target string, size int64) error {
	if err := f.Truncate(size); err != nil {
		return err
	}
	attributes := metacopy(target)
	for _, name := range slices.Sorted(maps.Keys(attributes)) { // sorted, so that errors are the same each time
		if err := unix.Fsetxattr(int(f.Fd()), name, []byte(attributes[name]), 0); err != nil {
			return os.NewSyscallError("setxattr "+name, err)
		}
	}
	return nil
}

// at returns the open directory of name, and the last element of name. The descriptor is
// valid until the next call.
func (w *writer) at(name string) (int, string, error) {
	dir, base := path.Dir(name), path.Base(name)
	if w.parent != nil && w.parentName == dir {
		return int(w.parent.Fd()), base, nil
	}
	if w.parent != nil {
		w.parent.Close()
	}
	var err error
	if w.parent, err = w.root.Open(dir); err != nil {
		return 0, "", err
	}
	w.parentName = dir
	return int(w.parent.Fd()), base, nil
}

// create creates and opens the file name. It has the given mode, as far as the umask
// allows.
func (w *writer) create(name string, mode fs.FileMode) (*os.File, error) {
	dir, base, err := w.at(name)
	if err != nil {
		return nil, err
	}
	fd, err := unix.Openat(dir, base, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, uint32(mode.Perm()))
	if err != nil {
		return nil, pathError("create", name, err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

// setAttrs sets extended attributes, owner, mode and time of a complete entry, and counts
// its disk usage.
func (w *writer) setAttrs(name string, n *node) error {
	dir, base, err := w.at(name)
	if err != nil {
		return err
	}
	if err := w.setXattrs(name, n.xattrs); err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Fstatat(dir, base, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return pathError("stat", name, err)
	}
	w.inodes++
	w.size += st.Blocks * 512
	uid, gid := w.shift.owner(n.attrs.uid, n.attrs.gid)
	if st.Uid != uid || st.Gid != gid {
		if err := unix.Fchownat(dir, base, int(uid), int(gid), unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return pathError("chown", name, err)
		}
	}
	mode := unixMode(n.attrs.mode)
	if n.kind != directory {
		mode &= 0o777 // even if the layer says setuid
	}
	// chown clears the special bits, which a directory may have.
	if n.kind != symlink && (mode > 0o777 || st.Mode&0o7777 != mode) {
		if err := unix.Fchmodat(dir, base, mode, 0); err != nil {
			return pathError("chmod", name, err)
		}
	}
	t, err := unix.TimeToTimespec(n.attrs.mtime)
	if err != nil {
		return pathError("utimensat", name, err)
	}
	return pathError("utimensat", name, unix.UtimesNanoAt(dir, base, []unix.Timespec{t, t}, unix.AT_SYMLINK_NOFOLLOW))
}

func (w *writer) setXattrs(name string, xattrs map[string]string) error {
	if len(xattrs) == 0 {
		return nil
	}
	f, err := w.root.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	for attr, value := range xattrs {
		if err := unix.Fsetxattr(int(f.Fd()), attr, []byte(value), 0); err != nil {
			// %v, because ext4 returns ENOSPC for an attribute that is too large, and the
			// disk is not full.
			return fmt.Errorf("extended attribute %.255q: %v: %w", attr, err, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

func pathError(op, name string, err error) error {
	if err == nil {
		return nil
	}
	return &fs.PathError{Op: op, Path: name, Err: err}
}

// specialBits are the mode bits that only directories keep, as the kernel and as Go have
// them.
var specialBits = map[uint32]fs.FileMode{
	unix.S_ISUID: fs.ModeSetuid, unix.S_ISGID: fs.ModeSetgid, unix.S_ISVTX: fs.ModeSticky,
}

func unixMode(m fs.FileMode) uint32 {
	mode := uint32(m.Perm())
	for u, bit := range specialBits {
		if m&bit != 0 {
			mode |= u
		}
	}
	return mode
}

// goMode is the inverse of unixMode.
func goMode(mode uint32) fs.FileMode {
	m := fs.FileMode(mode & 0o777)
	for u, bit := range specialBits {
		if mode&u != 0 {
			m |= bit
		}
	}
	return m
}
