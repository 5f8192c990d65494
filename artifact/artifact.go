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
// and whether the layer's blob is there at all, is for package unpack, which also
// settles what only a blob's first bytes can tell. It neither pulls nor writes.
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
func IsImageConfig(mediaType string) bool { return imageConfigs[bareType(mediaType)] }

// Annotation keys of models packed before ModelPack moved to the CNCF.
const (
	legacyAnnotationFilepath     = "org.cnai.model.filepath"
	legacyAnnotationFileMetadata = "org.cnai.model.file.metadata+json"
)

// Annotation keys of ORAS (oras-go, content/file): it packs a directory as a tar, always
// compressed with gzip, under any media type that it is told. The digest is that of
// the tar.
const (
	annotationUnpack = "io.deis.oras.content.unpack"
	annotationDigest = "io.deis.oras.content.digest"
)

// Format is the form of a layer's content once it is decompressed.
type Format string

const (
	// FormatRaw is a single file: the blob is its content.
	FormatRaw Format = "raw"
	// FormatTar is a tar archive, unpacked at the root of the volume.
	FormatTar Format = "tar"
	// FormatTarOrRaw is a layer of an image's layer type that has a name. ORAS gives
	// this type to every file, so only the bytes tell: an archive is FormatTar,
	// anything else the file of that name. See [Layer.Settle].
	FormatTarOrRaw Format = "tar or raw"
	// FormatEmpty is the empty descriptor, which stands for nothing
	// (https://github.com/opencontainers/image-spec/blob/main/manifest.md#guidance-for-an-empty-descriptor).
	// Its blob need not be anywhere.
	FormatEmpty Format = "empty"
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
	Descriptor ocispec.Descriptor
	Format     Format
	// Compression is what the media type says, or by ORAS's annotation gzip. The
	// blob may be otherwise, see [Layer.Settle].
	Compression Compression
	// DiffID is the digest of the decompressed content, or "" if neither the config
	// nor ORAS's annotation names one. That of a raw layer is the blob's own digest.
	DiffID digest.Digest
	// File is set for FormatRaw, and for FormatTarOrRaw as it would be.
	File File

	unnamed error // why there can be no File for FormatTarOrRaw
}

// Wrap returns err with the layer it is about: index, media type, digest and,
// for a raw layer, path.
func (l Layer) Wrap(err error) error {
	if l.File.Path == "" {
		return fmt.Errorf("layer %d (%s, %s): %w", l.Index, l.Descriptor.MediaType, l.Descriptor.Digest, err)
	}
	return fmt.Errorf("layer %d (%s, %s, %q): %w", l.Index, l.Descriptor.MediaType, l.Descriptor.Digest, l.File.Path, err)
}

// Settle returns the layer as its blob was found to be: FormatRaw or FormatTar, and how
// that is compressed. It changes nothing of FormatRaw and FormatEmpty, for which the bytes
// do not matter. A file whose name is no path, or whose DiffID is not its digest, is
// errdefs.ErrInvalidArgument.
func (l Layer) Settle(f Format, c Compression) (Layer, error) {
	switch {
	case l.Format == FormatRaw, l.Format == FormatEmpty:
	case f == FormatTar:
		l.Format, l.Compression, l.File, l.unnamed = f, c, File{}, nil
	case l.unnamed != nil:
		return l, l.unnamed
	default:
		l.Format, l.Compression = f, CompressionNone
		return l, l.checkOwnDigest()
	}
	return l, nil
}

// Unlike says how a blob with this compression differs from what the media type says; ""
// if it does not, or the layer does not go by its media type.
func (l Layer) Unlike(c Compression) string {
	if l.Format == FormatRaw || l.unpacked() || l.Compression == c {
		return ""
	}
	says := func(c Compression) string { return cmp.Or(string(c), "not compressed") }
	return fmt.Sprintf("its media type says that it is %s, and its bytes are %s", says(l.Compression), says(c))
}

// WrongDiffID says that the content of the layer, whose blob has this compression, has the
// digest got and not the DiffID that is claimed.
func (l Layer) WrongDiffID(c Compression, got digest.Digest) string {
	text := fmt.Sprintf("its content has the digest %s, %s the DiffID %s", got, l.Claim(), l.DiffID)
	if unlike := l.Unlike(c); unlike != "" {
		text = unlike + ": " + text
	}
	return text
}

// unpacked reports whether ORAS says that the layer is an archive.
func (l Layer) unpacked() bool { return l.Descriptor.Annotations[annotationUnpack] == "true" }

// Claim says who names the DiffID, for errors: "the config lists", say.
func (l Layer) Claim() string {
	if l.unpacked() && l.Descriptor.Annotations[annotationDigest] == l.DiffID.String() {
		return "the annotation " + annotationDigest + " says"
	}
	return "the config lists"
}

// Artifact is what a manifest and its config say. Layers are in the manifest's
// order, all of them.
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
	if err := checkUnambiguous[document](doc.text); err != nil {
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

// chainIDPreimage matches the texts that the names of snapshots are digests of: a chain
// ID is the digest of the chain ID below, a space and a DiffID (OCI image-spec,
// config.md, "Layer ChainID"); see also [Artifact.SnapshotName].
var chainIDPreimage = regexp.MustCompile(`^(artifact )?(sha256|sha384|sha512):[0-9a-f]{64,128} (sha256|sha384|sha512):[0-9a-f]{64,128}$`)

// IsChainIDPreimage reports whether the layer's bytes are the preimage of a chain ID, so
// that its digest would collide with another snapshot's name. The media type does not
// matter, since no archive has such bytes. The blob is read only if its size is that of
// a preimage; the errors are those of [Read] for a manifest.
func IsChainIDPreimage(ctx context.Context, l Layer, blobs content.Provider) (bool, error) {
	const shortest, longest int64 = 2*71 + 1, 2*135 + 1 + 9 // two sha256, "artifact " and two sha512
	if l.Descriptor.Size < shortest || l.Descriptor.Size > longest {
		return false, nil
	}
	content, err := readBlob(ctx, blobs, l.Descriptor, "layer", longest)
	return chainIDPreimage.Match(content), err
}

// SnapshotName returns the name of the artifact's own snapshot. It is not the ChainID, which
// an image with the same layers has, and so has another artifact with the same bytes under
// other file names. No chain of layers has this name, see [IsChainIDPreimage].
func (a *Artifact) SnapshotName() digest.Digest {
	return digest.FromString("artifact " + a.ChainID().String() + " " + a.Manifest.Digest.String())
}

// NewLayer returns the layer that desc is by itself, as if it were that of an
// artifact whose config says nothing.
func NewLayer(desc ocispec.Descriptor) (Layer, error) {
	return newLayer(0, desc, config{created: unixEpoch})
}

// ChainID is the chain ID of the layers, as defined for images
// (https://github.com/opencontainers/image-spec/blob/main/config.md#layer-chainid).
// If nothing names the DiffID of an archive, which may be compressed whatever its type
// says, it is the digest of the manifest instead.
func (a *Artifact) ChainID() digest.Digest {
	ids := make([]digest.Digest, 0, len(a.Layers))
	for _, l := range a.Layers {
		id := l.DiffID
		if l.Format == FormatRaw || l.Format == FormatEmpty {
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
	// An annotation that is present but empty counts as absent.
	name := cmp.Or(
		desc.Annotations[modelspec.AnnotationFilepath],
		desc.Annotations[legacyAnnotationFilepath],
		desc.Annotations[ocispec.AnnotationTitle],
	)
	l.Format, l.Compression = t.format, t.compression
	switch {
	case name == "" && isEmpty(desc): // with a name it is a file, for `oras pull`, too
		l.Format = FormatEmpty
	case l.unpacked():
		l.Format, l.Compression = FormatTar, cmp.Or(t.compression, CompressionGzip)
	case name != "" && t.format == FormatTar && images.IsLayerType(bareType(desc.MediaType)):
		l.Format = FormatTarOrRaw
	}
	if l.Format == FormatRaw || l.Format == FormatTarOrRaw {
		err := l.File.set(cmp.Or(name, desc.Digest.Encoded()), desc.Annotations, cfg.created)
		if err != nil && l.Format == FormatRaw {
			return Layer{}, l.Wrap(err)
		}
		if err != nil {
			l.File, l.unnamed = File{}, err
		}
	}
	if err := l.setDiffID(cfg); err != nil {
		return Layer{}, l.Wrap(err)
	}
	return l, nil
}

// setDiffID takes the DiffID from the config or from ORAS's annotation, which may not
// contradict each other.
func (l *Layer) setDiffID(cfg config) error {
	if annotated := digest.Digest(l.Descriptor.Annotations[annotationDigest]); l.unpacked() && annotated != "" {
		if err := validDigest(annotated); err != nil {
			return fmt.Errorf("annotation %s: %w", annotationDigest, err)
		}
		l.DiffID = annotated
	}
	if len(cfg.diffIDs) != 0 {
		id := cfg.diffIDs[l.Index]
		if err := validDigest(id); err != nil {
			return fmt.Errorf("DiffID in the config: %w", err)
		}
		if l.DiffID != "" && l.DiffID != id {
			return fmt.Errorf("the config's DiffID is %s, but the annotation %s says %s: %w", id, annotationDigest, l.DiffID, errdefs.ErrInvalidArgument)
		}
		l.DiffID = id
	}
	if l.Format == FormatRaw || l.Format == FormatEmpty {
		return l.checkOwnDigest()
	}
	return nil
}

// checkOwnDigest checks the DiffID of a layer that is not compressed.
func (l *Layer) checkOwnDigest() error {
	if l.DiffID == "" || l.DiffID == l.Descriptor.Digest {
		return nil
	}
	return fmt.Errorf("the config's DiffID is %s, but the layer is a file, and not a compressed archive, and its digest is %s: %w", l.DiffID, l.Descriptor.Digest, errdefs.ErrInvalidArgument)
}

// isEmpty reports whether desc is the empty descriptor.
func isEmpty(desc ocispec.Descriptor) bool {
	empty := ocispec.DescriptorEmptyJSON
	return bareType(desc.MediaType) == empty.MediaType && desc.Size == empty.Size && desc.Digest == desc.Digest.Algorithm().FromBytes(empty.Data)
}

// legacy returns the name a ModelPack media type had before the specification
// moved to the CNCF.
func legacy(mediaType string) string {
	return strings.Replace(mediaType, "application/vnd.cncf.model.", "application/vnd.cnai.model.", 1)
}
