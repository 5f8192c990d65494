// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package artifact

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func TestDigestsAreFoundHoweverTheyAreWritten(t *testing.T) {
	d := digest.FromString("x")
	long := digest.SHA512.FromString("x")
	escape := func(s string) string {
		var b strings.Builder
		for _, r := range s {
			fmt.Fprintf(&b, `\u%04x`, r)
		}
		return b.String()
	}
	for text, want := range map[string][]digest.Digest{
		`{"a": "` + string(d) + `"}`:                                             {d},
		" \n\t{\"" + string(d) + `":"` + string(long) + `"}`:                     {d, long},
		`{"a": "` + escape(string(long)) + `"}`:                                  {long},
		`{"a": "` + strings.Repeat("x", 1<<17) + `", "b": "` + string(d) + `"}`:  {d},
		`{"a": "\"", "b": "` + string(d) + `"}`:                                  {d},
		`{"a": "\\", "b": "` + string(d) + `"}`:                                  {d},
		`{"a": "\\\"` + string(d) + `"}`:                                         nil,
		`{"a": "` + strings.Repeat(`\\`, 1<<17) + `", "b": "` + string(d) + `"}`: {d},
		`{"a": "x` + string(d) + `"}`:                                            nil,
		`{"a": "` + string(d) + `x"}`:                                            nil,
		`{` + string(d) + `}`:                                                    nil,
		`["` + string(d) + `"]`:                                                  nil,
		`{"a": "` + string(d):                                                    nil,
		``:                                                                       nil,
	} {
		var got, slow []digest.Digest
		if err := digestsIn(t.Context(), strings.NewReader(text), func(d digest.Digest) { got = append(got, d) }); err != nil {
			t.Error(err)
		}
		if err := digestsIn(t.Context(), iotest.OneByteReader(strings.NewReader(text)), func(d digest.Digest) { slow = append(slow, d) }); err != nil {
			t.Error(err)
		}
		if !slices.Equal(got, want) || !slices.Equal(slow, want) {
			t.Errorf("%.100s has %v and %v, want %v", text, got, slow, want)
		}
	}
}

// What Identify finds, MayHaveConfig does not exclude.
func TestAConfigIsExcludedOnlyIfNoDocumentNamesIt(t *testing.T) {
	b := blobs{}
	config, other := digest.FromString("config"), digest.FromString("other")
	manifest := b.add(ocispec.MediaTypeImageManifest, fmt.Appendf(nil, `{"config": {"digest": %q}, "x": %q}`, config, strings.Repeat("x", maxIdentifiedManifest)))
	target := manifest
	for range maxIdentifiedDepth + 1 {
		target = b.add(ocispec.MediaTypeImageIndex, fmt.Appendf(nil, `{"manifests": [{"digest": %q}, {"digest": %q}]}`, digest.FromString("elsewhere"), target.Digest))
	}
	for _, of := range []ocispec.Descriptor{manifest, target} {
		if may, err := MayHaveConfig(t.Context(), b, of, config); !may || err != nil {
			t.Errorf("%v, %v, want that it may", may, err)
		}
		if may, err := MayHaveConfig(t.Context(), b, of, other); may || err != nil {
			t.Errorf("%v, %v, want that it may not", may, err)
		}
	}
	circle := digest.FromString("circle")
	b[circle] = fmt.Appendf(nil, `{"manifests": [{"digest": %q}]}`, circle)
	if may, err := MayHaveConfig(t.Context(), b, ocispec.Descriptor{Digest: circle}, config); may || err != nil {
		t.Errorf("a circle: %v, %v", may, err)
	}
	b[circle] = []byte(strings.Repeat(" ", 1<<17) + `{"x": "` + config.String() + `"}`)
	if may, err := MayHaveConfig(t.Context(), b, ocispec.Descriptor{Digest: circle}, config); !may || err != nil {
		t.Errorf("after white space: %v, %v", may, err)
	}
}
