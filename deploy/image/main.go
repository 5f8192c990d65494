// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

// Command image creates the container image as an OCI image layout for `crane push --index`:
// an index with one image for each architecture, which has the static binary and nothing
// else. The same binaries give the same digest.
//
//	image -out DIR -version VERSION amd64=PATH arm64=PATH
//
// All times in it are SOURCE_DATE_EPOCH, in seconds since 1970 (0 if it is not set).
package main

import (
	"archive/tar"
	"bytes"
	"cmp"
	"flag"
	"fmt"
	"io"
	"log"
	"os"
	"strconv"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// The binary is in PATH, so that a probe can run `artifact-snapshotter`.
const (
	directory = "/usr/local/bin"
	binary    = directory + "/artifact-snapshotter"
)

func main() {
	log.SetFlags(0)
	log.SetPrefix("image: ")
	out := flag.String("out", "", "directory for the OCI image layout; replaced if it is there")
	version := flag.String("version", "unknown", "version of the binaries, a label of the image")
	flag.Parse()
	if *out == "" || flag.NArg() == 0 {
		log.Fatal("usage: image -out DIR [-version VERSION] ARCHITECTURE=BINARY...")
	}
	digest, err := run(*out, *version, flag.Args())
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(digest)
}

// run writes the layout and returns the digest of its index.
func run(out, version string, binaries []string) (v1.Hash, error) {
	epoch, err := strconv.ParseInt(cmp.Or(os.Getenv("SOURCE_DATE_EPOCH"), "0"), 10, 64)
	if err != nil {
		return v1.Hash{}, fmt.Errorf("SOURCE_DATE_EPOCH is not a number of seconds: %w", err)
	}
	index := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for _, arg := range binaries {
		architecture, path, _ := strings.Cut(arg, "=")
		program, err := os.ReadFile(path)
		if err != nil {
			return v1.Hash{}, err
		}
		image, err := build(program, architecture, version, time.Unix(epoch, 0).UTC())
		if err != nil {
			return v1.Hash{}, fmt.Errorf("image for %s: %w", architecture, err)
		}
		index = mutate.AppendManifests(index, mutate.IndexAddendum{
			Add:        image,
			Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: architecture}},
		})
	}
	if err := os.RemoveAll(out); err != nil {
		return v1.Hash{}, err
	}
	if _, err := layout.Write(out, index); err != nil {
		return v1.Hash{}, err
	}
	return index.Digest()
}

// build returns an image that runs program.
func build(program []byte, architecture, version string, created time.Time) (v1.Image, error) {
	archive, err := pack(program, created)
	if err != nil {
		return nil, err
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(archive)), nil
	}, tarball.WithMediaType(types.OCILayer))
	if err != nil {
		return nil, err
	}
	image := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	if image, err = mutate.Append(image, mutate.Addendum{
		Layer:   layer,
		History: v1.History{Created: v1.Time{Time: created}, CreatedBy: "make image"},
	}); err != nil {
		return nil, err
	}
	config, err := image.ConfigFile()
	if err != nil {
		return nil, err
	}
	config = config.DeepCopy()
	config.OS, config.Architecture = "linux", architecture
	config.Created = v1.Time{Time: created}
	config.Config = v1.Config{
		Entrypoint: []string{binary},
		Env:        []string{"PATH=" + directory},
		Labels: map[string]string{ // https://specs.opencontainers.org/image-spec/annotations/
			"org.opencontainers.image.title":       "artifact-snapshotter",
			"org.opencontainers.image.description": "mounts OCI artifacts, such as AI models, as read-only volumes",
			"org.opencontainers.image.licenses":    "Apache-2.0",
			"org.opencontainers.image.source":      "https://github.com/artifact-snapshotter/artifact-snapshotter",
			"org.opencontainers.image.version":     version,
		},
	}
	return mutate.ConfigFile(image, config)
}

// pack returns a tar of the program and the directories above it.
func pack(program []byte, modified time.Time) ([]byte, error) {
	var archive bytes.Buffer
	w := tar.NewWriter(&archive)
	for _, header := range []*tar.Header{
		{Name: "usr/", Typeflag: tar.TypeDir, Mode: 0o755},
		{Name: "usr/local/", Typeflag: tar.TypeDir, Mode: 0o755},
		{Name: directory[1:] + "/", Typeflag: tar.TypeDir, Mode: 0o755},
		{Name: binary[1:], Typeflag: tar.TypeReg, Mode: 0o755, Size: int64(len(program))},
	} {
		header.ModTime = modified
		if err := w.WriteHeader(header); err != nil {
			return nil, err
		}
	}
	if _, err := w.Write(program); err != nil {
		return nil, err
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return archive.Bytes(), nil
}
