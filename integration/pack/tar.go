// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package pack

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Member is a member of a tar. If the header has no Size, it is that of Data.
type Member struct {
	tar.Header
	Data []byte
}

// TarOf writes the members without checks: names, types, owners and xattrs (PAXRecords).
func TarOf(members ...Member) ([]byte, error) {
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, m := range members {
		if m.Size == 0 {
			m.Size = int64(len(m.Data))
		}
		if err := w.WriteHeader(&m.Header); err != nil {
			return nil, fmt.Errorf("tar %q: %w", m.Name, err)
		}
		if _, err := w.Write(m.Data); err != nil {
			return nil, fmt.Errorf("tar %q: %w", m.Name, err)
		}
	}
	err := w.Close()
	return out.Bytes(), err
}

// SparseMember returns a member of size bytes in the old sparse format of GNU tar: zeros,
// and data at the offset. The caller puts it before a tar.
func SparseMember(name string, size, offset int64, data []byte) ([]byte, error) {
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	header := tar.Header{Name: name, Mode: 0o644, Size: int64(len(data)), ModTime: Created, Format: tar.FormatGNU}
	if err := w.WriteHeader(&header); err != nil {
		return nil, fmt.Errorf("tar %q: %w", name, err)
	}
	if _, err := w.Write(data); err != nil {
		return nil, fmt.Errorf("tar %q: %w", name, err)
	}
	if err := w.Flush(); err != nil {
		return nil, fmt.Errorf("tar %q: %w", name, err)
	}
	// See "Basic Tar Format" in the GNU tar manual: the type, the data's position, and the
	// real size.
	member := out.Bytes()
	member[156] = tar.TypeGNUSparse
	copy(member[386:], fmt.Sprintf("%011o\x00%011o\x00", offset, len(data)))
	copy(member[483:], fmt.Sprintf("%011o\x00", size))
	copy(member[148:156], "        ")
	sum := 0
	for _, b := range member[:512] {
		sum += int(b)
	}
	copy(member[148:156], fmt.Sprintf("%06o\x00 ", sum))
	return member, nil
}

// TarDir returns a tar of everything below dir, with directories, symlinks and the real
// attributes.
func TarDir(dir string) ([]byte, error) {
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if err != nil || path == dir {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		return addToTar(w, dir, rel, false)
	})
	if err == nil {
		err = w.Close()
	}
	return out.Bytes(), err
}

// addToTar adds dir/rel under its full relative path. The PAX format keeps the nanoseconds
// of the mtime.
func addToTar(w *tar.Writer, dir, rel string, rootOwner bool) error {
	path := filepath.Join(dir, rel)
	info, err := os.Lstat(path)
	if err != nil {
		return err
	}
	target := ""
	if info.Mode().Type() == fs.ModeSymlink {
		if target, err = os.Readlink(path); err != nil {
			return err
		}
	}
	header, err := tar.FileInfoHeader(info, target)
	if err != nil {
		return err
	}
	header.Name = filepath.ToSlash(rel)
	if info.IsDir() {
		header.Name += "/"
	}
	header.Format, header.Uname, header.Gname = tar.FormatPAX, "", ""
	header.AccessTime, header.ChangeTime = time.Time{}, time.Time{} // every call returns the same tar
	if rootOwner {
		header.Uid, header.Gid = 0, 0
	}
	if err := w.WriteHeader(header); err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return nil
	}
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.Copy(w, f)
	return err
}

// Gzip compresses data with gzip.
func Gzip(data []byte) ([]byte, error) {
	var out bytes.Buffer
	w := gzip.NewWriter(&out)
	if _, err := w.Write(data); err != nil {
		return nil, err
	}
	err := w.Close()
	return out.Bytes(), err
}

// Zstd compresses data with zstd.
func Zstd(data []byte) ([]byte, error) {
	w, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1))
	if err != nil {
		return nil, err
	}
	out := w.EncodeAll(data, nil)
	return out, w.Close()
}

// Image returns a container image for this platform with the tars as layers, optionally
// compressed with gzip.
func Image(config ocispec.ImageConfig, compressed bool, tars ...[]byte) (*Artifact, error) {
	image := ocispec.Image{
		Created:  &Created,
		Platform: ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH},
		Config:   config,
		RootFS:   ocispec.RootFS{Type: "layers"},
	}
	var layers []Layer
	for _, data := range tars {
		image.RootFS.DiffIDs = append(image.RootFS.DiffIDs, digest.FromBytes(data))
		layer := Layer{MediaType: ocispec.MediaTypeImageLayer, Data: data}
		if compressed {
			data, err := Gzip(data)
			if err != nil {
				return nil, err
			}
			layer = Layer{MediaType: ocispec.MediaTypeImageLayerGzip, Data: data}
		}
		layers = append(layers, layer)
	}
	text, err := json.Marshal(image)
	return &Artifact{ConfigType: ocispec.MediaTypeImageConfig, Config: text, Layers: layers}, err
}
