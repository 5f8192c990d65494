// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package images

import (
	"context"
	"fmt"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
	"github.com/artifact-snapshotter/artifact-snapshotter/blobs"
)

// crowd returns a Watcher that knows one artifact and a number of others, each by the three
// names that CRI gives it. config returns the config of an artifact; the one is number 0.
func crowd(others int, config func(int) string) (w *Watcher, one digest.Digest) {
	w = NewWatcher("", "")
	known := newCatalog()
	for i := range others + 1 {
		manifest := fmt.Sprint("manifest ", i)
		for _, name := range []string{
			fmt.Sprintf("registry.example.com/models/%d:v1", i),
			"registry.example.com/models@" + digest.FromString(manifest).String(),
			digest.FromString(config(i)).String(),
		} {
			known.put(*sampleImage(name, manifest, config(i)))
		}
	}
	w.known = map[string]*catalog{"k8s.io": known}
	return w, digest.FromString("manifest 0")
}

func ownConfig(i int) string { return fmt.Sprint("config ", i) }

func sharedConfig(int) string { return "shared" }

// The cost of a request for an image volume depends on its artifact alone.
func TestTheCostOfACheckDoesNotDependOnOtherImages(t *testing.T) {
	judge := func(others int) float64 {
		w, one := crowd(others, ownConfig)
		return testing.AllocsPerRun(100, func() {
			if err := w.judge(t.Context(), w.known["k8s.io"], one); err != nil {
				t.Error(err)
			}
			if name := w.Name("k8s.io", one); name != "registry.example.com/models/0:v1" {
				t.Errorf("it is called %q", name)
			}
			if _, ok := w.same("k8s.io", one); !ok {
				t.Error("its config would be looked for again")
			}
		})
	}
	if alone, among := judge(0), judge(2000); among > alone {
		t.Errorf("a check takes %v allocations alone, and %v among 2,000 others", alone, among)
	}
}

func TestACatalogForgetsImagesThatAreReplacedOrRemoved(t *testing.T) {
	one, other := digest.FromString("one"), digest.FromString("other")
	c := newCatalog()
	c.put(*sampleImage("tag:v1", "one", "config"))
	c.put(*sampleImage("tag:v2", "one", "config"))
	c.put(*sampleImage("tag:v1", "other", "config"))
	c.remove("no such name")
	for digest, want := range map[digest.Digest]string{one: "tag:v2", other: "tag:v1"} {
		if got := c.find(digest); got == nil || got.Name != want || len(c.withTarget(digest)) != 1 || len(c.withManifest(digest)) != 1 {
			t.Errorf("got %v, want %s alone", got, want)
		}
	}
	if got := c.withConfig(digest.FromString("config")); len(got) != 2 {
		t.Errorf("%d images have the config, want 2", len(got))
	}
	c.remove("tag:v1")
	c.remove("tag:v2")
	if len(c.byName)+len(c.byDigest)+len(c.undecided) > 0 || c.find(one) != nil {
		t.Errorf("the catalog still has %v", c)
	}
}

func TestStatsCountEachArtifactOnce(t *testing.T) {
	for _, tt := range []struct {
		config    func(int) string
		conflicts int
	}{{ownConfig, 0}, {sharedConfig, 11}} {
		w, _ := crowd(10, tt.config)
		if got, want := w.Stats(), (WatcherStats{Connected: true, Artifacts: 11, Conflicts: tt.conflicts}); got != want {
			t.Errorf("got %+v, want %+v", got, want)
		}
	}
}

func BenchmarkCheck(b *testing.B) {
	for _, bench := range []struct {
		name   string
		others int
		config func(int) string
	}{{"alone", 0, ownConfig}, {"among 2000", 2000, ownConfig}, {"2000 with its config", 2000, sharedConfig}} {
		w, one := crowd(bench.others, bench.config)
		b.Run(bench.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if err := w.judge(b.Context(), w.known["k8s.io"], one); errdefs.IsFailedPrecondition(err) != (bench.config(0) == "shared") {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkStats(b *testing.B) {
	for _, others := range []int{200, 2000} {
		w, _ := crowd(others, sharedConfig)
		b.Run(fmt.Sprintf("%d with one config", others), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				w.Stats()
			}
		})
	}
}

// counting counts how often each blob is opened.
type counting struct {
	content.Provider
	opened map[digest.Digest]int
}

func (c counting) ReaderAt(ctx context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	c.opened[desc.Digest]++
	return c.Provider.ReaderAt(ctx, desc)
}

// CRI gives an image three names, and reading it may be expensive.
func TestASurveyReadsEachImageOnce(t *testing.T) {
	w, targets := newTestWatcher(t, "one", "two")
	var all []images.Image
	for name, target := range targets {
		for _, i := range []string{"registry.example.com/" + name + ":v1", name + "@" + target.String(), target.String()} {
			all = append(all, imageRecord(i, target))
		}
	}
	near, far := counting{w.blobs, map[digest.Digest]int{}}, counting{w.blobs, map[digest.Digest]int{}}
	layers := 0
	s, err := survey(t.Context(), nearby{near, far}, all, func(a *artifact.Artifact) { layers += len(a.Layers) })
	if err != nil {
		t.Fatal(err)
	}
	if len(s.Artifacts) != 6 || layers != 2 {
		t.Errorf("there are %d names and %d layers, want 6 and 2", len(s.Artifacts), layers)
	}
	for _, i := range s.Artifacts {
		if i.Artifact != nil || i.ChainID() == "" || i.Config != ocispec.DescriptorEmptyJSON.Digest {
			t.Errorf("the survey has %+v", i)
		}
	}
	for blob, times := range near.opened {
		if blob != ocispec.DescriptorEmptyJSON.Digest && times != 1 {
			t.Errorf("blob %s is opened %d times", blob, times)
		}
	}
	if len(near.opened) < 2 || len(far.opened) > 0 {
		t.Errorf("near blobs are opened %v, far ones %v", near.opened, far.opened)
	}

	near.Provider = blobs.Dir(t.TempDir())
	if s, err := survey(t.Context(), nearby{near, far}, all[:1], nil); err != nil || len(s.Artifacts) != 1 || len(far.opened) == 0 {
		t.Errorf("blobs that are not near: %+v, %v", s, err)
	}
}
