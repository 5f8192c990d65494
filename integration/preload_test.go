// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"encoding/json"
	"slices"
	"testing"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
)

// runRecipe runs commands of docs/kubernetes.md in dir, as on the host of the node.
func runRecipe(t *testing.T, n *node.Node, dir, name string, oldnew ...string) string {
	t.Helper()
	script := "set -e\ncd '" + dir + "'\n" + recipe(t, name, oldnew...)
	out, err := n.Tool("env", "CONTAINERD_ADDRESS="+n.Address, "sh", "-c", script)
	check(t, err)
	return out
}

// pinned reports whether an image is excluded from kubelet's image garbage collection.
func pinned(t *testing.T, n *node.Node, ref string) bool {
	t.Helper()
	out, err := n.Crictl("images", "--output", "json")
	check(t, err)
	var list struct {
		Images []struct {
			RepoTags []string
			Pinned   bool
		}
	}
	check(t, json.Unmarshal([]byte(out), &list))
	for _, image := range list.Images {
		if slices.Contains(image.RepoTags, ref) {
			return image.Pinned
		}
	}
	t.Fatalf("CRI has no image %s: %s", ref, out)
	return false
}

// A node without access to a registry gets its models as files.
func TestAirGappedNode(t *testing.T) {
	n := node.ForTest(t, node.Options{})
	src := writeModel(t)
	want := wantTree(t, src, pack.Raw)
	manifest := pushModel(t, n, src, pack.Raw, "stable")
	repository := n.Registry + "/models/tiny"
	ref := repository + ":stable"
	dir := t.TempDir()
	runRecipe(t, n, dir, "save", "registry.example.com/models/llama:v1", "--from-plain-http "+ref)
	other := writeModel(t, "README.md")
	byTool := pushTo(t, n, "models/tool", other, pack.TarGzip)
	_, _, err := n.Artifact("pull", "--plain-http", byTool)
	check(t, err)
	check(t, n.StopRegistry())
	if _, err := n.Pull(ref); err == nil {
		t.Fatal("the registry can be reached, so the test proves nothing")
	}

	runRecipe(t, n, dir, "load", "registry.example.com/models/llama", repository)
	loaded := repository + ":v1" // the tag in the layout
	wantEventuallyServed(t, n, loaded, want)

	// The archive has a tag, but no name with a digest, which kubelet would look for.
	byDigest := repository + "@" + manifest.String()
	served := func() error {
		pod, err := n.RunPod(node.PodSpec{Volumes: []node.Volume{{Image: byDigest, Path: "/model"}}})
		if err == nil {
			wantVolume(t, pod, "main", "/model", want)
			check(t, pod.Remove())
		}
		return err
	}
	if err := served(); err == nil {
		t.Errorf("%s is mounted although CRI has no such name", byDigest)
	}
	runRecipe(t, n, dir, "name by digest",
		"registry.example.com/models/llama@sha256:2474bb134cd4c0a60a7cfd91447fc1858bee9e3f6d983e0691b1d7eb07f187a3", byDigest,
		"registry.example.com/models/llama", repository)
	waitFor(t, "CRI to know "+byDigest, func() bool { return served() == nil })

	wantServed(t, n, byTool, wantTree(t, other, pack.TarGzip))
}

func TestPinnedModel(t *testing.T) {
	n := node.ForTest(t, node.Options{})
	ref := pushTo(t, n, "models/llama", writeModel(t), pack.Raw)
	_, err := n.Pull(ref)
	check(t, err)
	if pinned(t, n, ref) {
		t.Error("the model is pinned before the recipe")
	}
	wantPinned := func(want bool, after string) {
		t.Helper()
		waitFor(t, "the expected pin after "+after, func() bool { return pinned(t, n, ref) == want })
	}
	_, err = n.Ctr("images", "label", ref, "io.cri-containerd.pinned=pinned")
	check(t, err)
	wantPinned(true, "the label")
	_, err = n.Pull(ref)
	check(t, err)
	wantPinned(false, "a pull, which rewrites the labels of the image")

	runRecipe(t, n, t.TempDir(), "pin", "registry.example.com/models/llama:v1", ref)
	wantPinned(true, "the recipe")
	_, err = n.Pull(ref)
	check(t, err)
	check(t, n.RestartContainerd())
	wantPinned(true, "a pull and a restart")
	runRecipe(t, n, t.TempDir(), "unpin")
	wantPinned(false, "the other recipe")
}
