// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package pack

import (
	"archive/tar"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/klauspost/compress/zstd"
	modelspec "github.com/modelpack/model-spec/specs-go/v1"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Form is a packing of a directory.
type Form string

// The forms. Each has one layer per file, like the reference packer.
const (
	Raw       Form = "raw"        // ModelPack: the file itself, with its attributes in an annotation
	Tar       Form = "tar"        // ModelPack: a tar of one file under its full relative path
	TarGzip   Form = "tar+gzip"   // the same, compressed
	TarZstd   Form = "tar+zstd"   //
	Legacy    Form = "legacy"     // Raw with the legacy media types
	LegacyTar Form = "legacy-tar" // Tar with the one legacy media type for all files
	Docker    Form = "docker"     // Docker's model format, with rootfs in the config
	Generic   Form = "generic"    // not a model: title annotations, an artifact type of its own and the empty config
)

// The legacy ModelPack media types, from before the project joined the CNCF.
const (
	legacyPrefix       = "application/vnd.cnai.model."
	legacyManifestType = legacyPrefix + "manifest.v1+json"
	legacyConfigType   = legacyPrefix + "config.v1+json"
	legacyTarType      = legacyPrefix + "layer.v1.tar"
	legacyFilepath     = "org.cnai.model.filepath"
	legacyMetadata     = "org.cnai.model.file.metadata+json"
)

// DockerConfigType is the config type of Docker's models
// (https://github.com/docker/model-spec/blob/main/config.md). Like an image's, the config
// has rootfs.diff_ids.
const DockerConfigType = "application/vnd.docker.ai.model.config.v0.1+json"

// GenericType is the artifact type of the form Generic.
const GenericType = "application/vnd.example.files.v1"

// form describes how to write a Form. KIND in a media type stands for the kind of the file.
type form struct {
	artifactType, configType string
	mediaType                string
	kind                     func(name string) string // nil means kind
	path, metadata           string                   // annotation keys; "" means no such annotation
	tar                      func(io.Writer) (io.WriteCloser, error)
}

var forms = map[Form]form{
	Raw:       {artifactType: modelspec.ArtifactTypeModelManifest, mediaType: "application/vnd.cncf.model.KIND.v1.raw", path: modelspec.AnnotationFilepath, metadata: modelspec.AnnotationFileMetadata},
	Tar:       {artifactType: modelspec.ArtifactTypeModelManifest, mediaType: "application/vnd.cncf.model.KIND.v1.tar", path: modelspec.AnnotationFilepath, metadata: modelspec.AnnotationFileMetadata, tar: uncompressed},
	TarGzip:   {artifactType: modelspec.ArtifactTypeModelManifest, mediaType: "application/vnd.cncf.model.KIND.v1.tar+gzip", path: modelspec.AnnotationFilepath, metadata: modelspec.AnnotationFileMetadata, tar: gzipped},
	TarZstd:   {artifactType: modelspec.ArtifactTypeModelManifest, mediaType: "application/vnd.cncf.model.KIND.v1.tar+zstd", path: modelspec.AnnotationFilepath, metadata: modelspec.AnnotationFileMetadata, tar: zstandard},
	Legacy:    {artifactType: legacyManifestType, configType: legacyConfigType, mediaType: legacyPrefix + "KIND.v1.raw", path: legacyFilepath, metadata: legacyMetadata},
	LegacyTar: {artifactType: legacyManifestType, configType: legacyConfigType, mediaType: legacyTarType, path: legacyFilepath, metadata: legacyMetadata, tar: uncompressed},
	Docker:    {configType: DockerConfigType, mediaType: "application/vnd.docker.ai.KIND", kind: dockerKind, path: modelspec.AnnotationFilepath, metadata: modelspec.AnnotationFileMetadata},
	Generic:   {artifactType: GenericType, configType: ocispec.MediaTypeEmptyJSON, mediaType: "application/octet-stream", path: ocispec.AnnotationTitle},
}

func uncompressed(w io.Writer) (io.WriteCloser, error) { return nopCloser{w}, nil }
func gzipped(w io.Writer) (io.WriteCloser, error)      { return gzip.NewWriter(w), nil }
func zstandard(w io.Writer) (io.WriteCloser, error)    { return zstd.NewWriter(w) }

type nopCloser struct{ io.Writer }

func (nopCloser) Close() error { return nil }

// Options configure Model.
type Options struct {
	Form    Form   // "" means Raw
	Scratch string // directory for the tars, needed by the forms with tars; the caller removes it

	// RootOwner sets every owner in a tar to 0:0, like the reference packer. Otherwise tars
	// have the owners of the files.
	RootOwner bool
}

// Model packs the regular files below dir in lexical order, one layer each. The artifact
// refers to the files, and to those in Scratch, by path, so they must not change until it
// is pushed or written.
func Model(dir string, o Options) (*Artifact, error) {
	if o.Form == "" {
		o.Form = Raw
	}
	how, ok := forms[o.Form]
	if !ok {
		return nil, fmt.Errorf("unknown form %q", o.Form)
	}
	if how.tar != nil && o.Scratch == "" {
		return nil, fmt.Errorf("the form %q needs Options.Scratch", o.Form)
	}
	a := &Artifact{ArtifactType: how.artifactType, ConfigType: how.configType}
	if o.Form != Raw { // the DiffIDs are equal, and CRI treats all images with one config as one image
		a.Name = "tiny, " + string(o.Form)
	}
	err := filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		if !d.Type().IsRegular() {
			return fmt.Errorf("%s is not a regular file", name)
		}
		rel, err := filepath.Rel(dir, name)
		if err != nil {
			return err
		}
		layer, err := how.layer(dir, filepath.ToSlash(rel))
		if err == nil && how.tar != nil {
			layer.Path = filepath.Join(o.Scratch, fmt.Sprintf("%d.tar", len(a.Layers)))
			layer.DiffID, err = how.writeTar(layer.Path, dir, rel, o.RootOwner)
		}
		if err != nil {
			return fmt.Errorf("pack %s: %w", name, err)
		}
		a.Layers = append(a.Layers, layer)
		return nil
	})
	return a, err
}

// layer returns the layer of one file as it is.
func (f form) layer(dir, rel string) (Layer, error) {
	of := f.kind
	if of == nil {
		of = kind
	}
	layer := Layer{
		MediaType:   strings.ReplaceAll(f.mediaType, "KIND", of(rel)),
		Path:        filepath.Join(dir, rel),
		Annotations: map[string]string{f.path: rel},
	}
	if f.metadata == "" {
		return layer, nil
	}
	var err error
	layer.Annotations[f.metadata], err = fileMetadata(layer.Path)
	return layer, err
}

// kind returns the ModelPack kind of a file by its name.
func kind(name string) string {
	switch path.Ext(name) {
	case ".safetensors", ".bin", ".gguf":
		return "weight"
	case ".json":
		return "weight.config"
	case ".md":
		return "doc"
	case ".py", ".sh":
		return "code"
	}
	return "dataset"
}

// dockerKind returns the kind of a file in Docker's model format.
func dockerKind(name string) string {
	switch path.Ext(name) {
	case ".safetensors":
		return "safetensors"
	case ".jinja":
		return "chat.template.jinja"
	case ".gguf":
		return "gguf.v3"
	case ".json":
		return "model.file"
	}
	return "license"
}

// fileMetadata returns the file metadata annotation as the reference packer writes it: the
// mode has only permission bits.
func fileMetadata(name string) (string, error) {
	info, err := os.Stat(name)
	if err != nil {
		return "", err
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return "", errors.New("stat returned no owner")
	}
	text, err := json.Marshal(modelspec.FileMetadata{
		Name:    info.Name(),
		Mode:    uint32(info.Mode().Perm()),
		Uid:     st.Uid,
		Gid:     st.Gid,
		Size:    info.Size(),
		ModTime: info.ModTime(),
	})
	return string(text), err
}

// writeTar writes the tar of one file to name and returns its DiffID.
func (f form) writeTar(name, dir, rel string, rootOwner bool) (digest.Digest, error) {
	file, err := os.Create(name)
	if err != nil {
		return "", err
	}
	defer file.Close()
	out, err := f.tar(file)
	if err != nil {
		return "", err
	}
	diffID := digest.Canonical.Digester()
	w := tar.NewWriter(io.MultiWriter(out, diffID.Hash()))
	if err := addToTar(w, dir, rel, rootOwner); err != nil {
		return "", err
	}
	err = errors.Join(w.Close(), out.Close())
	return diffID.Digest(), err
}

// WriteModel writes a small model with everything that a volume must reproduce into the
// empty directory dir. It needs root to set the owner of one file.
//
//	README.md
//	config.json                       mode 0600
//	model-00001.safetensors           3 MiB and 1,234 bytes: the last page is not full
//	scripts/run.sh                    mode 0755
//	src/__init__.py                   empty
//	tokenizer/a name with spaces.json owner 1234:5678
//	tokenizer/Wörter 语.txt            mtime in 2021 with nanoseconds
//	tokenizer/deep/er/copy.txt        same bytes as the previous file
func WriteModel(dir string) error {
	weights := make([]byte, 3<<20+1234)
	if _, err := rand.NewChaCha8([32]byte{}).Read(weights); err != nil {
		return err
	}
	const words = "Wörter\n语\n"
	for _, f := range []struct {
		name    string
		mode    fs.FileMode
		content string
	}{
		{"README.md", 0o644, "# tiny\n\nA model that is just large enough to be looked at.\n"},
		{"config.json", 0o600, `{"architectures": ["TinyForCausalLM"], "hidden_size": 8}` + "\n"},
		{"model-00001.safetensors", 0o644, string(weights)},
		{"scripts/run.sh", 0o755, "#!/bin/sh\nexec python3 -m src\n"},
		{"src/__init__.py", 0o644, ""},
		{"tokenizer/a name with spaces.json", 0o644, `{"version": "1.0"}` + "\n"},
		{"tokenizer/Wörter 语.txt", 0o644, words},
		{"tokenizer/deep/er/copy.txt", 0o644, words},
	} {
		name := filepath.Join(dir, f.name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(name, []byte(f.content), f.mode); err != nil {
			return err
		}
		if err := os.Chmod(name, f.mode); err != nil { // independent of the umask
			return err
		}
		mtime := Created.Add(time.Duration(len(f.name)) * time.Hour)
		if strings.HasSuffix(f.name, "Wörter 语.txt") {
			mtime = time.Date(2021, time.March, 4, 5, 6, 7, 123456789, time.UTC)
		}
		if err := os.Chtimes(name, time.Time{}, mtime); err != nil {
			return err
		}
	}
	return os.Chown(filepath.Join(dir, "tokenizer/a name with spaces.json"), 1234, 5678)
}
