// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package artifact

import (
	"bytes"
	"errors"
	"fmt"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// FuzzRead reads a manifest in which the word CONFIG stands for the digest of
// the other blob, which may be a config or, under an index, a manifest.
func FuzzRead(f *testing.F) {
	const (
		layerA = `{"mediaType":"application/vnd.cncf.model.weight.v1.raw","size":1,"digest":"CONFIG","annotations":{"org.cncf.model.filepath":"./a//b","org.cncf.model.file.metadata+json":"{\"mode\":420,\"uid\":1,\"mtime\":\"2021-02-03T04:05:06Z\"}"}}`
		layerB = `{"mediaType":"application/vnd.cnai.model.doc.v1.tar+gzip","size":0,"digest":"CONFIG"}`
		config = `"config":{"mediaType":"application/vnd.cncf.model.config.v1+json","size":2,"digest":"CONFIG"}`
	)
	f.Add([]byte(`{`+config+`,"layers":[`+layerA+`,`+layerB+`]}`), []byte(`{"descriptor":{"createdAt":"2021-02-03T04:05:06Z"}}`))
	f.Add([]byte(`{`+config+`,"layers":[`+layerB+`]}`), []byte(`{"modelfs":{"type":"layers","diffIds":["sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"]}}`))
	f.Add([]byte(`{"mediaType":"application/vnd.docker.distribution.manifest.v2+json","config":{"mediaType":"x","digest":"CONFIG"},"layers":[{"mediaType":"text/plain","digest":"CONFIG","annotations":{"org.opencontainers.image.title":"../x"}}]}`), []byte(`{"rootfs":{"diff_ids":[""]},"created":1}`))
	f.Add([]byte(`{"manifests":[{"digest":"CONFIG","platform":{"os":"linux","architecture":"arm64"}},{"digest":"CONFIG","platform":{"os":"linux","architecture":"amd64"}}]}`),
		[]byte(`{"config":{"mediaType":"application/vnd.oci.image.config.v1+json"},"layers":[]}`))
	f.Add([]byte(`{"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[{"digest":"CONFIG"}]}`), []byte(`{"manifests":[]}`))
	f.Add([]byte(`{"config":{"mediaType":"x","digest":"CONFIG"},"layers":[
		{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":"CONFIG","annotations":{"org.opencontainers.image.title":"/x"}},
		{"mediaType":"x","digest":"CONFIG","annotations":{"io.deis.oras.content.unpack":"true","io.deis.oras.content.digest":"CONFIG"}},
		{"mediaType":"application/vnd.oci.empty.v1+json","size":2,"digest":"CONFIG"}]}`), []byte(`{}`))

	f.Fuzz(func(t *testing.T, manifest, config []byte) {
		b := blobs{}
		dgst := b.add("", config).Digest
		target := b.add("", bytes.ReplaceAll(manifest, []byte("CONFIG"), []byte(dgst)))
		a, err := Read(t.Context(), b, target)
		if err != nil {
			if a != nil {
				t.Error("an artifact beside an error")
			}
			kinds := []error{ErrNotArtifact, errdefs.ErrInvalidArgument, errdefs.ErrNotFound}
			for _, kind := range kinds {
				if errors.Is(err, kind) {
					wantError(t, err, kind)
					return
				}
			}
			t.Fatalf("error of no kind: %v", err)
		}

		if len(a.Layers) == 0 || a.Created.IsZero() || a.Manifest.Digest == "" || a.Manifest.Size == 0 {
			t.Fatalf("artifact %+v", a)
		}
		for i, l := range a.Layers {
			if l.Index != i || l.Descriptor.Digest.Validate() != nil || l.Descriptor.Size < 0 {
				t.Errorf("layer %+v", l)
			}
			if l.DiffID != "" && (l.DiffID.Validate() != nil || l.Format == FormatRaw && l.DiffID != l.Descriptor.Digest) {
				t.Errorf("DiffID of layer %+v", l)
			}
			switch l.Format {
			case FormatRaw:
				checkPath(t, l.File.Path)
				if clean, err := CleanPath(l.File.Path); err != nil || clean != l.File.Path {
					t.Errorf("path %q: clean %q, %v", l.File.Path, clean, err)
				}
				checkAttributes(t, l.File)
				if l.Compression != CompressionNone {
					t.Errorf("compressed file %+v", l)
				}
			case FormatTar:
				if l.File != (File{}) {
					t.Errorf("file in a tar layer: %+v", l)
				}
			case FormatTarOrRaw:
				for _, as := range []Format{FormatTar, FormatRaw} {
					settled, err := l.Settle(as, CompressionNone)
					if err != nil {
						wantError(t, err, errdefs.ErrInvalidArgument)
						continue
					}
					if settled.Format != as || (settled.File == File{}) != (as == FormatTar) {
						t.Errorf("%+v settled as %s: %+v", l, as, settled)
					}
				}
			case FormatEmpty:
			default:
				t.Errorf("format %q", l.Format)
			}
		}
	})
}

// FuzzMayHaveConfig checks that no config is excluded that Identify finds, in a document in
// which CONFIG and ESCAPED stand for a digest.
func FuzzMayHaveConfig(f *testing.F) {
	f.Add([]byte(`{"config":{"mediaType":"x","digest":"CONFIG"}}`), ocispec.MediaTypeImageManifest)
	f.Add([]byte(`{"x":"\\\"","CONFIG":"\\","Config":{"DIGEST":"ESCAPED"}}`), ocispec.MediaTypeImageManifest)
	f.Add([]byte(`{"manifests":[{"digest":"CONFIG"}],"config":{"digest":"ESCAPED"}}`), ocispec.MediaTypeImageIndex)
	f.Add([]byte(" \n{\"a\":[{}],\"config\":{\"digest\":\"CONFIG\"}}"), "")
	f.Fuzz(func(t *testing.T, document []byte, mediaType string) {
		b := blobs{}
		manifest := b.add("", []byte(`{"config":{"digest":"`+digest.FromString("config")+`"}}`)).Digest
		var escaped []byte
		for _, c := range []byte(manifest) {
			escaped = fmt.Appendf(escaped, `\u%04x`, c)
		}
		document = bytes.ReplaceAll(document, []byte("CONFIG"), []byte(manifest))
		target := b.add(mediaType, bytes.ReplaceAll(document, []byte("ESCAPED"), escaped))
		_, config, err := Identify(t.Context(), b, target)
		if err != nil {
			return
		}
		if may, err := MayHaveConfig(t.Context(), b, target, config.Digest); !may || err != nil {
			t.Errorf("%s is excluded: %v, %v", config.Digest, may, err)
		}
	})
}
