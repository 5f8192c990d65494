// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
)

// gzipMagic begins every member of a gzip file (RFC 1952, 2.3.1).
const gzipMagic = "\x1f\x8b"

// decompressor is how a compression is read, and how many bytes of memory that takes.
type decompressor struct {
	// open returns a reader that fails on trailing garbage. It decodes in the goroutine of
	// the caller of Read, which can recover from a panic.
	open   func(*bufio.Reader) (io.ReadCloser, error)
	memory int64
}

// decompressors are the compressions that are supported.
var decompressors = map[artifact.Compression]decompressor{
	artifact.CompressionGzip: {
		open: func(r *bufio.Reader) (io.ReadCloser, error) {
			if _, err := peekMagic(r); err != nil {
				return nil, err
			}
			z, err := gzip.NewReader(r)
			if err != nil {
				return nil, err
			}
			z.Multistream(false)
			return &gzipMembers{z, r}, nil
		},
		memory: 16 * chunk,
	},
	artifact.CompressionZstd: {
		open: func(r *bufio.Reader) (io.ReadCloser, error) {
			head, _ := r.Peek(4) // if there are fewer bytes, the decoder reports it
			if err := new(zstd.Header).Decode(head); errors.Is(err, zstd.ErrMagicMismatch) {
				return nil, err
			}
			d, err := zstd.NewReader(r, zstd.WithDecoderMaxWindow(zstdWindow), zstd.WithDecoderLowmem(true), zstd.WithDecoderConcurrency(1))
			if err != nil {
				return nil, err
			}
			return zstdFrames{d.IOReadCloser()}, nil
		},
		memory: zstdWindow + 32*chunk,
	},
}

// decompressed is what a compressed blob holds. Reading fails beyond the limit of the
// budget.
type decompressed struct {
	io.ReadCloser
	compressed, limit, read int64
	release                 func()
}

// decompress opens the stream of a blob of size bytes, compressed by c. It waits until the
// budget has the memory and a core for it, which Close gives back.
func decompress(ctx context.Context, c artifact.Compression, blob io.Reader, size int64, b *Budget) (*decompressed, error) {
	how, ok := decompressors[c]
	if !ok {
		return nil, fmt.Errorf("compression %q: %w", c, errdefs.ErrNotImplemented)
	}
	release, err := b.take(ctx, how.memory)
	if err != nil {
		return nil, err
	}
	opened := false
	defer func() { // also when the decoder panics
		if !opened {
			release()
		}
	}()
	stream, err := how.open(bufio.NewReaderSize(blob, chunk))
	if err != nil {
		return nil, badStream(fmt.Errorf("it is not %s: %w", c, err))
	}
	opened = true
	return &decompressed{ReadCloser: stream, compressed: size, limit: b.expanded(size), release: release}, nil
}

func (d *decompressed) Read(p []byte) (int, error) {
	n, err := d.ReadCloser.Read(p)
	if d.read += int64(n); d.read > d.limit {
		return 0, fmt.Errorf("it decompresses to more than %d bytes from %d; raise max_expansion in the snapshotter's configuration if this is intended: %w",
			d.limit, d.compressed, errdefs.ErrInvalidArgument)
	}
	return n, err
}

// Close closes the stream and gives back what it has taken of the budget.
func (d *decompressed) Close() error {
	defer d.release()
	return d.ReadCloser.Close()
}

// gzipMembers reads a gzip file of any number of members (RFC 1952, 2.2). The multistream
// mode of gzip.Reader takes a member with a truncated header for the end of the file.
type gzipMembers struct {
	*gzip.Reader
	in *bufio.Reader
}

func (m *gzipMembers) Read(p []byte) (int, error) {
	for {
		n, err := m.Reader.Read(p)
		if !errors.Is(err, io.EOF) {
			return n, err
		}
		if n > 0 {
			return n, nil // the next call returns the end again
		}
		more, err := peekMagic(m.in)
		if errors.Is(err, gzip.ErrHeader) {
			return 0, behind(artifact.CompressionGzip)
		}
		if !more || err != nil {
			return 0, cmp.Or(err, io.EOF)
		}
		if err := m.Reset(m.in); err != nil {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return 0, err
		}
		m.Multistream(false)
	}
}

// peekMagic reports whether r has more bytes, and returns gzip.ErrHeader if they do not
// begin like a member of a gzip file. gzip.Reader would call a few wrong bytes a truncated
// header.
func peekMagic(r *bufio.Reader) (more bool, err error) {
	magic, err := r.Peek(len(gzipMagic))
	switch {
	case err != nil && !errors.Is(err, io.EOF):
		return false, err
	case !strings.HasPrefix(gzipMagic, string(magic)):
		return true, gzip.ErrHeader
	}
	return len(magic) > 0, nil
}

// zstdFrames reads a file of any number of Zstandard frames (RFC 8878, 3). The caller has
// looked at the first.
type zstdFrames struct{ io.ReadCloser }

func (z zstdFrames) Read(p []byte) (int, error) {
	n, err := z.ReadCloser.Read(p)
	switch {
	case errors.Is(err, zstd.ErrMagicMismatch):
		err = behind(artifact.CompressionZstd)
	case errors.Is(err, zstd.ErrWindowSizeExceeded), errors.Is(err, zstd.ErrDecoderSizeExceeded):
		err = fmt.Errorf("%w: a frame may ask for a window of at most %d MiB; compress the archive with zstd --long=27 or less", err, zstdWindow>>20)
	case errors.Is(err, io.ErrUnexpectedEOF): // the decoder does not distinguish the two
		err = fmt.Errorf("it ends within a frame, or up to 3 bytes follow the last frame: %w", err)
	}
	return n, err
}

// behind returns the error for bytes after the end of a compressed stream.
func behind(c artifact.Compression) error {
	return fmt.Errorf("bytes follow the end of the %s stream that are not %[1]s; compress the archive again: %w", c, errdefs.ErrInvalidArgument)
}

// DiffID returns the digest of the decompressed content of an archive's blob, by the
// algorithm of the DiffID that the layer names, else by the canonical one. The compression
// of the layer must be settled, see [Settle]. It decompresses within the limits of the
// budget, by the rules of [Build], and writes nothing. A blob that is not a stream of that
// compression is errdefs.ErrInvalidArgument.
func DiffID(ctx context.Context, l artifact.Layer, blob io.Reader, b *Budget) (id digest.Digest, err error) {
	if l.Compression == artifact.CompressionNone && l.DiffID != "" {
		return l.DiffID.Algorithm().FromReader(reader{ctx, blob, nil})
	}
	algorithm := digest.Canonical
	if l.DiffID != "" {
		algorithm = l.DiffID.Algorithm()
	}
	if _, ok := decompressors[l.Compression]; ok && l.Descriptor.Size == 0 { // an empty archive
		return algorithm.FromBytes(nil), nil
	}
	err = guard(func() error {
		stream, err := decompress(ctx, l.Compression, reader{ctx, blob, nil}, l.Descriptor.Size, b)
		if err != nil {
			return err
		}
		defer stream.Close()
		sum := algorithm.Digester()
		if _, err := io.Copy(sum.Hash(), stream); err != nil {
			return badStream(err)
		}
		id = sum.Digest()
		return nil
	})
	return id, err
}
