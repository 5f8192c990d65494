// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

// Package images knows which images containerd has, and which of them CRI takes for one
// image because they have the same config.
//
// A [Watcher] follows containerd's events and answers without calling containerd, so
// that a snapshotter may ask it. A [Reader] reads the images of one namespace once,
// through containerd's API; it must not be used inside a snapshotter call, where a call
// to containerd can deadlock with its garbage collection. [KeepEmptyBlob] makes
// artifacts with an empty file pullable.
package images

import (
	"strings"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/opencontainers/go-digest"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
)

// Image is an image of containerd's that is an artifact: a name for it.
type Image struct {
	images.Image
	// Artifact is what the image's target, a manifest or an index, stands for on
	// this node. Those of [Reader.Conflicts] have only the digests of the manifest
	// and the config.
	Artifact *artifact.Artifact
	// chain is the artifact's chain ID, if it has no layers here.
	chain digest.Digest
	// ordinary is an image that is no artifact.
	ordinary bool
	// refused is why an artifact cannot be shown, nil if it can.
	refused error
	// unread is why the image could not be read, if that may pass.
	unread error
}

// isArtifact reports whether the image is an artifact that can be shown.
func (i Image) isArtifact() bool { return i.Artifact != nil && !i.ordinary && i.refused == nil }

// ChainID is the chain ID of the artifact's layers, which a [Reader.Survey] remembers
// without the layers.
func (i Image) ChainID() digest.Digest {
	if i.chain != "" {
		return i.chain
	}
	return i.Artifact.ChainID()
}

// IsID reports whether the name is no reference but the image ID of CRI, the
// digest of the config. CRI makes an image of that name for all images with the
// config, whichever was the last; it is no name to show to people.
func (i Image) IsID() bool { return i.Artifact != nil && i.Name == i.Artifact.Config.String() }

// Named leaves out the names that are not for people: CRI's image IDs, and its
// names by digest, where there is a better one for the same target.
func Named(images []Image) []Image {
	rank := func(image Image) int {
		switch {
		case image.IsID():
			return 0
		case strings.HasSuffix(image.Name, "@"+image.Target.Digest.String()):
			return 1
		}
		return 2
	}
	best := map[digest.Digest]int{}
	for _, image := range images {
		best[image.Target.Digest] = max(best[image.Target.Digest], rank(image))
	}
	var named []Image
	for _, image := range images {
		if rank(image) == best[image.Target.Digest] {
			named = append(named, image)
		}
	}
	return named
}
