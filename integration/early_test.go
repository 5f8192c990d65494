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

// treeFile is what is there as soon as the tree of an artifact is.
func treeFile(n *node.Node, manifest digest.Digest) string {
	return filepath.Join(n.DaemonRoot, "trees", "sha256-"+manifest.Encoded(), "tree.json")
}

// waitForTree waits for the tree of an artifact that no pod has asked for.
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

// No pod has asked for what is unpacked here.
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

// A build waits for the layers of each of these, which containerd never fetches.
func TestArtifactsThatAreNeverFetchedDoNotKeepOthersFromBeingUnpacked(t *testing.T) {
	t.Parallel()
	n := node.ForTest(t, node.Options{})
	for i := range 40 {
		pulledUnfetched(t, n, fmt.Sprint("docs", i), "application/vnd.acme.config.v1+json")
	}
	waitForTree(t, n, pulled(t, n, writeModel(t), pack.TarGzip))
}

// The daemon was upgraded to a version with another format of trees, under a running
// pod, whose image is then deleted and pulled again.
func TestATreeOfAnotherVersionStaysAsLongAsItsPods(t *testing.T) {
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
			t.Errorf("the pod sees something else:\n%s", diff)
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

	next := run() // which waits for the build that the pull has begun, if it has
	wantRead(next)
	check(t, next.Remove())
	wantRead(running)
	if b, err := os.ReadFile(file); err != nil || string(b) != other {
		t.Errorf("the tree was built again below a running pod: %s, %v", b, err)
	}
	check(t, running.Remove())
	waitFor(t, "the tree to go with its last pod", func() bool {
		_, err := os.Stat(file)
		return os.IsNotExist(err)
	})
	last := run()
	wantRead(last)
	check(t, last.Remove())
}
