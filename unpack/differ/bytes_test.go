// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package differ

import (
	"os"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	modelspec "github.com/modelpack/model-spec/specs-go/v1"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
	"github.com/artifact-snapshotter/artifact-snapshotter/unpack/internal/unpacktest"
)

// In the differ, too, the bytes and not the media type decide what a layer is.
func TestTheBytesDecideForTheDifferToo(t *testing.T) {
	a := archive(t, file("dir/f", "x"))
	for _, ours := range []bool{true, false} {
		s := newSite(t)
		c := newChain(t, s, ours)
		for what, test := range map[string]struct {
			layer  artifact.Layer
			diffID digest.Digest
		}{
			"gzip that is said to be none": {s.Described(t, modelspec.MediaTypeModelWeight, unpacktest.Compress(t, artifact.CompressionGzip, a)), digest.FromBytes(a)},
			"a tar that is said to be":     {s.Described(t, modelspec.MediaTypeModelWeightZstd, a), digest.FromBytes(a)},
			"a directory of ORAS":          {s.Described(t, "text/plain", unpacktest.Compress(t, artifact.CompressionGzip, a), "io.deis.oras.content.unpack", "true"), digest.FromBytes(a)},
			"a file of ORAS":               {s.Described(t, ocispec.MediaTypeImageLayer, []byte("hi"), ocispec.AnnotationTitle, "hi.txt"), digest.FromString("hi")},
			"nothing":                      {s.Described(t, ocispec.MediaTypeEmptyJSON, []byte("{}")), digest.FromString("{}")},
		} {
			got, err := c.Apply(t.Context(), test.layer.Descriptor, c.prepare(t))
			if err != nil || got.Digest != test.diffID {
				t.Errorf("%s: %+v, %v; want the digest %s", what, got, err, test.diffID)
			}
		}
		var dir string
		if ours {
			var err error
			if err = os.Remove(s.Content.Path(digest.FromString("{}"))); err != nil {
				t.Fatal(err)
			}
			if dir, err = c.mountRetained(t); err != nil {
				t.Fatal(err)
			}
		} else {
			dir = c.overlay(t)
		}
		if got := listing(t, dir); len(got) != 4 || read(t, dir, "dir/f") != "x" || read(t, dir, "hi.txt") != "hi" {
			t.Errorf("it shows %v", got)
		}
	}
	// No file can get the name of an image's snapshot.
	s := newSite(t)
	c := newChain(t, s, true)
	names := digest.FromString("a").String() + " " + digest.FromString("b").String()
	l := s.Described(t, ocispec.MediaTypeImageLayer, []byte(names), ocispec.AnnotationTitle, "f")
	if _, err := c.Apply(t.Context(), l.Descriptor, c.prepare(t)); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "chain ID") {
		t.Errorf("a file whose digest is a chain ID: %v", err)
	}
}

// In a snapshot of ours, in one of another snapshotter, and in a chain of them.
func TestTheDifferTakesAnEmptyArchive(t *testing.T) {
	for _, ours := range []bool{true, false} {
		s := newSite(t)
		c := newChain(t, s, ours)
		none := s.Tar(t, artifact.CompressionNone, nil)
		if err := os.Remove(s.Content.Path(none.Descriptor.Digest)); err != nil {
			t.Fatal(err)
		}
		gz := none
		gz.Compression = artifact.CompressionGzip
		c.mustAdd(t, none, gz, s.Tar(t, artifact.CompressionGzip, nil), s.Tar(t, artifact.CompressionZstd, nil), s.Tar(t, artifact.CompressionNone, archive(t, file("f", "x"))))
		show := func(t *testing.T) (string, error) { return c.overlay(t), nil }
		if ours {
			show = c.mountRetained
		}
		dir, err := show(t)
		if err != nil {
			t.Fatal(err)
		}
		if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 || read(t, dir, "f") != "x" {
			t.Errorf("ours %v: the snapshots have %v (%v)", ours, entries, err)
		}
	}
}

// A tree whose config names the DiffID by another algorithm has decompressed the blob
// before.
func TestTheDiffIDIsCanonical(t *testing.T) {
	s := newSite(t)
	text := archive(t, file("a", "a"))
	l := s.Tar(t, artifact.CompressionGzip, text)
	other := l
	other.DiffID = digest.SHA512.FromBytes(text)
	s.treeOf(t, []artifact.Layer{other})
	for _, ours := range []bool{true, false} {
		c := newChain(t, s, ours)
		c.mustAdd(t, l)
		if !ours {
			continue
		}
		dir, err := c.mountRetained(t)
		if err != nil {
			t.Fatal(err)
		}
		if got := read(t, dir, "a"); got != "a" {
			t.Errorf("it reads %q", got)
		}
	}
}

func TestALayerWhoseDigestIsAnotherChainsIDIsRefused(t *testing.T) {
	s := newSite(t)
	victim := digest.FromString("a chain").String() + " " + digest.FromString("a DiffID").String()
	for _, ours := range []bool{true, false} {
		c := newChain(t, s, ours)
		if _, err := c.add(t, s.Raw(t, "f", victim)); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "the chain ID of other layers") {
			t.Errorf("ours %v: %v", ours, err)
		}
		c = newChain(t, s, ours)
		c.mustAdd(t, s.Raw(t, "f", strings.ToUpper(victim)))
	}
}
