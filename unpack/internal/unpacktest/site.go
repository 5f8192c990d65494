// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

// Package unpacktest makes layers and archives for the tests of unpack and unpack/differ,
// and compares the files that come out. It does not import unpack, whose own tests use it.
package unpacktest

import (
	"archive/tar"
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	modelspec "github.com/modelpack/model-spec/specs-go/v1"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
	"github.com/artifact-snapshotter/artifact-snapshotter/blobs"
)

// Created is the creation time of the artifacts of Numbered, ModTime the modification
// time of the files of Raw and, unless they have one, of Archive.
var (
	Created = time.Date(2021, 3, 4, 5, 6, 7, 0, time.UTC)
	ModTime = time.Date(2021, 1, 2, 3, 4, 5, 678901234, time.UTC)
)

// Site is a directory of blobs and a directory for trees.
type Site struct {
	Content blobs.Dir
	Root    string
}

// NewSite makes a site in temporary directories.
func NewSite(t testing.TB) Site {
	t.Helper()
	return SiteIn(t, t.TempDir())
}

// SiteIn makes a site below dir.
func SiteIn(t testing.TB, dir string) Site {
	t.Helper()
	s := Site{Content: blobs.Dir(filepath.Join(dir, "content")), Root: filepath.Join(dir, "root")}
	for _, d := range []string{filepath.Join(string(s.Content), "blobs/sha256"), s.Root} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

// Blob stores data as a blob.
func (s Site) Blob(t testing.TB, data []byte) ocispec.Descriptor {
	t.Helper()
	d := ocispec.Descriptor{MediaType: "application/test", Digest: digest.FromBytes(data), Size: int64(len(data))}
	if err := os.WriteFile(s.Content.Path(d.Digest), data, 0o444); err != nil && !errors.Is(err, os.ErrPermission) {
		t.Fatal(err)
	}
	return d
}

// Raw stores data as the blob of a raw layer with attributes of its own.
func (s Site) Raw(t testing.TB, path, data string) artifact.Layer {
	t.Helper()
	return artifact.Layer{
		Descriptor: s.Blob(t, []byte(data)), Format: artifact.FormatRaw,
		File: artifact.File{Path: path, Mode: 0o640, UID: 1234, GID: 5678, ModTime: ModTime},
	}
}

// Tar stores the archive, compressed by c, as the blob of a layer.
func (s Site) Tar(t testing.TB, c artifact.Compression, archive []byte) artifact.Layer {
	t.Helper()
	return artifact.Layer{
		Descriptor: s.Blob(t, Compress(t, c, archive)), Format: artifact.FormatTar, Compression: c,
		DiffID: digest.FromBytes(archive),
	}
}

// Described stores data as the blob of a layer of the media type, with annotations
// (name, value, name, value …), and reads it as a manifest's.
func (s Site) Described(t testing.TB, mediaType string, data []byte, annotations ...string) artifact.Layer {
	t.Helper()
	desc := s.Blob(t, data)
	desc.MediaType, desc.Annotations = mediaType, map[string]string{}
	for i := 0; i < len(annotations); i += 2 {
		desc.Annotations[annotations[i]] = annotations[i+1]
	}
	l, err := artifact.NewLayer(desc)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// Compress returns data compressed by c.
func Compress(t testing.TB, c artifact.Compression, data []byte) []byte {
	t.Helper()
	var buf bytes.Buffer
	switch c {
	case artifact.CompressionNone:
		return data
	case artifact.CompressionGzip:
		w := gzip.NewWriter(&buf)
		w.Write(data)
		w.Close()
	case artifact.CompressionZstd:
		w, err := zstd.NewWriter(&buf)
		if err != nil {
			t.Fatal(err)
		}
		w.Write(data)
		w.Close()
	}
	return buf.Bytes()
}

// Descriptor returns the layer as a manifest lists it.
func Descriptor(l artifact.Layer) ocispec.Descriptor {
	d := l.Descriptor
	d.MediaType = modelspec.MediaTypeModelWeight
	switch {
	case l.Format == artifact.FormatRaw:
		d.MediaType = modelspec.MediaTypeModelWeightRaw
		d.Annotations = map[string]string{
			modelspec.AnnotationFilepath:     l.File.Path,
			modelspec.AnnotationFileMetadata: `{"mode": 416, "uid": 1234, "gid": 5678, "mtime": "` + ModTime.Format(time.RFC3339Nano) + `"}`,
		}
	case l.Compression != artifact.CompressionNone:
		d.MediaType += "+" + string(l.Compression)
	}
	return d
}

// Numbered returns an artifact of the layers, in this order.
func Numbered(layers ...artifact.Layer) *artifact.Artifact {
	for i := range layers {
		layers[i].Index = i
	}
	return &artifact.Artifact{
		Manifest: ocispec.Descriptor{Digest: digest.FromString("manifest")},
		Created:  Created, Layers: layers,
	}
}

// Archive returns a tar of the members. The Linkname of a regular file is its content.
func Archive(t testing.TB, members ...tar.Header) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, h := range members {
		content := h.Linkname
		if h.Typeflag == 0 {
			h.Typeflag = tar.TypeReg
		}
		if h.Typeflag == tar.TypeReg {
			h.Linkname, h.Size = "", int64(len(content))
		}
		if h.ModTime.IsZero() && h.Typeflag != tar.TypeXGlobalHeader { // a global header has none
			h.ModTime = ModTime
			h.Format = tar.FormatPAX
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeReg {
			if _, err := w.Write([]byte(content)); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// File returns a regular file for Archive.
func File(name, content string) tar.Header {
	return tar.Header{Name: name, Linkname: content, Mode: 0o644}
}

// WithXattrs returns h with extended attributes.
func WithXattrs(h tar.Header, xattrs map[string]string) tar.Header {
	h.Format = tar.FormatPAX
	h.PAXRecords = map[string]string{}
	for name, value := range xattrs {
		h.PAXRecords["SCHILY.xattr."+name] = value
	}
	return h
}

// Read returns the content of a file.
func Read(t testing.TB, elem ...string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(elem...))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// Inode returns the inode number of a file.
func Inode(t testing.TB, path string) uint64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Ino
}

// Mount mounts m at dir until the test ends.
func Mount(t testing.TB, m mount.Mount, dir string) {
	t.Helper()
	if err := m.Mount(dir); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := mount.UnmountAll(dir, 0); err != nil {
			t.Error(err)
		}
	})
}
