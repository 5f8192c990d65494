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

// Tool runs a program of the tools' directory, or one in PATH if it is not
// there, and returns what it printed. The error holds its standard error.
func (n *Node) Tool(name string, args ...string) (string, error) {
	program := filepath.Join(n.tools, name)
	if _, err := os.Stat(program); err != nil {
		program = name
	}
	return n.run(program, args...)
}

// Artifact runs artifact-snapshotter as the tool of the node and returns what it
// printed. The error holds its standard error, too. See [Node.ArtifactCommand].
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

// ArtifactCommand is artifact-snapshotter with a command of its and its arguments,
// for this node's containerd and daemon and in CRI's namespace, unless args say
// otherwise. It ends with the node's context.
func (n *Node) ArtifactCommand(args ...string) (*exec.Cmd, error) {
	bin, err := findDaemon()
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(n.ctx, bin, args...)
	cmd.Env = append(n.env(), "CONTAINERD_ADDRESS="+n.Address, "CONTAINERD_NAMESPACE=k8s.io")
	return cmd, nil
}

// ConfigFile is a configuration file for artifact-snapshotter that names the
// directories and sockets of the node.
func (n *Node) ConfigFile() string { return n.path("snippet.toml") }

// PrivateUser and PrivatePassword are let in by the registry of
// StartPrivateRegistry.
const (
	PrivateUser     = "reader"
	PrivatePassword = "secret"
)

// privateUsers is a file of htpasswd(1).
const privateUsers = PrivateUser + ":$2y$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a\n"

const privateConfig = registryConfig + `auth:
  htpasswd:
    realm: test
    path: {{.Dir}}/htpasswd
`

// StartPrivateRegistry starts another registry with the content of the first, which
// asks for a password, and returns its host:port.
func (n *Node) StartPrivateRegistry() (string, error) {
	if err := n.writeVerbatim("htpasswd", privateUsers); err != nil {
		return "", err
	}
	var host string
	var err error
	n.private, host, err = n.spawnRegistry("private-registry", privateConfig)
	return host, err
}
