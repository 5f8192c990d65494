// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

// Package artifact reads what an OCI artifact consists of: given the descriptor of a
// manifest and a reader of blobs, it returns the list of the layers, each with its format,
// its compression and, if the layer is one file, the file's path and attributes.
//
// It knows ModelPack models
// (https://github.com/modelpack/model-spec/blob/main/docs/spec.md), also with the legacy
// media types of the time before the specification moved to the CNCF, and any other
// artifact that follows the guidance of the OCI image specification
// (https://github.com/opencontainers/image-spec/blob/main/artifacts-guidance.md).
//
// It alone decides what a manifest, an index or a config says. (Package store looks into blobs
// that arrive only to find what may be a manifest.) Package unpack reads layers, and settles what only their first bytes can tell.
//
// # Errors
//
// An image is [ErrNotArtifact]. A manifest or config that is not there is
// errdefs.ErrNotFound, one whose bytes do not match its digest errdefs.ErrDataLoss, and
// whatever breaks a rule errdefs.ErrInvalidArgument. An artifact is never read in part:
// one refused layer refuses the artifact. The limits are in limits.go.
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

// ErrNotArtifact is returned by [Read] for a container image: a manifest whose config is an
// OCI or Docker image config, whatever its layers are.
var ErrNotArtifact = errors.New("not an artifact but a container image")

// imageConfigs are the config types that make a manifest an image. Any other config type
// makes it an artifact, the OCI empty config included.
var imageConfigs = map[string]bool{
	ocispec.MediaTypeImageConfig:        true,
	images.MediaTypeDockerSchema2Config: true,
}

// IsImageConfig reports whether a config of that media type makes a manifest a container
// image and not an artifact.
func IsImageConfig(mediaType string) bool { return imageConfigs[bareType(mediaType)] }

// Annotation keys of models packed before ModelPack moved to the CNCF, as legacy as their
// media types.
const (
	legacyAnnotationFilepath     = "org.cnai.model.filepath"
	legacyAnnotationFileMetadata = "org.cnai.model.file.metadata+json"
)

// Annotation keys of ORAS (oras-go, content/file). It packs a directory as a tar, always
// compressed with gzip, under any media type that the user chooses. The digest is the
// tar's.
const (
	annotationUnpack = "io.deis.oras.content.unpack"
	annotationDigest = "io.deis.oras.content.digest"
)

// Format is the form of a layer's content, once decompressed.
type Format string

const (
	// FormatRaw is a single file: the blob is its content.
	FormatRaw Format = "raw"
	// FormatTar is a tar archive, unpacked at the root of the volume.
	FormatTar Format = "tar"
	// FormatTarOrRaw is a layer that has a name and an image's layer type. ORAS gives this
	// type to every file, so only the bytes tell: an archive is FormatTar, anything else
	// FormatRaw with that name. See [Layer.Settle].
	FormatTarOrRaw Format = "tar or raw"
	// FormatEmpty is the empty descriptor, which stands for no content
	// (https://github.com/opencontainers/image-spec/blob/main/manifest.md#guidance-for-an-empty-descriptor).
	// Its blob need not exist anywhere.
	FormatEmpty Format = "empty"
)

// Compression is the compression of a layer's blob.
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
	// Mode has permission bits only; setuid, setgid and sticky are cleared.
	Mode fs.FileMode
	// UID and GID are never 4294967295, which chown(2) takes for "leave unchanged".
	UID, GID uint32
	// ModTime is any time of the years 0 to 9999, which is more than UnixNano and some file
	// systems can hold.
	ModTime time.Time
}

// Layer is one layer of an artifact.
type Layer struct {
	// Index is the position in the manifest, from 0.
	Index int
	// Descriptor is as in the manifest. Its digest is valid and its size not negative.
	Descriptor ocispec.Descriptor
	Format     Format
	// Compression is what the media type says, or gzip if ORAS's annotation says that the
	// layer is a packed directory. The blob may differ, see [Layer.Settle].
	Compression Compression
	// DiffID is the digest of the decompressed content, "" if neither the config nor ORAS's
	// annotation names one. For a raw layer it is the blob's own digest.
	DiffID digest.Digest
	// File is set for FormatRaw, and for FormatTarOrRaw in case it is a file.
	File File

	unnamed error // why a FormatTarOrRaw cannot be a file
}

// Wrap adds to err which layer it is about: index, media type, digest and, for a raw layer,
// path.
func (l Layer) Wrap(err error) error {
	if l.File.Path == "" {
		return fmt.Errorf("layer %d (%s, %s): %w", l.Index, l.Descriptor.MediaType, l.Descriptor.Digest, err)
	}
	return fmt.Errorf("layer %d (%s, %s, %q): %w", l.Index, l.Descriptor.MediaType, l.Descriptor.Digest, l.File.Path, err)
}

// Settle returns the layer with the format and the compression that its blob was found to
// have: FormatRaw or FormatTar. A layer of FormatRaw or FormatEmpty does not change, since
// its bytes do not matter. A file whose name is not a valid path, or whose DiffID is not
// its digest, is errdefs.ErrInvalidArgument.
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

// Unlike says how a blob with the compression c contradicts the media type; "" if it does
// not, or if the media type does not decide.
func (l Layer) Unlike(c Compression) string {
	if l.Format == FormatRaw || l.unpacked() || l.Compression == c {
		return ""
	}
	says := func(c Compression) string { return cmp.Or(string(c), "not compressed") }
	return fmt.Sprintf("its media type says that it is %s, and its bytes are %s", says(l.Compression), says(c))
}

// WrongDiffID says that the content of the layer, whose blob has the compression c, has the
// digest got instead of the claimed DiffID.
func (l Layer) WrongDiffID(c Compression, got digest.Digest) string {
	text := fmt.Sprintf("its content has the digest %s, %s the DiffID %s", got, l.Claim(), l.DiffID)
	if unlike := l.Unlike(c); unlike != "" {
		text = unlike + ": " + text
	}
	return text
}

// unpacked reports whether ORAS's annotation says that the layer is a packed directory.
func (l Layer) unpacked() bool { return l.Descriptor.Annotations[annotationUnpack] == "true" }

// Claim says, for errors, who names the DiffID: "the config lists", for example.
func (l Layer) Claim() string {
	if l.unpacked() && l.Descriptor.Annotations[annotationDigest] == l.DiffID.String() {
		return "the annotation " + annotationDigest + " says"
	}
	return "the config lists"
}

// Artifact is what a manifest and its config say. Layers has all layers, in the manifest's
// order.
type Artifact struct {
	// Manifest has media type, digest and size of the manifest. It is not the target of
	// Read if that was an index.
	Manifest ocispec.Descriptor
	// Config is the digest of the config, by which CRI identifies an image.
	Config digest.Digest
	// Type is the manifest's artifactType, else its config's media type.
	Type string
	// Created is the creation time in the config, else the Unix epoch.
	Created time.Time
	Layers  []Layer
}

// Read returns the artifact that target, a manifest or an index, stands for. It needs only
// the digest of target. From an index it takes the manifest that matches this platform best
// or, if there is only one, that one.
//
// The errors are those of the package comment; errors about a layer come from [Layer.Wrap].
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

// NewLayer returns the layer that desc describes, without an artifact and its config.
func NewLayer(desc ocispec.Descriptor) (Layer, error) {
	return newLayer(0, desc, config{created: unixEpoch})
}

// ChainID returns the chain ID of the layers, as defined for images
// (https://github.com/opencontainers/image-spec/blob/main/config.md#layer-chainid). If an
// archive, which may be compressed whatever its type says, has no known DiffID, it returns
// the digest of the manifest instead.
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
	// Checked first, so that what Wrap prints is short and printable.
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
	// An annotation with an empty value counts as absent.
	name := cmp.Or(
		desc.Annotations[modelspec.AnnotationFilepath],
		desc.Annotations[legacyAnnotationFilepath],
		desc.Annotations[ocispec.AnnotationTitle],
	)
	l.Format, l.Compression = t.format, t.compression
	switch {
	case name == "" && isEmpty(desc): // with a name it is a file, as for `oras pull`
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

// setDiffID takes the DiffID from the config or from ORAS's annotation, which must not
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

// checkOwnDigest checks that the DiffID of a layer that is not compressed is the blob's own
// digest.
func (l *Layer) checkOwnDigest() error {
	if l.DiffID == "" || l.DiffID == l.Descriptor.Digest {
		return nil
	}
	return fmt.Errorf("the config's DiffID is %s, but the layer is a file that is not compressed, and its digest is %s: %w", l.DiffID, l.Descriptor.Digest, errdefs.ErrInvalidArgument)
}

// isEmpty reports whether desc is the empty descriptor.
func isEmpty(desc ocispec.Descriptor) bool {
	empty := ocispec.DescriptorEmptyJSON
	return bareType(desc.MediaType) == empty.MediaType && desc.Size == empty.Size && desc.Digest == desc.Digest.Algorithm().FromBytes(empty.Data)
}

// legacy returns the legacy name of a ModelPack media type, from before the specification
// moved to the CNCF.
func legacy(mediaType string) string {
	return strings.Replace(mediaType, "application/vnd.cncf.model.", "application/vnd.cnai.model.", 1)
}
