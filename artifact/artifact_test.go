// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package artifact

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	modelspec "github.com/modelpack/model-spec/specs-go/v1"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// blobs is a content.Provider in memory.
type blobs map[digest.Digest][]byte

func (b blobs) ReaderAt(_ context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	data, ok := b[desc.Digest]
	if !ok {
		return nil, fmt.Errorf("blob %s: %w", desc.Digest, errdefs.ErrNotFound)
	}
	return blob{bytes.NewReader(data)}, nil
}

type blob struct{ *bytes.Reader }

func (blob) Close() error { return nil }

// add stores data and returns its descriptor.
func (b blobs) add(mediaType string, data []byte) ocispec.Descriptor {
	desc := describe(mediaType, data)
	b[desc.Digest] = data
	return desc
}

// addJSON stores v, a string as it is, anything else as JSON.
func (b blobs) addJSON(t testing.TB, mediaType string, v any) ocispec.Descriptor {
	t.Helper()
	if s, ok := v.(string); ok {
		return b.add(mediaType, []byte(s))
	}
	data, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return b.add(mediaType, data)
}

// addManifest stores a config and a manifest over layers, and returns the
// manifest's digest alone: all that Read may need.
func (b blobs) addManifest(t testing.TB, configType string, config any, layers ...ocispec.Descriptor) ocispec.Descriptor {
	t.Helper()
	m := ocispec.Manifest{
		MediaType: ocispec.MediaTypeImageManifest,
		Config:    b.addJSON(t, configType, config),
		Layers:    layers,
	}
	return ocispec.Descriptor{Digest: b.addJSON(t, m.MediaType, m).Digest}
}

func describe(mediaType string, data []byte) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
}

// layer is a layer descriptor; annotations are keys and values in turn.
func layer(mediaType, data string, annotations ...string) ocispec.Descriptor {
	desc := describe(mediaType, []byte(data))
	for i := 0; i < len(annotations); i += 2 {
		if desc.Annotations == nil {
			desc.Annotations = map[string]string{}
		}
		desc.Annotations[annotations[i]] = annotations[i+1]
	}
	return desc
}

// wantError fails unless err is of the kind and has each of the texts.
func wantError(t *testing.T, err, kind error, texts ...string) {
	t.Helper()
	if !errors.Is(err, kind) {
		t.Fatalf("error %v, want one that is %q", err, kind)
	}
	for _, text := range texts {
		if !strings.Contains(err.Error(), text) {
			t.Errorf("error %q does not say %q", err, text)
		}
	}
	if len(err.Error()) > 8192 {
		t.Errorf("error of %d bytes", len(err.Error()))
	}
}

var (
	epoch   = time.Unix(0, 0).UTC()
	created = time.Date(2025, 3, 4, 5, 6, 7, 0, time.UTC)
)

const (
	anyConfig  = "application/vnd.example.config.v1+json"
	modelTitle = `{"descriptor":{"name":"tiny"}}`
)

func TestReadModelPackModel(t *testing.T) {
	b := blobs{}
	weights := layer(modelspec.MediaTypeModelWeightRaw, "weights",
		modelspec.AnnotationFilepath, "./deep/model weights ü.safetensors",
		modelspec.AnnotationFileMetadata, `{"name":"x","mode":33216,"uid":1000,"gid":100,"size":7,"mtime":"2021-02-03T04:05:06.789Z","typeflag":0}`)
	docs := layer(modelspec.MediaTypeModelDocGzip, "docs", modelspec.AnnotationFilepath, "README.md")
	again := layer(modelspec.MediaTypeModelCodeRaw, "weights", modelspec.AnnotationFilepath, "copy")
	docsDiffID := digest.FromString("docs, decompressed")
	cfg := modelspec.Model{
		Descriptor: modelspec.ModelDescriptor{CreatedAt: &created},
		ModelFS:    modelspec.ModelFS{Type: "layers", DiffIDs: []digest.Digest{weights.Digest, docsDiffID, again.Digest}},
	}
	configDesc := b.addJSON(t, modelspec.MediaTypeModelConfig, cfg)
	manifest := b.addJSON(t, ocispec.MediaTypeImageManifest, ocispec.Manifest{
		MediaType:    ocispec.MediaTypeImageManifest,
		ArtifactType: modelspec.ArtifactTypeModelManifest,
		Config:       configDesc,
		Layers:       []ocispec.Descriptor{weights, docs, again},
	})

	got, err := Read(t.Context(), b, ocispec.Descriptor{Digest: manifest.Digest})
	if err != nil {
		t.Fatal(err)
	}
	want := &Artifact{
		Manifest: manifest,
		Config:   configDesc.Digest,
		Type:     modelspec.ArtifactTypeModelManifest,
		Created:  created,
		Layers: []Layer{
			{
				Index: 0, Descriptor: weights, Format: FormatRaw, DiffID: weights.Digest,
				File: File{
					Path: "deep/model weights ü.safetensors", Mode: 0o700, UID: 1000, GID: 100,
					ModTime: time.Date(2021, 2, 3, 4, 5, 6, 789e6, time.UTC),
				},
			},
			{Index: 1, Descriptor: docs, Format: FormatTar, Compression: CompressionGzip, DiffID: docsDiffID},
			{
				Index: 2, Descriptor: again, Format: FormatRaw, DiffID: again.Digest,
				File: File{Path: "copy", Mode: 0o644, ModTime: created},
			},
		},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got\n%+v\nwant\n%+v", got, want)
	}
	if chain := digest.FromString(digest.FromString(weights.Digest.String()+" "+docsDiffID.String()).String() + " " + again.Digest.String()); got.ChainID() != chain {
		t.Errorf("the chain ID is %s, want %s", got.ChainID(), chain)
	}
	got.Layers[1].DiffID = "" // as if the config did not name any
	if got.ChainID() != manifest.Digest {
		t.Errorf("without DiffIDs the chain ID is %s, want %s", got.ChainID(), manifest.Digest)
	}
	if l, err := NewLayer(weights); err != nil || l.File != want.Layers[0].File || l.DiffID != "" {
		t.Errorf("the layer by itself is %+v, %v", l, err)
	}
}

func TestTypeIsArtifactTypeElseConfigType(t *testing.T) {
	b := blobs{}
	m := ocispec.Manifest{
		MediaType: ocispec.MediaTypeImageManifest,
		Config:    b.add(ocispec.MediaTypeEmptyJSON, []byte("{}")),
		Layers:    []ocispec.Descriptor{layer("text/plain", "x")},
	}
	for artifactType, want := range map[string]string{
		"application/vnd.example": "application/vnd.example",
		"":                        ocispec.MediaTypeEmptyJSON,
	} {
		m.ArtifactType = artifactType
		a, err := Read(t.Context(), b, b.addJSON(t, m.MediaType, m))
		if err != nil {
			t.Fatal(err)
		}
		if a.Type != want {
			t.Errorf("artifactType %q: type %q, want %q", artifactType, a.Type, want)
		}
	}
}

func TestConfigTypeTellsImagesFromArtifacts(t *testing.T) {
	for _, test := range []struct {
		configType string
		image      bool
	}{
		{ocispec.MediaTypeImageConfig, true},
		{"Application/vnd.OCI.image.config.v1+json; charset=utf-8", true},
		{images.MediaTypeDockerSchema2Config, true},
		{ocispec.MediaTypeEmptyJSON, false},
		{modelspec.MediaTypeModelConfig, false},
		{"application/vnd.cnai.model.config.v1+json", false},
		{"application/vnd.docker.ai.model.config.v0.1+json", false},
		{anyConfig, false},
	} {
		for _, layerType := range []string{ocispec.MediaTypeImageLayerGzip, "application/vnd.example.unknown"} {
			b := blobs{}
			_, err := Read(t.Context(), b, b.addManifest(t, test.configType, "{}", layer(layerType, "x")))
			if got := errors.Is(err, ErrNotArtifact); got != test.image {
				t.Errorf("config %s, layer %s: not an artifact = %v (%v), want %v", test.configType, layerType, got, err, test.image)
			}
			if !test.image && err != nil {
				t.Errorf("config %s, layer %s: %v", test.configType, layerType, err)
			}
		}
	}
	t.Run("image without layers or config blob", func(t *testing.T) {
		b := blobs{}
		target := b.addManifest(t, ocispec.MediaTypeImageConfig, "{}")
		delete(b, digest.FromString("{}"))
		_, err := Read(t.Context(), b, target)
		wantError(t, err, ErrNotArtifact)
	})
}

func TestAnnotatedTime(t *testing.T) {
	for annotations, want := range map[string]time.Time{
		`{"org.opencontainers.image.created":"2025-03-04T05:06:07Z"}`:             created,
		`{"org.opencontainers.image.created":"2025-03-04T06:06:07+01:00","x":[]}`: created,
		`{"org.opencontainers.image.created":"yesterday"}`:                        {},
		`{"org.opencontainers.image.created":7}`:                                  {},
		`{"other":"2025-03-04T05:06:07Z"}`:                                        {},
		`[]`:                                                                      {},
		`null`:                                                                    {},
	} {
		b := blobs{}
		text := `{"annotations":` + annotations + `}`
		desc := b.add(ocispec.MediaTypeImageManifest, []byte(text))
		if got := AnnotatedTime(t.Context(), b, desc); !got.Equal(want) {
			t.Errorf("%s: got %v, want %v", annotations, got, want)
		}
	}
	if got := AnnotatedTime(t.Context(), blobs{}, ocispec.Descriptor{Digest: digest.FromString("none")}); !got.IsZero() {
		t.Errorf("without a manifest: %v", got)
	}
}

func TestCreated(t *testing.T) {
	const at = `"2025-03-04T05:06:07Z"`
	for _, test := range []struct {
		name, configType, config string
		want                     time.Time
	}{
		{"ModelPack", modelspec.MediaTypeModelConfig, `{"descriptor":{"createdAt":` + at + `}}`, created},
		{"legacy ModelPack", "application/vnd.cnai.model.config.v1+json", `{"descriptor":{"createdAt":` + at + `}}`, created},
		{"like an OCI image config", anyConfig, `{"created":` + at + `}`, created},
		{"ModelPack's time goes first", anyConfig, `{"descriptor":{"createdAt":` + at + `},"created":"2000-01-01T00:00:00Z"}`, created},
		{"zero time", modelspec.MediaTypeModelConfig, `{"descriptor":{"createdAt":"0001-01-01T00:00:00Z"}}`, epoch},
		{"null", modelspec.MediaTypeModelConfig, `{"descriptor":{"createdAt":null},"created":null,"modelfs":null}`, epoch},
		{"ModelPack without a time", modelspec.MediaTypeModelConfig, modelTitle, epoch},
		{"OCI empty config", ocispec.MediaTypeEmptyJSON, `{}`, epoch},
		{"another shape", anyConfig, `{"created":12,"descriptor":[],"modelfs":"x","rootfs":{"diff_ids":[{}]}}`, epoch},
		{"one section of another shape", anyConfig, `{"descriptor":7,"created":` + at + `}`, created},
		{"a list", anyConfig, `[1]`, epoch},
		{"JSON null", anyConfig, `null`, epoch},
		{"not JSON", anyConfig, "GGUF\x00", epoch},
		{"no bytes", anyConfig, "", epoch},
	} {
		t.Run(test.name, func(t *testing.T) {
			b := blobs{}
			a, err := Read(t.Context(), b, b.addManifest(t, test.configType, test.config, layer("text/plain", "x")))
			if err != nil {
				t.Fatal(err)
			}
			if !a.Created.Equal(test.want) || !a.Layers[0].File.ModTime.Equal(test.want) {
				t.Errorf("created %v, file of %v, want %v", a.Created, a.Layers[0].File.ModTime, test.want)
			}
			if a.Layers[0].DiffID != "" {
				t.Errorf("DiffID %q, want none", a.Layers[0].DiffID)
			}
		})
	}
}

func TestMalformedModelPackConfigIsRefused(t *testing.T) {
	for _, config := range []string{
		"", "null", "[]", `"x"`, "{", `{} {}`, `{"descriptor":7}`, `{"descriptor":{"createdAt":"yesterday"}}`,
		`{"modelfs":{"diffIds":"sha256:x"}}`, `{"modelfs":{"diffIds":[1]}}`, `{"rootfs":[]}`,
		`{"descriptor":{"createdAt":"` + strings.Repeat("x", 1<<20) + `"}}`,
	} {
		for _, configType := range []string{modelspec.MediaTypeModelConfig, "application/vnd.cnai.model.config.v1+json"} {
			b := blobs{}
			_, err := Read(t.Context(), b, b.addManifest(t, configType, config, layer("text/plain", "x")))
			wantError(t, err, errdefs.ErrInvalidArgument, "malformed model config", digest.FromString(config).String())
		}
	}
}

func TestDiffIDs(t *testing.T) {
	raw := layer("text/plain", "raw")
	gz := layer(modelspec.MediaTypeModelWeightGzip, "gz")
	id := digest.FromString("decompressed")
	for name, config := range map[string]string{
		"ModelPack":         `{"modelfs":{"diffIds":[%q,%q]}}`,
		"early ModelPack":   `{"modelfs":{"diff_ids":[%q,%q]}}`,
		"OCI":               `{"rootfs":{"diff_ids":[%q,%q]}}`,
		"ModelPack's first": `{"modelfs":{"diffIds":[%q,%q]},"rootfs":{"diff_ids":["sha256:x"]}}`,
	} {
		b := blobs{}
		a, err := Read(t.Context(), b, b.addManifest(t, modelspec.MediaTypeModelConfig, fmt.Sprintf(config, raw.Digest, id), raw, gz))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if a.Layers[0].DiffID != raw.Digest || a.Layers[1].DiffID != id {
			t.Errorf("%s: DiffIDs %s and %s", name, a.Layers[0].DiffID, a.Layers[1].DiffID)
		}
	}
}

func TestWrongDiffIDsAreRefused(t *testing.T) {
	raw, tar, gz := layer("text/plain", "1"), layer(modelspec.MediaTypeModelDoc, "2"), layer(modelspec.MediaTypeModelDocGzip, "3")
	oras := layer("text/plain", "4", annotationUnpack, "true", annotationDigest, raw.Digest.String())
	unreadable := layer("text/plain", "4", annotationUnpack, "true", annotationDigest, "sha256:x")
	other := digest.FromString("other")
	for _, test := range []struct {
		name    string
		layers  []ocispec.Descriptor
		diffIDs []digest.Digest
		texts   []string
	}{
		{"too few", []ocispec.Descriptor{raw, tar}, []digest.Digest{raw.Digest}, []string{"lists 1 DiffIDs for 2 layers"}},
		{"too many", []ocispec.Descriptor{raw}, []digest.Digest{raw.Digest, raw.Digest}, []string{"lists 2 DiffIDs for 1 layers"}},
		{"another file's", []ocispec.Descriptor{raw}, []digest.Digest{other}, []string{"layer 0 (text/plain, ", other.String(), raw.Digest.String()}},
		{"another than in ORAS's annotation", []ocispec.Descriptor{oras}, []digest.Digest{other}, []string{"layer 0", other.String(), annotationDigest + " says " + raw.Digest.String()}},
		{"none, and no digest in ORAS's annotation", []ocispec.Descriptor{unreadable}, nil, []string{"layer 0", "annotation " + annotationDigest, `"sha256:x"`}},
		{"not a digest", []ocispec.Descriptor{gz}, []digest.Digest{"sha256:../../etc"}, []string{"layer 0", `"sha256:../../etc"`, "DiffID"}},
		{"empty", []ocispec.Descriptor{gz}, []digest.Digest{""}, []string{"layer 0", "DiffID"}},
		{"unknown algorithm", []ocispec.Descriptor{gz}, []digest.Digest{"blake3:" + digest.Digest(other.Encoded())}, []string{"layer 0", "unsupported algorithm"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			b := blobs{}
			cfg := modelspec.Model{ModelFS: modelspec.ModelFS{DiffIDs: test.diffIDs}}
			_, err := Read(t.Context(), b, b.addManifest(t, modelspec.MediaTypeModelConfig, cfg, test.layers...))
			wantError(t, err, errdefs.ErrInvalidArgument, test.texts...)
		})
	}
}

func TestRefusedLayersAreNamed(t *testing.T) {
	good := layer("text/plain", "x")
	edit := func(change func(*ocispec.Descriptor)) ocispec.Descriptor {
		d := layer(modelspec.MediaTypeModelWeightRaw, "y", modelspec.AnnotationFilepath, "a/b")
		change(&d)
		return d
	}
	for _, test := range []struct {
		name  string
		layer ocispec.Descriptor
		texts []string
	}{
		{"no digest", edit(func(d *ocispec.Descriptor) { d.Digest = "" }), []string{"digest"}},
		{"digest that is a path", edit(func(d *ocispec.Descriptor) { d.Digest = "sha256:../../../etc/passwd" }), []string{"../../../etc/passwd"}},
		{"upper-case digest", edit(func(d *ocispec.Descriptor) { d.Digest = "sha256:" + digest.Digest(strings.Repeat("A", 64)) }), []string{"digest"}},
		{"unknown algorithm", edit(func(d *ocispec.Descriptor) { d.Digest = "md5:" + digest.Digest(strings.Repeat("a", 32)) }), []string{"unsupported algorithm"}},
		{"negative size", edit(func(d *ocispec.Descriptor) { d.Size = -1 }), []string{modelspec.MediaTypeModelWeightRaw, "negative size -1"}},
		{"no media type", edit(func(d *ocispec.Descriptor) { d.MediaType = "" }), []string{"media type"}},
		{"unprintable media type", edit(func(d *ocispec.Descriptor) { d.MediaType = "text/plain\n\x1b[2J" }), []string{`"text/plain\n\x1b[2J"`}},
		{"endless media type", edit(func(d *ocispec.Descriptor) { d.MediaType = "text/" + strings.Repeat("x", 1<<20) }), []string{"media type"}},
		{"encrypted", edit(func(d *ocispec.Descriptor) { d.MediaType = images.MediaTypeImageLayerGzipEncrypted }), []string{images.MediaTypeImageLayerGzipEncrypted, "encrypted layer is not supported"}},
		{"path", edit(func(d *ocispec.Descriptor) { d.Annotations[modelspec.AnnotationFilepath] = "../x" }), []string{modelspec.MediaTypeModelWeightRaw, `"../x"`}},
		{"endless path", edit(func(d *ocispec.Descriptor) {
			d.Annotations[modelspec.AnnotationFilepath] = strings.Repeat("\x01/", 1<<20)
		}), []string{"over the limit"}},
		{"metadata", edit(func(d *ocispec.Descriptor) { d.Annotations[modelspec.AnnotationFileMetadata] = "{" }), []string{
			modelspec.MediaTypeModelWeightRaw + ", " + digest.FromString("y").String() + `, "a/b"`, modelspec.AnnotationFileMetadata,
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			b := blobs{}
			target := b.addManifest(t, anyConfig, "{}", good, test.layer)
			_, err := Read(t.Context(), b, target)
			wantError(t, err, errdefs.ErrInvalidArgument, append(test.texts, "layer 1", target.Digest.String())...)
		})
	}
}

func TestNoLayersIsRefused(t *testing.T) {
	b := blobs{}
	for _, manifest := range []string{
		`{"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType":"application/x"},"layers":[]}`,
		`{"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType":"application/x"}}`,
		`{"config":{"mediaType":"application/x"},"layers":[]}`,
	} {
		_, err := Read(t.Context(), b, b.add("", []byte(manifest)))
		wantError(t, err, errdefs.ErrInvalidArgument, "has no layers")
	}
}

func TestConfigBlob(t *testing.T) {
	x := layer("text/plain", "x")
	t.Run("missing", func(t *testing.T) {
		b := blobs{}
		target := b.addManifest(t, anyConfig, modelTitle, x)
		delete(b, digest.FromString(modelTitle))
		_, err := Read(t.Context(), b, target)
		wantError(t, err, errdefs.ErrNotFound, "config "+digest.FromString(modelTitle).String(), "pull it again")
	})
	t.Run("corrupt", func(t *testing.T) {
		b := blobs{}
		target := b.addManifest(t, anyConfig, modelTitle, x)
		b[digest.FromString(modelTitle)] = []byte("else")
		_, err := Read(t.Context(), b, target)
		wantError(t, err, errdefs.ErrDataLoss, "config "+digest.FromString(modelTitle).String(), digest.FromString("else").String())
	})
	t.Run("too large", func(t *testing.T) {
		b := blobs{}
		_, err := Read(t.Context(), b, b.addManifest(t, anyConfig, strings.Repeat(" ", maxConfigSize+1), x))
		wantError(t, err, errdefs.ErrInvalidArgument, "config", "8388609 bytes, over the limit of 8388608")
	})
	t.Run("as large as may be", func(t *testing.T) {
		b := blobs{}
		if _, err := Read(t.Context(), b, b.addManifest(t, anyConfig, strings.Repeat(" ", maxConfigSize), x)); err != nil {
			t.Error(err)
		}
	})
	t.Run("not named", func(t *testing.T) {
		b := blobs{}
		_, err := Read(t.Context(), b, b.addJSON(t, "", map[string]any{"layers": []ocispec.Descriptor{x}}))
		wantError(t, err, errdefs.ErrInvalidArgument, "config: digest")
	})
}

func TestWrap(t *testing.T) {
	cause := errors.New("cause")
	l := Layer{Index: 3, Descriptor: ocispec.Descriptor{MediaType: "text/plain", Digest: "sha256:00"}}
	for path, want := range map[string]string{
		"":     `layer 3 (text/plain, sha256:00): cause`,
		"a\nb": `layer 3 (text/plain, sha256:00, "a\nb"): cause`,
	} {
		l.File.Path = path
		err := l.Wrap(cause)
		if err.Error() != want || !errors.Is(err, cause) {
			t.Errorf("got %q, want %q around the cause", err, want)
		}
	}
}

func TestIsChainIDPreimage(t *testing.T) {
	chain := []digest.Digest{digest.FromString("a"), digest.FromString("b"), digest.FromString("c")}
	below := identity.ChainID(chain[:2])
	other := Artifact{
		Manifest: ocispec.Descriptor{Digest: digest.FromString("manifest")},
		Layers:   []Layer{{Descriptor: ocispec.Descriptor{Digest: chain[0]}}},
	}
	for content, want := range map[string]bool{
		below.String() + " " + chain[2].String():                                                          true,
		digest.SHA512.FromString("x").String() + " " + digest.SHA384.FromString("x").String():             true,
		"artifact " + other.ChainID().String() + " " + other.Manifest.Digest.String():                     true,
		"artifact " + digest.SHA512.FromString("").String() + " " + digest.SHA512.FromString("").String(): true,
		below.String() + " " + chain[2].String() + "\n":                                                   false,
		strings.Repeat("a", 143): false,
		"x":                      false,
	} {
		// With this type it is a file, too, since it is not an archive.
		desc := layer(ocispec.MediaTypeImageLayer, content, ocispec.AnnotationTitle, "f")
		l, err := NewLayer(desc)
		if err != nil {
			t.Fatal(err)
		}
		got, err := IsChainIDPreimage(t.Context(), l, blobs{desc.Digest: []byte(content)})
		if got != want || err != nil {
			t.Errorf("%q is the preimage of a chain ID: %v, %v", content, got, err)
		}
		if named := desc.Digest == identity.ChainID(chain) || desc.Digest == other.SnapshotName(); named && !got {
			t.Errorf("%q is what a name is the digest of", content)
		}
	}
}
