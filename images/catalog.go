// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package images

import (
	"iter"
	"maps"
	"slices"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
)

// catalog is the images of one namespace. A question about one image takes no longer
// when there are others. The zero value and nil have no images, and put wants the
// former. An image that is in it is never changed, only replaced, so that what was
// found can be looked at later.
type catalog struct {
	byName map[string]*Image
	// byDigest are, by each digest, the images of which it is that of the target, the
	// manifest or the config.
	byDigest map[digest.Digest][]*Image
	// unread are, by name, those that are to be read again.
	unread map[string]*Image
}

// put adds an image, or replaces that of the same name.
func (c *catalog) put(i Image) {
	c.set(i)
	c.adopt(i.Target.Digest)
}

// set is put without a look at other names of the image.
func (c *catalog) set(i Image) {
	c.remove(i.Name)
	if c.byName == nil {
		*c = catalog{map[string]*Image{}, map[digest.Digest][]*Image{}, map[string]*Image{}}
	}
	c.byName[i.Name] = &i
	for d := range i.digests() {
		c.byDigest[d] = append(c.byDigest[d], &i)
	}
	if i.unread != nil {
		c.unread[i.Name] = &i
	}
}

func (c *catalog) remove(name string) {
	if c == nil || c.byName[name] == nil {
		return
	}
	old := c.byName[name]
	delete(c.byName, name)
	delete(c.unread, name)
	for d := range old.digests() {
		c.byDigest[d] = slices.DeleteFunc(c.byDigest[d], func(i *Image) bool { return i == old })
		if len(c.byDigest[d]) == 0 {
			delete(c.byDigest, d)
		}
	}
}

// adopt finds out what an image is that could not be read, by an image ID of CRI that
// is a name for the same target: CRI makes them in each pull, before it knows another
// name (internal/cri/server/images/image_pull.go of containerd).
func (c *catalog) adopt(target digest.Digest) {
	same := c.withTarget(target)
	id := slices.IndexFunc(same, func(i *Image) bool { return digest.Digest(i.Name).Validate() == nil })
	if id < 0 {
		return
	}
	for _, i := range same {
		if i.Artifact != nil || i.unread == nil {
			continue
		}
		known := *i
		known.unread = nil
		known.Artifact = &artifact.Artifact{Manifest: ocispec.Descriptor{Digest: target}, Config: digest.Digest(same[id].Name)}
		c.set(known)
	}
}

// with are the images that have the digest, and for which is true.
func (c *catalog) with(d digest.Digest, is func(*Image) bool) (found []*Image) {
	if c == nil {
		return nil
	}
	for _, i := range c.byDigest[d] {
		if is(i) {
			found = append(found, i)
		}
	}
	return found
}

// withTarget are the images with that target.
func (c *catalog) withTarget(target digest.Digest) []*Image {
	return c.with(target, func(i *Image) bool { return i.Target.Digest == target })
}

// withManifest are the images that stand for the manifest.
func (c *catalog) withManifest(manifest digest.Digest) []*Image {
	return c.with(manifest, func(i *Image) bool { return i.Artifact != nil && i.Artifact.Manifest.Digest == manifest })
}

// withConfig are the images that have the config.
func (c *catalog) withConfig(config digest.Digest) []*Image {
	return c.with(config, func(i *Image) bool { return i.Artifact != nil && i.Artifact.Config == config })
}

// find returns an image with that target or manifest, by a name for people if there is
// one; nil if there is no image.
func (c *catalog) find(target digest.Digest) *Image {
	found := append(c.withTarget(target), c.withManifest(target)...)
	if named := slices.IndexFunc(found, func(i *Image) bool { return i.Artifact != nil && !i.IsID() }); named >= 0 {
		return found[named]
	}
	if len(found) == 0 {
		return nil
	}
	return found[0]
}

// again are the images that are to be read again.
func (c *catalog) again() []*Image {
	if c == nil {
		return nil
	}
	return slices.Collect(maps.Values(c.unread))
}

// all are all images.
func (c *catalog) all() []*Image {
	if c == nil {
		return nil
	}
	return slices.Collect(maps.Values(c.byName))
}

// digests are those of the image, each once.
func (i *Image) digests() iter.Seq[digest.Digest] {
	all := map[digest.Digest]bool{i.Target.Digest: true}
	if i.Artifact != nil {
		all[i.Artifact.Manifest.Digest], all[i.Artifact.Config] = true, true
	}
	return maps.Keys(all)
}
