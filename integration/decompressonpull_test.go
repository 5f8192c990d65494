// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/treelist"
)

// treeFile returns a file that exists as soon as the tree of an artifact does.
func treeFile(n *node.Node, manifest digest.Digest) string {
	return filepath.Join(n.DaemonRoot, "trees", "sha256-"+manifest.Encoded(), "tree.json")
}

// waitForTree waits for the tree of an artifact that no pod has used.
func waitForTree(t *testing.T, n *node.Node, ref string) (file string) {
	t.Helper()
	_, manifest := pulledManifest(t, n, ref)
	file = treeFile(n, manifest)
	waitFor(t, "the tree of "+ref, func() bool {
		_, err := os.Stat(file)
		return err == nil
	})
	return file
}

// The trees are built although no pod uses the artifacts.
func TestCompressedLayersAreUnpackedDuringThePull(t *testing.T) {
	n := node.ForTest(t, node.Options{})
	before := daemonUsage(t, n)
	for _, form := range []pack.Form{pack.TarGzip, pack.TarZstd} {
		ref := pulled(t, n, writeModel(t), form)
		waitForTree(t, n, ref)
		_, err := n.Crictl("rmi", ref)
		check(t, err)
		wantUsage(t, n, before)
	}
}

// containerd never fetches the layers of these artifacts, so their builds wait.
func TestArtifactsThatAreNeverFetchedDoNotDelayOthers(t *testing.T) {
	t.Parallel()
	n := node.ForTest(t, node.Options{})
	for i := range 40 {
		pulledUnfetched(t, n, fmt.Sprint("docs", i), "application/vnd.acme.config.v1+json")
	}
	waitForTree(t, n, pulled(t, n, writeModel(t), pack.TarGzip))
}

// An upgrade of the daemon changed the format of trees while a pod was running. Then the
// pod's image is deleted and pulled again.
func TestATreeOfAnotherVersionStaysUntilItsPodsEnd(t *testing.T) {
	t.Parallel()
	n := node.ForTest(t, node.Options{})
	src := writeModel(t)
	ref := pulled(t, n, src, pack.TarGzip)
	want := wantTree(t, src, pack.TarGzip)
	file := waitForTree(t, n, ref)
	run := func() *node.Pod {
		t.Helper()
		pod, err := n.RunPod(node.PodSpec{Volumes: []node.Volume{{Image: ref, Path: "/model"}}})
		check(t, err)
		return pod
	}
	wantRead := func(pod *node.Pod) {
		t.Helper()
		got, err := pod.Tree("main", "/model")
		check(t, err)
		if diff := treelist.Diff(want, got); diff != "" {
			t.Errorf("the volume differs:\n%s", diff)
		}
	}
	running := run()
	check(t, n.StopDaemon())
	const other = `{"format": 1}`
	check(t, os.WriteFile(file, []byte(other), 0o600))
	check(t, n.StartDaemon())
	waitForDaemon(t, n)
	_, err := n.Crictl("rmi", ref)
	check(t, err)
	_, err = n.Pull(ref)
	check(t, err)

	next := run() // waits for the build that the pull may have started
	wantRead(next)
	check(t, next.Remove())
	wantRead(running)
	if b, err := os.ReadFile(file); err != nil || string(b) != other {
		t.Errorf("the tree of a running pod was replaced: %s, %v", b, err)
	}
	check(t, running.Remove())
	waitFor(t, "the removal of the tree after its last pod", func() bool {
		_, err := os.Stat(file)
		return os.IsNotExist(err)
	})
	last := run()
	wantRead(last)
	check(t, last.Remove())
}
