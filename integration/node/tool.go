// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package node

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// Tool runs a program from the tools' directory, or else from PATH, and returns its
// standard output. The error contains its standard error.
func (n *Node) Tool(name string, args ...string) (string, error) {
	program := filepath.Join(n.tools, name)
	if _, err := os.Stat(program); err != nil {
		program = name
	}
	return n.run(program, args...)
}

// Artifact runs the artifact-snapshotter program on the node. The error contains its
// standard error. See [Node.ArtifactCommand].
func (n *Node) Artifact(args ...string) (stdout, stderr string, err error) {
	cmd, err := n.ArtifactCommand(args...)
	if err != nil {
		return "", "", err
	}
	var out, errs strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err = cmd.Run(); err != nil {
		err = fmt.Errorf("artifact-snapshotter %s: %w\n%s", strings.Join(args, " "), err, errs.String())
	}
	return out.String(), errs.String(), err
}

// ArtifactCommand prepares artifact-snapshotter with these arguments. Its defaults are the
// node's containerd and CRI's namespace. It ends with the node's context.
func (n *Node) ArtifactCommand(args ...string) (*exec.Cmd, error) {
	bin, err := findDaemon()
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(n.ctx, bin, args...)
	cmd.Env = append(n.env(), "CONTAINERD_ADDRESS="+n.Address, "CONTAINERD_NAMESPACE=k8s.io")
	return cmd, nil
}

// ConfigFile returns an artifact-snapshotter configuration file with the node's directories
// and sockets.
func (n *Node) ConfigFile() string { return n.path("snippet.toml") }

// PrivateUser and PrivatePassword are the credentials of StartPrivateRegistry.
const (
	PrivateUser     = "reader"
	PrivatePassword = "secret"
)

// PrivateUsers is a file of htpasswd(1) with them.
const PrivateUsers = PrivateUser + ":$2y$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a\n"

const privateConfig = registryConfig + `auth:
  htpasswd:
    realm: test
    path: {{.Dir}}/htpasswd
`

// StartPrivateRegistry starts another registry with the content of the first one and a
// password. It returns its host:port.
func (n *Node) StartPrivateRegistry() (string, error) {
	if err := n.writeVerbatim("htpasswd", PrivateUsers); err != nil {
		return "", err
	}
	var host string
	var err error
	n.private, host, err = n.spawnRegistry("private-registry", privateConfig)
	return host, err
}
