// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"

	store "github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
)

// Members calls each with the header of every member of an archive, in the archive's order,
// and writes nothing. The layer must be settled, see [Settle]. It decompresses within the
// limits of the budget, and ends with the error of each. It does not check what [Build]
// refuses about a member; an archive that cannot be read is errdefs.ErrInvalidArgument.
func Members(ctx context.Context, l artifact.Layer, blobs store.Provider, b *Budget, each func(*tar.Header) error) error {
	if l.Format != artifact.FormatTar || l.Descriptor.Size == 0 {
		return nil
	}
	blob, err := blobs.ReaderAt(ctx, l.Descriptor)
	if err != nil {
		return err
	}
	defer blob.Close()
	return guard(func() error {
		section := io.NewSectionReader(blob, 0, blob.Size())
		if l.Compression == artifact.CompressionNone {
			return readMembers(seeking{ctx, section}, each)
		}
		stream, err := decompress(ctx, l.Compression, reader{ctx, section, nil}, l.Descriptor.Size, b)
		if err != nil {
			return err
		}
		defer stream.Close()
		return readMembers(stream, each)
	})
}

func readMembers(in io.Reader, each func(*tar.Header) error) error {
	r := tar.NewReader(in)
	for n := 0; ; n++ {
		h, err := r.Next()
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return badStream(err)
		case n >= maxEntries:
			return fmt.Errorf("it has more than %d members: %w", maxEntries, errdefs.ErrInvalidArgument)
		}
		if err := each(h); err != nil {
			return err
		}
	}
}
