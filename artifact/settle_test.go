// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package artifact

import (
	"reflect"
	"testing"

	"github.com/containerd/errdefs"
	modelspec "github.com/modelpack/model-spec/specs-go/v1"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// mustLayer returns the layer that desc describes.
func mustLayer(t *testing.T, desc ocispec.Descriptor) Layer {
	t.Helper()
	l, err := NewLayer(desc)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// This is what `oras push REF docs/:TYPE` makes.
func TestALayerThatORASUnpacksIsAnArchiveWithAnyType(t *testing.T) {
	tarDigest := digest.FromString("the tar")
	for _, mediaType := range []string{
		"application/vnd.acme.docs.layer.v1+tar", "application/vnd.acme.docs", ocispec.MediaTypeImageLayer, ocispec.MediaTypeImageLayerGzip, modelspec.MediaTypeModelDocRaw,
	} {
		l := mustLayer(t, layer(mediaType, "x", ocispec.AnnotationTitle, "docs", annotationUnpack, "true", annotationDigest, tarDigest.String()))
		if l.Format != FormatTar || l.Compression != CompressionGzip || l.DiffID != tarDigest || l.File != (File{}) {
			t.Errorf("%s: %+v", mediaType, l)
		}
		if claim := l.Claim(); claim != "the annotation io.deis.oras.content.digest says" {
			t.Errorf("%s: %s", mediaType, claim)
		}
	}
	for _, no := range []string{"false", "True", "1", ""} {
		l := mustLayer(t, layer("text/plain", "x", ocispec.AnnotationTitle, "docs", annotationUnpack, no, annotationDigest, tarDigest.String()))
		if l.Format != FormatRaw || l.DiffID != "" {
			t.Errorf("unpack: %q: %+v", no, l)
		}
	}
}

func TestTheEmptyDescriptorHasNoFiles(t *testing.T) {
	empty := ocispec.DescriptorEmptyJSON
	sha512 := empty
	sha512.Digest = digest.SHA512.FromBytes(empty.Data)
	titled := layer(ocispec.MediaTypeEmptyJSON, "{}", ocispec.AnnotationTitle, "empty.json")
	for _, test := range []struct {
		desc ocispec.Descriptor
		want Format
	}{
		{empty, FormatEmpty},
		{sha512, FormatEmpty},
		{layer("application/vnd.OCI.empty.v1+json; x=y", "{}"), FormatEmpty},
		{titled, FormatRaw}, // a file for `oras pull`, too
		{layer(ocispec.MediaTypeEmptyJSON, "{ }"), FormatRaw},
		{layer("application/json", "{}"), FormatRaw},
	} {
		if l := mustLayer(t, test.desc); l.Format != test.want {
			t.Errorf("%+v: %s, want %s", test.desc, l.Format, test.want)
		}
	}
}

func TestSettle(t *testing.T) {
	file := layer(ocispec.MediaTypeImageLayer, "hi", ocispec.AnnotationTitle, "./hi.txt")
	l := mustLayer(t, file)
	asFile, err := l.Settle(FormatRaw, CompressionNone)
	if err != nil || asFile.Format != FormatRaw || asFile.File != (File{Path: "hi.txt", Mode: 0o644, ModTime: epoch}) {
		t.Errorf("the file is %+v, %v", asFile, err)
	}
	asTar, err := l.Settle(FormatTar, CompressionZstd)
	if err != nil || !reflect.DeepEqual(asTar, Layer{Descriptor: file, Format: FormatTar, Compression: CompressionZstd}) {
		t.Errorf("the archive is %+v, %v", asTar, err)
	}

	// The name of an archive does not matter.
	file.Annotations[ocispec.AnnotationTitle] = "/tmp/docs.tar"
	l = mustLayer(t, file)
	if _, err := l.Settle(FormatTar, CompressionNone); err != nil {
		t.Errorf("an archive of an absolute title: %v", err)
	}
	_, err = l.Settle(FormatRaw, CompressionNone)
	wantError(t, err, errdefs.ErrInvalidArgument, "is absolute")

	l = mustLayer(t, layer(ocispec.MediaTypeImageLayer, "hi", ocispec.AnnotationTitle, "hi.txt"))
	l.DiffID = digest.FromString("another")
	_, err = l.Settle(FormatRaw, CompressionNone)
	wantError(t, err, errdefs.ErrInvalidArgument, l.DiffID.String(), l.Descriptor.Digest.String(), "is a file")

	for _, never := range []ocispec.Descriptor{layer("application/octet-stream", "x"), ocispec.DescriptorEmptyJSON} {
		l := mustLayer(t, never)
		if settled, err := l.Settle(FormatTar, CompressionGzip); err != nil || !reflect.DeepEqual(settled, l) {
			t.Errorf("%s became %+v, %v", never.MediaType, settled, err)
		}
	}
}

func TestChainIDWithAndWithoutDiffIDs(t *testing.T) {
	manifest := ocispec.Descriptor{Digest: digest.FromString("manifest")}
	for _, test := range []struct {
		name  string
		layer ocispec.Descriptor
		known bool
	}{
		{"a file", layer("text/plain", "x"), true},
		{"nothing", ocispec.DescriptorEmptyJSON, true},
		{"a tar by its type, which may be compressed", layer(modelspec.MediaTypeModelDoc, "x"), false},
		{"an archive or a file", layer(ocispec.MediaTypeImageLayer, "x", ocispec.AnnotationTitle, "x"), false},
		{"a directory of ORAS", layer("text/plain", "x", annotationUnpack, "true", annotationDigest, digest.FromString("x").String()), true},
	} {
		a := Artifact{Manifest: manifest, Layers: []Layer{mustLayer(t, test.layer)}}
		if known := a.ChainID() != manifest.Digest; known != test.known {
			t.Errorf("%s: the chain ID is %s", test.name, a.ChainID())
		}
	}
}
