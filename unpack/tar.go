// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
)

const (
	// zstdMaxWindow bounds the decoder's memory: what zstd itself decodes
	// unless it is told otherwise (--long=27).
	zstdMaxWindow = 128 << 20
	// xattrPrefix is of the PAX records that hold extended attributes.
	xattrPrefix = "SCHILY.xattr."
	blockSize   = 512 // of a tar
	// maxPadding bounds the zeros behind an archive. Tools pad to a record, of
	// 10 KiB mostly.
	maxPadding = 1 << 20
	// maxTarget is the longest target of a symlink (PATH_MAX).
	maxTarget = 4095
)

// extractions bounds how many archives are extracted at once, and so the memory
// for their windows. More of them would not be quicker.
var extractions = make(chan struct{}, 4)

// decompressors are data: a compression and how to read it. Each reader fails
// on trailing garbage by itself, being multi-stream.
var decompressors = map[artifact.Compression]func(io.Reader) (io.ReadCloser, error){
	artifact.CompressionNone: func(r io.Reader) (io.ReadCloser, error) { return io.NopCloser(r), nil },
	artifact.CompressionGzip: func(r io.Reader) (io.ReadCloser, error) { return gzip.NewReader(r) },
	artifact.CompressionZstd: func(r io.Reader) (io.ReadCloser, error) {
		d, err := zstd.NewReader(r, zstd.WithDecoderMaxWindow(zstdMaxWindow), zstd.WithDecoderLowmem(true),
			zstd.WithDecoderConcurrency(1)) // in this goroutine, where a panic can be recovered from
		if err != nil {
			return nil, err
		}
		return d.IOReadCloser(), nil
	},
}

// tar extracts a layer that is an archive at the root of the volume.
func (w *writer) tar(ctx context.Context, l artifact.Layer) error {
	blob, err := w.open(l.Descriptor)
	if err != nil {
		return err
	}
	defer blob.Close()
	decompress, ok := decompressors[l.Compression]
	if !ok {
		return fmt.Errorf("compression %q: %w", l.Compression, errdefs.ErrNotImplemented)
	}
	select {
	case extractions <- struct{}{}:
		defer func() { <-extractions }()
	case <-ctx.Done():
		return ctx.Err()
	}
	flat, err := decompress(bufio.NewReaderSize(io.TeeReader(blob, counter(w.done)), len(w.buf)))
	if err != nil {
		return fmt.Errorf("it is not %s: %v: %w", l.Compression, err, errdefs.ErrInvalidArgument)
	}
	defer flat.Close()
	want := l.DiffID
	if want == "" && l.Compression == artifact.CompressionNone {
		want = l.Descriptor.Digest
	}
	s := &stream{r: reader{ctx, flat}}
	if want == "" {
		return badStream(w.members(ctx, s, l.Index))
	}
	hash := want.Algorithm().Digester()
	s.r = io.TeeReader(s.r, hash.Hash())
	if err := w.members(ctx, s, l.Index); err != nil {
		return badStream(err)
	}
	got := hash.Digest()
	if got != want && l.DiffID == "" {
		return wrongDigest(want)
	}
	if got != want {
		return fmt.Errorf("its content has the digest %s, the config lists the DiffID %s: %w", got, want, errdefs.ErrInvalidArgument)
	}
	return nil
}

// counter is a writer that only counts.
type counter func(n int64)

func (c counter) Write(p []byte) (int, error) {
	c(int64(len(p)))
	return len(p), nil
}

// badStream names an error of the archive's format or compression for what it
// is. An error of the node's (a full disk, an unreadable blob) stays one.
func badStream(err error) error {
	var path *fs.PathError
	var link *os.LinkError
	switch {
	case err == nil, errors.As(err, &path), errors.As(err, &link), errors.Is(err, context.Canceled),
		errors.Is(err, context.DeadlineExceeded), errdefs.IsInvalidArgument(err), errors.Is(err, unix.ENOSPC):
		return err
	case errors.Is(err, io.ErrUnexpectedEOF):
		return fmt.Errorf("the archive is truncated: %v: %w", err, errdefs.ErrInvalidArgument)
	}
	return fmt.Errorf("the archive cannot be read: %v: %w", err, errdefs.ErrInvalidArgument)
}

// stream counts the bytes of an archive. It hides everything but Read from
// archive/tar, which otherwise seeks past what the digest must see.
type stream struct {
	r io.Reader
	n int64
	// zeros is where the zeros begin that the bytes read so far end with.
	zeros int64
}

func (s *stream) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	if used := len(bytes.TrimRight(p[:n], "\x00")); used > 0 {
		s.zeros = s.n + int64(used)
	}
	s.n += int64(n)
	return n, err
}

// members extracts all members and checks that the archive ends as POSIX says
// (pax, "ustar Interchange Format": two blocks of zeros, of which archive/tar
// and others take one for enough), with nothing but zeros behind it.
func (w *writer) members(ctx context.Context, s *stream, layer int) error {
	links := map[string]bool{} // the regular files of this layer
	r := tar.NewReader(s)
	for {
		end := (s.n + blockSize - 1) / blockSize * blockSize
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			if s.n < end+blockSize || s.zeros > end {
				return fmt.Errorf("it ends without a mark: %w", io.ErrUnexpectedEOF)
			}
			return w.padding(s, end)
		}
		if err != nil {
			return err
		}
		if err := w.member(reader{ctx, r}, h, layer, links); err != nil {
			return fmt.Errorf("member %.255q: %w", h.Name, err)
		}
		// A member may have content that its type has no use for.
		if _, err := io.CopyBuffer(io.Discard, struct{ io.Reader }{r}, w.buf); err != nil {
			return err
		}
	}
}

// padding reads the zeros behind the archive's end to the end of the stream.
func (w *writer) padding(s *stream, end int64) error {
	for {
		_, err := s.Read(w.buf)
		switch {
		case s.zeros > end:
			return fmt.Errorf("there is garbage behind the end of the archive: %w", errdefs.ErrInvalidArgument)
		case s.n > end+maxPadding:
			return fmt.Errorf("there are more than %d bytes of padding behind the end of the archive: %w", maxPadding, errdefs.ErrInvalidArgument)
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		}
	}
}

// member extracts one member.
func (w *writer) member(r io.Reader, h *tar.Header, layer int, links map[string]bool) error {
	if h.Typeflag == tar.TypeXGlobalHeader {
		return nil // git-archive writes one
	}
	a, err := tarAttrs(h)
	if err != nil {
		return err
	}
	if h.Typeflag == tar.TypeDir && isRoot(h.Name) {
		w.nodes["."].attrs = a // tar -C DIR . begins with it
		return nil
	}
	name, err := artifact.CleanPath(h.Name)
	if err != nil {
		return err
	}
	switch h.Typeflag {
	case tar.TypeDir:
		n, err := w.mkdir(name, layer)
		if err != nil {
			return err
		}
		n.layer, n.attrs = layer, a
		return w.setXattrs(name, h)
	case tar.TypeReg, tar.TypeGNUSparse, tar.TypeCont:
		links[name] = true
		return w.regular(r, name, h, layer, a)
	case tar.TypeSymlink:
		delete(links, name)
		return w.symlink(name, h, layer, a)
	case tar.TypeLink:
		return w.hardLink(name, h, layer, links)
	}
	return fmt.Errorf("%s is not a file that a volume may hold: %w", typeName(h.Typeflag), errdefs.ErrInvalidArgument)
}

// isRoot reports whether name, such as "./", is that of the volume itself.
func isRoot(name string) bool {
	for part := range strings.SplitSeq(name, "/") {
		if part != "." && part != "" {
			return false
		}
	}
	return !strings.HasPrefix(name, "/")
}

func typeName(flag byte) string {
	switch flag {
	case tar.TypeChar:
		return "a character device"
	case tar.TypeBlock:
		return "a block device"
	case tar.TypeFifo:
		return "a FIFO"
	}
	return fmt.Sprintf("a member of type %q", flag)
}

// tarAttrs are the attributes in the header h. Setuid, setgid and sticky bits
// are kept on directories alone.
func tarAttrs(h *tar.Header) (attrs, error) {
	if h.Uid < 0 || h.Uid >= math.MaxUint32 || h.Gid < 0 || h.Gid >= math.MaxUint32 {
		return attrs{}, fmt.Errorf("owner %d:%d is not a user: %w", h.Uid, h.Gid, errdefs.ErrInvalidArgument)
	}
	mode := h.FileInfo().Mode()
	// Not mode.IsDir(): the mode field of a file's header may say so, too.
	if h.Typeflag == tar.TypeDir {
		mode &= fs.ModePerm | fs.ModeSetuid | fs.ModeSetgid | fs.ModeSticky
	} else {
		mode &= fs.ModePerm
	}
	return attrs{mode: mode, uid: uint32(h.Uid), gid: uint32(h.Gid), mtime: h.ModTime}, nil
}

func (w *writer) regular(r io.Reader, name string, h *tar.Header, layer int, a attrs) error {
	if err := w.place(name, layer, regular); err != nil {
		return err
	}
	f, err := w.create(name, a.mode)
	if err != nil {
		return err
	}
	defer f.Close()
	w.logical += h.Size
	if w.logical < h.Size {
		return fmt.Errorf("the files have more bytes than can be counted: %w", errdefs.ErrInvalidArgument)
	}
	if err := requireSpace(f, w.logical-w.written); err != nil {
		return err
	}
	if err := w.copySparse(f, r, h.Size); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	if err := w.setXattrs(name, h); err != nil {
		return err
	}
	return w.setAttrs(name, regular, a)
}

// copySparse copies size bytes of r to the empty file f and leaves out what is
// zero, so that a sparse member takes no more of the disk than of the archive.
func (w *writer) copySparse(f *os.File, r io.Reader, size int64) error {
	for off := int64(0); off < size; {
		b := w.buf[:min(int64(len(w.buf)), size-off)]
		if _, err := io.ReadFull(r, b); err != nil {
			return err
		}
		if b[0] != 0 || !bytes.Equal(b[:len(b)-1], b[1:]) {
			if _, err := f.WriteAt(b, off); err != nil {
				return err
			}
			w.written += int64(len(b))
		}
		off += int64(len(b))
	}
	return f.Truncate(size)
}

// symlink makes a symlink. Where it points to does not matter here: nothing is
// ever written through it, and the container resolves it in its own root.
func (w *writer) symlink(name string, h *tar.Header, layer int, a attrs) error {
	if h.Linkname == "" || len(h.Linkname) > maxTarget {
		return fmt.Errorf("a symlink with a target of %d bytes: %w", len(h.Linkname), errdefs.ErrInvalidArgument)
	}
	if err := w.place(name, layer, symlink); err != nil {
		return err
	}
	dir, base, err := w.at(name)
	if err != nil {
		return err
	}
	if err := unix.Symlinkat(h.Linkname, dir, base); err != nil {
		return &fs.PathError{Op: "symlink", Path: name, Err: err}
	}
	return w.setAttrs(name, symlink, a)
}

// hardLink links name to a regular file that came before it in the same layer;
// owner, mode and time are that file's.
func (w *writer) hardLink(name string, h *tar.Header, layer int, links map[string]bool) error {
	target, err := artifact.CleanPath(h.Linkname)
	if err != nil {
		return fmt.Errorf("hard link to %.255q: %w", h.Linkname, err)
	}
	if !links[target] {
		return fmt.Errorf("hard link to %.255q, which is not a regular file before it in the same layer: %w", h.Linkname, errdefs.ErrInvalidArgument)
	}
	if name == target {
		return nil
	}
	if err := w.place(name, layer, regular); err != nil {
		return err
	}
	links[name] = true
	return w.root.Link(in(target), in(name))
}

// setXattrs sets the extended attributes of the user namespace. The others are
// dropped: trusted and security attributes mean something to the node's kernel
// (overlayfs, file capabilities, SELinux), and the system ones hold IDs that
// no owner rule has seen.
func (w *writer) setXattrs(name string, h *tar.Header) error {
	for key, value := range h.PAXRecords {
		attr, ok := strings.CutPrefix(key, xattrPrefix)
		if !ok || !strings.HasPrefix(attr, "user.") {
			continue
		}
		if err := w.setXattr(name, attr, []byte(value)); err != nil {
			return err
		}
	}
	return nil
}

func (w *writer) setXattr(name, attr string, value []byte) error {
	f, err := w.root.Open(in(name))
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.Fsetxattr(int(f.Fd()), attr, value, 0); err != nil {
		// Also when it does not fit the file system, which ext4 calls "no
		// space": %v, for that is not a full disk.
		return fmt.Errorf("extended attribute %.255q: %v: %w", attr, err, errdefs.ErrInvalidArgument)
	}
	return nil
}
