// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package node

import (
	"errors"
	"io"
	"net/http"
	"os"
	"strings"
	"syscall"
)

// StartMirror starts a second registry with the content of the first one and returns its
// host:port.
func (n *Node) StartMirror() (string, error) {
	var host string
	var err error
	n.mirror, host, err = n.spawnRegistry("mirror", registryConfig)
	return host, err
}

// StopRegistry stops the registry at Registry with SIGTERM.
func (n *Node) StopRegistry() error { return n.registry.Stop(syscall.SIGTERM) }

// ProvideCredentials configures an image credential provider for kubelets that are started
// later: a CredentialProviderConfig in YAML or JSON, and its program. WithdrawCredentials
// undoes it.
func (n *Node) ProvideCredentials(config, name, program string) error {
	const bin, file = "credential-providers", "credential-providers.yaml"
	n.kubeletFlags = []string{"--image-credential-provider-bin-dir", n.path(bin), "--image-credential-provider-config", n.path(file)}
	return errors.Join(
		n.writeVerbatim(file, config),
		n.writeVerbatim(bin+"/"+name, program),
		os.Chmod(n.path(bin+"/"+name), 0o755),
	)
}

// WithdrawCredentials undoes ProvideCredentials.
func (n *Node) WithdrawCredentials() { n.kubeletFlags = nil }

// KubeletMetrics returns kubelet's metrics in the Prometheus format.
func (n *Node) KubeletMetrics() (string, error) {
	resp, err := http.Get(strings.TrimSuffix(n.kubeletPods, "/pods") + "/metrics")
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	return string(text), err
}
