// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"strings"
	"testing"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
)

// containerd as it comes, with overlayfs, and the daemon as a plugin of its NRI.

func TestByNRIAModelIsShownAsItWasPacked(t *testing.T) {
	n := node.ForTest(t, node.Options{NRI: true})
	src := writeModel(t)
	for _, form := range allForms {
		t.Run(string(form), func(t *testing.T) {
			d := pushModel(t, n, src, form, strings.ReplaceAll(string(form), "+", "-"))
			want := wantTree(t, src, form)
			for _, ref := range []string{
				n.Registry + "/models/tiny:" + strings.ReplaceAll(string(form), "+", "-"),
				n.Registry + "/models/tiny@" + d.String(),
			} {
				_, err := n.Pull(ref)
				check(t, err)
				pod, err := n.RunPod(node.PodSpec{Volumes: []node.Volume{{Image: ref, Path: "/model"}}})
				check(t, err)
				wantVolume(t, pod, "main", "/model", want)
				check(t, pod.Remove())
			}
		})
	}
}
