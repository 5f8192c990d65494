// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"

	store "github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/containerd/errdefs"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
)

// A media type may be wrong about the bytes: ORAS compresses every directory and calls
// every file a tar, under any type that the user chooses. containerd
// (pkg/archive/compression), ORAS and buildah look at the first bytes, and so does this
// file, which decides for every part of the program what a layer is.

// Settle returns the layer with the format and compression that its blob really has. A blob
// that is not there is errdefs.ErrNotFound, one that Build would refuse
// errdefs.ErrInvalidArgument.
func Settle(ctx context.Context, l artifact.Layer, blobs store.Provider) (artifact.Layer, error) {
	if !isDetected(l) {
		return l, nil
	}
	in := io.ReaderAt(bytes.NewReader(nil)) // a layer of no bytes may have no blob
	if l.Descriptor.Size > 0 {
		blob, err := blobs.ReaderAt(ctx, l.Descriptor)
		if err != nil {
			return l, err
		}
		defer blob.Close()
		in = blob
	}
	settled := l
	err := guard(func() error {
		format, compression, err := detect(ctx, l, in, NewBudget(DefaultLimits))
		if err == nil {
			settled, err = l.Settle(format, compression)
		}
		return err
	})
	return settled, err
}

// isDetected reports whether the bytes, and not the media type, decide what the layer is.
func isDetected(l artifact.Layer) bool {
	return l.Format == artifact.FormatTar || l.Format == artifact.FormatTarOrRaw
}

// detect returns what the blob of a layer is: an archive and its compression, or a file.
func detect(ctx context.Context, l artifact.Layer, blob io.ReaderAt, b *Budget) (artifact.Format, artifact.Compression, error) {
	const tarred, raw, none = artifact.FormatTar, artifact.FormatRaw, artifact.CompressionNone
	head, err := readHead(io.NewSectionReader(blob, 0, l.Descriptor.Size))
	if err != nil {
		return "", "", err
	}
	is := compressionOf(head)
	switch {
	case l.Format == artifact.FormatTarOrRaw:
		if is != none {
			if head, err = headWithin(ctx, is, io.NewSectionReader(blob, 0, l.Descriptor.Size), b); err != nil {
				return "", "", err
			}
		}
		if !beginsArchive(head) {
			return raw, none, nil
		}
	case is != none && l.DiffID == l.Descriptor.Digest:
		if !beginsArchive(head) {
			return "", "", fmt.Errorf("its bytes are %s, but %s the DiffID %s, which is the digest of the compressed blob instead of the archive in it: %w", is, l.Claim(), l.DiffID, errdefs.ErrInvalidArgument)
		}
		is = none // a tar whose first member has such a name
	case is == none && !beginsArchive(head):
		for _, other := range others {
			if bytes.HasPrefix(head, []byte(other.magic)) {
				return "", "", fmt.Errorf("its bytes are %s, which is not supported; pack the layer as a tar without compression, or with gzip or zstd: %w", other.name, errdefs.ErrInvalidArgument)
			}
		}
	}
	return tarred, is, nil
}

// others are recognized only to name them in an error.
var others = []struct{ magic, name string }{
	{"\xfd7zXZ\x00", "xz"},
	{"BZh", "bzip2"},
	{"\x04\x22\x4d\x18", "lz4"},
	{"PK\x03\x04", "zip"},
}

// compressionOf returns the compression that the first bytes of a blob show, by
// containerd's rules.
func compressionOf(head []byte) artifact.Compression {
	switch compression.DetectCompression(head) {
	case compression.Gzip:
		return artifact.CompressionGzip
	case compression.Zstd:
		return artifact.CompressionZstd
	default:
		return artifact.CompressionNone
	}
}

// readHead reads the size of a tar header, or all if there is less.
func readHead(r io.Reader) ([]byte, error) {
	head := make([]byte, tarBlock)
	n, err := io.ReadFull(r, head)
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		err = nil
	}
	return head[:n], err
}

// headWithin is readHead of the content of a compressed blob. It returns nothing if the
// stream is broken, but an error if the blob cannot be read, since that blob might be an
// archive.
func headWithin(ctx context.Context, c artifact.Compression, blob io.Reader, b *Budget) (head []byte, err error) {
	in := &failing{Reader: reader{ctx, blob, nil}}
	stream, err := decompress(ctx, c, in, math.MaxInt64, b)
	switch {
	case err == nil:
		defer stream.Close()
		head, _ = readHead(stream) // a broken stream is no archive
	case !errdefs.IsInvalidArgument(err):
		return nil, err
	}
	return head, in.err
}

// failing remembers why its reader could not be read.
type failing struct {
	io.Reader
	err error
}

func (f *failing) Read(p []byte) (int, error) {
	n, err := f.Reader.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		f.err = err
	}
	return n, err
}

// beginsArchive reports whether head is the header of a tar member, which may be truncated
// after it, in the text of an extended header for example. Zeros end an archive but do not
// begin one: a file of zeros must not become an empty volume.
func beginsArchive(head []byte) bool {
	if len(head) < tarBlock {
		return false
	}
	_, err := tar.NewReader(bytes.NewReader(head)).Next()
	return err == nil || errors.Is(err, io.ErrUnexpectedEOF)
}
