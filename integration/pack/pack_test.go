// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package pack

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	modelspec "github.com/modelpack/model-spec/specs-go/v1"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// read reads a blob from dir and checks its digest and mode.
func read(t *testing.T, dir string, d ocispec.Descriptor) []byte {
	t.Helper()
	name := filepath.Join(dir, "blobs", "sha256", d.Digest.Encoded())
	data, err := os.ReadFile(name)
	check(t, err)
	info, err := os.Stat(name)
	check(t, err)
	if digest.FromBytes(data) != d.Digest || int64(len(data)) != d.Size || info.Mode() != 0o444 {
		t.Fatalf("blob %s: %d bytes with digest %s and mode %v, want %d bytes and -r--r--r--", d.Digest, len(data), digest.FromBytes(data), info.Mode(), d.Size)
	}
	return data
}

func unmarshal[T any](t *testing.T, data []byte) (v T) {
	t.Helper()
	check(t, json.Unmarshal(data, &v))
	return v
}

var modelFiles = []string{
	"README.md", "config.json", "model-00001.safetensors", "scripts/run.sh", "src/__init__.py",
	"tokenizer/Wörter 语.txt", "tokenizer/a name with spaces.json", "tokenizer/deep/er/copy.txt",
}

func TestModelHasEveryFileInEveryForm(t *testing.T) {
	src := t.TempDir()
	check(t, WriteModel(src))
	for _, tt := range []struct {
		form             Form
		weight, filepath string // media type of the weight layer; key of the path annotation
		open             func([]byte) io.Reader
	}{
		{Raw, "application/vnd.cncf.model.weight.v1.raw", "org.cncf.model.filepath", nil},
		{Tar, "application/vnd.cncf.model.weight.v1.tar", "org.cncf.model.filepath", plain},
		{TarGzip, "application/vnd.cncf.model.weight.v1.tar+gzip", "org.cncf.model.filepath", gunzip},
		{TarZstd, "application/vnd.cncf.model.weight.v1.tar+zstd", "org.cncf.model.filepath", unzstd},
		{Legacy, "application/vnd.cnai.model.weight.v1.raw", "org.cnai.model.filepath", nil},
		{LegacyTar, "application/vnd.cnai.model.layer.v1.tar", "org.cnai.model.filepath", plain},
		{Generic, "application/octet-stream", "org.opencontainers.image.title", nil},
	} {
		t.Run(string(tt.form), func(t *testing.T) {
			artifact, err := Model(src, Options{Form: tt.form, Scratch: t.TempDir()})
			check(t, err)
			dir := t.TempDir()
			desc, err := artifact.WriteTo(dir)
			check(t, err)
			manifest := unmarshal[ocispec.Manifest](t, read(t, dir, desc))
			config := unmarshal[modelspec.Model](t, read(t, dir, manifest.Config))
			if len(manifest.Layers) != len(modelFiles) {
				t.Fatalf("%d layers, want %d", len(manifest.Layers), len(modelFiles))
			}
			for i, layer := range manifest.Layers {
				want, err := os.ReadFile(filepath.Join(src, modelFiles[i]))
				check(t, err)
				if got := layer.Annotations[tt.filepath]; got != modelFiles[i] {
					t.Errorf("layer %d is %q, want %q", i, got, modelFiles[i])
				}
				got := read(t, dir, layer)
				if tt.open != nil {
					flat, err := io.ReadAll(tt.open(got))
					check(t, err)
					if id := config.ModelFS.DiffIDs[i]; id != digest.FromBytes(flat) {
						t.Errorf("layer %d has the DiffID %s, want %s", i, id, digest.FromBytes(flat))
					}
					got = onlyMember(t, flat, filepath.Join(src, modelFiles[i]), modelFiles[i])
				}
				if !bytes.Equal(got, want) {
					t.Errorf("%s has %d bytes and differs from the source of %d bytes", modelFiles[i], len(got), len(want))
				}
			}
			if got := manifest.Layers[2].MediaType; got != tt.weight {
				t.Errorf("the weights are %q, want %q", got, tt.weight)
			}
		})
	}
}

func plain(data []byte) io.Reader { return bytes.NewReader(data) }

func gunzip(data []byte) io.Reader {
	r, err := gzip.NewReader(bytes.NewReader(data))
	if err != nil {
		return strings.NewReader(err.Error())
	}
	return r
}

func unzstd(data []byte) io.Reader {
	r, err := zstd.NewReader(bytes.NewReader(data))
	if err != nil {
		return strings.NewReader(err.Error())
	}
	return r
}

// onlyMember returns the content of a tar's only member and compares its attributes with
// source.
func onlyMember(t *testing.T, data []byte, source, name string) []byte {
	t.Helper()
	r := tar.NewReader(bytes.NewReader(data))
	header, err := r.Next()
	check(t, err)
	info, err := os.Stat(source)
	check(t, err)
	st := info.Sys().(*syscall.Stat_t)
	if header.Name != name || header.FileInfo().Mode() != info.Mode() || !header.ModTime.Equal(info.ModTime()) ||
		header.Uid != int(st.Uid) || header.Gid != int(st.Gid) {
		t.Errorf("the tar has %q %v %d:%d %v, the source %q %v %d:%d %v", header.Name, header.FileInfo().Mode(), header.Uid, header.Gid, header.ModTime,
			name, info.Mode(), st.Uid, st.Gid, info.ModTime())
	}
	content, err := io.ReadAll(r)
	check(t, err)
	if _, err := r.Next(); err != io.EOF {
		t.Errorf("after the only member: %v, want EOF", err)
	}
	return content
}

func TestRawLayersHaveAttributes(t *testing.T) {
	src := t.TempDir()
	check(t, WriteModel(src))
	artifact, err := Model(src, Options{})
	check(t, err)
	got := map[string]string{}
	for _, layer := range artifact.Layers {
		got[layer.Annotations[modelspec.AnnotationFilepath]] = layer.Annotations[modelspec.AnnotationFileMetadata]
	}
	for name, want := range map[string]string{
		"tokenizer/Wörter 语.txt":            `{"name":"Wörter 语.txt","mode":420,"uid":0,"gid":0,"size":12,"mtime":"2021-03-04T05:06:07.123456789Z","typeflag":0}`,
		"tokenizer/a name with spaces.json": `{"name":"a name with spaces.json","mode":420,"uid":1234,"gid":5678,"size":19,"mtime":"2024-02-04T13:05:06Z","typeflag":0}`,
	} {
		wanted, gotten := unmarshal[modelspec.FileMetadata](t, []byte(want)), unmarshal[modelspec.FileMetadata](t, []byte(got[name]))
		if !gotten.ModTime.Equal(wanted.ModTime) {
			t.Errorf("%s: mtime %v, want %v", name, gotten.ModTime, wanted.ModTime)
		}
		wanted.ModTime, gotten.ModTime = time.Time{}, time.Time{}
		if gotten != wanted {
			t.Errorf("%s: %+v, want %+v", name, gotten, wanted)
		}
	}
}

func TestLayerCanLieAndBeMissing(t *testing.T) {
	missing := digest.FromString("missing")
	artifact := Artifact{Layers: []Layer{
		{MediaType: modelspec.MediaTypeModelWeightRaw, Digest: missing, Size: 7},
		{MediaType: modelspec.MediaTypeModelWeightRaw, Data: []byte("abc"), Size: 1 << 40, DiffID: missing},
	}}
	dir := t.TempDir()
	desc, err := artifact.WriteTo(dir)
	check(t, err)
	manifest := unmarshal[ocispec.Manifest](t, read(t, dir, desc))
	if l := manifest.Layers[0]; l.Digest != missing || l.Size != 7 {
		t.Errorf("the missing layer is %+v", l)
	}
	if _, err := os.Stat(filepath.Join(dir, "blobs", "sha256", missing.Encoded())); !os.IsNotExist(err) {
		t.Errorf("the missing blob: %v, want ErrNotExist", err)
	}
	if l := manifest.Layers[1]; l.Digest != digest.FromString("abc") || l.Size != 1<<40 {
		t.Errorf("the lying layer is %+v", l)
	}
	config := unmarshal[modelspec.Model](t, read(t, dir, manifest.Config))
	if ids := config.ModelFS.DiffIDs; len(ids) != 2 || ids[0] != missing || ids[1] != missing {
		t.Errorf("DiffIDs are %v", ids)
	}
}

func TestIndexNamesItsManifests(t *testing.T) {
	image, err := Image(ocispec.ImageConfig{Entrypoint: []string{"/x"}}, true, []byte("not really a tar"))
	check(t, err)
	platform := &ocispec.Platform{OS: "linux", Architecture: "riscv64"}
	dir := t.TempDir()
	desc, err := (&Index{Manifests: []IndexEntry{{image, platform}, {&Artifact{}, nil}}}).WriteTo(dir)
	check(t, err)
	index := unmarshal[ocispec.Index](t, read(t, dir, desc))
	if len(index.Manifests) != 2 || index.Manifests[0].Platform.Architecture != "riscv64" || index.Manifests[1].Platform != nil {
		t.Fatalf("index is %+v", index)
	}
	manifest := unmarshal[ocispec.Manifest](t, read(t, dir, index.Manifests[0]))
	config := unmarshal[ocispec.Image](t, read(t, dir, manifest.Config))
	if want := digest.FromString("not really a tar"); len(config.RootFS.DiffIDs) != 1 || config.RootFS.DiffIDs[0] != want {
		t.Errorf("diff_ids are %v, want %s", config.RootFS.DiffIDs, want)
	}
	if manifest.Config.MediaType != ocispec.MediaTypeImageConfig || manifest.Layers[0].MediaType != ocispec.MediaTypeImageLayerGzip {
		t.Errorf("manifest is %+v", manifest)
	}
}

func TestSparseMemberHasItsHoles(t *testing.T) {
	member, err := SparseMember("sparse", 100000, 77777, []byte("data"))
	check(t, err)
	rest, err := TarOf(Member{Header: tar.Header{Name: "next", Mode: 0o644}, Data: []byte("x")})
	check(t, err)
	if size := len(member) + len(rest); size > 10000 {
		t.Errorf("the tar has %d bytes", size)
	}
	r := tar.NewReader(bytes.NewReader(append(member, rest...)))
	header, err := r.Next()
	check(t, err)
	content, err := io.ReadAll(r)
	check(t, err)
	want := make([]byte, 100000)
	copy(want[77777:], "data")
	if header.Name != "sparse" || header.Mode != 0o644 || !bytes.Equal(content, want) {
		t.Errorf("the member is %+v with %d bytes; it differs from the %d bytes expected", header, len(content), len(want))
	}
	if header, err = r.Next(); err != nil || header.Name != "next" {
		t.Errorf("the next member is %+v (%v)", header, err)
	}
}
