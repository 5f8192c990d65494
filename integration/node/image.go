// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package node

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
)

// BuildImage builds the daemon's container image for this machine, as `make image` does,
// into an OCI image layout in dir. It returns the digest of its index.
func (n *Node) BuildImage(dir string) (string, error) { return BuildImage(n.ctx, dir) }

// BuildImage is [Node.BuildImage] without a node.
func BuildImage(ctx context.Context, dir string) (string, error) {
	repository, err := findRepository()
	if err != nil {
		return "", err
	}
	bin, err := findDaemon()
	if err != nil {
		return "", err
	}
	cmd := exec.CommandContext(ctx, "go", "run", ".", "-out", dir, "-version", "test", runtime.GOARCH+"="+bin)
	cmd.Dir = filepath.Join(repository, "deploy", "image")
	out, err := cmd.Output()
	var failed *exec.ExitError
	if errors.As(err, &failed) {
		err = fmt.Errorf("%s: %w\n%s", cmd, err, failed.Stderr)
	}
	return strings.TrimSpace(string(out)), err
}

// PushImage pushes the image of an OCI image layout into the node's registry and
// returns its reference.
func (n *Node) PushImage(dir string) (string, error) {
	ref := n.Registry + "/artifact-snapshotter:test"
	_, err := n.Tool("crane", "push", "--index", dir, ref)
	return ref, err
}

// Chart renders the daemon's Helm chart. The values have names and JSON values as for `helm
// --set-json`. It returns the manifests that `helm install test` would create.
func (n *Node) Chart(values map[string]string) (string, error) {
	repository, err := findRepository()
	if err != nil {
		return "", err
	}
	helm := filepath.Join(n.tools, "helm")
	if _, err := os.Stat(helm); err != nil {
		return "", fmt.Errorf("helm is missing: run `make helm`: %w", err)
	}
	args := []string{"template", "test", filepath.Join(repository, "deploy", "chart", "artifact-snapshotter"), "--namespace", "kube-system"}
	for name, json := range values {
		args = append(args, "--set-json", name+"="+json)
	}
	return n.run(helm, args...)
}
