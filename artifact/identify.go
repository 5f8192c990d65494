// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package artifact

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// ErrTooLarge is returned by [Identify] for a manifest or an index that is too large, or too
// many indexes deep, to be looked into: CRI may know its config, and we do not.
var ErrTooLarge = fmt.Errorf("too large: %w", errdefs.ErrInvalidArgument)

// reference is what decides in a descriptor which config an image has. It is small, since
// a hostile index can have one for every three bytes.
type reference struct {
	MediaType string
	Digest    digest.Digest
	Platform  *ocispec.Platform
}

// configured is what counts in a manifest. Config is not a pointer, as in containerd: null
// sets a pointer to nil, and leaves a struct as it is.
type configured struct{ Config reference }

// Identify returns what containerd's CRI knows any image by, a container image included:
// the digest of the manifest that it takes for this platform, and media type and digest of
// that manifest's config, which is the image's ID.
//
// Unlike [Read], Identify reads the JSON as leniently as containerd does (core/images/image.go,
// Manifest), because an image that Read refuses may share its config with an artifact that
// is mounted. It may find a config where CRI finds none. It needs digest and media type of
// target. Other errors than ErrTooLarge are those of Read, but never errdefs.ErrDataLoss.
func Identify(ctx context.Context, blobs content.Provider, target ocispec.Descriptor) (manifest digest.Digest, config ocispec.Descriptor, err error) {
	next := &reference{MediaType: target.MediaType, Digest: target.Digest}
	for range maxIdentifiedDepth + 1 {
		var doc struct {
			configured
			Manifests []reference
		}
		isManifest, limit, parsed := images.IsManifestType(next.MediaType), int64(maxIdentifiedIndex), any(&doc)
		if isManifest {
			limit, parsed = maxIdentifiedManifest, &doc.configured
		}
		// containerd compares neither the size nor the digest of what it has stored.
		raw, err := readUnverified(ctx, blobs, ocispec.Descriptor{Digest: next.Digest}, "manifest", limit)
		if err != nil {
			return "", config, err
		}
		if err := json.Unmarshal(raw, parsed); err != nil {
			return "", config, fmt.Errorf("manifest %s: malformed JSON: %.300v: %w", next.Digest, err, errdefs.ErrInvalidArgument)
		}
		// The media type of the target may be unknown.
		if isManifest || !images.IsIndexType(next.MediaType) && len(doc.Manifests) == 0 {
			if err := doc.Config.Digest.Validate(); err != nil {
				return "", config, fmt.Errorf("config of manifest %s: digest %.255q: %v: %w", next.Digest, doc.Config.Digest, err, errdefs.ErrInvalidArgument)
			}
			return next.Digest, ocispec.Descriptor{MediaType: doc.Config.MediaType, Digest: doc.Config.Digest}, nil
		}
		index := next.Digest
		if next = first(doc.Manifests); next == nil {
			return "", config, fmt.Errorf("index %s: no manifest for %s: %w", index, platforms.DefaultString(), errdefs.ErrNotFound)
		}
	}
	return "", config, fmt.Errorf("index %s: more than %d indexes lead to a manifest: %w", target.Digest, maxIdentifiedDepth, ErrTooLarge)
}

// first returns the manifest of an index that CRI looks into; CRI looks into no other.
func first(manifests []reference) (best *reference) {
	here := platforms.Default()
	for i := range manifests {
		m := &manifests[i]
		switch {
		case m.Platform != nil && !here.Match(*m.Platform):
		case best == nil, m.Platform != nil && (best.Platform == nil || here.Less(*m.Platform, *best.Platform)):
			best = m
		}
	}
	return best
}

// Layers returns those layers of a manifest, given by its digest, that can be read, without
// what its config says of them; none if the manifest cannot be read.
func Layers(ctx context.Context, blobs content.Provider, manifest ocispec.Descriptor) (layers []Layer) {
	_, doc, err := resolve(ctx, blobs, manifest)
	if err != nil {
		return nil
	}
	for i, d := range doc.Layers {
		if l, err := newLayer(i, d, config{created: unixEpoch}); err == nil {
			layers = append(layers, l)
		}
	}
	return layers
}
