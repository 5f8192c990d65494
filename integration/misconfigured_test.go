// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"path/filepath"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/treelist"
)

// With a wrong address of containerd or a wrong content root the daemon can mount no
// artifact, and the error names the setting. Container images still work.
func TestAMisconfiguredDaemonRefusesOnlyArtifacts(t *testing.T) {
	t.Parallel()
	for frontEnd, o := range map[string]node.Options{"snapshotter": {}, "NRI": {NRI: true}} {
		t.Run(frontEnd, func(t *testing.T) {
			t.Parallel()
			n := node.ForTest(t, o)
			src := writeModel(t)
			ref := pulled(t, n, src, pack.Raw)
			layer, err := pack.TarDir(src)
			check(t, err)
			image, err := pack.Image(ocispec.ImageConfig{}, true, layer)
			check(t, err)
			_, err = image.Push(t.Context(), n.Registry, "images/tiny", "latest")
			check(t, err)
			ordinary := n.Registry + "/images/tiny:latest"
			_, err = n.Pull(ordinary)
			check(t, err)
			want, err := treelist.List(src)
			check(t, err)
			address, contentRoot := n.Address, n.ContentRoot
			restart := func(t *testing.T, a, c string) {
				t.Helper()
				check(t, n.StopDaemon())
				n.Address, n.ContentRoot = a, c
				err := n.StartDaemon()
				n.Address, n.ContentRoot = address, contentRoot
				check(t, err)
				if o.NRI {
					check(t, n.WaitForNRI())
				} else {
					waitForDaemon(t, n)
				}
			}
			none := filepath.Join(n.Dir, "none")
			for _, wrong := range []struct{ key, address, contentRoot, reason string }{
				{"containerd_address", none, contentRoot, "containerd_address"},
				{"content_root", address, none, "check that this is the runtime's content root"},
			} {
				t.Run(wrong.key, func(t *testing.T) {
					restart(t, wrong.address, wrong.contentRoot)
					wantServed(t, n, ordinary, want)
					pod, err := n.RunSandbox(node.PodSpec{})
					check(t, err)
					refused := wantRefused
					if o.NRI {
						refused = wantRefusedByNRI
					}
					refused(t, pod, ref, wrong.reason)
					check(t, pod.Remove())
				})
			}
			restart(t, address, contentRoot)
			wantServed(t, n, ref, wantTree(t, src, pack.Raw))
		})
	}
}
