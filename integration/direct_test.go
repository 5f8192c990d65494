// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"slices"
	"strings"
	"testing"

	modelspec "github.com/modelpack/model-spec/specs-go/v1"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
)

func TestFilesCanBeReadWithODirectWhereItIsRequired(t *testing.T) {
	t.Parallel()
	raws, tars := modesOfTheKernel(rawModes), modesOfTheKernel(tarModes)
	n := node.ForTest(t, node.Options{})
	layers, expected := mixture(t)
	mixed := push(t, n, "mixture", layers...)
	plain := push(t, n, "plain", tarLayer(t, modelspec.MediaTypeModelWeight, archiveOf(t, file("before"), file("f"))))
	want := map[string]string{"/plain/f": fileEntry("f", []byte("f")).SHA256}
	for _, e := range expected {
		if e.Type == "file" {
			want["/mixture/"+e.Path] = e.SHA256
		}
	}
	for _, setting := range []string{"optional", "required"} {
		t.Run(setting, func(t *testing.T) {
			check(t, restartWith(t, n, `direct_io = "`+setting+`"`))
			tar := tars[0]
			if setting == "required" {
				tar = tars[slices.IndexFunc(tars, func(r string) bool { return r == "erofs-loop" || r == "extract" })]
			}
			works := tar != "erofs" && tar != "erofs-buffered"
			pod, err := n.RunPod(node.PodSpec{Volumes: []node.Volume{{Image: mixed, Path: "/mixture"}, {Image: plain, Path: "/plain"}}})
			check(t, err)
			wantModes(t, n, raws[0], tar, raws[0], tar)
			for path, sum := range want {
				got, err := pod.Exec("main", node.Guest, "direct", path)
				check(t, err)
				if !works && (path == "/plain/f" || strings.HasPrefix(path, "/mixture/plain/")) {
					sum = "EINVAL"
				}
				// The other files can be read only if their bytes are a whole blob.
				if got = strings.TrimSpace(got); got != sum && (works || got != "EINVAL") {
					t.Errorf("%s: %s, want %s, with the mode %s", path, got, sum, tar)
				}
			}
			check(t, pod.Remove())
			// A mounted volume keeps its mode, so wait until nothing is mounted.
			waitFor(t, "removal of the daemon's mounts", func() bool {
				mounts, err := node.Mounts(n.DaemonState)
				return err == nil && len(mounts) == 0
			})
		})
	}
	for _, tar := range tars {
		if tar != "erofs" && tar != "erofs-buffered" {
			continue
		}
		err := restartWith(t, n, "direct_io = \"required\"\ntar_mode = \""+tar+`"`)
		if log := daemonLog(t, n); err == nil || !strings.Contains(log, "O_DIRECT") {
			t.Errorf("the daemon started in the mode %s, or did not log why it could not: %v", tar, err)
		}
	}
	check(t, restartWith(t, n, ""))
}
