// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
)

const (
	// zstdWindow bounds the decoder's memory: what zstd itself decodes unless it
	// is told otherwise (--long=27).
	zstdWindow = 128 << 20
	// gzipMagic begins every member of a gzip (RFC 1952, 2.3.1).
	gzipMagic = "\x1f\x8b"
	// chunk is how much of a stream is decompressed while the chunk before it is
	// hashed and written.
	chunk = 256 << 10
	// lookEvery is how much is written between two looks at the free space.
	lookEvery = 16 << 20
	// largeLayer is how large a layer is of which the log tells.
	largeLayer = 64 << 20
)

// decompressor is how a compression is read, and the memory that takes.
type decompressor struct {
	// open returns a reader that fails on trailing garbage, and decodes in the
	// goroutine of whoever reads, where a panic can be recovered from.
	open   func(*bufio.Reader) (io.ReadCloser, error)
	memory int64
}

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
			head, _ := r.Peek(4) // if there are less, the decoder says it
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

// gzipMembers reads a gzip file of any number of members (RFC 1952, 2.2). The
// reader's own way to do that takes a member whose header is cut off for the end.
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
			return n, nil // the end comes again
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

// peekMagic reports whether there is more in r, and returns gzip.ErrHeader if that is no
// member of a gzip, as far as it goes. Of a few bytes the reader would say that they are
// the beginning of one.
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

// zstdFrames reads a file of any number of Zstandard frames (RFC 8878, 3), of which the
// first has been looked at.
type zstdFrames struct{ io.ReadCloser }

func (z zstdFrames) Read(p []byte) (int, error) {
	n, err := z.ReadCloser.Read(p)
	switch {
	case errors.Is(err, zstd.ErrMagicMismatch):
		err = behind(artifact.CompressionZstd)
	case errors.Is(err, zstd.ErrWindowSizeExceeded), errors.Is(err, zstd.ErrDecoderSizeExceeded):
		err = fmt.Errorf("%w: a frame may ask for a window of %d MiB at most: compress the archive with zstd --long=27 or less", err, zstdWindow>>20)
	case errors.Is(err, io.ErrUnexpectedEOF): // of both, the decoder says the same
		err = fmt.Errorf("it ends within a frame, or there are up to 3 bytes behind the last one: %w", err)
	}
	return n, err
}

// behind is the error for a blob that goes on behind the end of its compressed stream.
func behind(c artifact.Compression) error {
	return fmt.Errorf("behind the end of the %s stream are bytes that are no %[1]s: compress the archive again: %w", c, errdefs.ErrInvalidArgument)
}

// retainFlat makes c the flat tar in a compressed blob: a link to that of
// another Tree with the same blob, or a new one.
//
// Nothing is found by the DiffID that a config claims: whoever knows that of
// somebody else's layer could read it so.
func (cs *contents) retainFlat(ctx context.Context, c *content) error {
	release, err := cs.Budget.Lock(ctx, c.layer.Descriptor.Digest.String())
	if err != nil {
		return err
	}
	defer release()
	done := cs.flatOf(c.layer.Descriptor.Digest)
	// detect has opened the blob: who does not have it gets nothing of what is in it.
	if target, err := os.Readlink(done); err == nil {
		shared := filepath.Join(filepath.Dir(done), target)
		if os.Link(shared, c.path) == nil {
			c.digest = digest.NewDigestFromEncoded(digest.Algorithm(filepath.Base(filepath.Dir(shared))), filepath.Base(shared))
			cs.done(c.layer.Descriptor.Size)
			if fi, err := os.Lstat(c.path); err == nil {
				cs.counted(Linked, fi.Size())
			}
			return nil
		}
	}
	if err := cs.inflate(ctx, c); err != nil {
		return err
	}
	if c.made, err = cs.share(c); err != nil {
		return err
	}
	// Remembered as a symlink from the blob to what it holds.
	if err := os.MkdirAll(filepath.Dir(done), 0o700); err != nil {
		return err
	}
	target := filepath.Join("..", c.digest.Algorithm().String(), c.digest.Encoded())
	if err := os.Symlink(target, done); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	return nil
}

// flatOf is the symlink to the flat tar of a compressed blob.
func (cs *contents) flatOf(blob digest.Digest) string { return cs.Shared.Path(blob) + ".tar" }

// inflate decompresses the blob of c into c and computes its digest, in one pass. What is
// wrong is never shared: other artifacts would be shown it.
func (cs *contents) inflate(ctx context.Context, c *content) error {
	l := c.layer
	how, ok := decompressors[c.compression]
	if !ok {
		return fmt.Errorf("compression %q: %w", c.compression, errdefs.ErrNotImplemented)
	}
	release, err := cs.Budget.take(ctx, how.memory)
	if err != nil {
		return err
	}
	defer release()
	blob, err := cs.open(ctx, l.Descriptor)
	if err != nil {
		return err
	}
	defer blob.Close()
	seen, verifier := io.Writer(counter(cs.done)), l.Descriptor.Digest.Verifier()
	if l.DiffID == "" { // else that tells as well, and nothing is hashed twice
		seen = io.MultiWriter(seen, verifier)
	}
	compressed := io.TeeReader(reader{ctx, blob}, seen)
	stream, err := how.open(bufio.NewReaderSize(compressed, chunk))
	if err != nil {
		return badStream(fmt.Errorf("it is not %s: %w", c.compression, err))
	}
	defer stream.Close()
	dst, err := os.OpenFile(c.path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o444)
	if err != nil {
		return err
	}
	defer dst.Close()
	algorithm := digest.Canonical
	if l.DiffID != "" {
		algorithm = l.DiffID.Algorithm()
	}
	sum := algorithm.Digester()
	out := &flatWriter{
		file: dst, hash: sum.Hash(), budget: cs.Budget,
		compressed: l.Descriptor.Size, limit: cs.Budget.expanded(l.Descriptor.Size),
	}
	began := time.Now()
	if err := out.fill(ctx, stream); err != nil {
		return badStream(err)
	}
	cs.counted(Decompressed, out.written)
	level := log.DebugLevel // an artifact may have a layer for each of its files
	if out.written >= largeLayer {
		level = log.InfoLevel
	}
	log.G(ctx).WithFields(log.Fields{
		"blob": l.Descriptor.Digest, "bytes": l.Descriptor.Size, "decompressed": out.written, "duration": time.Since(began),
	}).Log(level, "decompressed a layer")
	c.digest = sum.Digest()
	if l.DiffID != "" {
		if err := cs.checkDiffID(ctx, c, l); err != nil {
			return err
		}
	} else if !verifier.Verified() {
		return wrongBlob(l.Descriptor.Digest)
	}
	return dst.Close()
}

// flatWriter writes a flat tar, within bounds.
type flatWriter struct {
	file              *os.File
	hash              hash.Hash
	budget            *Budget
	compressed, limit int64
	written, look     int64
}

// fill reads r to its end, in this goroutine, while another one hashes and
// writes what was read before.
func (w *flatWriter) fill(ctx context.Context, r io.Reader) (err error) {
	free, full := make(chan []byte, 2), make(chan []byte, 2)
	for range cap(free) {
		free <- make([]byte, chunk)
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		for b := range full {
			if err := w.write(b); err != nil {
				return err
			}
			free <- b[:chunk]
		}
		return nil
	})
	defer func() { // when the decoder panics, too
		close(full)
		if werr := g.Wait(); werr != nil {
			err = werr
		}
	}()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case b := <-free:
			n, err := readChunk(r, b)
			full <- b[:n] // there is room: there are no more chunks than that
			if errors.Is(err, io.EOF) {
				return nil
			}
			if err != nil {
				return err
			}
		}
	}
}

// readChunk fills b as far as it can. Other than io.ReadFull it tells the end of
// a stream from one that is cut off.
func readChunk(r io.Reader, b []byte) (n int, err error) {
	for n < len(b) && err == nil {
		var more int
		more, err = r.Read(b[n:])
		n += more
	}
	return n, err
}

func (w *flatWriter) write(b []byte) error {
	w.written += int64(len(b))
	if w.written > w.limit {
		return fmt.Errorf("it decompresses to more than %d bytes from %d; raise max_expansion in the snapshotter's configuration if that is as it should be: %w",
			w.limit, w.compressed, errdefs.ErrInvalidArgument)
	}
	if w.written >= w.look {
		if err := w.budget.room(w.file, int64(len(b))); err != nil {
			return err
		}
		w.look = w.written + lookEvery
	}
	if _, err := w.hash.Write(b); err != nil {
		return err
	}
	_, err := w.file.Write(b)
	return err
}

// counter is a writer that only counts.
type counter func(n int64)

func (c counter) Write(p []byte) (int, error) {
	c(int64(len(p)))
	return len(p), nil
}

// checkDiffID checks what is claimed of a layer's content; l is the layer as the
// manifest has it. A blob that is not compressed is its content, and the runtime has
// checked its digest.
func (cs *contents) checkDiffID(ctx context.Context, c *content, l artifact.Layer) error {
	if l.DiffID == "" || l.DiffID == c.digest {
		return nil
	}
	got, err := c.digestBy(ctx, l.DiffID.Algorithm())
	if err != nil {
		return err
	}
	if got != l.DiffID {
		return fmt.Errorf("%s: %w", l.WrongDiffID(c.compression, got), errdefs.ErrInvalidArgument)
	}
	return nil
}

// checkEmpty checks the digests of a layer of no bytes. Its blob is not looked at: there
// is nothing to share, and the runtime may not even have it.
func checkEmpty(l artifact.Layer) error {
	switch {
	case l.Descriptor.Digest != l.Descriptor.Digest.Algorithm().FromBytes(nil):
		return fmt.Errorf("its descriptor says 0 bytes, but its digest is not that of no bytes: %w", errdefs.ErrInvalidArgument)
	case l.DiffID != "" && l.DiffID != l.DiffID.Algorithm().FromBytes(nil):
		return fmt.Errorf("it has no bytes, but %s the DiffID %s, which is not that of no bytes: %w", l.Claim(), l.DiffID, errdefs.ErrInvalidArgument)
	}
	return nil
}

// diffID is the DiffID of l, whose content is c, nil if it has none. If its config does
// not name it, it is by the canonical algorithm; what another Tree has decompressed may
// be known by the one in its config.
func (c *content) diffID(ctx context.Context, l artifact.Layer) (digest.Digest, error) {
	switch {
	case l.Compression == artifact.CompressionNone:
		return l.Descriptor.Digest, nil
	case l.DiffID != "":
		return l.DiffID, nil
	case c == nil:
		return digest.Canonical.FromBytes(nil), nil
	default:
		return c.digestBy(ctx, digest.Canonical)
	}
}

// digestBy is the digest of c by an algorithm.
func (c *content) digestBy(ctx context.Context, algorithm digest.Algorithm) (digest.Digest, error) {
	if c.digest.Algorithm() == algorithm {
		return c.digest, nil
	}
	if got := c.digests[algorithm]; got != "" { // many layers may have the blob
		return got, nil
	}
	f, err := os.Open(c.path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	got, err := algorithm.FromReader(reader{ctx, f})
	if err != nil {
		return "", err
	}
	if c.digests == nil {
		c.digests = map[digest.Algorithm]digest.Digest{}
	}
	c.digests[algorithm] = got
	return got, nil
}
