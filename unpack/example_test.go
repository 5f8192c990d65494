// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package unpack_test

import (
	"context"
	"fmt"
	"io/fs"
	"log"
	"os"
	"path/filepath"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/opencontainers/go-digest"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
	"github.com/artifact-snapshotter/artifact-snapshotter/blobs"
	"github.com/artifact-snapshotter/artifact-snapshotter/unpack"
)

// Build and mount the tree of an artifact in an OCI image layout. It needs root.
func ExampleBuild() {
	ctx := context.Background()
	dir, err := os.MkdirTemp("", "example")
	check(err)
	defer os.RemoveAll(dir)
	layout := blobs.Dir(filepath.Join(dir, "layout"))
	manifest := writeArtifact(layout)
	root, volume := filepath.Join(dir, "root"), filepath.Join(dir, "volume")
	check(os.Mkdir(root, 0o700))
	check(os.Mkdir(volume, 0o700))

	target, err := layout.Find(manifest.Encoded())
	check(err)
	a, err := artifact.Read(ctx, layout, target)
	check(err)
	modes, err := unpack.Probe(ctx, root, unpack.Modes{}, false)
	if modes == (unpack.Modes{}) { // otherwise err only says why better modes do not work
		check(err)
	}
	tree, err := unpack.Build(ctx, filepath.Join(root, "tree"), a, unpack.Options{
		Modes:  modes,
		Blobs:  layout,
		Shared: blobs.Dir(root),
		Budget: unpack.NewBudget(unpack.DefaultLimits),
	})
	check(err)
	check(tree.Mount(ctx, volume))
	defer func() { check(mount.UnmountAll(volume, 0)) }()

	check(fs.WalkDir(os.DirFS(volume), ".", func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			b, err := os.ReadFile(filepath.Join(volume, path))
			check(err)
			fmt.Printf("%s: %s\n", path, b)
		}
		return err
	}))
	// Output:
	// README.md: a model
	// weights/model.safetensors: 7 billion numbers
}

// writeArtifact writes an artifact of two raw layers into an OCI image layout.
func writeArtifact(layout blobs.Dir) (manifest digest.Digest) {
	store := func(text string) digest.Digest {
		id := digest.FromString(text)
		check(os.MkdirAll(filepath.Dir(layout.Path(id)), 0o755))
		check(os.WriteFile(layout.Path(id), []byte(text), 0o444))
		return id
	}
	layer := func(path, text string) string {
		return fmt.Sprintf(`{"mediaType": "application/vnd.cncf.model.weight.v1.raw", "digest": %q, "size": %d,
			"annotations": {"org.cncf.model.filepath": %q}}`, store(text), len(text), path)
	}
	return store(fmt.Sprintf(`{"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
		"config": {"mediaType": "application/vnd.cncf.model.config.v1+json", "digest": %q, "size": 2}, "layers": [%s, %s]}`,
		store("{}"), layer("README.md", "a model"), layer("weights/model.safetensors", "7 billion numbers")))
}

func check(err error) {
	if err != nil {
		log.Panic(err)
	}
}
