// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
)

// No pod has asked for what is unpacked here.
func TestCompressedLayersAreUnpackedDuringThePull(t *testing.T) {
	n := node.ForTest(t, node.Options{})
	before := daemonUsage(t, n)
	for _, form := range []pack.Form{pack.TarGzip, pack.TarZstd} {
		src := writeModel(t)
		ref := pulled(t, n, src, form)
		_, target := pulledManifest(t, n, ref)
		tree := filepath.Join(n.DaemonRoot, "trees", "sha256-"+target.Encoded(), "tree.json")
		waitFor(t, "the tree of "+string(form), func() bool {
			_, err := os.Stat(tree)
			return err == nil
		})
		_, err := n.Crictl("rmi", ref)
		check(t, err)
		wantUsage(t, n, before)
	}
}
