// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package images

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
	"github.com/artifact-snapshotter/artifact-snapshotter/blobs"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
)

// refusedArtifact has the empty config and a file name that is refused.
func refusedArtifact() *pack.Artifact {
	return &pack.Artifact{ArtifactType: pack.GenericType, ConfigType: ocispec.MediaTypeEmptyJSON, Layers: []pack.Layer{{
		MediaType: "text/plain", Data: []byte("x"), Annotations: map[string]string{ocispec.AnnotationTitle: "/etc/passwd"},
	}}}
}

// writeBlob writes a blob and returns its descriptor without a media type.
func writeBlob(t *testing.T, blobs blobs.Dir, data string) ocispec.Descriptor {
	t.Helper()
	desc := ocispec.Descriptor{Digest: digest.FromString(data), Size: int64(len(data))}
	if err := os.WriteFile(blobs.Path(desc.Digest), []byte(data), 0o444); err != nil {
		t.Fatal(err)
	}
	return desc
}

// sameConfig returns targets for which CRI finds the empty config, although package
// artifact refuses them.
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

func TestAnArtifactThatIsRefusedMayBeInConflict(t *testing.T) {
	w, targets := newTestWatcher(t, "one")
	s, _ := fakeStream(1)
	following(t, w, s, noImages)
	for name, target := range sameConfig(t, w.blobs) {
		t.Run(name, func(t *testing.T) {
			image := w.identify(t.Context(), images.Image{Name: "refused:v1", Target: target})
			if _, err := artifact.Read(t.Context(), w.blobs, target); err == nil || image.Config != ocispec.DescriptorEmptyJSON.Digest || image.container {
				t.Fatalf("got %+v", image)
			}
			w.know(t.Context(), targets, "k8s.io/one")
			w.set(func() { w.known["k8s.io"].put(image) })
			for _, of := range []digest.Digest{targets["one"], target.Digest} {
				if err := w.Check(t.Context(), "k8s.io", of); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), `"refused:v1"`) {
					t.Errorf("got %v, want that it is refused with the name of the other", err)
				}
			}
			w.set(func() { w.known["k8s.io"].remove("refused:v1") })
			if err := w.Check(t.Context(), "k8s.io", target.Digest); !errdefs.IsFailedPrecondition(err) {
				t.Errorf("got %v, want that it is refused although it is not known", err)
			}
			w.know(t.Context(), targets)
			if err := w.Check(t.Context(), "k8s.io", target.Digest); err != nil {
				t.Errorf("alone: %v", err)
			}
		})
	}
}

func TestAManifestThatCRICannotReadHasNoConfig(t *testing.T) {
	w, _ := newTestWatcher(t, "one")
	for name, manifest := range map[string]string{
		"no JSON":            "x",
		"no config":          `{"layers": []}`,
		"no digest":          `{"config": {"digest": "x"}, "layers": []}`,
		"no manifest for us": `{"manifests": []}`,
	} {
		t.Run(name, func(t *testing.T) {
			image := w.identify(t.Context(), images.Image{Name: "odd:v1", Target: writeBlob(t, w.blobs, manifest)})
			if image.Config != "" || image.undecided != nil || image.IsID() {
				t.Errorf("got %+v", image)
			}
		})
	}
}

// Large manifests must neither hide a conflict nor make other volumes unavailable.
func TestTheConfigOfALargeManifestIsFound(t *testing.T) {
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
		"bytes":       {ocispec.MediaTypeImageManifest, fmt.Sprintf(`{%s, "layers": [], "x": "%s"}`, config, strings.Repeat("x", 9<<20)), true},
		"layers":      {ocispec.MediaTypeImageManifest, fmt.Sprintf(`{%s, "layers": [{}%s]}`, config, strings.Repeat(",{}", 1<<20)), true},
		"other nodes": {ocispec.MediaTypeImageIndex, fmt.Sprintf(`{"manifests": [%s%s]}`, good, strings.Repeat(`,{"platform":{"os":"a","architecture":"b"}}`, 1000)), false},
		"more bytes":  {ocispec.MediaTypeImageManifest, fmt.Sprintf(`{%s, "layers": [], "x": "%s"}`, config, strings.Repeat("x", 9<<20)), true},
		"entries":     {ocispec.MediaTypeImageIndex, fmt.Sprintf(`{"manifests": [{}%s]}`, strings.Repeat(",{}", 1<<17)), false},
	} {
		t.Run(name, func(t *testing.T) {
			target := writeBlob(t, w.blobs, tt.text)
			target.MediaType = tt.mediaType
			image := w.identify(t.Context(), images.Image{Name: "large:v1", Target: target})
			w.know(t.Context(), targets, "k8s.io/one")
			w.set(func() { w.known["k8s.io"].put(image) })
			if err := w.Check(t.Context(), "k8s.io", targets["one"]); errdefs.IsFailedPrecondition(err) != tt.refused || !tt.refused && err != nil {
				t.Errorf("got %v, want refused: %v", err, tt.refused)
			}
		})
	}
}

// The runtime may mount an image whose config we cannot find in place of another whose config
// it names. So that one is not mounted until it is removed, and the error names it. All other
// images are mounted.
func TestAnImageWithAnUnknownConfigMakesVolumesOfItsConfigUnavailable(t *testing.T) {
	w, targets := newTestWatcher(t, "one")
	s, _ := fakeStream(1)
	following(t, w, s, noImages)
	other := pack.Artifact{ArtifactType: pack.GenericType, ConfigType: "application/x-config", Config: []byte("[1]"), Layers: []pack.Layer{{MediaType: "text/plain", Data: []byte("other")}}}
	desc, err := other.WriteTo(string(w.blobs))
	if err != nil {
		t.Fatal(err)
	}
	targets["other"] = desc.Digest
	config := fmt.Sprintf(`"config": {"digest": %q}`, ocispec.DescriptorEmptyJSON.Digest)
	for mediaType, text := range map[string]string{
		ocispec.MediaTypeImageManifest: fmt.Sprintf(`{%s, "x": "%s"}`, config, strings.Repeat("x", 64<<20)),
		ocispec.MediaTypeImageIndex:    fmt.Sprintf(`{"manifests": [{"digest": %q}], "x": "%s"}`, targets["one"], strings.Repeat("x", 8<<20)),
		"":                             fmt.Sprintf(`{%s, "x": "%s"}`, config, strings.Repeat("x", 8<<20)),
	} {
		t.Run(mediaType, func(t *testing.T) {
			target := writeBlob(t, w.blobs, text)
			target.MediaType = mediaType
			w.know(t.Context(), targets, "k8s.io/one", "k8s.io/other")
			w.set(func() {
				w.known["k8s.io"].put(w.identify(t.Context(), images.Image{Name: "odd:v1", Target: target}))
			})
			for range 2 { // the second time it is remembered
				if err := w.Check(t.Context(), "k8s.io", targets["other"]); err != nil {
					t.Errorf("with another config: %v", err)
				}
			}
			if n := len(w.known["k8s.io"].excluded); n != 1 {
				t.Errorf("%d answers are remembered", n)
			}
			for _, of := range []digest.Digest{target.Digest, targets["one"]} {
				if err := w.Check(t.Context(), "k8s.io", of); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), `"odd:v1"`) || !strings.Contains(err.Error(), "over the limit") {
					t.Errorf("got %v, want that it is unknown, and why", err)
				}
			}
			w.set(func() { w.known["k8s.io"].remove("odd:v1") })
			if err := w.Check(t.Context(), "k8s.io", targets["one"]); err != nil {
				t.Errorf("without it: %v", err)
			}
		})
	}
}

// A shortage of files, for example, says nothing about the image.
func TestAnImageThatCouldNotBeReadIsReadAgain(t *testing.T) {
	w, targets := newTestWatcher(t, "one", "two")
	s, _ := fakeStream(1)
	following(t, w, s, noImages)
	unread := func() {
		w.know(t.Context(), targets, "k8s.io/one")
		w.set(func() {
			w.known["k8s.io"].put(Image{Image: imageRecord("two", targets["two"]), undecided: syscall.EMFILE})
		})
	}

	unread()
	blobs := w.blobs
	w.blobs = "/dev/null" // ENOTDIR
	err := w.Check(t.Context(), "k8s.io", targets["one"])
	w.blobs = blobs
	if !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), `image "two"`) {
		t.Errorf("got %v, want that it is unavailable because of two", err)
	}
	for range 2 { // the second time it is known
		if err := w.Check(t.Context(), "k8s.io", targets["one"]); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("got %v, want that it is refused", err)
		}
	}

	unread()
	if err := os.Remove(w.blobs.Path(targets["two"])); err != nil {
		t.Fatal(err)
	}
	if err := w.Check(t.Context(), "k8s.io", targets["one"]); err != nil {
		t.Errorf("the manifest of two is missing, so CRI cannot find its config either: %v", err)
	}
}

// An image may be replaced or removed while its config is looked for.
func TestAnImageThatIsReadAgainDoesNotComeBack(t *testing.T) {
	w, targets := newTestWatcher(t, "one", "two")
	w.know(t.Context(), targets, "k8s.io/one")
	known := w.known["k8s.io"]
	known.put(Image{Image: imageRecord("two", targets["two"]), undecided: syscall.EMFILE})
	w.blobs = "/dev/null"
	if undecided := w.readAgain(t.Context(), known); len(undecided) != 1 || undecided[0].Name != "two" {
		t.Errorf("undecided is %v, want two", undecided)
	}
	again := known.toReadAgain()
	known.remove("two")
	w.replace(known, again[0], *sampleImage("two", "two", "shared"))
	if known.byName["two"] != nil {
		t.Error("an image that has been removed is there again")
	}
}
