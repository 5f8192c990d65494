// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

// Package images knows which images containerd has, and which of them CRI takes for one
// image because they have the same config.
//
// A [Watcher] follows containerd's events and answers without calling containerd, so a
// snapshotter may ask it. A [Reader] reads the images of one namespace through
// containerd's API. It must not be used inside a snapshotter call, where a call to
// containerd can deadlock with containerd's garbage collection. [KeepEmptyBlob] makes
// artifacts with an empty file pullable.
package images

import (
	"cmp"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/opencontainers/go-digest"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
)

// Image is one name in containerd's image store, with the digests by which CRI
// identifies the image. Several images may have one target.
type Image struct {
	images.Image
	// Manifest is the digest of the manifest that the target, a manifest or an index,
	// stands for on this node, and Config that of its config. Both are "" if they are
	// unknown.
	Manifest, Config digest.Digest
	// Artifact is what a [Reader] has read. It is nil for an image of a [Survey] or a
	// [Sharing], because the layers of all artifacts may take a lot of memory.
	Artifact *artifact.Artifact

	// chain is the chain ID of an artifact that is not in memory.
	chain digest.Digest
	// container is set for a container image, as opposed to an artifact.
	container bool
	// undecided is why the config is unknown, if reading the image again may find it.
	undecided error
}

// ChainID is the chain ID of the artifact's layers.
func (i Image) ChainID() digest.Digest {
	if i.Artifact != nil {
		return i.Artifact.ChainID()
	}
	return i.chain
}

// IsID reports whether the name is not a reference but CRI's image ID, the digest of the
// config. CRI gives this name to the image with that config that was pulled last.
func (i Image) IsID() bool { return i.Config != "" && i.Name == i.Config.String() }

// sameManifest reports whether two images stand for one manifest.
func (i Image) sameManifest(other *Image) bool { return i.Manifest == other.Manifest }

// Named leaves out the names that are not meant for people if there is a better name for
// the same target: CRI's image IDs, and CRI's names by digest.
func Named(all []Image) []Image {
	rank := func(i Image) int {
		switch {
		case i.IsID():
			return 0
		case strings.HasSuffix(i.Name, "@"+i.Target.Digest.String()):
			return 1
		}
		return 2
	}
	best := map[digest.Digest]int{}
	for _, i := range all {
		best[i.Target.Digest] = max(best[i.Target.Digest], rank(i))
	}
	var named []Image
	for _, i := range all {
		if rank(i) == best[i.Target.Digest] {
			named = append(named, i)
		}
	}
	return named
}

// byName orders images by their names.
func byName(a, b *Image) int { return cmp.Compare(a.Name, b.Name) }

// quote returns the name in quotes. It cuts the middle of a long name, since the registry
// is at the beginning and the tag at the end.
func quote(name string) string {
	quoted := strconv.Quote(name)
	if len(quoted) <= maxNameBytes {
		return quoted
	}
	half := maxNameBytes / 2
	return strings.ToValidUTF8(quoted[:half], "") + "…" + strings.ToValidUTF8(quoted[len(quoted)-half:], "")
}

// Short returns the algorithm and the first 12 digits of a digest, as crictl and ctr
// print it.
func Short(d digest.Digest) string {
	return d.Algorithm().String() + ":" + d.Encoded()[:12]
}
