// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
)

// raw lays out a layer that is a file.
func (w *writer) raw(ctx context.Context, l artifact.Layer) error {
	f := l.File
	// An empty blob is not looked at: it has nothing to share, and the runtime
	// may not even have it. So its digest must say that it is empty.
	if d := l.Descriptor; d.Size == 0 && d.Digest != d.Digest.Algorithm().FromBytes(nil) {
		return fmt.Errorf("its descriptor says 0 bytes, but its digest is not that of no bytes: %w", errdefs.ErrInvalidArgument)
	}
	if err := w.place(f.Path, l.Index, regular); err != nil {
		return err
	}
	if err := w.rawFile(ctx, f, l.Descriptor); err != nil {
		return err
	}
	if w.Rung == Link && l.Descriptor.Size > 0 {
		return nil // its attributes are the blob's, and not ours to change
	}
	return w.setAttrs(f.Path, regular, attrs{mode: f.Mode, uid: f.UID, gid: f.GID, mtime: f.ModTime})
}

// rawFile makes the file f with the blob's content.
func (w *writer) rawFile(ctx context.Context, f artifact.File, blob ocispec.Descriptor) error {
	if w.Rung == Link && blob.Size > 0 {
		if err := w.retain(ctx, blob); err != nil {
			return err
		}
		dir, base, err := w.at(f.Path)
		if err != nil {
			return err
		}
		if err := unix.Linkat(unix.AT_FDCWD, w.retained(blob.Digest), dir, base, 0); err != nil {
			return &os.LinkError{Op: "link", Old: blob.Digest.String(), New: f.Path, Err: err}
		}
		return nil
	}
	dst, err := w.create(f.Path, f.Mode)
	if err != nil {
		return err
	}
	switch {
	case blob.Size == 0:
	case w.Rung == Overlay:
		err = makeMetacopy(dst, w.blobs[blob.Digest], blob.Size)
	default:
		err = w.fill(ctx, dst, blob)
	}
	return errors.Join(err, dst.Close())
}

// The attributes of overlayfs (fs/overlayfs/overlayfs.h).
const (
	xattrMetacopy = "trusted.overlay.metacopy"
	xattrRedirect = "trusted.overlay.redirect"
)

// makeMetacopy turns the empty file f into one that overlayfs shows with f's
// attributes and size and the content of data/<target> in a data-only layer
// (Documentation/filesystems/overlayfs.rst, "Metadata only copy up" and
// "Data-only lower layers"). An empty metacopy attribute asks for no fs-verity
// digest.
func makeMetacopy(f *os.File, target string, size int64) error {
	if err := f.Truncate(size); err != nil {
		return err
	}
	if err := unix.Fsetxattr(int(f.Fd()), xattrMetacopy, nil, 0); err != nil {
		return os.NewSyscallError("setxattr "+xattrMetacopy, err)
	}
	if err := unix.Fsetxattr(int(f.Fd()), xattrRedirect, []byte("/"+target), 0); err != nil {
		return os.NewSyscallError("setxattr "+xattrRedirect, err)
	}
	return nil
}

// open opens a blob of the runtime and checks its size: the digest was checked
// when the runtime stored it.
func (w *writer) open(blob ocispec.Descriptor) (*os.File, error) {
	f, err := os.OpenFile(w.Blobs.Path(blob.Digest), os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, w.explain(err)
	}
	fi, err := f.Stat()
	if err == nil {
		err = checkSize(fi, blob)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

func (w *writer) explain(err error) error {
	if errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("its blob is not in %s; delete the image and pull it again: %w", w.Blobs, errdefs.ErrNotFound)
	}
	return err
}

func checkSize(fi os.FileInfo, blob ocispec.Descriptor) error {
	if !fi.Mode().IsRegular() {
		return fmt.Errorf("its blob is not a regular file: %w", errdefs.ErrFailedPrecondition)
	}
	if fi.Size() != blob.Size {
		return fmt.Errorf("its blob has %d bytes, its descriptor says %d: %w", fi.Size(), blob.Size, errdefs.ErrFailedPrecondition)
	}
	return nil
}

// retainAll retains the blobs of all raw layers, for the rung that needs them
// only when the Tree is mounted.
func (w *writer) retainAll(ctx context.Context, a *artifact.Artifact) error {
	if w.Rung != Overlay {
		return nil
	}
	return each(ctx, a.Layers, func(ctx context.Context, l artifact.Layer) error {
		if l.Format != artifact.FormatRaw || l.Descriptor.Size == 0 {
			return nil
		}
		return w.retain(ctx, l.Descriptor)
	})
}

// retain gives the Tree a blob of its own in data/, which no garbage collection
// of the runtime takes away: by hard link to the runtime's, else to a copy made
// for another Tree, else by a new copy that later Trees can link to. The same
// blob may stand in many layers.
func (w *writer) retain(ctx context.Context, blob ocispec.Descriptor) error {
	target := w.retained(blob.Digest)
	src, shared := w.Blobs.Path(blob.Digest), filepath.Join(w.Copies, blob.Digest.Encoded())
	err := os.Link(src, target)
	switch {
	case err == nil, errors.Is(err, os.ErrExist): // it may be the second layer of this digest
	case errors.Is(err, unix.EXDEV), errors.Is(err, unix.EMLINK), errors.Is(err, unix.EPERM), errors.Is(err, unix.EOPNOTSUPP):
		if err := os.Link(shared, target); err == nil {
			break
		}
		log.G(ctx).WithError(err).WithField("blob", blob.Digest).Warnf("copying a blob of %s, since it cannot be linked into the snapshotter's root", w.Blobs)
		if err := w.copy(ctx, target, blob); err != nil {
			return err
		}
		// Whoever is first shares; the others keep theirs.
		if err := os.Link(target, shared); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	default:
		return w.explain(err)
	}
	fi, err := os.Lstat(target)
	if err != nil {
		return err
	}
	return checkSize(fi, blob)
}

// retained is the path of a blob in data/.
func (w *writer) retained(d digest.Digest) string {
	return filepath.Join(w.dir, dataDir, w.blobs[d])
}

func (w *writer) copy(ctx context.Context, target string, blob ocispec.Descriptor) error {
	dst, err := os.OpenFile(target, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o444)
	if err != nil {
		return err
	}
	return errors.Join(w.fill(ctx, dst, blob), dst.Close())
}

// fill gives dst the content of blob.
func (w *writer) fill(ctx context.Context, dst *os.File, blob ocispec.Descriptor) error {
	src, err := w.open(blob)
	if err != nil {
		return err
	}
	return errors.Join(clone(ctx, dst, src, blob), src.Close())
}

// clone fills dst with src: by reflink (FICLONE) where the file system can,
// which also works between the subvolumes of btrfs where a link does not; else
// by a copy, whose digest is checked since every byte passes by.
func clone(ctx context.Context, dst, src *os.File, blob ocispec.Descriptor) error {
	err := unix.IoctlFileClone(int(dst.Fd()), int(src.Fd()))
	runtime.KeepAlive(src)
	if err == nil {
		return nil
	}
	if err := requireSpace(dst, blob.Size); err != nil {
		return err
	}
	verifier := blob.Digest.Verifier()
	if _, err := io.Copy(io.MultiWriter(dst, verifier), reader{ctx, src}); err != nil {
		return err
	}
	if !verifier.Verified() {
		return wrongDigest(blob.Digest)
	}
	return nil
}

// wrongDigest is the error for a blob that is not what the runtime stored.
func wrongDigest(want digest.Digest) error {
	return fmt.Errorf("its blob does not have the digest %s; delete the image and pull it again: %w", want, errdefs.ErrFailedPrecondition)
}

// requireSpace refuses size bytes that the file system of f has no room for,
// before the first one is written and the node's disk is full.
func requireSpace(f *os.File, size int64) error {
	const unchecked = 1 << 20
	if size < unchecked {
		return nil
	}
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
		return os.NewSyscallError("fstatfs", err)
	}
	if st.Blocks == 0 { // it does not say, as ramfs
		return nil
	}
	if free := st.Bavail * uint64(st.Bsize); uint64(size) > free {
		return fmt.Errorf("%d bytes are needed and %d are free: %w", size, free, unix.ENOSPC)
	}
	return nil
}

// reader reads until ctx ends.
type reader struct {
	ctx context.Context
	io.Reader
}

func (r reader) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	return r.Reader.Read(p)
}
