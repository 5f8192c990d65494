// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package images

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// sampleImage returns an artifact with the digests of those words.
func sampleImage(name, manifest, config string) *Image {
	dgst := digest.FromString(manifest)
	return &Image{
		Image:    images.Image{Name: name, Target: ocispec.Descriptor{Digest: dgst}},
		Manifest: dgst,
		Config:   digest.FromString(config),
	}
}

func TestImagesWithOneConfigAndDifferentManifestsAreInConflict(t *testing.T) {
	one, oneByDigest := sampleImage("one:v1", "one", "shared"), sampleImage("one@sha256:1", "one", "shared")
	two, own := sampleImage("two:v1", "two", "shared"), sampleImage("own:v1", "own", "own")
	id := sampleImage(digest.FromString("shared").String(), "three", "shared")
	image, same := sampleImage("image:v1", "image", "shared"), sampleImage("same:v1", "same", "shared")
	image.container, same.container = true, true
	refused := sampleImage("refused:v1", "image", "shared") // by an index with the wrong size, for example
	for _, tt := range []struct {
		name string
		all  []*Image
		want map[string]string // names by manifest
	}{
		{"none", nil, nil},
		{"one", []*Image{one}, nil},
		{"two names of one", []*Image{one, oneByDigest}, nil},
		{"other configs", []*Image{one, own}, nil},
		{"two", []*Image{one, oneByDigest, two, own}, map[string]string{"one": "two:v1", "two": "one:v1 one@sha256:1"}},
		{"the image ID is no name", []*Image{one, oneByDigest, sampleImage(id.Name, "one", "shared")}, nil},
		{"an image that has lost its names", []*Image{one, id}, map[string]string{"three": "one:v1"}},
		{"images", []*Image{image, same}, nil},
		{"images and an artifact", []*Image{image, same, one}, map[string]string{"image": "one:v1", "same": "one:v1", "one": "image:v1 same:v1"}},
		{"an artifact of the manifest of an image", []*Image{image, refused}, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			sharing, all := sharings(tt.all), map[digest.Digest]string{}
			for manifest, names := range tt.want {
				all[digest.FromString(manifest)] = names
			}
			for _, i := range tt.all {
				want := strings.Fields(all[i.Manifest])
				for limit := range 3 {
					some, more := sharing[i.Config].With(*i, limit)
					var names []string
					for _, other := range some {
						names = append(names, other.Name)
					}
					if !slices.Equal(names, want[:min(limit, len(want))]) || len(names)+more != len(want) {
						t.Errorf("%s is in conflict with %q and %d more, want %d of %q", i.Name, names, more, limit, want)
					}
				}
			}
		})
	}
}

func TestAConflictNamesAFewArtifactsOnce(t *testing.T) {
	sharing := func(all ...*Image) *Sharing { return sharings(all)[digest.FromString("shared")] }
	one, two := sampleImage("one:v1", "one", "shared"), sampleImage("two:v1", "two", "shared")
	err := sharing(two, one, sampleImage("two@sha256:2", "two", "shared"), sampleImage(digest.FromString("shared").String(), "one", "shared"), sampleImage("esc\x1b[2J", "three", "shared")).conflict(*one)
	if !errdefs.IsFailedPrecondition(err) {
		t.Errorf("the error is not errdefs.ErrFailedPrecondition: %v", err)
	}
	for _, want := range []string{
		`: "esc\x1b[2J" (` + Short(digest.FromString("three")) + `), "one:v1" (` + Short(digest.FromString("one")) + `), "two:v1" (` + Short(digest.FromString("two")) + "); ",
		"crictl rmi " + digest.FromString("shared").Encoded()[:12],
	} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("the error does not say %q: %v", want, err)
		}
	}
	// The names do not depend on the order of the images, and the error fits into an event.
	var many []*Image
	for i := range 2000 {
		name := fmt.Sprintf("registry.example.com/%s/%04d:v1", strings.Repeat("é\x1b", 400), i)
		many = append(many, sampleImage(name+"@"+digest.FromString(name).String(), name, "shared"), sampleImage(name, name, "shared"))
	}
	want := sharing(many...).conflict(*many[7])
	if len(want.Error()) > 1024 || strings.Count(want.Error(), `:v1" (sha256:`) != 4 || !utf8.ValidString(want.Error()) {
		t.Errorf("%d bytes: %v", len(want.Error()), want)
	}
	for i := range 4 {
		if named := fmt.Sprintf(`/%04d:v1" (`, i); !strings.Contains(want.Error(), named) {
			t.Errorf("the error does not have %s: %v", named, want)
		}
	}
	if !strings.Contains(want.Error(), ", and 1996 more; ") {
		t.Errorf("the error does not count the others: %v", want)
	}
	slices.Reverse(many)
	if got := sharing(many...).conflict(*many[len(many)-8]); got.Error() != want.Error() {
		t.Errorf("in another order it is\n%v, not\n%v", got, want)
	}
}
