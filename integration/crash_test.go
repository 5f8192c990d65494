// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

//go:build amd64

package integration

import (
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/crash"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
)

// Package crash kills the daemon alone, at every operation. This test kills it at some
// operations of a complete node.
func TestANodeSurvivesThatTheDaemonIsKilledAtAnyOperation(t *testing.T) {
	kills := 3
	if os.Getenv("ARTIFACT_SNAPSHOTTER_LONG") != "" {
		kills = 50
	} else if testing.Short() {
		kills = 1
	}
	program, err := node.Program()
	check(t, err)
	wrapper, err := crash.NewWrapper(t.TempDir(), program)
	check(t, err)
	t.Setenv("ARTIFACT_SNAPSHOTTER_BIN", wrapper.Path)
	n := node.ForTest(t, node.Options{})
	before := daemonUsage(t, n)
	src := writeModel(t)

	// This pod reads during the whole test.
	stays := pulled(t, n, src, pack.Raw)
	pod, err := n.RunPod(reading(stays))
	check(t, err)
	random := rand.New(rand.NewPCG(50, 0)) // any seed will do
	distinct := map[string]bool{}
	for i := range kills {
		form := []pack.Form{pack.TarGzip, pack.Raw, pack.TarZstd, pack.Tar}[i%4]
		ref := n.Registry + "/models/tiny:" + strings.ReplaceAll(string(form), "+", "-")
		pushModel(t, n, src, form, ref[strings.LastIndex(ref, ":")+1:])
		check(t, wrapper.Arm(1+random.IntN(120)))
		at, killed := comeAndGoUntilKilled(t, n, wrapper, ref, form != pack.Raw)
		if !killed {
			t.Fatal("the daemon was not killed: it had too few operations")
		}
		distinct[at] = true
		wantReading(t, pod)
		check(t, n.KillDaemon()) // waits for its end
		check(t, n.StartDaemon())
		waitForDaemon(t, n)
		wantReading(t, pod)
		wantVolume(t, pod, "main", "/model", wantTree(t, src, pack.Raw))
		removeOthers(t, n, pod)
		// The next pod works.
		_, err := n.Pull(ref)
		check(t, err)
		next, err := n.RunPod(node.PodSpec{Volumes: []node.Volume{{Image: ref, Path: "/model"}}})
		if err != nil {
			t.Fatalf("after a kill at %s: %v", at, err)
		}
		wantVolume(t, next, "main", "/model", wantTree(t, src, form))
		check(t, next.Remove())
		if t.Failed() {
			t.Fatalf("these failures occurred after a kill at %s", at)
		}
	}
	t.Logf("%d kills at %d distinct operations survived", kills, len(distinct))
	check(t, pod.Remove())
	out, err := n.Crictl("images", "--quiet")
	check(t, err)
	for _, image := range strings.Fields(out) {
		if refs, err := n.Crictl("inspecti", "--output", "go-template", "--template", "{{.status.repoTags}}", image); err == nil && strings.Contains(refs, "/models/") {
			_, err := n.Crictl("rmi", image)
			check(t, err)
		}
	}
	wantUsage(t, n, before)
}

// comeAndGoUntilKilled pulls an artifact, runs pods with it and, if may is set, deletes it.
// It repeats this until the daemon has been killed.
func comeAndGoUntilKilled(t *testing.T, n *node.Node, w *crash.Wrapper, ref string, may bool) (at string, killed bool) {
	t.Helper()
	for range 20 {
		var pods []*node.Pod
		for _, step := range []func(){
			func() { _, _ = n.Pull(ref) },
			func() { pods = append(pods, tryPod(n, ref)) },
			func() { pods = append(pods, tryPod(n, ref)) },
			func() {
				for _, p := range slices.DeleteFunc(pods, func(p *node.Pod) bool { return p == nil }) {
					_ = p.Remove()
				}
			},
			func() {
				if may {
					_, _ = n.Crictl("rmi", ref)
				}
			},
		} {
			step() // fails if the daemon is killed
			if at, killed := w.Killed(); killed {
				return at, true
			}
		}
	}
	return "", false
}

func tryPod(n *node.Node, ref string) *node.Pod {
	pod, err := n.RunPod(node.PodSpec{Volumes: []node.Volume{{Image: ref, Path: "/model"}}})
	if err != nil {
		return nil
	}
	return pod
}

// removeOthers removes all pods except one. Some may exist only in part.
func removeOthers(t *testing.T, n *node.Node, but *node.Pod) {
	t.Helper()
	out, err := n.Crictl("pods", "--quiet")
	check(t, err)
	for _, id := range strings.Fields(out) {
		if id != but.ID {
			_, err := n.Crictl("rmp", "--force", id)
			check(t, err)
		}
	}
}
