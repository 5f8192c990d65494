// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package store_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/artifact-snapshotter/artifact-snapshotter/blobs"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
	"github.com/artifact-snapshotter/artifact-snapshotter/store"
	"github.com/artifact-snapshotter/artifact-snapshotter/unpack"
)

// A front end mounts an artifact, records that it is in use, and later lets it go. It must run
// as root.
func Example() {
	ctx := context.Background()
	dir, err := os.MkdirTemp("", "store-example-*")
	check(err)
	defer os.RemoveAll(dir)

	// The runtime has pulled an artifact with one file into its content store.
	content := filepath.Join(dir, "content")
	target, err := pack.File("model.safetensors", "weights of a model").WriteTo(content)
	check(err)

	trees, err := store.Open(ctx, store.Config{
		Root: filepath.Join(dir, "root"), State: filepath.Join(dir, "state"),
		Content: blobs.Dir(content),
		Limits:  unpack.DefaultLimits,
	})
	check(err)
	defer trees.Close()

	// The front end keeps the list of what is in use. A real one has it on disk.
	var inUse []store.ID
	trees.AddReferences(func(context.Context) ([]store.ID, error) { return inUse, nil })

	ref, err := trees.Acquire(ctx, target, unpack.IDMap{})
	check(err)
	inUse = append(inUse, ref.ID)
	ref.Listed() // from here on the list keeps the mount
	check(trees.CollectGarbage(ctx))
	text, err := os.ReadFile(filepath.Join(ref.Path, "model.safetensors"))
	check(err)
	fmt.Printf("in use: %s\n", text)

	inUse = nil
	check(trees.CollectGarbage(ctx))
	_, err = os.Stat(ref.Path)
	fmt.Println("unmounted:", os.IsNotExist(err))
	// Output:
	// in use: weights of a model
	// unmounted: true
}

func check(err error) {
	if err != nil {
		panic(err)
	}
}
