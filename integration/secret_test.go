// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"strings"
	"testing"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
)

// privateModel pushes a model of one file. It returns its reference in the registry that
// requires a password.
func privateModel(t *testing.T, n *node.Node, private, text string) (ref string, want func(t *testing.T, pod *node.Pod)) {
	t.Helper()
	ref, _, expected := pushText(t, n, "private/"+text, text)
	return strings.Replace(ref, n.Registry, private, 1), func(t *testing.T, pod *node.Pod) {
		t.Helper()
		wantVolume(t, pod, "main", "/model", expected)
	}
}

// containerd gets credentials for a private registry in two ways: with the pull from
// kubelet (a pull secret, or from a credential provider), or from hosts.toml on the node.
func TestPrivateRegistry(t *testing.T) {
	dir := t.TempDir()
	n := node.ForTest(t, node.Options{ContainerdConfig: configPath(dir)})
	private, err := n.StartPrivateRegistry()
	check(t, err)

	pulled, want := privateModel(t, n, private, "with-the-pull")
	spec := node.PodSpec{Volumes: []node.Volume{{Image: pulled, Path: "/model"}}}
	_, err = n.Pull(pulled)
	if err == nil || !strings.Contains(err.Error(), "authorization failed: no basic auth credentials") {
		t.Errorf("without credentials: %v", err)
	}
	_, err = n.Crictl("pull", "--creds", node.PrivateUser+":wrong", pulled)
	if err == nil || !strings.Contains(err.Error(), "401 Unauthorized") {
		t.Errorf("with a wrong password: %v", err)
	}
	_, err = n.Crictl("pull", "--creds", node.PrivateUser+":"+node.PrivatePassword, pulled)
	check(t, err)
	pod, err := n.RunPod(spec)
	check(t, err)
	want(t, pod)

	// The artifact is on the node now, so containerd needs no password any more.
	other, err := n.RunPod(spec)
	check(t, err)
	want(t, other)

	configured, want := privateModel(t, n, private, "of-the-node")
	writeHosts(t, dir, private, recipe(t, "header", "https://registry.example.com", "http://"+private))
	_, err = n.Pull(configured)
	check(t, err)
	pod, err = n.RunPod(node.PodSpec{Volumes: []node.Volume{{Image: configured, Path: "/model"}}})
	check(t, err)
	want(t, pod)
}
