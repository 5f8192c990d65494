// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package images

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/artifact-snapshotter/artifact-snapshotter/blobs"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
)

// refusedArtifact has the empty config and a name that no file may have.
func refusedArtifact() *pack.Artifact {
	return &pack.Artifact{ArtifactType: pack.GenericType, ConfigType: ocispec.MediaTypeEmptyJSON, Layers: []pack.Layer{{
		MediaType: "text/plain", Data: []byte("x"), Annotations: map[string]string{ocispec.AnnotationTitle: "/etc/passwd"},
	}}}
}

// writeBlob writes a blob, and returns its descriptor without a media type.
func writeBlob(t *testing.T, blobs blobs.Dir, data string) ocispec.Descriptor {
	t.Helper()
	desc := ocispec.Descriptor{Digest: digest.FromString(data), Size: int64(len(data))}
	if err := os.WriteFile(blobs.Path(desc.Digest), []byte(data), 0o444); err != nil {
		t.Fatal(err)
	}
	return desc
}

// sameConfig are targets whose config is the empty one to CRI, though no artifact
// can be made of them.
func sameConfig(t *testing.T, blobs blobs.Dir) map[string]ocispec.Descriptor {
	t.Helper()
	refused, err := refusedArtifact().WriteTo(string(blobs))
	if err != nil {
		t.Fatal(err)
	}
	here := platforms.DefaultSpec()
	index, err := (&pack.Index{Manifests: []pack.IndexEntry{{Artifact: refusedArtifact(), Platform: &here}}}).WriteTo(string(blobs))
	if err != nil {
		t.Fatal(err)
	}
	lying := refused
	lying.Platform, lying.Size = &here, refused.Size+1
	text, err := json.Marshal(ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{lying}})
	if err != nil {
		t.Fatal(err)
	}
	ofOtherSize := writeBlob(t, blobs, string(text))
	ofOtherSize.MediaType = ocispec.MediaTypeImageIndex
	targets := map[string]ocispec.Descriptor{"refused": refused, "index": index, "another size": ofOtherSize}
	for _, name := range []string{"refused", "index"} {
		targets[name+", no type"] = ocispec.Descriptor{Digest: targets[name].Digest}
	}
	return targets
}

func TestWhatIsRefusedHasAConfig(t *testing.T) {
	w, targets := newTestWatcher(t, "one")
	s, _ := fakeStream(1)
	following(t, w, s, noImages)
	for name, target := range sameConfig(t, w.blobs) {
		t.Run(name, func(t *testing.T) {
			image := readAny(t.Context(), w.blobs, images.Image{Name: "refused:v1", Target: target})
			if image.Artifact == nil || image.Artifact.Config != ocispec.DescriptorEmptyJSON.Digest || image.isArtifact() || image.ordinary {
				t.Fatalf("got %+v", image)
			}
			w.know(t.Context(), targets, "k8s.io/one")
			w.set(func() { w.known["k8s.io"].put(image.brief()) })
			for _, of := range []digest.Digest{targets["one"], target.Digest} {
				if err := w.Check(t.Context(), "k8s.io", of); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), `"refused:v1"`) {
					t.Errorf("got %v, want that it is refused with the name of the other", err)
				}
			}
			w.set(func() { w.known["k8s.io"].remove("refused:v1") })
			if err := w.Check(t.Context(), "k8s.io", target.Digest); !errdefs.IsFailedPrecondition(err) {
				t.Errorf("got %v, want that it is refused, though it is not known", err)
			}
			w.know(t.Context(), targets)
			if err := w.Check(t.Context(), "k8s.io", target.Digest); err != nil {
				t.Errorf("alone: %v", err)
			}
		})
	}
}

func TestWhatCRICannotKnowHasNoConfig(t *testing.T) {
	w, _ := newTestWatcher(t, "one")
	for name, manifest := range map[string]string{
		"no JSON":            "x",
		"no config":          `{"layers": []}`,
		"no digest":          `{"config": {"digest": "x"}, "layers": []}`,
		"no manifest for us": `{"manifests": []}`,
	} {
		t.Run(name, func(t *testing.T) {
			image := readAny(t.Context(), w.blobs, images.Image{Name: "odd:v1", Target: writeBlob(t, w.blobs, manifest)})
			if image.Artifact != nil || image.unread != nil || image.IsID() {
				t.Errorf("got %+v", image)
			}
		})
	}
}

// Others must not be able to keep an artifact from being judged, or all others from
// being shown.
func TestALargeManifestHasAConfig(t *testing.T) {
	w, targets := newTestWatcher(t, "one")
	s, _ := fakeStream(1)
	following(t, w, s, noImages)
	config := fmt.Sprintf(`"config": {"mediaType": %q, "digest": %q, "size": 2}`, ocispec.MediaTypeEmptyJSON, ocispec.DescriptorEmptyJSON.Digest)
	here := platforms.DefaultSpec()
	good, err := json.Marshal(ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: targets["one"], Platform: &here})
	if err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		mediaType, text string
		refused         bool
	}{
		"bytes":       {ocispec.MediaTypeImageManifest, fmt.Sprintf(`{%s, "layers": [], "x": %q}`, config, strings.Repeat("x", 9<<20)), true},
		"layers":      {ocispec.MediaTypeImageManifest, fmt.Sprintf(`{%s, "layers": [{}%s]}`, config, strings.Repeat(",{}", 1<<20)), true},
		"other nodes": {ocispec.MediaTypeImageIndex, fmt.Sprintf(`{"manifests": [%s%s]}`, good, strings.Repeat(`,{"platform":{"os":"a","architecture":"b"}}`, 1000)), false},
		"more bytes":  {ocispec.MediaTypeImageManifest, fmt.Sprintf(`{%s, "layers": [], "x": %q}`, config, strings.Repeat("x", 9<<20)), true},
		"entries":     {ocispec.MediaTypeImageIndex, fmt.Sprintf(`{"manifests": [{}%s]}`, strings.Repeat(",{}", 1<<17)), false},
	} {
		t.Run(name, func(t *testing.T) {
			target := writeBlob(t, w.blobs, tt.text)
			target.MediaType = tt.mediaType
			image := readAny(t.Context(), w.blobs, images.Image{Name: "large:v1", Target: target})
			w.know(t.Context(), targets, "k8s.io/one")
			w.set(func() { w.known["k8s.io"].put(image.brief()) })
			if err := w.Check(t.Context(), "k8s.io", targets["one"]); errdefs.IsFailedPrecondition(err) != tt.refused || !tt.refused && err != nil {
				t.Errorf("got %v, want refused: %v", err, tt.refused)
			}
		})
	}
}

// What is too large to read is what CRI's name for it says, even when CRI has given
// the name to another image since.
func TestWhatIsNotReadIsKnownByItsImageID(t *testing.T) {
	w, targets := newTestWatcher(t, "one")
	s, _ := fakeStream(1)
	following(t, w, s, noImages)
	config := fmt.Sprintf(`"config": {"digest": %q}`, ocispec.DescriptorEmptyJSON.Digest)
	for name, text := range map[string]string{
		"too large":       fmt.Sprintf(`{%s, "x": %q}`, config, strings.Repeat("x", maxDocument)),
		"manifests twice": fmt.Sprintf(`{%s, "manifests": [{}], "Manifests": [], "x": %q}`, config, strings.Repeat("x", maxTwice)),
	} {
		t.Run(name, func(t *testing.T) {
			target := writeBlob(t, w.blobs, text)
			target.MediaType = ocispec.MediaTypeImageManifest
			record := func(name string) {
				w.set(func() {
					w.known["k8s.io"].put(readAny(t.Context(), w.blobs, images.Image{Name: name, Target: target}).brief())
				})
			}
			w.know(t.Context(), targets, "k8s.io/one")
			record("odd:v1")
			for _, of := range []digest.Digest{target.Digest, targets["one"]} {
				if err := w.Check(t.Context(), "k8s.io", of); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), `"odd:v1"`) {
					t.Errorf("got %v, want that it is not known", err)
				}
			}
			id := ocispec.DescriptorEmptyJSON.Digest.String()
			record(id)
			w.set(func() {
				w.known["k8s.io"].put(readAny(t.Context(), w.blobs, imageRecord(id, targets["one"])).brief())
			})
			for _, of := range []digest.Digest{target.Digest, targets["one"]} {
				if err := w.Check(t.Context(), "k8s.io", of); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), `"odd:v1"`) {
					t.Errorf("got %v, want that it is refused", err)
				}
			}
			// Another ID is another config.
			w.know(t.Context(), targets, "k8s.io/one")
			record("odd:v1")
			record(digest.FromString("other").String())
			if err := w.Check(t.Context(), "k8s.io", targets["one"]); err != nil {
				t.Errorf("got %v, want that it is shown", err)
			}
		})
	}
}

// What cannot be read for want of files, say, is read again.
func TestWhatCannotBeReadIsReadAgain(t *testing.T) {
	w, targets := newTestWatcher(t, "one", "two")
	s, _ := fakeStream(1)
	following(t, w, s, noImages)
	two := w.blobs.Path(targets["two"])
	if err := os.Rename(two, two+".aside"); err != nil {
		t.Fatal(err)
	}
	w.know(t.Context(), targets, "k8s.io/one")
	w.set(func() {
		w.known["k8s.io"].put(Image{Image: imageRecord("two", targets["two"]), refused: syscall.EMFILE, unread: syscall.EMFILE})
	})
	if err := w.Check(t.Context(), "k8s.io", targets["one"]); err != nil {
		t.Errorf("two is not there any more: %v", err)
	}
	if err := os.Rename(two+".aside", two); err != nil {
		t.Fatal(err)
	}
	if err := w.Check(t.Context(), "k8s.io", targets["one"]); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("got %v, want that it is refused", err)
	}
	blobs := w.blobs
	w.blobs = "/dev/null" // ENOTDIR
	err := w.Check(t.Context(), "k8s.io", targets["one"])
	w.blobs = blobs
	if !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), `image "two"`) {
		t.Errorf("got %v, want that it is unavailable because of two", err)
	}
}

// It is containerd's code that decides what CRI finds.
func TestTheConfigIsThatWhichCRIFinds(t *testing.T) {
	blobs := blobs.Dir(t.TempDir())
	here := platforms.DefaultSpec()
	worse := ocispec.Platform{OS: here.OS, Architecture: "386"} // amd64 runs it, too
	platform := map[string]*ocispec.Platform{"here": &here, "worse": &worse, "none": nil, "elsewhere": {OS: "plan9", Architecture: "mips"}}
	names := slices.Sorted(maps.Keys(platform))
	for i := range 256 { // all lists of four
		index := pack.Index{}
		var of []string
		for n := range 4 {
			name := names[i>>(2*n)&3]
			of = append(of, name)
			config := fmt.Sprintf(`{"os": %q, "architecture": %q, "n": %d}`, here.OS, here.Architecture, n)
			index.Manifests = append(index.Manifests, pack.IndexEntry{
				Artifact: &pack.Artifact{ConfigType: ocispec.MediaTypeImageConfig, Config: []byte(config)},
				Platform: platform[name],
			})
		}
		target, err := index.WriteTo(string(blobs))
		if err != nil {
			t.Fatal(err)
		}
		want, wantErr := images.Manifest(t.Context(), blobs, target, platforms.Default())
		_, got, err := configOf(t.Context(), blobs, target)
		if got != want.Config.Digest || (err == nil) != (wantErr == nil) {
			t.Errorf("of %q: got %s, %v, want %s, %v", of, got, err, want.Config.Digest, wantErr)
		}
	}
}

func TestListsOfManifestsAreMerged(t *testing.T) {
	w, targets := newTestWatcher(t, "one")
	here, err := json.Marshal(platforms.DefaultSpec())
	if err != nil {
		t.Fatal(err)
	}
	one := fmt.Sprintf(`"mediaType": %q, "digest": %q`, ocispec.MediaTypeImageManifest, targets["one"])
	for _, text := range []string{
		`{"manifests": [{%[1]s, "platform": %[2]s}], "Manifests": [{}]}`,
		`{"manifests": [{"platform": {"os": "plan9"}}], "manifests": [{%[1]s, "platform": %[2]s}]}`,
		`{"manifests": [{"platform": %[2]s}], "manifests": [{%[1]s}]}`,
		`{"manifests": [{%[1]s, "platform": %[2]s}], "manifests": []}`,
		`{"manifests": [{%[1]s, "platform": %[2]s}], "manifests": null}`,
	} {
		target := writeBlob(t, w.blobs, fmt.Sprintf(text, one, here))
		target.MediaType = ocispec.MediaTypeImageIndex
		want, wantErr := images.Manifest(t.Context(), w.blobs, target, platforms.Default())
		_, got, err := configOf(t.Context(), w.blobs, target)
		if got != want.Config.Digest || (err == nil) != (wantErr == nil) {
			t.Errorf("%s: got %s, %v, want %s, %v", text, got, err, want.Config.Digest, wantErr)
		}
	}
}
