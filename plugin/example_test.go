// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package plugin_test

import (
	"fmt"

	"github.com/containerd/plugin"
	"github.com/containerd/plugin/registry"

	_ "github.com/artifact-snapshotter/artifact-snapshotter/plugin"
)

// A containerd with the snapshotter is containerd's main function and one more import:
//
//	import (
//		_ "github.com/containerd/containerd/v2/cmd/containerd/builtins"
//		"github.com/containerd/containerd/v2/cmd/containerd/command"
//
//		_ "github.com/artifact-snapshotter/artifact-snapshotter/plugin"
//	)
//
//	func main() {
//		if err := command.App().Run(context.Background(), os.Args); err != nil {
//			fmt.Fprintln(os.Stderr, "containerd:", err)
//			os.Exit(1)
//		}
//	}
//
// The import registers two plugins. testdata/containerd has the whole program; a test of this
// package compiles it in a module of its own and mounts an artifact with it.
func Example() {
	for _, r := range registry.Graph(func(*plugin.Registration) bool { return false }) {
		fmt.Println(r.URI())
	}
	// Output:
	// io.containerd.snapshotter.v1.artifact
	// io.containerd.differ.v1.artifact
}
