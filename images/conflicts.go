// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package images

import (
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// Sharing has the images of a namespace that have the same config. CRI identifies an image
// by its config (internal/cri/store/image of containerd), so CRI may mount any of them in
// place of another: see [Watcher.Check].
type Sharing struct {
	// Images are those that are not named by their [Image.IsID]: CRI finds an image by its
	// ID only if it has no other name.
	Images []*Image

	all        counts
	ofManifest map[digest.Digest]counts
}

// counts counts images, and the artifacts among them.
type counts struct{ images, artifacts int }

// sharings groups images by their configs.
func sharings(all []*Image) map[digest.Digest]*Sharing {
	sharing := map[digest.Digest]*Sharing{}
	for _, i := range all {
		if i.Config == "" {
			continue
		}
		if sharing[i.Config] == nil {
			sharing[i.Config] = &Sharing{ofManifest: map[digest.Digest]counts{}}
		}
		sharing[i.Config].add(i)
	}
	return sharing
}

func (s *Sharing) add(i *Image) {
	if i.IsID() {
		return
	}
	manifest := s.ofManifest[i.Manifest]
	for _, c := range []*counts{&s.all, &manifest} {
		c.images++
		if !i.container {
			c.artifacts++
		}
	}
	s.ofManifest[i.Manifest] = manifest
	s.Images = append(s.Images, i)
}

// With returns the first images that CRI may mount in place of i, which has the config, at
// most limit, and the number of the others. Container images with one config are not in
// conflict with each other: their layers are the same. A nil Sharing has no images.
func (s *Sharing) With(i Image, limit int) (some []Image, more int) {
	all := s.others(i)
	if all == 0 {
		return nil, 0
	}
	for _, other := range s.Images {
		if len(some) == min(limit, all) {
			break
		}
		if !i.sameManifest(other) && (!i.container || !other.container) {
			some = append(some, *other)
		}
	}
	return some, all - len(some)
}

// others counts the images that CRI may mount in place of i.
func (s *Sharing) others(i Image) int {
	if s == nil {
		return 0
	}
	same := s.ofManifest[i.Manifest]
	if i.container {
		return s.all.artifacts - same.artifacts
	}
	return s.all.images - same.images
}

// refuse returns an error if the image is in conflict with one of those that have the same
// config.
func refuse(image Image, same []*Image) error {
	if sharing := sharings(same)[image.Config]; sharing.others(image) > 0 {
		return sharing.conflict(image)
	}
	return nil
}

// conflict is the error for an image that is in conflict with others.
func (s *Sharing) conflict(image Image) error {
	var first []*Image // one name for each manifest, a tag if there is one
	for _, i := range slices.SortedFunc(slices.Values(s.Images), byName) {
		if len(first) < maxNamed && !slices.ContainsFunc(first, i.sameManifest) {
			first = append(first, i)
		}
	}
	var names []string
	for _, i := range first {
		names = append(names, fmt.Sprintf("%s (%s)", quote(i.Name), Short(i.Manifest)))
	}
	if more := len(s.ofManifest) - len(names); more > 0 {
		names = append(names, fmt.Sprintf("and %d more", more))
	}
	what := "artifact"
	if image.container {
		what = "image"
	}
	return fmt.Errorf("%s %s has the same config, %s, as another image, and the runtime identifies images by their config, so it might mount any of these in place of another: %s; give each a config of its own, or remove them all with `crictl rmi %s` and pull again the one that is needed: %w",
		what, Short(image.Manifest), Short(image.Config), strings.Join(names, ", "), image.Config.Encoded()[:12], errdefs.ErrFailedPrecondition)
}
