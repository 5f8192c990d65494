// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package artifact_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/opencontainers/go-digest"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
	"github.com/artifact-snapshotter/artifact-snapshotter/blobs"
)

// Read a model of one file of weights and one archive of documents from a directory like
// that of an OCI image layout, or of containerd's content store.
func ExampleRead() {
	root, err := os.MkdirTemp("", "example")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(root)
	store := func(content string) digest.Digest {
		dgst := digest.FromString(content)
		path := blobs.Dir(root).Path(dgst)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			panic(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o444); err != nil {
			panic(err)
		}
		return dgst
	}

	config := store(`{"descriptor":{"createdAt":"2025-01-02T03:04:05Z"}}`)
	manifest := store(fmt.Sprintf(`{
		"schemaVersion": 2,
		"mediaType": "application/vnd.oci.image.manifest.v1+json",
		"artifactType": "application/vnd.cncf.model.manifest.v1+json",
		"config": {"mediaType": "application/vnd.cncf.model.config.v1+json", "digest": %q, "size": 51},
		"layers": [{
			"mediaType": "application/vnd.cncf.model.weight.v1.raw", "digest": %q, "size": 7,
			"annotations": {
				"org.cncf.model.filepath": "weights/model.safetensors",
				"org.cncf.model.file.metadata+json": "{\"mode\":384,\"uid\":1000,\"gid\":1000}"
			}
		}, {
			"mediaType": "application/vnd.cncf.model.doc.v1.tar+gzip", "digest": %q, "size": 9
		}]
	}`, config, store("weights"), digest.FromString("documents")))

	// A runtime names a volume by the digest of its manifest, in hex.
	dir := blobs.Dir(root)
	target, err := dir.Find(manifest.Encoded())
	if err != nil {
		panic(err)
	}
	a, err := artifact.Read(context.Background(), dir, target)
	if err != nil {
		panic(err)
	}
	fmt.Println(a.Type)
	for _, l := range a.Layers {
		switch l.Format {
		case artifact.FormatRaw:
			f := l.File
			fmt.Println(l.Format, f.Path, f.Mode, f.UID, f.GID, f.ModTime)
		case artifact.FormatTar:
			fmt.Println(l.Format, l.Compression)
		default:
		}
	}
	// Output:
	// application/vnd.cncf.model.manifest.v1+json
	// raw weights/model.safetensors -rw------- 1000 1000 2025-01-02 03:04:05 +0000 UTC
	// tar gzip
}
