// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package artifact

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	modelspec "github.com/modelpack/model-spec/specs-go/v1"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// The names are spelled out, since registries have them, whatever happens to the constants.
func TestLayerTypes(t *testing.T) {
	type want struct {
		format      Format
		compression Compression
	}
	var (
		raw  = want{"raw", ""}
		tar  = want{"tar", ""}
		gzip = want{"tar", "gzip"}
		zstd = want{"tar", "zstd"}
		// Every layer here has a name, and ORAS gives every file such a type.
		anyTar  = want{"tar or raw", ""}
		anyGzip = want{"tar or raw", "gzip"}
		anyZstd = want{"tar or raw", "zstd"}
	)
	tests := map[string]want{
		"application/vnd.cnai.model.layer.v1.tar":      tar,
		"application/vnd.cnai.model.layer.v1.tar+gzip": gzip,

		"application/vnd.oci.image.layer.v1.tar":            anyTar,
		"application/vnd.oci.image.layer.v1.tar+gzip":       anyGzip,
		"application/vnd.oci.image.layer.v1.tar+zstd":       anyZstd,
		"application/vnd.oci.image.layer.v1.TAR; x=y":       anyTar,
		"application/vnd.oci.image.layer.v1.squashfs":       raw,
		"application/vnd.docker.image.rootfs.diff.tar":      anyTar,
		"application/vnd.docker.image.rootfs.diff.tar.gzip": anyGzip,
		"application/vnd.docker.image.rootfs.diff.tar.zstd": anyZstd,

		"application/vnd.example.tar":      tar,
		"application/vnd.example+tar":      tar,
		"application/vnd.example.tar+gzip": gzip,
		"application/vnd.example.tar.gzip": gzip,
		"application/vnd.example+tar+gzip": gzip,
		"application/vnd.example.tar+zstd": zstd,
		"application/vnd.example+tar+zstd": zstd,
		"application/vnd.example.tar.zstd": zstd,

		"application/vnd.docker.ai.gguf.v3":        raw,
		"application/vnd.oci.empty.v1+json":        raw,
		"application/octet-stream":                 raw,
		"application/gzip":                         raw,
		"application/vnd.example.v1+gzip":          raw,
		"application/vnd.example.tar.old":          raw,
		"application/vnd.example.avatar":           raw,
		"text/plain":                               raw,
		"no-slash":                                 raw,
		"Application/vnd.Example.TAR+Gzip":         gzip,
		"application/vnd.example.tar; charset=x":   tar,
		"application/vnd.example ; name=a.tar":     raw,
		"Application/VND.cncf.model.doc.v1.RAW; x": raw,
		"APPLICATION/vnd.cnai.model.layer.v1.tar":  tar,
	}
	count := 0
	for _, org := range []string{"cncf", "cnai"} {
		for _, kind := range []string{"weight", "weight.config", "doc", "code", "dataset"} {
			for form, w := range map[string]want{"raw": raw, "tar": tar, "tar+gzip": gzip, "tar+zstd": zstd} {
				name := "application/vnd." + org + ".model." + kind + ".v1." + form
				tests[name] = w
				if _, ok := exactTypes[name]; !ok {
					t.Errorf("%s is not in the table", name)
				}
				count++
			}
		}
	}
	if count != 40 || len(modelTypes) != 20 {
		t.Errorf("%d ModelPack names tested, %d in the table; want 40 and 20", count, len(modelTypes))
	}

	for mediaType, want := range tests {
		b := blobs{}
		desc := layer(mediaType, "content", modelspec.AnnotationFilepath, "dir/file")
		a, err := Read(t.Context(), b, b.addManifest(t, anyConfig, "{}", desc))
		if err != nil {
			t.Errorf("%s: %v", mediaType, err)
			continue
		}
		l := a.Layers[0]
		if l.Format != want.format || l.Compression != want.compression {
			t.Errorf("%s: %s %q, want %s %q", mediaType, l.Format, l.Compression, want.format, want.compression)
		}
		if isFile := l.File != (File{}); isFile != (want.format != FormatTar) {
			t.Errorf("%s: file %+v", mediaType, l.File)
		}
		if l.Descriptor.MediaType != mediaType {
			t.Errorf("%s became %s", mediaType, l.Descriptor.MediaType)
		}
	}
}

func TestUnsupportedLayerTypesAreRefused(t *testing.T) {
	for mediaType, why := range map[string]string{
		"application/vnd.oci.image.layer.v1.tar+encrypted":                   "encrypted",
		"application/vnd.oci.image.layer.v1.tar+gzip+encrypted":              "encrypted",
		"application/vnd.oci.image.layer.v1.tar+zstd+encrypted":              "encrypted",
		"application/vnd.oci.image.layer.nondistributable.v1.tar+encrypted":  "encrypted",
		"application/vnd.oci.image.layer.nondistributable.v1.tar":            "non-distributable",
		"application/vnd.oci.image.layer.nondistributable.v1.tar+gzip":       "non-distributable",
		"application/vnd.oci.image.layer.nondistributable.v1.tar+zstd":       "non-distributable",
		"application/vnd.docker.image.rootfs.foreign.diff.tar":               "non-distributable",
		"application/vnd.docker.image.rootfs.foreign.diff.tar.gzip":          "non-distributable",
		"Application/vnd.OCI.image.layer.nondistributable.v1.tar; charset=x": "non-distributable",
	} {
		b := blobs{}
		_, err := Read(t.Context(), b, b.addManifest(t, anyConfig, "{}", layer(mediaType, "x")))
		wantError(t, err, errdefs.ErrInvalidArgument, "layer 0", mediaType, why)
	}
}

func TestPathOfRawLayer(t *testing.T) {
	const (
		model  = modelspec.AnnotationFilepath
		title  = ocispec.AnnotationTitle
		legacy = "org.cnai.model.filepath"
	)
	hex := layer("text/plain", "x").Digest.Encoded()
	for _, test := range []struct {
		annotations []string
		want        string
	}{
		{[]string{model, "m", title, "t", legacy, "l"}, "m"},
		{[]string{title, "model.safetensors", legacy, "unet/model.safetensors"}, "unet/model.safetensors"},
		{[]string{title, "t"}, "t"},
		{[]string{legacy, "l"}, "l"},
		{nil, hex},
		{[]string{model, "", title, "t"}, "t"},
		{[]string{model, "", title, "", legacy, "l"}, "l"},
		{[]string{model, "", title, "t", legacy, ""}, "t"},
		{[]string{model, "", title, "", legacy, ""}, hex},
		{[]string{model, "./a//b/"}, "a/b"},
	} {
		b := blobs{}
		a, err := Read(t.Context(), b, b.addManifest(t, anyConfig, "{}", layer("text/plain", "x", test.annotations...)))
		if err != nil {
			t.Errorf("%q: %v", test.annotations, err)
			continue
		}
		if got := a.Layers[0].File.Path; got != test.want {
			t.Errorf("%q: path %q, want %q", test.annotations, got, test.want)
		}
	}
}

func TestAnnotationsOfTarLayerAreNotRead(t *testing.T) {
	b := blobs{}
	desc := layer(modelspec.MediaTypeModelDoc, "x", modelspec.AnnotationFilepath, "../..", modelspec.AnnotationFileMetadata, "{")
	a, err := Read(t.Context(), b, b.addManifest(t, anyConfig, "{}", desc))
	if err != nil {
		t.Fatal(err)
	}
	if a.Layers[0].File != (File{}) {
		t.Errorf("file %+v", a.Layers[0].File)
	}
}

func TestTheSamePathTwiceIsAllowed(t *testing.T) {
	b := blobs{}
	a, err := Read(t.Context(), b, b.addManifest(t, anyConfig, "{}",
		layer("text/plain", "old", ocispec.AnnotationTitle, "f"), layer("text/plain", "new", ocispec.AnnotationTitle, "f")))
	if err != nil {
		t.Fatal(err)
	}
	var paths []string
	for _, l := range a.Layers {
		paths = append(paths, l.File.Path)
	}
	if got := strings.Join(paths, " "); got != "f f" {
		t.Errorf("paths %q", got)
	}
}

// The types are those that containerd takes for layers of images.
func TestRefetchOfLayersWithImageTypes(t *testing.T) {
	for mediaType, fetched := range map[string]bool{
		"application/vnd.oci.image.layer.v1.tar":            false,
		"application/vnd.oci.image.layer.v1.tar+zstd":       false,
		"application/vnd.docker.image.rootfs.diff.tar.gzip": false,
		"application/vnd.cncf.model.weight.v1.raw":          true,
		"application/vnd.acme.docs.layer.v1+tar":            true,
		"":                                                  true,
	} {
		advice := Refetch(ocispec.Descriptor{MediaType: mediaType})
		if got := advice == "delete the image and pull it again"; got != fetched {
			t.Errorf("%s: %s", mediaType, advice)
		}
		if !fetched && !strings.Contains(advice, "`artifact-snapshotter pull`") {
			t.Errorf("%s: %s", mediaType, advice)
		}
	}
}
