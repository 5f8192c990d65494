// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package snapshot_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"

	"github.com/artifact-snapshotter/artifact-snapshotter/blobs"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
	"github.com/artifact-snapshotter/artifact-snapshotter/snapshot"
	"github.com/artifact-snapshotter/artifact-snapshotter/store"
	"github.com/artifact-snapshotter/artifact-snapshotter/unpack"
)

// containerd's CRI plugin prepares the image volume of an artifact. It must run as root.
func Example() {
	ctx := context.Background()
	dir, err := os.MkdirTemp("", "snapshot-example-*")
	check(err)
	defer os.RemoveAll(dir)

	// containerd has pulled an artifact with one file.
	content := filepath.Join(dir, "content")
	target, err := pack.File("model.safetensors", "weights of a model").WriteTo(content)
	check(err)

	root := filepath.Join(dir, "root")
	trees, err := store.Open(ctx, store.Config{
		Root: root, State: filepath.Join(dir, "state"),
		Content: blobs.Dir(content),
		Limits:  unpack.DefaultLimits,
	})
	check(err)
	defer trees.Close()
	snapshotter, err := snapshot.New(root, trees)
	check(err)
	defer snapshotter.Close()

	// The key is the path of the volume. Its last part is all that says which image it is.
	key := "/run/containerd/io.containerd.grpc.v1.cri/image-volumes/sandbox/" + target.Digest.Encoded()
	mounts, err := snapshotter.Prepare(ctx, key, "")
	check(err)
	fmt.Println(mounts[0].Type, strings.Join(mounts[0].Options, ","))

	err = mount.WithReadonlyTempMount(ctx, mounts, func(at string) error {
		text, err := os.ReadFile(filepath.Join(at, "model.safetensors"))
		fmt.Printf("%s\n", text)
		return err
	})
	check(err)
	check(snapshotter.Remove(ctx, key))
	check(trees.CollectGarbage(ctx)) // unmounts the tree
	// Output:
	// bind bind,ro,nosuid,nodev
	// weights of a model
}

func check(err error) {
	if err != nil {
		panic(err)
	}
}
