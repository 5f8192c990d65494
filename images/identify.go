// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package images

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"syscall"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
)

// errTooLarge is why the config of an image is not looked for.
var errTooLarge = errors.New("the manifest or the index is too large")

// identify returns the image with the digests by which CRI identifies it, as far as they
// can be found.
func identify(ctx context.Context, blobs content.Provider, i images.Image) Image {
	image := Image{Image: i}
	manifest, config, err := configOf(ctx, blobs, i.Target)
	if err != nil {
		log.G(ctx).WithError(err).WithField("image", i.Name).Debug("Cannot find the config of an image")
		image.undecided = temporary(err)
		return image
	}
	image.Manifest, image.Config = manifest, config.Digest
	image.container = artifact.IsImageConfig(config.MediaType)
	return image
}

// temporary returns err if it says nothing about the image, so that CRI may know a config
// that we do not.
func temporary(err error) error {
	var errno syscall.Errno
	if errors.As(err, &errno) || errors.Is(err, errTooLarge) || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return nil
}

// descriptor is what matters of a descriptor in a manifest or an index.
type descriptor struct {
	MediaType string
	Digest    digest.Digest
	Platform  *ocispec.Platform
}

// configOf returns the digest of the manifest and the descriptor of the config that CRI
// finds for an image (core/images/image.go of containerd, Manifest). Unlike package
// artifact it reads JSON as leniently as CRI does, because an image that we refuse may
// share its config with one that we mount. It may find a config where CRI finds none.
func configOf(ctx context.Context, blobs content.Provider, target ocispec.Descriptor) (manifest digest.Digest, config descriptor, err error) {
	next := &descriptor{MediaType: target.MediaType, Digest: target.Digest}
	for {
		doc, err := readDocument(ctx, blobs, *next)
		if err != nil {
			return "", config, err
		}
		// The media type of the target may be unknown.
		if images.IsManifestType(next.MediaType) || !images.IsIndexType(next.MediaType) && len(doc.Manifests) == 0 {
			if err := doc.Config.Digest.Validate(); err != nil {
				return "", config, fmt.Errorf("config of manifest %s: %w", next.Digest, err)
			}
			return next.Digest, doc.Config, nil
		}
		best := choose(doc.Manifests)
		if best == nil {
			return "", config, fmt.Errorf("index %s: no manifest for %s: %w", next.Digest, platforms.DefaultString(), errdefs.ErrNotFound)
		}
		next = best
	}
}

// choose returns the manifest of an index that CRI looks into; CRI looks into no other.
func choose(manifests []descriptor) (best *descriptor) {
	here := platforms.Default()
	for i := range manifests {
		next := &manifests[i]
		switch {
		case next.Platform != nil && !here.Match(*next.Platform):
		case best == nil, next.Platform != nil && (best.Platform == nil || here.Less(*next.Platform, *best.Platform)):
			best = next
		}
	}
	return best
}

// document is what matters of a manifest or an index.
type document struct {
	Config    descriptor
	Manifests []descriptor
}

// readDocument reads a manifest or an index. It does not compare its size with that of
// the descriptor, as containerd does not.
func readDocument(ctx context.Context, blobs content.Provider, desc descriptor) (doc document, err error) {
	limit, parsed := int64(maxIndex), any(&doc)
	if images.IsManifestType(desc.MediaType) {
		limit, parsed = maxManifest, &struct{ Config *descriptor }{&doc.Config}
	}
	ra, err := blobs.ReaderAt(ctx, ocispec.Descriptor{Digest: desc.Digest})
	if err != nil {
		return doc, err
	}
	defer ra.Close()
	if ra.Size() > limit {
		return doc, fmt.Errorf("%w: %s has %d bytes, over the limit of %d", errTooLarge, desc.Digest, ra.Size(), limit)
	}
	text := make([]byte, ra.Size())
	if _, err := io.ReadFull(content.NewReader(ra), text); err != nil {
		return doc, fmt.Errorf("blob %s: %w", desc.Digest, err)
	}
	if err := json.Unmarshal(text, parsed); err != nil {
		return doc, fmt.Errorf("blob %s: %.300v: %w", desc.Digest, err, errdefs.ErrInvalidArgument)
	}
	return doc, nil
}
