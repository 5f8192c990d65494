// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package artifact

import (
	"context"
	"errors"
	"runtime"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// here and elsewhere are platforms that do and do not match this machine's.
var (
	here       = &ocispec.Platform{OS: runtime.GOOS, Architecture: runtime.GOARCH}
	elsewhere  = &ocispec.Platform{OS: runtime.GOOS, Architecture: "s390x"}
	elsewhere2 = &ocispec.Platform{OS: "plan9", Architecture: "ppc64le"}
	attested   = &ocispec.Platform{OS: "unknown", Architecture: "unknown"}
)

// addPlain stores a manifest that differs from others by name.
func (b blobs) addPlain(t *testing.T, name string, platform *ocispec.Platform) ocispec.Descriptor {
	desc := b.addManifest(t, anyConfig, "{}", layer("text/plain", name, ocispec.AnnotationTitle, name))
	desc.Platform = platform
	return desc
}

func (b blobs) addIndex(t *testing.T, mediaType string, manifests ...ocispec.Descriptor) ocispec.Descriptor {
	return b.addJSON(t, mediaType, ocispec.Index{MediaType: mediaType, Manifests: manifests})
}

func TestIndexIsResolved(t *testing.T) {
	b := blobs{}
	mine, theirs, neutral := b.addPlain(t, "mine", here), b.addPlain(t, "theirs", elsewhere), b.addPlain(t, "any", nil)
	attestation := b.addPlain(t, "attestation", attested)
	inner := b.addIndex(t, ocispec.MediaTypeImageIndex, theirs, mine)
	inner.Platform = here
	for _, test := range []struct {
		name      string
		manifests []ocispec.Descriptor
		want      ocispec.Descriptor
	}{
		{"this platform's", []ocispec.Descriptor{theirs, neutral, mine}, mine},
		{"the first of equals", []ocispec.Descriptor{mine, b.addPlain(t, "second", here)}, mine},
		{"the only one, without a platform", []ocispec.Descriptor{neutral}, neutral},
		{"the only one, for another platform", []ocispec.Descriptor{theirs}, theirs},
		{"the only one beside attestations", []ocispec.Descriptor{attestation, theirs, attestation}, theirs},
		{"this platform's, two indexes down", []ocispec.Descriptor{theirs, inner}, mine},
	} {
		for _, mediaType := range []string{ocispec.MediaTypeImageIndex, images.MediaTypeDockerSchema2ManifestList, ""} {
			t.Run(test.name+" "+mediaType, func(t *testing.T) {
				target := ocispec.Descriptor{Digest: b.addIndex(t, mediaType, test.manifests...).Digest}
				got, _, err := resolve(t.Context(), b, target)
				if err != nil {
					t.Fatal(err)
				}
				if got.Digest != test.want.Digest || got.MediaType != ocispec.MediaTypeImageManifest || got.Size != int64(len(b[got.Digest])) {
					t.Errorf("resolved to %+v, want %s", got, test.want.Digest)
				}
				a, err := Read(t.Context(), b, target)
				if err != nil {
					t.Fatal(err)
				}
				if a.Manifest.Digest != test.want.Digest {
					t.Errorf("read %s, want %s", a.Manifest.Digest, test.want.Digest)
				}
			})
		}
	}
}

func TestIndexWithoutAManifestForThisNodeIsRefused(t *testing.T) {
	b := blobs{}
	one, two := b.addPlain(t, "1", elsewhere), b.addPlain(t, "2", elsewhere2)
	attestation := b.addPlain(t, "attestation", attested)
	for _, test := range []struct {
		name      string
		manifests []ocispec.Descriptor
		texts     []string
	}{
		{"other platforms", []ocispec.Descriptor{one, two}, []string{runtime.GOOS + "/" + runtime.GOARCH, runtime.GOOS + "/s390x", "plan9/ppc64le"}},
		{"another and none", []ocispec.Descriptor{one, b.addPlain(t, "3", nil)}, []string{runtime.GOOS + "/s390x", "none"}},
		{"none", []ocispec.Descriptor{}, []string{"lists no manifest"}},
		{"attestations", []ocispec.Descriptor{attestation}, []string{"lists no manifest"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			target := b.addIndex(t, ocispec.MediaTypeImageIndex, test.manifests...)
			_, _, err := resolve(t.Context(), b, target)
			wantError(t, err, errdefs.ErrInvalidArgument, append(test.texts, "index "+target.Digest.String())...)
		})
	}
	t.Run("very many platforms", func(t *testing.T) {
		many := make([]ocispec.Descriptor, 5000)
		for i := range many {
			many[i] = one
			many[i].Platform = &ocispec.Platform{OS: "\x1b[2J", Architecture: strings.Repeat("x", 100)}
		}
		_, _, err := resolve(t.Context(), b, b.addIndex(t, ocispec.MediaTypeImageIndex, many...))
		wantError(t, err, errdefs.ErrInvalidArgument, "among 5000")
		if strings.Contains(err.Error(), "\x1b") {
			t.Errorf("control characters in %q", err)
		}
	})
}

func TestTheDepthOfIndexesIsLimited(t *testing.T) {
	b := blobs{}
	target := b.addPlain(t, "file", nil)
	for depth := 1; depth <= maxIndexDepth; depth++ {
		target = b.addIndex(t, ocispec.MediaTypeImageIndex, target)
		if _, _, err := resolve(t.Context(), b, target); err != nil {
			t.Errorf("depth %d: %v", depth, err)
		}
	}
	_, _, err := resolve(t.Context(), b, b.addIndex(t, ocispec.MediaTypeImageIndex, target))
	wantError(t, err, errdefs.ErrInvalidArgument, "nested more than 3 deep")
}

func TestMediaTypeOfTarget(t *testing.T) {
	const body = `"config":{"mediaType":"application/x","digest":"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a","size":2},
		"layers":[{"mediaType":"text/plain","digest":"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a","size":2}]`
	for _, test := range []struct {
		name, manifest, want, err string
	}{
		{"OCI", `{"mediaType":"application/vnd.oci.image.manifest.v1+json",` + body + `}`, ocispec.MediaTypeImageManifest, ""},
		{"Docker", `{"mediaType":"application/vnd.docker.distribution.manifest.v2+json",` + body + `}`, images.MediaTypeDockerSchema2Manifest, ""},
		{"case and parameters", `{"mediaType":"Application/vnd.oci.image.Manifest.v1+JSON; charset=utf-8",` + body + `}`, ocispec.MediaTypeImageManifest, ""},
		{"by shape", `{` + body + `}`, ocispec.MediaTypeImageManifest, ""},
		{"by shape, null is absent", `{"manifests":null,` + body + `}`, ocispec.MediaTypeImageManifest, ""},
		{"both shapes", `{"manifests":[],` + body + `}`, "", "both layers and manifests"},
		{"both shapes and a type", `{"mediaType":"application/vnd.oci.image.manifest.v1+json","manifests":[],` + body + `}`, "", "both layers and manifests"},
		{"neither shape", `{"config":{}}`, "", "neither mediaType nor layers nor manifests"},
		{"manifest that calls itself an index", `{"mediaType":"application/vnd.oci.image.index.v1+json",` + body + `}`, "", "does not match the media type"},
		{"index that calls itself a manifest", `{"mediaType":"application/vnd.oci.image.manifest.v1+json","manifests":[]}`, "", "does not match the media type"},
		{"Docker schema 1", `{"mediaType":"application/vnd.docker.distribution.manifest.v1+prettyjws",` + body + `}`, "", "vnd.docker.distribution.manifest.v1"},
		{"unknown", `{"mediaType":"application/\u001b[2J",` + body + `}`, "", `"application/\x1b[2j"`},
		{"not JSON", "ELF", "", "malformed JSON"},
		{"trailing data", `{` + body + `}{}`, "", "malformed JSON"},
		{"a list", `[]`, "", "malformed JSON"},
		{"null", `null`, "", "not a manifest"},
		{"no bytes", ``, "", "malformed JSON"},
		{"wrong types", `{"layers":7}`, "", "malformed JSON"},
	} {
		t.Run(test.name, func(t *testing.T) {
			b := blobs{}
			b.add("", []byte("{}"))
			target := b.add("a media type in the descriptor does not count", []byte(test.manifest))
			a, err := Read(t.Context(), b, target)
			if test.err != "" {
				wantError(t, err, errdefs.ErrInvalidArgument, test.err, target.Digest.String())
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			want := ocispec.Descriptor{MediaType: test.want, Digest: target.Digest, Size: target.Size}
			if got, _, err := resolve(t.Context(), b, target); err != nil || got.MediaType != want.MediaType || got.Size != want.Size {
				t.Errorf("resolved to %+v, %v; want %+v", got, err, want)
			}
			if a.Manifest.MediaType != want.MediaType || a.Manifest.Digest != want.Digest || a.Manifest.Size != want.Size {
				t.Errorf("manifest %+v, want %+v", a.Manifest, want)
			}
		})
	}
}

func TestManifestBlob(t *testing.T) {
	b := blobs{}
	good := b.addPlain(t, "file", nil)
	t.Run("missing", func(t *testing.T) {
		missing := digest.FromString("missing")
		_, err := Read(t.Context(), b, ocispec.Descriptor{Digest: missing})
		wantError(t, err, errdefs.ErrNotFound, "manifest "+missing.String(), "pull it again")
	})
	t.Run("missing, named by an index", func(t *testing.T) {
		missing := ocispec.Descriptor{Digest: digest.FromString("missing"), Platform: here}
		_, err := Read(t.Context(), b, b.addIndex(t, ocispec.MediaTypeImageIndex, good, missing))
		wantError(t, err, errdefs.ErrNotFound, "manifest "+missing.Digest.String(), "pull it again")
	})
	t.Run("corrupt", func(t *testing.T) {
		corrupt := digest.FromString("what it was")
		b[corrupt] = b[good.Digest]
		_, err := Read(t.Context(), b, ocispec.Descriptor{Digest: corrupt})
		wantError(t, err, errdefs.ErrDataLoss, "manifest "+corrupt.String(), good.Digest.String())
	})
	t.Run("too large", func(t *testing.T) {
		_, err := Read(t.Context(), b, b.add("", make([]byte, maxManifestSize+1)))
		wantError(t, err, errdefs.ErrInvalidArgument, "manifest", "8388609 bytes, over the limit of 8388608")
	})
	t.Run("unreadable", func(t *testing.T) {
		cause := errors.New("input/output error")
		_, err := Read(t.Context(), failing{cause}, good)
		wantError(t, err, cause, "manifest "+good.Digest.String())
	})
	for _, algorithm := range []digest.Algorithm{digest.SHA384, digest.SHA512} {
		t.Run(string(algorithm), func(t *testing.T) {
			strong := algorithm.FromBytes(b[good.Digest])
			b[strong] = b[good.Digest]
			a, err := Read(t.Context(), b, ocispec.Descriptor{Digest: strong})
			if err != nil || a.Manifest.Digest != strong {
				t.Errorf("got %+v, %v", a, err)
			}
		})
	}
	for _, bad := range []digest.Digest{"", "x", "sha256:", "sha256:../../x", "md5:d41d8cd98f00b204e9800998ecf8427e"} {
		t.Run("digest "+string(bad), func(t *testing.T) {
			_, err := Read(t.Context(), b, ocispec.Descriptor{Digest: bad})
			wantError(t, err, errdefs.ErrInvalidArgument, "digest")
		})
	}
}

// failing is a provider that cannot read.
type failing struct{ error }

func (f failing) ReaderAt(context.Context, ocispec.Descriptor) (content.ReaderAt, error) {
	return nil, f.error
}

// Two bytes of JSON would become a descriptor of more than a hundred bytes in memory.
func TestDescriptorsAreCountedBeforeTheyAreParsed(t *testing.T) {
	raw := []byte(`{"schemaVersion":2,"layers":[` + strings.Repeat("{},", 100000) + `{}]}`)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	_, err := parseDocument(raw)
	runtime.ReadMemStats(&after)
	if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "100001 descriptors") {
		t.Errorf("%v, want a refusal", err)
	}
	if got := after.TotalAlloc - before.TotalAlloc; got > 20<<20 {
		t.Errorf("%d bytes were allocated", got)
	}
}
