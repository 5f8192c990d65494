// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
)

// Target is where ExtractLayer extracts a layer.
type Target struct {
	// Upper is the existing directory that gets the files.
	Upper string
	// Lower are the directories below Upper in an overlay, the uppermost first, as far
	// as they are known.
	Lower []string
	// UserXattr says that the overlay is mounted with the option userxattr: overlayfs
	// then obeys attributes that every user may set (user.overlay.*).
	UserXattr bool
	// Sync asks for the file system of Upper to be synced to the disk at the end.
	Sync bool
}

// ExtractLayer extracts one layer into a directory, for containerd: a raw layer becomes
// a reflink of its blob, else a hard link to it (with the blob's mode, owner and time),
// else a copy; a tar becomes its members. It returns digest and size of the layer's
// content. scratch is an empty directory on the file system of o.Shared.
//
// containerd names snapshots by contents alone, so an image that has a layer with the
// same content gets the same snapshot. A layer that containerd would extract in another
// way is therefore refused, and so is one that does not fit the directories below, by the
// rule for the layers of an artifact. These are errdefs.ErrInvalidArgument; other errors
// are those of Build. o.Modes and o.Owners are ignored. A call that failed or was killed
// can be repeated.
func ExtractLayer(ctx context.Context, l artifact.Layer, into Target, scratch string, o Options) (content ocispec.Descriptor, err error) {
	o.Modes, o.Owners = Modes{Raw: Copy, Tar: Extract}, IDMap{}
	err = guard(func() error {
		content, err = extractLayer(ctx, l, into, newContents(scratch, []artifact.Layer{l}, o))
		return err
	})
	return content, outOfSpace(err)
}

func extractLayer(ctx context.Context, said artifact.Layer, into Target, cs *contents) (content ocispec.Descriptor, err error) {
	layers := []artifact.Layer{said}
	if err := cs.retainArchives(ctx, layers); err != nil {
		return content, err
	}
	planned, release, err := cs.plan(ctx, time.Unix(0, 0).UTC(), layers)
	if err != nil {
		return content, err
	}
	defer release()
	l, c, err := cs.found(said)
	if err == nil {
		err = planned.asOfAnImage(ctx, l, c, cs)
	}
	if err != nil {
		return content, said.Wrap(err)
	}
	root, err := os.OpenRoot(into.Upper)
	if err != nil {
		return content, err
	}
	defer root.Close()
	if err := planned.fit(ctx, into); err != nil {
		return content, err
	}
	if err := planned.clear(ctx, root); err != nil {
		return content, err
	}
	w := &writer{contents: cs, root: root, plan: planned}
	w.whole = w.shareWhole
	if err := w.write(ctx); err != nil {
		return content, err
	}
	if into.Sync {
		if err := syncFS(into.Upper); err != nil {
			return content, err
		}
	}
	content.Size = l.Descriptor.Size
	if content.Digest, err = c.diffID(ctx, l); err != nil || c == nil || l.Format == artifact.FormatRaw {
		return content, err
	}
	fi, err := os.Lstat(c.path)
	if err != nil {
		return content, err
	}
	content.Size = fi.Size()
	return content, nil
}

// fit checks the plan against what the directories have already, by the rule for the layers
// of an artifact: a file and a directory do not replace each other. A directory that the
// plan does not describe keeps the attributes that it has there.
func (p *plan) fit(ctx context.Context, in Target) error {
	var roots []*os.Root
	defer func() {
		for _, root := range roots {
			root.Close()
		}
	}()
	for _, dir := range append([]string{in.Upper}, in.Lower...) {
		root, err := os.OpenRoot(dir)
		if err != nil {
			return err
		}
		roots = append(roots, root)
	}
	if root := p.nodes["."]; root.implied && len(in.Lower) > 0 {
		if err := root.adopt(roots[1], "."); err != nil {
			return err
		}
	}
	merged := map[string][]*os.Root{".": roots} // the directories that overlayfs merges
	for _, name := range p.sorted() {
		if err := ctx.Err(); err != nil { // many layers below may take long
			return err
		}
		n := p.nodes[name]
		err := n.fitXattrs(in)
		if err == nil && name != "." {
			merged[name], err = n.fit(name, merged[path.Dir(name)])
			if above := p.nodes[path.Dir(name)]; err == nil && n.implied && len(merged[name]) == 0 && above.attrs.mode&fs.ModeSetgid != 0 {
				// For a layer of an image the kernel would take the group from above.
				err = fmt.Errorf("no layer describes this directory, and the directory above it is setgid; pack the directory with its own entry: %w", errdefs.ErrInvalidArgument)
			}
		}
		if err != nil {
			return p.wrap(name, err)
		}
	}
	return nil
}

func (n *node) fitXattrs(in Target) error {
	for attr := range n.xattrs {
		if in.UserXattr && strings.HasPrefix(attr, "user.overlay.") {
			return fmt.Errorf("the snapshotter's overlayfs would obey the extended attribute %.255q: %w", attr, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

// fit compares n with the uppermost entry of that name in roots, and returns those roots in
// which it is a directory that overlayfs merges.
func (n *node) fit(name string, roots []*os.Root) (dirs []*os.Root, err error) {
	for _, root := range roots {
		fi, err := root.Lstat(name)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			continue
		case err != nil:
			return nil, err
		case !fi.IsDir():
			if len(dirs) == 0 && n.kind == directory && !isWhiteout(fi) {
				return nil, fmt.Errorf("it is a directory, but a file in a layer below: %w", errdefs.ErrInvalidArgument)
			}
			return dirs, nil
		case n.kind != directory:
			return nil, fmt.Errorf("it is a file, but a directory in a layer below: %w", errdefs.ErrInvalidArgument)
		case n.implied && len(dirs) == 0:
			if err := n.adopt(root, name); err != nil {
				return nil, err
			}
		}
		dirs = append(dirs, root)
	}
	return dirs, nil
}

// adopt gives n the attributes of an existing directory.
func (n *node) adopt(root *os.Root, name string) error {
	f, err := root.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return pathError("stat", name, err)
	}
	n.attrs = attrs{mode: goMode(st.Mode), uid: st.Uid, gid: st.Gid, mtime: time.Unix(st.Mtim.Unix())}
	n.xattrs, err = listUserXattrs(fmt.Sprintf("/proc/self/fd/%d/.", f.Fd()))
	return err
}

// isWhiteout reports whether an entry of an overlay's layer is a whiteout, which hides the
// entries below (Documentation/filesystems/overlayfs.rst, "whiteouts and opaque
// directories").
func isWhiteout(fi fs.FileInfo) bool {
	return fi.Mode()&fs.ModeCharDevice != 0
}

// clear removes from root what an earlier attempt has left, and the files that the plan
// replaces.
func (p *plan) clear(ctx context.Context, root *os.Root) error {
	for _, name := range slices.Backward(p.sorted()) {
		if err := ctx.Err(); err != nil {
			return err
		}
		if p.nodes[name].kind == directory {
			continue
		}
		if err := root.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return p.wrap(name, err)
		}
	}
	return nil
}

// shareWhole creates the file of a raw layer: a reflink of the blob, else a hard link to
// it, with the attributes of the blob, else a copy. A sparse member is copied, since the
// directory may be on another file system.
func (w *writer) shareWhole(ctx context.Context, name string, n *node) error {
	if n.bytes.content.own {
		return w.copyOwn(ctx, name, n)
	}
	blob := n.bytes.content.layer.Descriptor
	src, err := w.open(ctx, blob)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := w.create(name, n.attrs.mode)
	if err != nil {
		return err
	}
	defer dst.Close()
	if unix.IoctlFileClone(int(dst.Fd()), int(src.Fd())) == nil {
		w.counted(Reflinked, blob.Size)
		return w.setAttrs(name, n)
	}
	dir, base, err := w.at(name)
	if err != nil {
		return err
	}
	if err := unix.Unlinkat(dir, base, 0); err != nil {
		return pathError("unlink", name, err)
	}
	// This links the file that is open, whatever has happened to its name.
	if unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", src.Fd()), dir, base, unix.AT_SYMLINK_FOLLOW) == nil {
		w.counted(Linked, blob.Size)
		return nil
	}
	copied, err := w.create(name, n.attrs.mode)
	if err != nil {
		return err
	}
	_, err = w.fill(ctx, copied, blob)
	if err := errors.Join(err, copied.Close()); err != nil {
		return err
	}
	return w.setAttrs(name, n)
}

func (w *writer) copyOwn(ctx context.Context, name string, n *node) error {
	src, err := os.Open(n.bytes.content.path)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := w.create(name, n.attrs.mode)
	if err != nil {
		return err
	}
	written, err := copySparse(dst, reader{ctx, src, nil}, n.bytes.size, n.bytes.size)
	w.counted(Copied, written)
	if err := errors.Join(err, dst.Close()); err != nil {
		return err
	}
	return w.setAttrs(name, n)
}

// syncFS syncs the file system of dir to the disk.
func syncFS(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	return pathError("syncfs", dir, unix.Syncfs(int(f.Fd())))
}
