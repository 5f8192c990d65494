// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"math"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
)

// DiffID is the digest of what the blob of an archive holds, by the algorithm of the
// DiffID that the layer names. The layer's compression is its blob's, see [Settle]. It
// decompresses within the limits of the budget, by the rules of [Build], and writes
// nothing. What is no stream of that compression is errdefs.ErrInvalidArgument.
func DiffID(ctx context.Context, l artifact.Layer, blob io.Reader, b *Budget) (id digest.Digest, err error) {
	if l.Compression == artifact.CompressionNone && l.DiffID != "" {
		return l.DiffID.Algorithm().FromReader(reader{ctx, blob})
	}
	how, ok := decompressors[l.Compression]
	if !ok {
		return "", fmt.Errorf("compression %q: %w", l.Compression, errdefs.ErrNotImplemented)
	}
	algorithm := digest.Canonical
	if l.DiffID != "" {
		algorithm = l.DiffID.Algorithm()
	}
	if l.Descriptor.Size == 0 { // no bytes are an empty archive, whatever their compression
		return algorithm.FromBytes(nil), nil
	}
	release, err := b.take(ctx, how.memory)
	if err != nil {
		return "", err
	}
	defer release()
	err = guard(func() error {
		stream, err := how.open(bufio.NewReaderSize(reader{ctx, blob}, chunk))
		if err != nil {
			return badStream(fmt.Errorf("it is not %s: %w", l.Compression, err))
		}
		defer stream.Close()
		sum := algorithm.Digester()
		limit := b.expanded(l.Descriptor.Size)
		n, err := io.Copy(sum.Hash(), io.LimitReader(stream, min(limit, math.MaxInt64-1)+1))
		if err != nil {
			return badStream(err)
		}
		if n > limit {
			return fmt.Errorf("it decompresses to more than %d bytes from %d; raise max_expansion in the snapshotter's configuration if that is as it should be: %w",
				limit, l.Descriptor.Size, errdefs.ErrInvalidArgument)
		}
		id = sum.Digest()
		return nil
	})
	return id, err
}
