// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"slices"
	"strings"
	"testing"

	store "github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
)

// oneBlob provides the same bytes for every descriptor.
type oneBlob []byte

func (b oneBlob) ReaderAt(context.Context, ocispec.Descriptor) (store.ReaderAt, error) {
	return struct {
		*bytes.Reader
		noCloser
	}{bytes.NewReader(b), noCloser{}}, nil
}

type noCloser struct{}

func (noCloser) Close() error { return nil }

func TestMembersOfAnArchive(t *testing.T) {
	var plain, packed bytes.Buffer
	w := tar.NewWriter(&plain)
	for _, h := range []*tar.Header{
		{Name: "dir/", Typeflag: tar.TypeDir, Mode: 0o755},
		{Name: "dir/a.bin", Typeflag: tar.TypeReg, Mode: 0o640, Size: 3},
		{Name: "link", Typeflag: tar.TypeSymlink, Linkname: "dir/a.bin"},
	} {
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte("abc")[:h.Size]); err != nil {
			t.Fatal(err)
		}
	}
	z := gzip.NewWriter(&packed)
	if err := errors.Join(w.Close(), func() error { _, err := z.Write(plain.Bytes()); return err }(), z.Close()); err != nil {
		t.Fatal(err)
	}
	list := func(blob []byte, c artifact.Compression, stop string) (names []string, err error) {
		l := artifact.Layer{Format: artifact.FormatTar, Compression: c, Descriptor: ocispec.Descriptor{Digest: digest.FromBytes(blob), Size: int64(len(blob))}}
		err = Members(t.Context(), l, oneBlob(blob), NewBudget(DefaultLimits), func(h *tar.Header) error {
			names = append(names, h.Name)
			if h.Name == stop {
				return errors.New("enough")
			}
			return nil
		})
		return names, err
	}
	want := []string{"dir/", "dir/a.bin", "link"}
	for c, blob := range map[artifact.Compression][]byte{artifact.CompressionNone: plain.Bytes(), artifact.CompressionGzip: packed.Bytes()} {
		if got, err := list(blob, c, ""); err != nil || !slices.Equal(got, want) {
			t.Errorf("%q: got %q, %v", c, got, err)
		}
		if got, err := list(blob, c, "dir/a.bin"); err == nil || err.Error() != "enough" || len(got) != 2 {
			t.Errorf("%q: got %q, %v", c, got, err)
		}
		if _, err := list(blob[:len(blob)*3/5], c, ""); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: a part of it is read: %v", c, err)
		}
	}
	if got, err := list(nil, artifact.CompressionGzip, ""); err != nil || got != nil {
		t.Errorf("no bytes have the members %q, %v", got, err)
	}
	var bomb bytes.Buffer
	z = gzip.NewWriter(&bomb)
	w = tar.NewWriter(z)
	if err := errors.Join(w.WriteHeader(&tar.Header{Name: "zeros", Size: alwaysAllowed}), func() error { _, err := w.Write(make([]byte, alwaysAllowed)); return err }(), w.Close(), z.Close()); err != nil {
		t.Fatal(err)
	}
	if _, err := list(bomb.Bytes(), artifact.CompressionGzip, ""); err == nil || !strings.Contains(err.Error(), "decompresses to more") {
		t.Errorf("a bomb is listed: %v", err)
	}
}
