// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"context"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
)

// largeLayer, in bytes, is the size from which the log tells of a decompressed layer.
const largeLayer = 64 << 20

// retainFlat makes c the flat tar, that is the decompressed content, of a compressed blob:
// a link to the flat tar of another tree with the same blob, or a new one.
//
// It does not look for a flat tar by the DiffID that a config claims: whoever knows the
// DiffID of another tenant's layer could read that layer.
func (cs *contents) retainFlat(ctx context.Context, c *content) error {
	release, err := cs.Budget.Lock(ctx, c.layer.Descriptor.Digest.String())
	if err != nil {
		return err
	}
	defer release()
	done := cs.flatOf(c.layer.Descriptor.Digest)
	// detect has opened the blob, so whoever does not have the blob does not get its
	// content.
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
	// Recorded as a symlink from the blob to its content.
	if err := os.MkdirAll(filepath.Dir(done), 0o700); err != nil {
		return err
	}
	target := filepath.Join("..", c.digest.Algorithm().String(), c.digest.Encoded())
	if err := os.Symlink(target, done); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	return nil
}

// flatOf returns the path of the symlink to the flat tar of a compressed blob.
func (cs *contents) flatOf(blob digest.Digest) string { return cs.Shared.Path(blob) + ".tar" }

// inflate decompresses the blob of c into c and computes its digest, in one pass. A wrong
// content is never shared, since other artifacts would get it.
func (cs *contents) inflate(ctx context.Context, c *content) error {
	l := c.layer
	blob, err := cs.open(ctx, l.Descriptor)
	if err != nil {
		return err
	}
	defer blob.Close()
	in, verifier := io.Reader(reader{ctx, blob, cs.done}), l.Descriptor.Digest.Verifier()
	if l.DiffID == "" { // a DiffID proves the same, and nothing is hashed twice
		in = io.TeeReader(in, verifier)
	}
	stream, err := decompress(ctx, c.compression, in, l.Descriptor.Size, cs.Budget)
	if err != nil {
		return err
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
	out := &flatWriter{file: dst, hash: sum.Hash(), budget: cs.Budget}
	began := time.Now()
	if err := out.fill(ctx, stream); err != nil {
		return badStream(err)
	}
	cs.counted(Decompressed, out.written)
	level := log.DebugLevel // an artifact may have one layer per file
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

// flatWriter writes a flat tar.
type flatWriter struct {
	file          *os.File
	hash          hash.Hash
	budget        *Budget
	written, look int64
}

// fill reads r to its end in this goroutine, while another one hashes and writes what was
// read before.
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
	defer func() { // also when the decoder panics
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
			full <- b[:n] // it does not block: full has room for all chunks
			if errors.Is(err, io.EOF) {
				return nil
			}
			if err != nil {
				return err
			}
		}
	}
}

// readChunk fills b as far as possible. Unlike io.ReadFull it distinguishes the end of a
// stream from a truncated one.
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

// checkDiffID checks the claimed DiffID of l, a layer as in the manifest, against its
// content. A blob that is not compressed is its own content, and the runtime has checked
// its digest.
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

// checkEmpty checks the digests of a layer without bytes. It does not look at the blob:
// there is nothing to share, and the runtime may not have it.
func checkEmpty(l artifact.Layer) error {
	switch {
	case l.Descriptor.Digest != l.Descriptor.Digest.Algorithm().FromBytes(nil):
		return fmt.Errorf("its descriptor says 0 bytes, but its digest is not the digest of no bytes: %w", errdefs.ErrInvalidArgument)
	case l.DiffID != "" && l.DiffID != l.DiffID.Algorithm().FromBytes(nil):
		return fmt.Errorf("it has no bytes, but %s the DiffID %s, which is not the digest of no bytes: %w", l.Claim(), l.DiffID, errdefs.ErrInvalidArgument)
	}
	return nil
}

// diffID returns the DiffID of l, whose content is c, nil if it has none: as the config
// names it, else by the canonical algorithm. If another tree has decompressed the blob,
// c.digest may be by the algorithm in that tree's config.
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

// digestBy returns the digest of c by an algorithm.
func (c *content) digestBy(ctx context.Context, algorithm digest.Algorithm) (digest.Digest, error) {
	if c.digest.Algorithm() == algorithm {
		return c.digest, nil
	}
	if got := c.digests[algorithm]; got != "" { // several layers may have the blob
		return got, nil
	}
	f, err := os.Open(c.path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	got, err := algorithm.FromReader(reader{ctx, f, nil})
	if err != nil {
		return "", err
	}
	if c.digests == nil {
		c.digests = map[digest.Algorithm]digest.Digest{}
	}
	c.digests[algorithm] = got
	return got, nil
}
