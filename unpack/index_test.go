// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"archive/tar"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
)

// kinds are all kinds of layers.
var kinds = []string{"raw", "tar", "gzip", "zstd"}

// layerOf returns a layer of a kind with the content at name.
func (s site) layerOf(t *testing.T, kind, name, content string) artifact.Layer {
	t.Helper()
	compressions := map[string]artifact.Compression{
		"tar": artifact.CompressionNone, "gzip": artifact.CompressionGzip, "zstd": artifact.CompressionZstd,
	}
	if kind == "raw" {
		return s.Raw(t, name, content)
	}
	return s.Tar(t, compressions[kind], archive(t, file(name, content)))
}

func permutations(of []string) (all [][]string) {
	if len(of) < 2 {
		return [][]string{slices.Clone(of)}
	}
	for i, first := range of {
		for _, rest := range permutations(slices.Delete(slices.Clone(of), i, i+1)) {
			all = append(all, append([]string{first}, rest...))
		}
	}
	return all
}

func TestTheLastLayerWinsForAnyKindsOfLayers(t *testing.T) {
	for _, mode := range []Modes{best, {Overlay, Extract}, {Copy, EROFS}} {
		for _, order := range permutations(kinds) {
			t.Run(mode.String()+"/"+strings.Join(order, ","), func(t *testing.T) {
				t.Parallel()
				s := newSite(t)
				var layers []artifact.Layer
				for i, kind := range order {
					layers = append(layers, s.layerOf(t, kind, "d/f", kind), s.layerOf(t, kind, fmt.Sprint("d/of ", i), kind))
				}
				dir := s.mounted(t, mode, layers...)
				if got, want := read(t, dir, "d/f"), order[len(order)-1]; got != want {
					t.Errorf("d/f is of the layer %s, want %s", got, want)
				}
				for i, kind := range order {
					if got := read(t, dir, fmt.Sprint("d/of ", i)); got != kind {
						t.Errorf("the other file of %s holds %q", kind, got)
					}
				}
			})
		}
	}
}

func TestABlobCanBeManyLayers(t *testing.T) {
	for _, mode := range everyPair {
		for _, kind := range kinds {
			t.Run(mode.String()+"/"+kind, func(t *testing.T) {
				t.Parallel()
				s := newSite(t)
				a, b := s.layerOf(t, kind, "f", "a"), s.layerOf(t, kind, "f", "b")
				if kind == "raw" { // of which two may not have one path
					b = s.layerOf(t, kind, "g", "b")
				}
				if dir := s.mounted(t, mode, a, b, a); read(t, dir, "f") != "a" {
					t.Error("the first layer's blob, as the last one, does not win")
				}
			})
		}
	}
}

func TestABlobCanBeATarAndAFile(t *testing.T) {
	for _, mode := range everyPair {
		for _, order := range [][]string{{"file", "tar"}, {"tar", "file"}, {"file", "tar", "file"}} {
			for c, compression := range map[string]artifact.Compression{
				"plain": artifact.CompressionNone, "gzip": artifact.CompressionGzip, "zstd": artifact.CompressionZstd,
			} {
				t.Run(mode.String()+"/"+strings.Join(order, ",")+"/"+c, func(t *testing.T) {
					t.Parallel()
					s := newSite(t)
					asTar := s.Tar(t, compression, archive(t, file("member", strings.Repeat("hello", 1000))))
					asFile := artifact.Layer{Descriptor: asTar.Descriptor, Format: artifact.FormatRaw, File: artifact.File{Path: "model.tar", Mode: 0o644, ModTime: mtime}}
					var layers []artifact.Layer
					for i, what := range order {
						l := asTar
						if what == "file" {
							l = asFile
							l.File.Path += itoa(i)
						}
						layers = append(layers, l)
					}
					dir := s.mounted(t, mode, layers...)
					if got := read(t, dir, "member"); got != strings.Repeat("hello", 1000) {
						t.Errorf("the member holds %d other bytes", len(got))
					}
					blob := read(t, string(s.Content), "blobs/sha256", asTar.Descriptor.Digest.Encoded())
					for i, what := range order {
						if what == "file" && read(t, dir, "model.tar"+itoa(i)) != blob {
							t.Error("the blob as a file holds something else")
						}
					}
				})
			}
		}
	}
}

func TestALayerCanReplaceAHardLinkedFile(t *testing.T) {
	for _, mode := range everyPair {
		t.Run(mode.String(), func(t *testing.T) {
			s := newSite(t)
			linked := archive(t, file("first", "1"), tar.Header{Name: "second", Typeflag: tar.TypeLink, Linkname: "first"},
				tar.Header{Name: "third", Typeflag: tar.TypeLink, Linkname: "second"})
			dir := s.mounted(t, mode, s.Tar(t, artifact.CompressionNone, linked), s.Raw(t, "first", "raw"),
				s.Tar(t, artifact.CompressionGzip, archive(t, file("third", "tar"))))
			for name, want := range map[string]string{"first": "raw", "second": "1", "third": "tar"} {
				if got := read(t, dir, name); got != want {
					t.Errorf("%s holds %q, want %q", name, got, want)
				}
			}
		})
	}
}
