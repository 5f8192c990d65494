// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
)

// contentRoot is the root of a content store, with blobs of the test.
type contentRoot struct {
	t   *testing.T
	dir string
}

func (s contentRoot) add(mediaType string, data []byte) ocispec.Descriptor {
	s.t.Helper()
	desc := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
	path := filepath.Join(s.dir, "blobs", "sha256", desc.Digest.Encoded())
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		s.t.Fatal(err)
	}
	if err := os.WriteFile(path, data, 0o444); err != nil {
		s.t.Fatal(err)
	}
	return desc
}

func (s contentRoot) addJSON(mediaType string, value any) ocispec.Descriptor {
	s.t.Helper()
	data, err := json.Marshal(value)
	if err != nil {
		s.t.Fatal(err)
	}
	return s.add(mediaType, data)
}

func (s contentRoot) addManifest(config ocispec.Descriptor, layers ...ocispec.Descriptor) ocispec.Descriptor {
	s.t.Helper()
	return s.addJSON(ocispec.MediaTypeImageManifest, ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: ocispec.MediaTypeImageManifest,
		Config:    config,
		Layers:    layers,
	})
}

func TestInspect(t *testing.T) {
	s := contentRoot{t, t.TempDir()}
	weights := s.add("application/vnd.cncf.model.weight.v1.raw", make([]byte, 1536))
	weights.Annotations = map[string]string{
		"org.cncf.model.filepath":           "dir one/model.bin",
		"org.cncf.model.file.metadata+json": `{"name":"model.bin","mode":488,"uid":1000,"gid":100,"size":1536,"mtime":"2021-02-03T04:05:06Z","typeflag":0}`,
	}
	readme := s.add("application/vnd.cncf.model.doc.v1.raw", []byte("read me"))
	readme.Annotations = map[string]string{"org.cncf.model.filepath": "README.md"}
	// The media type of the last layer does not say that it is compressed; one blob is missing.
	dataset := s.add("application/vnd.cncf.model.dataset.v1.tar", append([]byte("\x1f\x8b\x08"), make([]byte, 3<<20-3)...))
	named := map[string]string{"org.opencontainers.image.title": "hi.txt"}
	file := s.add(ocispec.MediaTypeImageLayer, []byte("hi"))
	absent := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: digest.FromString("absent"), Size: 7}
	file.Annotations, absent.Annotations = named, named
	const configType = "application/vnd.cncf.model.config.v1+json"
	manifest := s.addManifest(s.addJSON(configType, map[string]any{
		"descriptor": map[string]string{"name": "test", "createdAt": "2025-01-02T03:04:05Z"},
		"modelfs": map[string]any{
			"type":    "layers",
			"diffIds": []digest.Digest{weights.Digest, readme.Digest, file.Digest, absent.Digest, ocispec.DescriptorEmptyJSON.Digest, digest.FromString("tar")},
		},
	}), weights, readme, file, absent, ocispec.DescriptorEmptyJSON, dataset)
	index := s.addJSON(ocispec.MediaTypeImageIndex, ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: ocispec.MediaTypeImageIndex,
		Manifests: []ocispec.Descriptor{manifest},
	})
	image := s.addManifest(s.addJSON(ocispec.MediaTypeImageConfig, map[string]string{"os": "linux"}))
	missing := digest.FromString("missing")

	// Without containerd.
	none := filepath.Join(t.TempDir(), "none.sock")

	want := manifest.Digest.String() + "  " + configType + `  created 2025-01-02T03:04:05Z
PATH                    SIZE     MODE        OWNER     LAYER TYPE                                 COMPRESSION
dir one/model.bin       1.5 KiB  -rwxr-x---  1000:100  application/vnd.cncf.model.weight.v1.raw   -
README.md               7 B      -rw-r--r--  0:0       application/vnd.cncf.model.doc.v1.raw      -
hi.txt                  2 B      -rw-r--r--  0:0       application/vnd.oci.image.layer.v1.tar     -
hi.txt (or an archive)  7 B      -           -         application/vnd.oci.image.layer.v1.tar     -
(empty)                 2 B      -           -         application/vnd.oci.empty.v1+json          -
(unpacked at the root)  3.0 MiB  -           -         application/vnd.cncf.model.dataset.v1.tar  gzip
  (not listed)          -        -           -         the archive cannot be read: flate: corrupt input before offset 5
`
	for name, argument := range map[string]string{
		"digest":          manifest.Digest.String(),
		"bare hex":        manifest.Digest.Encoded(),
		"first digits":    manifest.Digest.Encoded()[:12],
		"an abbreviation": manifest.Digest.String()[:19],
		"digest of index": index.Digest.String(),
	} {
		t.Run(name, func(t *testing.T) {
			if got := output(t, "inspect", "--address", none, "--content-root", s.dir, argument); got != want {
				t.Errorf("got\n%s\nwant\n%s", got, want)
			}
		})
	}

	var found inspected
	if err := json.Unmarshal([]byte(output(t, "inspect", "--address", none, "--content-root", s.dir, "--output", "json", index.Digest.String())), &found); err != nil {
		t.Fatal(err)
	}
	if found.Image != nil || found.Manifest != manifest.Digest || found.Type != configType || len(found.Layers) != 6 ||
		found.Layers[0].File == nil || found.Layers[0].File.Path != "dir one/model.bin" || found.Layers[0].File.Mode != "0750" ||
		found.Layers[2].Format != artifact.FormatRaw || found.Layers[3].Format != artifact.FormatTarOrRaw || found.Layers[4].Format != artifact.FormatEmpty || found.Layers[4].File != nil ||
		found.Layers[5].File != nil || found.Layers[5].Compression != artifact.CompressionGzip || found.Layers[5].DiffID != digest.FromString("tar") {
		t.Errorf("the JSON has %+v", found)
	}

	for name, test := range map[string]struct {
		argument string
		want     []string
	}{
		"image":          {image.Digest.String(), []string{image.Digest.String(), "a container image"}},
		"missing":        {missing.String(), []string{missing.Encoded(), "content root"}},
		"no such digits": {"0123456789", []string{"0123456789", "content root"}},
		"no digest":      {"model:v1", []string{"containerd does not answer on " + none}},
		"no hex":         {"../../etc/passwd", []string{"containerd does not answer on " + none}},
		"not a manifest": {readme.Digest.String(), []string{readme.Digest.Encoded()}},
	} {
		t.Run(name, func(t *testing.T) {
			stdout, stderr, exit := run(t, "inspect", "--address", none, "--content-root", s.dir, test.argument)
			if exit != 1 || stdout != "" {
				t.Errorf("exit code %d, want 1; stdout %q, want nothing", exit, stdout)
			}
			wantErrorLine(t, stderr, test.want...)
		})
	}
}

// As ORAS packs: the time is in the manifest's annotations, and a directory is an archive.
func TestInspectListsArchivesAndTheAnnotatedTime(t *testing.T) {
	s := contentRoot{t, t.TempDir()}
	var archive bytes.Buffer
	w := tar.NewWriter(&archive)
	for _, name := range []string{"dir/", "dir/a.bin"} {
		h := &tar.Header{Name: name, Mode: 0o640, Uid: 7, Size: 2048 * int64(strings.Count(name, "a"))}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(make([]byte, h.Size)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	manifest := s.addJSON(ocispec.MediaTypeImageManifest, ocispec.Manifest{
		Versioned:   specs.Versioned{SchemaVersion: 2},
		Config:      s.addJSON(ocispec.MediaTypeEmptyJSON, struct{}{}),
		Layers:      []ocispec.Descriptor{s.add("application/vnd.cncf.model.dataset.v1.tar", archive.Bytes())},
		Annotations: map[string]string{ocispec.AnnotationCreated: "2025-01-02T03:04:05Z"},
	})
	args := []string{"inspect", "--address", filepath.Join(t.TempDir(), "none.sock"), "--content-root", s.dir, manifest.Digest.String()}
	text := output(t, args...)
	for _, want := range []string{"created 2025-01-02T03:04:05Z\n", "\n  dir/                  -        drw-r-----  7:0\n", "\n  dir/a.bin             2.0 KiB  -rw-r-----  7:0\n"} {
		if !strings.Contains(text, want) {
			t.Errorf("the text has no %q:\n%s", want, text)
		}
	}
	if text := output(t, append(args, "--layers")...); strings.Contains(text, "a.bin") || !strings.Contains(text, "(unpacked at the root)") {
		t.Errorf("with --layers it prints\n%s", text)
	}
	var found inspected
	if err := json.Unmarshal([]byte(output(t, append(args, "-o", "json")...)), &found); err != nil {
		t.Fatal(err)
	}
	if m := found.Layers[0].Members; found.Created == nil || len(m) != 2 || m[0].Type != "directory" || m[1].Path != "dir/a.bin" || m[1].Size != 2048 || m[1].Mode != "0640" || m[1].UID != 7 {
		t.Errorf("the JSON has %+v", found)
	}
}

// The author of an artifact chooses names, and must not control the terminal.
func TestInspectQuotesControlCharacters(t *testing.T) {
	var got bytes.Buffer
	a := &artifact.Artifact{
		Type:    "a\x1b[2Jb",
		Created: time.Unix(0, 0),
		Layers: []artifact.Layer{
			{Format: artifact.FormatRaw, File: artifact.File{Path: "x\ty\nz", Mode: 0o644}, Descriptor: ocispec.Descriptor{MediaType: "m\rn"}},
			{Format: artifact.FormatRaw, File: artifact.File{Path: "модель 模型.bin", Mode: 0o644}, Descriptor: ocispec.Descriptor{MediaType: "m"}},
			{Format: artifact.FormatTar},
		},
	}
	i := inspectedOf(nil, a)
	for _, name := range []string{"evil\x1b", "2", "3"} {
		i.Layers[2].Members = append(i.Layers[2].Members, memberOf(&tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: "to\n"}))
	}
	i.Layers[2].Unlisted = "bad\nname \x1b"
	if err := printArtifact(&got, a, i, 2); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`"a\x1b[2Jb"`, `"x\ty\nz"`, `"m\rn"`, `  "evil\x1b" -> "to\n"  `, "  and 1 more (--no-trunc)", `(not listed)`, `"bad; name \x1b"`, "модель 模型.bin ", "created unknown"} {
		if !strings.Contains(got.String(), want) {
			t.Errorf("%q does not have %s", got.String(), want)
		}
	}
	if lines := strings.Count(got.String(), "\n"); lines != 9 {
		t.Errorf("got %d lines, want 9:\n%s", lines, got.String())
	}
}
