// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package artifact

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// wantConfigOfCRI compares the config that Identify finds with that of containerd, which
// CRI calls. If exact is false, Identify may find one where CRI finds none.
func wantConfigOfCRI(t *testing.T, b blobs, target ocispec.Descriptor, exact bool) {
	t.Helper()
	want, wantErr := images.Manifest(t.Context(), b, target, platforms.Default())
	manifest, config, err := Identify(t.Context(), b, target)
	switch {
	case wantErr != nil && err == nil && exact:
		t.Errorf("containerd finds no config: %v; got %s, %v", wantErr, config.Digest, err)
	case wantErr == nil && (err != nil || config.Digest != want.Config.Digest || config.MediaType != want.Config.MediaType):
		t.Errorf("got %+v, %v; containerd finds %+v", config, err, want.Config)
	case err == nil && b[manifest] == nil:
		t.Errorf("manifest %s", manifest)
	}
}

func TestIdentifyFindsTheConfigThatCRIFinds(t *testing.T) {
	here := platforms.DefaultSpec()
	worse := ocispec.Platform{OS: here.OS, Architecture: "386"} // amd64 runs it, too
	platform := map[string]*ocispec.Platform{"here": &here, "worse": &worse, "none": nil, "elsewhere": {OS: "plan9", Architecture: "mips"}}
	names := slices.Sorted(maps.Keys(platform))
	for i := range 256 { // all lists of four
		b, index := blobs{}, ocispec.Index{MediaType: ocispec.MediaTypeImageIndex}
		for n := range 4 {
			config := b.addJSON(t, ocispec.MediaTypeImageConfig, fmt.Sprintf(`{"os": %q, "architecture": %q, "n": %d}`, here.OS, here.Architecture, n))
			m := b.addJSON(t, ocispec.MediaTypeImageManifest, ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, Config: config})
			m.Platform = platform[names[i>>(2*n)&3]]
			index.Manifests = append(index.Manifests, m)
		}
		target := b.addJSON(t, index.MediaType, index)
		wantConfigOfCRI(t, b, target, true)
		nested := ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{{MediaType: ocispec.MediaTypeImageIndex, Digest: digest.FromString("none"), Platform: platform["elsewhere"]}, target}}
		wantConfigOfCRI(t, b, b.addJSON(t, nested.MediaType, nested), true)
	}
}

func TestIdentifyReadsJSONAsCRIDoes(t *testing.T) {
	b := blobs{}
	manifest := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: b.addManifest(t, "application/x", "{}").Digest}
	here, err := json.Marshal(platforms.DefaultSpec())
	if err != nil {
		t.Fatal(err)
	}
	one := fmt.Sprintf(`"mediaType": %q, "digest": %q`, manifest.MediaType, manifest.Digest)
	for _, text := range []string{
		`{"manifests": [{%[1]s, "platform": %[2]s}], "Manifests": [{}]}`,
		`{"manifests": [{"platform": {"os": "plan9"}}], "manifests": [{%[1]s, "platform": %[2]s}]}`,
		`{"manifests": [{"platform": %[2]s}], "manifests": [{%[1]s}]}`,
		`{"manifests": [{%[1]s, "platform": %[2]s}], "manifests": []}`,
		`{"manifests": [{%[1]s, "platform": %[2]s}], "manifests": null}`,
		`{"MANIFESTS": [{%[1]s, "platform": %[2]s, "size": 5}]}`,
	} {
		wantConfigOfCRI(t, b, b.add(ocispec.MediaTypeImageIndex, fmt.Appendf(nil, text, one, here)), true)
	}
	config := ocispec.DescriptorEmptyJSON.Digest
	for _, text := range []string{
		`{"config": {"digest": %[1]q}, "Config": {"mediaType": "application/x"}}`,
		`{"config": {"digest": "x"}, "config": {"digest": %[1]q}, "layers": [{}, {}, {}]}`,
		`{"config": {"digest": %[1]q}, "config": null}`,
		`{"config": null, "config": {"digest": %[1]q}}`,
		`{"config": {"digest": "x"}, "config": null, "config": {"digest": %[1]q}}`,
		"{\"config\": {\"digest\": %[1]q}, \"\xff\": 1}",
	} {
		wantConfigOfCRI(t, b, b.add(ocispec.MediaTypeImageManifest, fmt.Appendf(nil, text, config)), true)
	}
}

func TestIdentifyNeedsNoMediaTypeAndNoSize(t *testing.T) {
	b := blobs{}
	config := b.addJSON(t, ocispec.MediaTypeImageConfig, "{}")
	m := b.addJSON(t, ocispec.MediaTypeImageManifest, ocispec.Manifest{Config: config})
	m.Size++
	here := platforms.DefaultSpec()
	m.Platform = &here
	index := b.addJSON(t, ocispec.MediaTypeImageIndex, ocispec.Index{Manifests: []ocispec.Descriptor{m}})
	for _, target := range []digest.Digest{m.Digest, index.Digest} {
		manifest, got, err := Identify(t.Context(), b, ocispec.Descriptor{Digest: target})
		if err != nil || manifest != m.Digest || got.Digest != config.Digest || !IsImageConfig(got.MediaType) {
			t.Errorf("got manifest %s, config %+v, %v", manifest, got, err)
		}
	}
}

// containerd does not notice that a manifest on the disk has changed, so CRI knows the image
// by what the manifest says now.
func TestIdentifyReadsAManifestThatIsCorrupt(t *testing.T) {
	b := blobs{}
	config := ocispec.DescriptorEmptyJSON.Digest
	m := b.addJSON(t, ocispec.MediaTypeImageManifest, ocispec.Manifest{Config: ocispec.DescriptorEmptyJSON})
	b[m.Digest] = fmt.Appendf(nil, `{"config": {"mediaType": "Application/vnd.oci.image.config.v1+JSON; a=b", "digest": %q}, "changed": 1}`, config)
	_, got, err := Identify(t.Context(), b, m)
	if err != nil || got.Digest != config || !IsImageConfig(got.MediaType) {
		t.Errorf("got %+v, %v", got, err)
	}
	wantConfigOfCRI(t, b, m, true)
}

func TestIdentifyIsBounded(t *testing.T) {
	b := blobs{}
	config := fmt.Sprintf(`"config": {"digest": %q}`, ocispec.DescriptorEmptyJSON.Digest)
	for what, test := range map[string]struct {
		mediaType, text string
		tooLarge        bool
	}{
		"a manifest of many layers": {ocispec.MediaTypeImageManifest, fmt.Sprintf(`{%s, "layers": [{}%s]}`, config, strings.Repeat(",{}", 1<<20)), false},
		"a large manifest":          {ocispec.MediaTypeImageManifest, fmt.Sprintf(`{%s, "x": %q}`, config, strings.Repeat("x", maxManifestSize)), false},
		"a larger one":              {ocispec.MediaTypeImageManifest, fmt.Sprintf(`{%s, "x": %q}`, config, strings.Repeat("x", maxIdentifiedManifest)), true},
		"a large index":             {ocispec.MediaTypeImageIndex, fmt.Sprintf(`{"x": %q}`, strings.Repeat("x", maxIdentifiedIndex)), true},
	} {
		_, got, err := Identify(t.Context(), b, b.add(test.mediaType, []byte(test.text)))
		if test.tooLarge != (errors.Is(err, ErrTooLarge) && errdefs.IsInvalidArgument(err)) || !test.tooLarge && (err != nil || got.Digest != ocispec.DescriptorEmptyJSON.Digest) {
			t.Errorf("%s: %+v, %v", what, got, err)
		}
	}
}

func TestIdentifyEndsInACircleOfIndexes(t *testing.T) {
	b := blobs{}
	circle := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageIndex, Digest: digest.FromString("circle")}
	text, err := json.Marshal(ocispec.Index{Manifests: []ocispec.Descriptor{circle}})
	if err != nil {
		t.Fatal(err)
	}
	b[circle.Digest] = text
	if _, _, err := Identify(t.Context(), b, circle); !errors.Is(err, ErrTooLarge) {
		t.Errorf("%v", err)
	}
}

func TestIdentifySaysWhatIsWrong(t *testing.T) {
	b := blobs{}
	for text, want := range map[string]struct {
		kind error
		says string
	}{
		`x`:                               {errdefs.ErrInvalidArgument, "malformed JSON"},
		`{}`:                              {errdefs.ErrInvalidArgument, "config of manifest"},
		`{"config": {"digest": "x"}}`:     {errdefs.ErrInvalidArgument, "config of manifest"},
		`{"manifests": [{"digest": ""}]}`: {errdefs.ErrInvalidArgument, "digest"},
		`{"manifests": [{"platform": {"os": "plan9", "architecture": "mips"}}]}`: {errdefs.ErrNotFound, "no manifest for"},
	} {
		_, _, err := Identify(t.Context(), b, ocispec.Descriptor{Digest: b.add("", []byte(text)).Digest})
		wantError(t, err, want.kind, want.says)
	}
	_, _, err := Identify(t.Context(), b, ocispec.Descriptor{Digest: digest.FromString("none")})
	wantError(t, err, errdefs.ErrNotFound, "pull it again")
}

func TestLayersAreThoseThatCanBeRead(t *testing.T) {
	b := blobs{}
	good := layer("application/x", "x", ocispec.AnnotationTitle, "good")
	manifest := b.addManifest(t, "application/x", "not read", layer("application/x", "x", ocispec.AnnotationTitle, "../bad"), good)
	delete(b, digest.FromString("not read"))
	if got := Layers(t.Context(), b, manifest); len(got) != 1 || got[0].Index != 1 || got[0].File.Path != "good" {
		t.Errorf("got %+v", got)
	}
	if got := Layers(t.Context(), b, ocispec.Descriptor{Digest: b.add("", []byte("{}")).Digest}); len(got) != 0 {
		t.Errorf("of no manifest: %+v", got)
	}
}

// FuzzIdentify compares Identify with containerd. In the document the word CONFIG stands
// for the digest of the other blob.
func FuzzIdentify(f *testing.F) {
	for _, text := range []string{
		`{}`, `null`, `{"config":{"digest":"CONFIG"}}`, `{"manifests":[]}`, `{"manifests":null}`,
		`{"manifests":[{"digest":"CONFIG","mediaType":"application/vnd.oci.image.manifest.v1+json"},{"digest":"CONFIG","platform":{"os":"linux","architecture":"amd64"}}]}`,
		`{"manifests":[{"platform":{"os":"linux","architecture":"arm64"}}],"Manifests":[{"digest":"x"}]}`, `{"manifests":{}}`, `{"manifests":[1]}`, `{"manifests":[{}],"manifests":[{}]}`,
		`{"config":[]}`, `{"manifests":[[]]}`, `{"manifests":[{"platform":1}]}`,
	} {
		f.Add([]byte(text), []byte(`{"config":{"digest":"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"}}`), true)
		f.Add([]byte(text), []byte(`{"config":{"digest":"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"}}`), false)
	}
	f.Fuzz(func(t *testing.T, text, other []byte, index bool) {
		b := blobs{}
		mediaType := ocispec.MediaTypeImageManifest
		if index {
			mediaType = ocispec.MediaTypeImageIndex
		}
		target := b.add(mediaType, []byte(strings.ReplaceAll(string(text), "CONFIG", b.add("", other).Digest.String())))
		m, err := images.Manifest(t.Context(), b, target, platforms.Default())
		if err == nil && validDigest(m.Config.Digest) != nil {
			return // CRI has no use for it
		}
		wantConfigOfCRI(t, b, target, false)
	})
}
