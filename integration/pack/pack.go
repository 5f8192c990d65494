// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

// Package pack builds model artifacts and container images for tests, the demo and
// benchmarks: Model packs a directory, Artifact any layers, even hostile ones. It pushes
// them to a registry or writes them into a blob directory. It validates nothing, because
// that is the task of the code under test.
package pack

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	modelspec "github.com/modelpack/model-spec/specs-go/v1"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Created is the creation time in the config of every model.
var Created = time.Date(2024, time.February, 3, 4, 5, 6, 0, time.UTC)

// Layer is a layer of an Artifact. Its blob is the file at Path, or Data if Path is "".
type Layer struct {
	MediaType   string
	Data        []byte
	Path        string
	Annotations map[string]string

	// DiffID goes into the model config; "" means the blob's own digest.
	DiffID digest.Digest

	// Digest and Size override the descriptor's true values. A layer with a Digest and
	// neither Data nor Path has no blob.
	Digest digest.Digest
	Size   int64
}

// Artifact is one manifest with its config and layers.
type Artifact struct {
	ArtifactType string
	ConfigType   string // "" means ModelPack's
	Config       []byte // nil means a config with the layers' DiffIDs, or {} for the empty type
	Name         string // in the model config; "" means "tiny"
	Layers       []Layer
	Annotations  map[string]string
}

// blob is a descriptor with its bytes.
type blob struct {
	ocispec.Descriptor
	data   []byte
	path   string
	absent bool
}

func (b blob) open() (io.ReadCloser, error) {
	if b.path != "" {
		return os.Open(b.path)
	}
	return io.NopCloser(bytes.NewReader(b.data)), nil
}

func bytesBlob(mediaType string, data []byte) blob {
	return blob{
		Descriptor: ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))},
		data:       data,
	}
}

func (l Layer) blob() (blob, error) {
	b := bytesBlob(l.MediaType, l.Data)
	b.Annotations = l.Annotations
	b.absent = l.Digest != "" && l.Data == nil && l.Path == ""
	if l.Path != "" {
		b.path = l.Path
		f, err := os.Open(l.Path)
		if err != nil {
			return blob{}, err
		}
		defer f.Close()
		if b.Digest, err = digest.FromReader(f); err != nil {
			return blob{}, err
		}
		info, err := f.Stat()
		if err != nil {
			return blob{}, err
		}
		b.Size = info.Size()
	}
	if l.Digest != "" {
		b.Digest = l.Digest
	}
	if l.Size != 0 {
		b.Size = l.Size
	}
	return b, nil
}

// blobs returns the layers, the config and, last, the manifest.
func (a *Artifact) blobs() ([]blob, error) {
	var all []blob
	var descriptors []ocispec.Descriptor
	var diffIDs []digest.Digest
	for i, layer := range a.Layers {
		b, err := layer.blob()
		if err != nil {
			return nil, fmt.Errorf("layer %d: %w", i, err)
		}
		all = append(all, b)
		descriptors = append(descriptors, b.Descriptor)
		if layer.DiffID == "" {
			layer.DiffID = b.Digest
		}
		diffIDs = append(diffIDs, layer.DiffID)
	}
	config, err := a.config(diffIDs)
	if err != nil {
		return nil, fmt.Errorf("config: %w", err)
	}
	manifest, err := json.Marshal(ocispec.Manifest{
		Versioned:    specs.Versioned{SchemaVersion: 2},
		MediaType:    ocispec.MediaTypeImageManifest,
		ArtifactType: a.ArtifactType,
		Config:       config.Descriptor,
		Layers:       descriptors,
		Annotations:  a.Annotations,
	})
	if err != nil {
		return nil, fmt.Errorf("manifest: %w", err)
	}
	top := bytesBlob(ocispec.MediaTypeImageManifest, manifest)
	top.ArtifactType = a.ArtifactType
	return append(all, config, top), nil
}

func (a *Artifact) config(diffIDs []digest.Digest) (blob, error) {
	mediaType, data := a.ConfigType, a.Config
	if mediaType == "" {
		mediaType = modelspec.MediaTypeModelConfig
	}
	var err error
	switch {
	case data != nil:
	case mediaType == modelspec.MediaTypeModelConfig || mediaType == legacyConfigType:
		data, err = json.Marshal(modelspec.Model{
			Descriptor: modelspec.ModelDescriptor{Name: cmp.Or(a.Name, "tiny"), CreatedAt: &Created},
			ModelFS:    modelspec.ModelFS{Type: "layers", DiffIDs: diffIDs},
		})
	case mediaType == DockerConfigType:
		data, err = json.Marshal(map[string]any{
			"config":     map[string]string{"format": "gguf"},
			"descriptor": map[string]time.Time{"createdAt": Created},
			"rootfs":     map[string]any{"type": "rootfs", "diff_ids": diffIDs},
		})
	case mediaType == ocispec.MediaTypeEmptyJSON:
		data = ocispec.DescriptorEmptyJSON.Data
	default:
		err = errors.New("there is no default config of type " + mediaType)
	}
	return bytesBlob(mediaType, data), err
}

// File returns an artifact whose only layer is a file with that path and content.
func File(path, content string) *Artifact {
	return &Artifact{Layers: []Layer{{
		MediaType: "application/vnd.cncf.model.weight.v1.raw", Data: []byte(content),
		Annotations: map[string]string{"org.cncf.model.filepath": path},
	}}}
}

// WriteTo writes the blobs to dir/blobs/<algorithm>/<hex> with mode 0444, like containerd's
// content store. It returns the manifest's descriptor.
func (a *Artifact) WriteTo(dir string) (ocispec.Descriptor, error) {
	blobs, err := a.blobs()
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	return writeBlobs(dir, blobs)
}

// writeBlobs writes the blobs and returns the descriptor of the last one.
func writeBlobs(dir string, blobs []blob) (ocispec.Descriptor, error) {
	for _, b := range blobs {
		if b.absent {
			continue
		}
		if err := writeBlob(filepath.Join(dir, "blobs", b.Digest.Algorithm().String(), b.Digest.Encoded()), b); err != nil {
			return ocispec.Descriptor{}, fmt.Errorf("write blob %s: %w", b.Digest, err)
		}
	}
	return blobs[len(blobs)-1].Descriptor, nil
}

func writeBlob(path string, b blob) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	in, err := b.open()
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o444)
	if errors.Is(err, os.ErrExist) {
		return nil
	}
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Chmod(0o444), out.Close())
}

// Index is an image index.
type Index struct {
	ArtifactType string
	Manifests    []IndexEntry
}

// IndexEntry is an artifact in an index, for a platform or for none.
type IndexEntry struct {
	*Artifact
	Platform *ocispec.Platform
}

// blobs returns the blobs of every artifact and, last, the index.
func (x *Index) blobs() ([]blob, error) {
	index := ocispec.Index{
		Versioned:    specs.Versioned{SchemaVersion: 2},
		MediaType:    ocispec.MediaTypeImageIndex,
		ArtifactType: x.ArtifactType,
		Manifests:    []ocispec.Descriptor{},
	}
	var all []blob
	for i, entry := range x.Manifests {
		blobs, err := entry.blobs()
		if err != nil {
			return nil, fmt.Errorf("manifest %d: %w", i, err)
		}
		manifest := blobs[len(blobs)-1].Descriptor
		manifest.Platform = entry.Platform
		index.Manifests = append(index.Manifests, manifest)
		all = append(all, blobs...)
	}
	data, err := json.Marshal(index)
	if err != nil {
		return nil, err
	}
	return append(all, bytesBlob(ocispec.MediaTypeImageIndex, data)), nil
}

// WriteTo writes the blobs as [Artifact.WriteTo] does and returns the index's
// descriptor.
func (x *Index) WriteTo(dir string) (ocispec.Descriptor, error) {
	blobs, err := x.blobs()
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	return writeBlobs(dir, blobs)
}
