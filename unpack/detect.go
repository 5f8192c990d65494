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

	store "github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/containerd/errdefs"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
)

// A media type may be wrong about the bytes: ORAS compresses every directory and calls
// every file a tar, whatever type it is told. containerd (pkg/archive/compression), ORAS
// and buildah go by the first bytes. So does this file, which decides for every part of the
// program what a layer is.

// Settle returns the layer as the bytes of its blob say that it is. A blob that is not
// there is errdefs.ErrNotFound, one that no Tree can be built from
// errdefs.ErrInvalidArgument.
func Settle(ctx context.Context, l artifact.Layer, blobs store.Provider) (artifact.Layer, error) {
	if !isDetected(l) {
		return l, nil
	}
	in := io.ReaderAt(bytes.NewReader(nil)) // of no bytes there may be no blob
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

// isDetected reports whether it is the bytes that say what the layer is.
func isDetected(l artifact.Layer) bool {
	return l.Format == artifact.FormatTar || l.Format == artifact.FormatTarOrRaw
}

// detect says what the blob of a layer is: an archive and its compression, or a file.
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
			return "", "", fmt.Errorf("its bytes are %s, but %s the DiffID %s, which is the digest of the compressed blob and not of the archive in it: %w", is, l.Claim(), l.DiffID, errdefs.ErrInvalidArgument)
		}
		is = none // the name of its first member begins like that
	case is == none && !beginsArchive(head):
		for _, other := range others {
			if bytes.HasPrefix(head, []byte(other.magic)) {
				return "", "", fmt.Errorf("its bytes are %s, which is not supported: pack the layer as a tar that is not compressed, or with gzip or zstd: %w", other.name, errdefs.ErrInvalidArgument)
			}
		}
	}
	return tarred, is, nil
}

// others are recognized only to be refused by their names.
var others = []struct{ magic, name string }{
	{"\xfd7zXZ\x00", "xz"},
	{"BZh", "bzip2"},
	{"\x04\x22\x4d\x18", "lz4"},
	{"PK\x03\x04", "zip"},
}

// compressionOf is what the first bytes of a blob say, by containerd's rules.
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

// readHead reads as much as the header of a tar's member, or all if that is less.
func readHead(r io.Reader) ([]byte, error) {
	head := make([]byte, tarBlock)
	n, err := io.ReadFull(r, head)
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		err = nil
	}
	return head[:n], err
}

// headWithin is readHead of what is compressed; nothing if it is broken. A blob that cannot
// be read is an error, and not a broken stream: it might be an archive.
func headWithin(ctx context.Context, c artifact.Compression, blob io.Reader, b *Budget) (head []byte, err error) {
	how := decompressors[c]
	release, err := b.take(ctx, how.memory)
	if err != nil {
		return nil, err
	}
	defer release()
	in := &failing{Reader: reader{ctx, blob}}
	if stream, err := how.open(bufio.NewReader(in)); err == nil {
		defer stream.Close()
		head, _ = readHead(stream) // what is wrong with the stream does not matter here
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

// beginsArchive reports whether head is the header of a tar's member. What may follow it,
// such as the text of an extended header, is cut off. Zeros end an archive, but do not
// begin one: a file of zeros must not become an empty volume.
func beginsArchive(head []byte) bool {
	if len(head) < tarBlock {
		return false
	}
	_, err := tar.NewReader(bytes.NewReader(head)).Next()
	return err == nil || errors.Is(err, io.ErrUnexpectedEOF)
}
