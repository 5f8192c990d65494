// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package client

import (
	"bytes"
	"compress/gzip"
	"context"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
	"github.com/artifact-snapshotter/artifact-snapshotter/unpack"
)

// opened provides one blob, and counts how often it is opened.
type opened struct {
	blob  []byte
	times int
}

func (o *opened) ReaderAt(context.Context, ocispec.Descriptor) (content.ReaderAt, error) {
	o.times++
	return inMemory{bytes.NewReader(o.blob)}, nil
}

// A manifest may have the same blob for thousands of layers.
func TestVerifyReadsABlobOnce(t *testing.T) {
	var text bytes.Buffer
	w := gzip.NewWriter(&text)
	_, err := w.Write([]byte("content"))
	must(t, err)
	must(t, w.Close())
	desc := ocispec.Descriptor{Digest: digest.FromBytes(text.Bytes()), Size: int64(text.Len())}
	good := digest.FromString("content")
	layer := func(diffID digest.Digest, size int64) Checked {
		desc := desc
		desc.Size = size
		l := artifact.Layer{Descriptor: desc, DiffID: diffID, Compression: artifact.CompressionGzip}
		return Checked{Kind: KindLayer, Descriptor: desc, DiffID: diffID, Layer: l, said: l}
	}
	raw := layer("", desc.Size)
	raw.Layer.Compression = artifact.CompressionNone
	cases := []struct {
		Checked
		want string
	}{
		{layer(digest.FromString("other"), desc.Size), "the config lists the DiffID " + digest.FromString("other").String()},
		{layer(good, desc.Size), ""},
		{layer(good, 1), "its descriptor says 1"},
		{layer(digest.FromString("another"), desc.Size), "the config lists the DiffID " + digest.FromString("another").String()},
		{raw, ""},
		{raw, ""},
	}
	var all []Checked
	for _, c := range cases {
		all = append(all, c.Checked)
	}
	store := &opened{blob: text.Bytes()}
	i, read := 0, int64(0)
	bad, err := verifyAll(t.Context(), store, all, unpack.NewBudget(unpack.DefaultLimits), func(_ Checked, n int64) { read = max(read, n) }, func(k Checked) {
		want := cases[i].want
		if (k.Err == nil) != (want == "") || k.Err != nil && !strings.Contains(k.Err.Error(), want) {
			t.Errorf("%d: got %v, want %q", i, k.Err, want)
		}
		i++
	})
	if must(t, err); !bad {
		t.Error("no blob is bad")
	}
	if read != desc.Size {
		t.Errorf("the progress ends with %d bytes, want %d", read, desc.Size)
	}
	if i != len(cases) || store.times != 2 { // as it is, and decompressed
		t.Errorf("%d blobs are reported, the blob was opened %d times, want %d and 2", i, store.times, len(cases))
	}
}
