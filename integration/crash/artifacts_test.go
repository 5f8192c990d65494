// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

//go:build amd64

package crash

import (
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/treelist"
)

// model is an artifact with the expected content of its volume.
type model struct {
	name     string
	manifest ocispec.Descriptor
	layers   []ocispec.Descriptor // of ModelPack artifacts, for containerd's own unpacker
	blobs    string               // the directory that contains blobs/
	files    []string             // paths of the blobs, the manifest first, as in a pull
	want     []treelist.Entry
	refused  string // the reason why the daemon refuses it, or ""
}

// models has one model of every kind.
type models struct{ raw, tar, gzip, zstd, mixed, half, otherHalf, refused *model }

func (m *models) all() []*model {
	return []*model{m.raw, m.tar, m.gzip, m.zstd, m.mixed, m.half, m.otherHalf}
}

// packModels packs the models, the same bytes each time.
func packModels(t testing.TB) *models {
	t.Helper()
	return packModelsOf(t, 1)
}

// packModelsOf is packModels with different weights for each seed.
func packModelsOf(t testing.TB, seed byte) *models {
	t.Helper()
	src := t.TempDir()
	if err := writeFiles(src, seed); err != nil {
		t.Fatal(err)
	}
	forms := map[pack.Form]*pack.Artifact{}
	for _, form := range []pack.Form{pack.Raw, pack.Tar, pack.TarGzip, pack.TarZstd} {
		a, err := pack.Model(src, pack.Options{Form: form, Scratch: t.TempDir()})
		if err != nil {
			t.Fatal(err)
		}
		forms[form] = a
	}
	of := func(name string, layers ...pack.Layer) *pack.Artifact {
		return &pack.Artifact{ArtifactType: forms[pack.Raw].ArtifactType, Name: name, Layers: layers}
	}
	// Cycle through the forms, one per file.
	mixed := of("mixed")
	for i := range forms[pack.Raw].Layers {
		form := []pack.Form{pack.Raw, pack.TarGzip, pack.Tar, pack.TarZstd}[i%4]
		mixed.Layers = append(mixed.Layers, forms[form].Layers[i])
	}
	gzip := forms[pack.TarGzip].Layers
	wrong := slices.Clone(gzip)
	last := &wrong[len(wrong)-1]
	last.DiffID = digest.FromString("another content")
	list := func(which ...int) []treelist.Entry { return listed(t, src, forms[pack.Raw].Layers, which) }
	everything := make([]int, len(gzip))
	for i := range everything {
		everything[i] = i
	}
	return &models{
		raw:   newModel(t, "raw", forms[pack.Raw], list(everything...)),
		tar:   newModel(t, "tar", forms[pack.Tar], list(everything...)),
		gzip:  newModel(t, "tar+gzip", forms[pack.TarGzip], list(everything...)),
		zstd:  newModel(t, "tar+zstd", forms[pack.TarZstd], list(everything...)),
		mixed: newModel(t, "mixed", mixed, list(everything...)),
		// These two share a compressed layer, the weights.
		half:      newModel(t, "half", of("half", gzip[0], gzip[weights]), list(0, weights)),
		otherHalf: newModel(t, "other half", of("other half", gzip[1], gzip[weights]), list(1, weights)),
		refused: func() *model {
			m := newModel(t, "refused", of("refused", wrong...), nil)
			m.refused = "the config lists the DiffID"
			return m
		}(),
	}
}

// weights is the index of the layer with the largest file.
const (
	weights     = 4
	weightsFile = "weights.safetensors"
)

// writeFiles writes the files of all models, in layer order.
func writeFiles(dir string, seed byte) error {
	random := make([]byte, 600<<10+123)
	if _, err := rand.NewChaCha8([32]byte{seed}).Read(random); err != nil {
		return err
	}
	for i, f := range []struct {
		name    string
		mode    fs.FileMode
		content string
	}{
		{"README.md", 0o644, "# crash\n"},
		{"config.json", 0o600, `{"hidden_size": 8}` + "\n"},
		{"scripts/run.sh", 0o755, "#!/bin/sh\n"},
		{"src/__init__.py", 0o644, ""},
		{weightsFile, 0o644, string(random)},
	} {
		name := filepath.Join(dir, f.name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(name, []byte(f.content), f.mode); err != nil {
			return err
		}
		if err := os.Chtimes(name, time.Time{}, pack.Created.Add(time.Duration(i)*time.Hour)); err != nil {
			return err
		}
	}
	return os.Chown(filepath.Join(dir, "config.json"), 1234, 5678)
}

// listed returns the expected volume of the layers with these numbers, whose files are in
// dir.
func listed(t testing.TB, dir string, layers []pack.Layer, which []int) []treelist.Entry {
	t.Helper()
	all, err := treelist.List(dir)
	if err != nil {
		t.Fatal(err)
	}
	mounted := map[string]bool{}
	for _, i := range which {
		rel, err := filepath.Rel(dir, layers[i].Path)
		if err != nil {
			t.Fatal(err)
		}
		for ; rel != "."; rel = filepath.Dir(rel) {
			mounted[rel] = true
		}
	}
	all = slices.DeleteFunc(all, func(e treelist.Entry) bool { return !mounted[e.Path] })
	for i := range all {
		if all[i].Type == "dir" { // no layer describes directories
			all[i].ModTime = pack.Created.UnixNano()
		}
	}
	return all
}

func newModel(t testing.TB, name string, a *pack.Artifact, want []treelist.Entry) *model {
	t.Helper()
	m := &model{name: name, blobs: t.TempDir(), want: want}
	var err error
	if m.manifest, err = a.WriteTo(m.blobs); err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob(filepath.Join(m.blobs, "blobs", "*", "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		rel, err := filepath.Rel(m.blobs, file)
		if err != nil {
			t.Fatal(err)
		}
		m.files = append(m.files, rel)
	}
	first := func(file string) int {
		if strings.HasSuffix(file, m.manifest.Digest.Encoded()) {
			return 0
		}
		return 1
	}
	slices.SortStableFunc(m.files, func(a, b string) int { return first(a) - first(b) })
	for _, l := range a.Layers {
		text := l.Data
		if l.Path != "" {
			if text, err = os.ReadFile(l.Path); err != nil {
				t.Fatal(err)
			}
		}
		m.layers = append(m.layers, ocispec.Descriptor{MediaType: l.MediaType, Digest: digest.FromBytes(text), Size: int64(len(text)), Annotations: l.Annotations})
	}
	return m
}

// deliver adds a blob to the content store like containerd: complete, optionally synced, by
// a rename.
func (m *model) deliver(content, blob string, synced bool) error {
	target := filepath.Join(content, blob)
	if _, err := os.Lstat(target); err == nil {
		return nil // another model has the same blob
	}
	ingest := filepath.Join(content, "ingest")
	for _, dir := range []string{ingest, filepath.Dir(target)} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	in, err := os.Open(filepath.Join(m.blobs, blob))
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.Create(filepath.Join(ingest, "data"))
	if err != nil {
		return err
	}
	defer out.Close()
	if _, err := io.Copy(out, in); err != nil {
		return err
	}
	if err := out.Chmod(0o444); err != nil {
		return err
	}
	if synced {
		if err := out.Sync(); err != nil {
			return err
		}
	}
	return os.Rename(out.Name(), target)
}
