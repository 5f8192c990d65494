// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

// Package artifact says what an OCI artifact is made of: from the descriptor
// of a manifest and a reader of blobs to the list of its layers, each with its
// format, its compression and, where the layer is one file, the file's path
// and attributes.
//
// It knows ModelPack models
// (https://github.com/modelpack/model-spec/blob/main/docs/spec.md), also under
// the names they had before the specification moved to the CNCF, and any other
// artifact that follows the guidance of the OCI image specification
// (https://github.com/opencontainers/image-spec/blob/main/artifacts-guidance.md).
//
// It reads manifests and configs and nothing else: what is inside a layer,
// and whether the layer's blob is there at all, is for package unpack. It
// neither pulls nor writes.
//
// # Errors
//
// An image is [ErrNotArtifact]. A manifest or config that is not there is
// errdefs.ErrNotFound, one whose bytes do not match its digest
// errdefs.ErrDataLoss, and everything that is refused
// errdefs.ErrInvalidArgument. An artifact is never half-read: one refused
// layer refuses the artifact.
package artifact

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"regexp"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	modelspec "github.com/modelpack/model-spec/specs-go/v1"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// ErrNotArtifact is returned by [Read] for a container image: a manifest whose
// config is an OCI or Docker image config, whatever its layers are.
var ErrNotArtifact = errors.New("not an artifact but a container image")

// imageConfigs are the config types that make a manifest an image. Every other
// config type, the OCI empty config included, makes it an artifact.
var imageConfigs = map[string]bool{
	ocispec.MediaTypeImageConfig:        true,
	images.MediaTypeDockerSchema2Config: true,
}

// IsImageConfig reports whether a config of that media type makes a manifest a
// container image and no artifact.
func IsImageConfig(mediaType string) bool { return imageConfigs[mediaType] }

// Annotation keys of models packed before ModelPack moved to the CNCF.
const (
	legacyAnnotationFilepath     = "org.cnai.model.filepath"
	legacyAnnotationFileMetadata = "org.cnai.model.file.metadata+json"
)

// Format is the form of a layer's content once it is decompressed.
type Format string

const (
	// FormatRaw is a single file: the blob is its content.
	FormatRaw Format = "raw"
	// FormatTar is a tar archive, unpacked at the root of the volume.
	FormatTar Format = "tar"
)

// Compression is the compression of a layer's blob; none is "".
type Compression string

const (
	// CompressionNone means that the blob is the content.
	CompressionNone Compression = ""
	// CompressionGzip is RFC 1952.
	CompressionGzip Compression = "gzip"
	// CompressionZstd is RFC 8878.
	CompressionZstd Compression = "zstd"
)

// File is the one file of a raw layer.
type File struct {
	// Path is relative to the volume and has passed [CleanPath].
	Path string
	// Mode has permission bits only: setuid, setgid and sticky are cleared.
	Mode fs.FileMode
	// UID and GID are never 4294967295, which chown(2) takes for "unchanged".
	UID, GID uint32
	// ModTime may be any time of the years 0 to 9999: more than UnixNano or
	// some file systems can hold.
	ModTime time.Time
}

// Layer is one layer of an artifact.
type Layer struct {
	// Index is the layer's place in the manifest, from 0.
	Index int
	// Descriptor is the manifest's; its digest is valid and its size not negative.
	Descriptor  ocispec.Descriptor
	Format      Format
	Compression Compression
	// DiffID is the digest of the decompressed content, or "" if the config
	// names none. That of an uncompressed layer is the blob's own digest.
	DiffID digest.Digest
	// File is set for FormatRaw only.
	File File
}

// Wrap returns err with the layer it is about: index, media type, digest and,
// for a raw layer, path.
func (l Layer) Wrap(err error) error {
	if l.File.Path == "" {
		return fmt.Errorf("layer %d (%s, %s): %w", l.Index, l.Descriptor.MediaType, l.Descriptor.Digest, err)
	}
	return fmt.Errorf("layer %d (%s, %s, %q): %w", l.Index, l.Descriptor.MediaType, l.Descriptor.Digest, l.File.Path, err)
}

// Artifact is what a manifest and its config say. Layers are in the manifest's
// order, all of them: where two name the same path, the later one wins.
type Artifact struct {
	// Manifest has the media type, digest and size of the artifact's manifest,
	// which is not the target of Read if that was an index.
	Manifest ocispec.Descriptor
	// Config is the digest of its config. CRI runtimes take it for the identity
	// of an image.
	Config digest.Digest
	// Type is the manifest's artifactType, else its config's media type.
	Type string
	// Created is the creation time the config names, else the Unix unixEpoch.
	Created time.Time
	Layers  []Layer
}

// Read returns the artifact that target, a manifest or an index, stands for.
// Of target only the digest is needed. An index is resolved as by [Resolve].
//
// Errors are those of the package comment; errors about a layer come from
// [Layer.Wrap].
func Read(ctx context.Context, blobs content.Provider, target ocispec.Descriptor) (*Artifact, error) {
	desc, doc, err := resolve(ctx, blobs, target)
	if err != nil {
		return nil, err
	}
	a, err := read(ctx, blobs, desc, doc)
	if err != nil {
		return nil, fmt.Errorf("manifest %s: %w", desc.Digest, err)
	}
	return a, nil
}

func read(ctx context.Context, blobs content.Provider, desc ocispec.Descriptor, doc document) (*Artifact, error) {
	configType := bareType(doc.Config.MediaType)
	if imageConfigs[configType] {
		return nil, fmt.Errorf("config type %s: %w", configType, ErrNotArtifact)
	}
	if err := checkUnambiguous(doc.text); err != nil {
		return nil, fmt.Errorf("malformed JSON: %v: %w", err, errdefs.ErrInvalidArgument)
	}
	if len(doc.Layers) == 0 {
		return nil, fmt.Errorf("the artifact has no layers: %w", errdefs.ErrInvalidArgument)
	}
	raw, err := readBlob(ctx, blobs, doc.Config, "config", maxConfigSize)
	if err != nil {
		return nil, err
	}
	cfg, err := parseConfig(configType, raw)
	if err != nil {
		return nil, fmt.Errorf("config %s: %w", doc.Config.Digest, err)
	}
	if n := len(cfg.diffIDs); n != 0 && n != len(doc.Layers) {
		return nil, fmt.Errorf("config %s lists %d DiffIDs for %d layers: %w", doc.Config.Digest, n, len(doc.Layers), errdefs.ErrInvalidArgument)
	}

	a := &Artifact{
		Manifest: desc,
		Config:   doc.Config.Digest,
		Type:     cmp.Or(doc.ArtifactType, doc.Config.MediaType),
		Created:  cfg.created,
		Layers:   make([]Layer, 0, len(doc.Layers)),
	}
	for i, d := range doc.Layers {
		l, err := newLayer(i, d, cfg)
		if err != nil {
			return nil, err
		}
		a.Layers = append(a.Layers, l)
	}
	return a, nil
}

// namesAChain matches what the names of snapshots are digests of: a chain ID is that
// of the chain below and a DiffID, with a space between.
var namesAChain = regexp.MustCompile(`^(artifact )?(sha256|sha384|sha512):[0-9a-f]{64,128} (sha256|sha384|sha512):[0-9a-f]{64,128}$`)

// NamesAChain reports whether the content of a raw layer has a chain ID of somebody
// else's for its digest: the layer by itself would have the name of that chain's
// snapshot. Open is asked only for contents of a size that such a one has.
func NamesAChain(l Layer, open func(ocispec.Descriptor) ([]byte, error)) (bool, error) {
	const shortest, longest int64 = 2*71 + 1, 2*135 + 1 + 9
	if l.Format != FormatRaw || l.Descriptor.Size < shortest || l.Descriptor.Size > longest {
		return false, nil
	}
	content, err := open(l.Descriptor)
	return namesAChain.Match(content), err
}

// OtherName is the name of the snapshot of an artifact whose ChainID is, or may be,
// that of something else's. No chain of layers has it, see [NamesAChain].
func (a *Artifact) OtherName() digest.Digest {
	return digest.FromString("artifact " + a.ChainID().String() + " " + a.Manifest.Digest.String())
}

// NewLayer returns the layer that desc is by itself, as if it were that of an
// artifact whose config says nothing.
func NewLayer(desc ocispec.Descriptor) (Layer, error) {
	return newLayer(0, desc, config{created: unixEpoch})
}

// ChainID is the chain ID of the layers, as defined for images
// (https://github.com/opencontainers/image-spec/blob/main/config.md#layer-chainid).
// If the config does not name the DiffID of a compressed layer, it is the digest
// of the manifest instead.
func (a *Artifact) ChainID() digest.Digest {
	ids := make([]digest.Digest, 0, len(a.Layers))
	for _, l := range a.Layers {
		id := l.DiffID
		if l.Compression == CompressionNone {
			id = l.Descriptor.Digest
		}
		if id == "" {
			return a.Manifest.Digest
		}
		ids = append(ids, id)
	}
	return identity.ChainID(ids)
}

func newLayer(index int, desc ocispec.Descriptor, cfg config) (Layer, error) {
	// What Wrap prints must be known to be short and printable.
	if !validType(desc.MediaType) {
		return Layer{}, fmt.Errorf("layer %d: %.255q is not a media type: %w", index, desc.MediaType, errdefs.ErrInvalidArgument)
	}
	if err := validDigest(desc.Digest); err != nil {
		return Layer{}, fmt.Errorf("layer %d (%s): %w", index, desc.MediaType, err)
	}

	l := Layer{Index: index, Descriptor: desc}
	if desc.Size < 0 {
		return Layer{}, l.Wrap(fmt.Errorf("negative size %d: %w", desc.Size, errdefs.ErrInvalidArgument))
	}
	t := typeOf(desc.MediaType)
	if t.refused != "" {
		return Layer{}, l.Wrap(fmt.Errorf("%s: %w", t.refused, errdefs.ErrInvalidArgument))
	}
	l.Format, l.Compression = t.format, t.compression

	if l.Format == FormatRaw {
		// An annotation that is present but empty counts as absent.
		path, err := CleanPath(cmp.Or(
			desc.Annotations[modelspec.AnnotationFilepath],
			desc.Annotations[ocispec.AnnotationTitle],
			desc.Annotations[legacyAnnotationFilepath],
			desc.Digest.Encoded(),
		))
		if err != nil {
			return Layer{}, l.Wrap(err)
		}
		l.File.Path = path
		if err := l.File.setAttributes(desc.Annotations, cfg.created); err != nil {
			return Layer{}, l.Wrap(err)
		}
	}

	if len(cfg.diffIDs) != 0 {
		l.DiffID = cfg.diffIDs[index]
		if err := validDigest(l.DiffID); err != nil {
			return Layer{}, l.Wrap(fmt.Errorf("DiffID in the config: %w", err))
		}
		if l.Compression == CompressionNone && l.DiffID != desc.Digest {
			return Layer{}, l.Wrap(fmt.Errorf("the config's DiffID is %s, but the layer is not compressed and its digest is %s: %w", l.DiffID, desc.Digest, errdefs.ErrInvalidArgument))
		}
	}
	return l, nil
}

// legacy returns the name a ModelPack media type had before the specification
// moved to the CNCF.
func legacy(mediaType string) string {
	return strings.Replace(mediaType, "application/vnd.cncf.model.", "application/vnd.cnai.model.", 1)
}
