// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package artifact

import (
	"context"
	_ "crypto/sha256" // for go-digest, which computes only what is linked in
	_ "crypto/sha512"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// document has the fields of a manifest or an index that this package needs, see
// https://github.com/opencontainers/image-spec/blob/main/manifest.md and
// https://github.com/opencontainers/image-spec/blob/main/image-index.md.
type document struct {
	MediaType    string               `json:"mediaType"`
	ArtifactType string               `json:"artifactType"`
	Config       ocispec.Descriptor   `json:"config"`
	Layers       []ocispec.Descriptor `json:"layers"`
	Manifests    []ocispec.Descriptor `json:"manifests"`

	text []byte // the whole JSON
}

// AnnotatedTime returns the creation time in the annotations of a manifest
// (org.opencontainers.image.created), or zero. Files do not get it: [Artifact.Created] is
// theirs. No artifact is refused for its annotations.
func AnnotatedTime(ctx context.Context, blobs content.Provider, manifest ocispec.Descriptor) time.Time {
	text, err := readBlob(ctx, blobs, manifest, "manifest", maxManifestSize)
	if err != nil {
		return time.Time{}
	}
	var of struct {
		Annotations map[string]json.RawMessage `json:"annotations"`
	}
	var created time.Time
	if json.Unmarshal(text, &of) != nil || json.Unmarshal(of.Annotations[ocispec.AnnotationCreated], &created) != nil {
		return time.Time{}
	}
	return created.UTC()
}

// resolve returns the manifest that target stands for: its descriptor (media type, digest
// and size) and its content. A manifest stands for itself; an index for the manifest that
// matches this platform best, or for its only manifest, whatever the platform is, since
// most artifacts do not depend on one. resolve does not decide whether the manifest is an
// artifact.
func resolve(ctx context.Context, blobs content.Provider, target ocispec.Descriptor) (ocispec.Descriptor, document, error) {
	for range maxIndexDepth + 1 {
		raw, err := readBlob(ctx, blobs, target, "manifest", maxManifestSize)
		if err != nil {
			return ocispec.Descriptor{}, document{}, err
		}
		doc, err := parseDocument(raw)
		if err != nil {
			return ocispec.Descriptor{}, document{}, fmt.Errorf("manifest %s: %w", target.Digest, err)
		}
		if images.IsManifestType(doc.MediaType) {
			return ocispec.Descriptor{MediaType: doc.MediaType, Digest: target.Digest, Size: int64(len(raw))}, doc, nil
		}
		next, err := choose(doc.Manifests)
		if err != nil {
			return ocispec.Descriptor{}, document{}, fmt.Errorf("index %s: %w", target.Digest, err)
		}
		target = next
	}
	return ocispec.Descriptor{}, document{}, fmt.Errorf("index %s: indexes are nested more than %d deep: %w", target.Digest, maxIndexDepth, errdefs.ErrInvalidArgument)
}

// parseDocument parses a manifest or an index. The media type of the result is one that
// images.IsManifestType or images.IsIndexType accepts.
func parseDocument(raw []byte) (document, error) {
	// Counted before they are parsed, see minDescriptor.
	var parts struct {
		Layers    []json.RawMessage `json:"layers"`
		Manifests []json.RawMessage `json:"manifests"`
	}
	if err := json.Unmarshal(raw, &parts); err != nil {
		return document{}, fmt.Errorf("malformed JSON: %.300v: %w", err, errdefs.ErrInvalidArgument)
	}
	if n := len(parts.Layers) + len(parts.Manifests); n > len(raw)/minDescriptor {
		return document{}, fmt.Errorf("%d descriptors in %d bytes cannot have digests: %w", n, len(raw), errdefs.ErrInvalidArgument)
	}
	doc := document{text: raw}
	if err := json.Unmarshal(raw, &doc); err != nil {
		return document{}, fmt.Errorf("malformed JSON: %.300v: %w", err, errdefs.ErrInvalidArgument)
	}
	// A document that is a manifest to one reader and an index to another could be checked
	// as the one and used as the other (CVE-2021-41190).
	if doc.Layers != nil && doc.Manifests != nil {
		return document{}, fmt.Errorf("both layers and manifests are present: neither a manifest nor an index: %w", errdefs.ErrInvalidArgument)
	}
	doc.MediaType = bareType(doc.MediaType)
	switch {
	case images.IsManifestType(doc.MediaType) && doc.Manifests == nil:
	case images.IsIndexType(doc.MediaType) && doc.Layers == nil:
	case images.IsManifestType(doc.MediaType) || images.IsIndexType(doc.MediaType):
		return document{}, fmt.Errorf("the content does not match the media type %s: %w", doc.MediaType, errdefs.ErrInvalidArgument)
	case doc.MediaType != "":
		return document{}, fmt.Errorf("%.255q is not the media type of a manifest or an index: %w", doc.MediaType, errdefs.ErrInvalidArgument)
	case doc.Layers != nil: // OCI image-spec 1.0 leaves mediaType optional
		doc.MediaType = ocispec.MediaTypeImageManifest
	case doc.Manifests != nil:
		doc.MediaType = ocispec.MediaTypeImageIndex
	default:
		return document{}, fmt.Errorf("neither mediaType nor layers nor manifests are present: not a manifest: %w", errdefs.ErrInvalidArgument)
	}
	return doc, nil
}

// choose returns the manifest of an index that is for this node.
func choose(manifests []ocispec.Descriptor) (ocispec.Descriptor, error) {
	var (
		matcher = platforms.Default()
		best    *ocispec.Descriptor
		only    *ocispec.Descriptor
		offered []string
	)
	for i := range manifests {
		m := &manifests[i]
		if m.Platform == nil {
			offered = append(offered, "none")
			only = m
			continue
		}
		// This platform marks attestations: BuildKit,
		// docs/attestations/attestation-storage.md.
		if m.Platform.OS == "unknown" && m.Platform.Architecture == "unknown" {
			continue
		}
		offered = append(offered, platforms.FormatAll(*m.Platform))
		only = m
		if matcher.Match(*m.Platform) && (best == nil || matcher.Less(*m.Platform, *best.Platform)) {
			best = m
		}
	}
	switch {
	case best != nil:
		return *best, nil
	case len(offered) == 1:
		return *only, nil
	case len(offered) == 0:
		return ocispec.Descriptor{}, fmt.Errorf("lists no manifest: %w", errdefs.ErrInvalidArgument)
	}
	return ocispec.Descriptor{}, fmt.Errorf("no manifest for %s among %d for the platforms %.1000q: %w",
		platforms.DefaultString(), len(offered), strings.Join(offered, ", "), errdefs.ErrInvalidArgument)
}

// readBlob returns the content, verified by its digest, of a blob of at most limit bytes.
// what says in errors what the blob is.
func readBlob(ctx context.Context, blobs content.Provider, desc ocispec.Descriptor, what string, limit int64) ([]byte, error) {
	b, err := readUnverified(ctx, blobs, desc, what, limit)
	if err != nil {
		return nil, err
	}
	if actual := desc.Digest.Algorithm().FromBytes(b); actual != desc.Digest {
		return nil, fmt.Errorf("%s %s: the blob on this node is corrupt: its digest is %s; delete the image and pull it again: %w", what, desc.Digest, actual, errdefs.ErrDataLoss)
	}
	return b, nil
}

// readUnverified is readBlob without a comparison of the content with its digest.
func readUnverified(ctx context.Context, blobs content.Provider, desc ocispec.Descriptor, what string, limit int64) ([]byte, error) {
	if err := validDigest(desc.Digest); err != nil {
		return nil, fmt.Errorf("%s: %w", what, err)
	}
	ra, err := blobs.ReaderAt(ctx, desc)
	if errdefs.IsNotFound(err) {
		return nil, fmt.Errorf("%s %s is not on this node; %s: %w", what, desc.Digest, Refetch(desc), err)
	}
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w", what, desc.Digest, err)
	}
	defer ra.Close()

	if ra.Size() > limit {
		return nil, fmt.Errorf("%s %s has %d bytes, over the limit of %d: %w", what, desc.Digest, ra.Size(), limit, ErrTooLarge)
	}
	b := make([]byte, ra.Size())
	if _, err := io.ReadFull(content.NewReader(ra), b); err != nil {
		return nil, fmt.Errorf("read %s %s: %w", what, desc.Digest, err)
	}
	return b, nil
}

// validDigest refuses a digest that is not well-formed, or whose algorithm the OCI image
// specification and containerd's content store do not know.
func validDigest(d digest.Digest) error {
	err := d.Validate()
	if err == nil {
		switch d.Algorithm() {
		case digest.SHA256, digest.SHA384, digest.SHA512:
			return nil
		}
		err = digest.ErrDigestUnsupported
	}
	if errors.Is(err, digest.ErrDigestUnsupported) {
		err = errors.New("unsupported algorithm, not sha256, sha384 or sha512")
	}
	return fmt.Errorf("digest %.255q: %v: %w", d, err, errdefs.ErrInvalidArgument)
}
