// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package images

import (
	"iter"
	"maps"
	"slices"

	"github.com/opencontainers/go-digest"
)

// catalog has the images of one namespace, indexed so that a question about one image
// does not depend on the number of images. An image in the catalog is never changed, only
// replaced, so that a caller may use what it has found without a lock. A nil catalog is
// empty.
type catalog struct {
	byName map[string]*Image
	// byDigest has, for each digest, the images of which it is the target, the manifest
	// or the config.
	byDigest map[digest.Digest][]*Image
	// undecided has those whose config is to be looked for again, by name.
	undecided map[string]*Image
	// excluded has the configs that an undecided image was found not to have, with its
	// target. CRI does not look into an image again before an event tells of it.
	excluded map[[2]digest.Digest]bool
}

func newCatalog() *catalog {
	return &catalog{map[string]*Image{}, map[digest.Digest][]*Image{}, map[string]*Image{}, map[[2]digest.Digest]bool{}}
}

// put adds an image, or replaces the one with the same name.
func (c *catalog) put(i Image) {
	c.remove(i.Name)
	c.byName[i.Name] = &i
	for d := range i.digests() {
		c.byDigest[d] = append(c.byDigest[d], &i)
	}
	if i.undecided != nil {
		c.undecided[i.Name] = &i
		clear(c.excluded)
	}
}

func (c *catalog) remove(name string) {
	if c == nil || c.byName[name] == nil {
		return
	}
	old := c.byName[name]
	delete(c.byName, name)
	delete(c.undecided, name)
	for d := range old.digests() {
		c.byDigest[d] = slices.DeleteFunc(c.byDigest[d], func(i *Image) bool { return i == old })
		if len(c.byDigest[d]) == 0 {
			delete(c.byDigest, d)
		}
	}
}

// with returns the images that have the digest and satisfy is.
func (c *catalog) with(d digest.Digest, is func(*Image) bool) (found []*Image) {
	if c == nil || d == "" {
		return nil
	}
	for _, i := range c.byDigest[d] {
		if is(i) {
			found = append(found, i)
		}
	}
	return found
}

func (c *catalog) withTarget(target digest.Digest) []*Image {
	return c.with(target, func(i *Image) bool { return i.Target.Digest == target })
}

func (c *catalog) withManifest(manifest digest.Digest) []*Image {
	return c.with(manifest, func(i *Image) bool { return i.Manifest == manifest })
}

func (c *catalog) withConfig(config digest.Digest) []*Image {
	return c.with(config, func(i *Image) bool { return i.Config == config })
}

// find returns an image with that target or manifest, if possible one whose name is not an
// image ID. It returns nil if there is none.
func (c *catalog) find(target digest.Digest) *Image {
	found := append(c.withTarget(target), c.withManifest(target)...)
	if named := slices.IndexFunc(found, func(i *Image) bool { return i.Config != "" && !i.IsID() }); named >= 0 {
		return found[named]
	}
	if len(found) == 0 {
		return nil
	}
	return found[0]
}

// toReadAgain returns the images whose config is to be looked for again.
func (c *catalog) toReadAgain() []*Image {
	if c == nil {
		return nil
	}
	return slices.Collect(maps.Values(c.undecided))
}

// undecidedAs returns the image of that name if its config is to be looked for again, or nil.
func (c *catalog) undecidedAs(name string) *Image {
	if c == nil {
		return nil
	}
	return c.undecided[name]
}

// isExcluded reports whether an image was found not to have a config, see excluded.
func (c *catalog) isExcluded(key [2]digest.Digest) bool { return c != nil && c.excluded[key] }

// all returns all images.
func (c *catalog) all() []*Image {
	if c == nil {
		return nil
	}
	return slices.Collect(maps.Values(c.byName))
}

// digests returns the digests of the image, each once.
func (i *Image) digests() iter.Seq[digest.Digest] {
	all := map[digest.Digest]bool{i.Target.Digest: true}
	if i.Config != "" {
		all[i.Manifest], all[i.Config] = true, true
	}
	return maps.Keys(all)
}
