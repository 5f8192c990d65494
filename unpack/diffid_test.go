// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package unpack_test

import (
	"bytes"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
	"github.com/artifact-snapshotter/artifact-snapshotter/unpack"
)

func TestDiffIDIsThatOfTheContent(t *testing.T) {
	data := bytes.Repeat([]byte("content "), 1<<20)
	for compression, compress := range map[artifact.Compression]func([]byte) ([]byte, error){
		artifact.CompressionGzip: pack.Gzip,
		artifact.CompressionZstd: pack.Zstd,
	} {
		blob, err := compress(data)
		if err != nil {
			t.Fatal(err)
		}
		budget := unpack.NewBudget(unpack.DefaultLimits)
		l := artifact.Layer{Descriptor: ocispec.Descriptor{Size: int64(len(blob))}, Compression: compression}
		for _, algorithm := range []digest.Algorithm{digest.SHA256, digest.SHA512} {
			l.DiffID = algorithm.FromString("whatever it says")
			if got, err := unpack.DiffID(t.Context(), l, bytes.NewReader(blob), budget); err != nil || got != algorithm.FromBytes(data) {
				t.Errorf("%s: %s, %v; want %s", compression, got, err, algorithm.FromBytes(data))
			}
		}
		for name, bad := range map[string][]byte{
			"truncated": blob[:len(blob)-1],
			"garbage":   append(bytes.Clone(blob), 1),
			"another":   data,
		} {
			if _, err := unpack.DiffID(t.Context(), l, bytes.NewReader(bad), budget); !errdefs.IsInvalidArgument(err) {
				t.Errorf("%s, %s: %v, want an invalid argument", compression, name, err)
			}
		}
	}
	// A blob that is not compressed is its own content.
	plain := artifact.Layer{DiffID: digest.SHA512.FromString("whatever it says")}
	if got, err := unpack.DiffID(t.Context(), plain, bytes.NewReader(data), unpack.NewBudget(unpack.DefaultLimits)); err != nil || got != digest.SHA512.FromBytes(data) {
		t.Errorf("not compressed: %s, %v", got, err)
	}
	// A layer that decompresses to more than the limit, perhaps endlessly.
	blob, err := pack.Gzip(make([]byte, 65<<20))
	if err != nil {
		t.Fatal(err)
	}
	tight := unpack.NewBudget(unpack.Limits{Memory: 1, Expansion: 1})
	l := artifact.Layer{Descriptor: ocispec.Descriptor{Size: int64(len(blob))}, Compression: artifact.CompressionGzip}
	if _, err := unpack.DiffID(t.Context(), l, bytes.NewReader(blob), tight); !errdefs.IsInvalidArgument(err) {
		t.Errorf("%v, want that it decompresses to too much", err)
	}
	if _, err := unpack.DiffID(t.Context(), artifact.Layer{}, bytes.NewReader(data), tight); !errdefs.IsNotImplemented(err) {
		t.Errorf("%v, want that there is nothing to decompress", err)
	}
}
