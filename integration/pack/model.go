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

// Form is a way to pack a directory.
type Form string

// The forms, one layer per file each, as the reference packer has it.
const (
	Raw       Form = "raw"        // ModelPack, the file itself, attributes in an annotation
	Tar       Form = "tar"        // ModelPack, a tar of one file, with its full relative path inside
	TarGzip   Form = "tar+gzip"   // the same, compressed
	TarZstd   Form = "tar+zstd"   //
	Legacy    Form = "legacy"     // as Raw, with the legacy media types
	LegacyTar Form = "legacy-tar" // as Tar, with their one media type for all files
	Docker    Form = "docker"     // a model of Docker's, with rootfs in its config
	Generic   Form = "generic"    // not a model: titles, an artifact type of its own and the empty config
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
// (https://github.com/docker/model-spec/blob/main/config.md), whose config has
// rootfs.diff_ids as an image's.
const DockerConfigType = "application/vnd.docker.ai.model.config.v0.1+json"

// GenericType is the artifact type of the form Generic.
const GenericType = "application/vnd.example.files.v1"

// form describes how to write a Form. KIND in a media type stands for the file's kind.
type form struct {
	artifactType, configType string
	mediaType                string
	kind                     func(name string) string // nil means kind
	path, metadata           string                   // annotations; without metadata there is none
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

// Options say how Model packs.
type Options struct {
	Form    Form   // "" means Raw
	Scratch string // a directory for the tars; the caller removes it. Not needed for the forms without tars

	// RootOwner sets every owner in a tar to 0:0, as the reference packer does;
	// otherwise tars have the files' owners.
	RootOwner bool
}

// Model packs the regular files below dir in lexical order, one layer each. The
// artifact refers to the files, and to those in Scratch, by path: do not change them
// until it is pushed or written.
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
	if o.Form != Raw { // the DiffIDs are the same, and CRI takes what has one config for one image
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

// layer is the layer of one file as it is.
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

// kind is the ModelPack type of a file by its name.
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

// dockerKind is the type of a file in a model of Docker's.
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

// fileMetadata is the file metadata annotation as the reference packer writes it: its
// mode has permission bits only.
func fileMetadata(name string) (string, error) {
	info, err := os.Stat(name)
	if err != nil {
		return "", err
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return "", errors.New("stat tells no owner")
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
// empty directory dir. It needs root, for one file's owner.
//
//	README.md
//	config.json                       mode 0600
//	model-00001.safetensors           3 MiB and 1,234 bytes: the last page is not full
//	scripts/run.sh                    mode 0755
//	src/__init__.py                   empty
//	tokenizer/a name with spaces.json owner 1234:5678
//	tokenizer/Wörter 语.txt            mtime in 2021 with nanoseconds
//	tokenizer/deep/er/copy.txt        same bytes as the one before
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
		if err := os.Chmod(name, f.mode); err != nil { // whatever the umask is
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
