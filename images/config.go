// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package images

import (
	"bytes"
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

// maxTwice, in bytes, bounds an index that lists manifests twice: then all are kept.
const maxTwice = 4 << 20

// errUndecided is why it is not found out by reading the image: then the names that
// CRI gives it tell, see catalog.adopt.
var errUndecided = errors.New("a manifest or an index that is too large")

// readAny reads whatever image there is, as far as it can be read: see Image.
func readAny(ctx context.Context, blobs content.Provider, i images.Image) Image {
	a, err := artifact.Read(ctx, blobs, i.Target)
	if err == nil {
		return Image{Image: i, Artifact: a}
	}
	image := Image{Image: i, refused: err, unread: passing(err)}
	if errors.Is(err, artifact.ErrNotArtifact) {
		image.ordinary, image.refused = true, nil
	}
	manifest, config, err := configOf(ctx, blobs, i.Target)
	if err == nil {
		image.Artifact = &artifact.Artifact{Manifest: ocispec.Descriptor{Digest: manifest}, Config: config}
		return image
	}
	if image.unread == nil {
		image.unread = passing(err)
	}
	log.G(ctx).WithError(err).WithField("image", i.Name).Debug("Cannot read an image")
	return image
}

// readAll reads the images of a namespace, as far as they can be read and only what
// brief keeps of them; each, if it is not nil, sees all of it before. What has been read
// already is in read, by target: CRI gives an image several names.
func readAll(ctx context.Context, blobs content.Provider, all []images.Image, read map[digest.Digest]Image, each func(*Image)) *catalog {
	known := &catalog{}
	for _, i := range all {
		if ctx.Err() != nil {
			break
		}
		image, ok := read[i.Target.Digest]
		if !ok {
			image = readAny(ctx, blobs, i)
			if each != nil {
				each(&image)
			}
			image = image.brief()
			read[i.Target.Digest] = image
		}
		image.Name = i.Name
		known.put(image)
	}
	return known
}

// passing returns err if it does not say what the image is, so that this may be found
// out another time.
func passing(err error) error {
	var errno syscall.Errno
	if errors.As(err, &errno) || errors.Is(err, errUndecided) || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return nil
}

// configOf returns the digests of the manifest and the config that CRI finds,
// whatever else may be wrong with the image (core/images/image.go of containerd,
// Manifest). It may return some where CRI finds none.
func configOf(ctx context.Context, blobs content.Provider, target ocispec.Descriptor) (manifest, config digest.Digest, err error) {
	next := entry{target.MediaType, target.Digest, nil}
	for {
		doc, err := readDocument(ctx, blobs, next.Digest)
		if err != nil {
			return "", "", err
		}
		// The media type of the target may be unknown.
		if images.IsManifestType(next.MediaType) || !images.IsIndexType(next.MediaType) && !doc.Manifests.any {
			if err := doc.Config.Digest.Validate(); err != nil {
				return "", "", fmt.Errorf("config of manifest %s: %w", next.Digest, err)
			}
			return next.Digest, doc.Config.Digest, nil
		}
		if doc.Manifests.best == nil {
			return "", "", fmt.Errorf("index %s: no manifest for %s: %w", next.Digest, platforms.DefaultString(), errdefs.ErrNotFound)
		}
		next = *doc.Manifests.best
	}
}

// document is what decides in a manifest or an index; all else takes no memory.
type document struct {
	Config    struct{ Digest digest.Digest }
	Manifests entries
}

// entries are the manifests of an index.
type entries struct {
	any  bool
	best *entry // that which CRI looks into; it looks at no other
}

type entry struct {
	MediaType string
	Digest    digest.Digest
	Platform  *ocispec.Platform
}

// UnmarshalJSON implements json.Unmarshaler. A list takes much more memory than its
// JSON, so that it is not kept.
func (e *entries) UnmarshalJSON(raw []byte) error {
	if e.any {
		return errUndecided
	}
	list := json.NewDecoder(bytes.NewReader(raw))
	if begin, err := list.Token(); err != nil || begin != json.Delim('[') {
		return err
	}
	here := platforms.Default()
	for list.More() {
		var next entry
		if err := list.Decode(&next); err != nil {
			return err
		}
		e.add(next, here)
	}
	return nil
}

func (e *entries) add(next entry, here platforms.MatchComparer) {
	e.any = true
	switch best := e.best; {
	case next.Platform != nil && !here.Match(*next.Platform):
	case best == nil, next.Platform != nil && (best.Platform == nil || here.Less(*next.Platform, *best.Platform)):
		e.best = &next
	}
}

func readDocument(ctx context.Context, blobs content.Provider, dgst digest.Digest) (doc document, err error) {
	// The size in a descriptor is nothing to containerd.
	ra, err := blobs.ReaderAt(ctx, ocispec.Descriptor{Digest: dgst})
	if err != nil {
		return doc, err
	}
	defer ra.Close()
	if ra.Size() > maxDocument {
		return doc, fmt.Errorf("blob %s of %d bytes: %w", dgst, ra.Size(), errUndecided)
	}
	text := make([]byte, ra.Size())
	if _, err := io.ReadFull(content.NewReader(ra), text); err != nil {
		return doc, fmt.Errorf("blob %s: %w", dgst, err)
	}
	err = json.Unmarshal(text, &doc)
	if errors.Is(err, errUndecided) {
		if len(text) > maxTwice {
			return doc, fmt.Errorf("blob %s: %w", dgst, err)
		}
		doc, err = mergeTwice(text)
	}
	if err != nil {
		return doc, fmt.Errorf("blob %s: %.300v: %w", dgst, err, errdefs.ErrInvalidArgument)
	}
	return doc, nil
}

// mergeTwice parses what has two lists as encoding/json does for CRI, which merges
// them.
func mergeTwice(text []byte) (doc document, err error) {
	var all struct {
		Config    struct{ Digest digest.Digest }
		Manifests []entry
	}
	if err := json.Unmarshal(text, &all); err != nil {
		return doc, err
	}
	doc.Config = all.Config
	here := platforms.Default()
	for _, next := range all.Manifests {
		doc.Manifests.add(next, here)
	}
	return doc, nil
}
