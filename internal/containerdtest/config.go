// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package containerdtest

import (
	"bytes"
	"os/exec"
	"strings"
	"testing"

	"github.com/pelletier/go-toml/v2"
)

// Config is the part of `containerd config dump` that concerns snapshotters.
type Config struct {
	ProxyPlugins map[string]struct {
		Type         string            `toml:"type"`
		Address      string            `toml:"address"`
		Capabilities []string          `toml:"capabilities"`
		Exports      map[string]string `toml:"exports"`
	} `toml:"proxy_plugins"`
	Plugins struct {
		Images struct {
			Snapshotter string `toml:"snapshotter"`
		} `toml:"io.containerd.cri.v1.images"`
		Runtime struct {
			Containerd struct {
				Default  string `toml:"default_runtime_name"`
				Runtimes map[string]struct {
					Type        string `toml:"runtime_type"`
					Snapshotter string `toml:"snapshotter"`
					Options     struct {
						SystemdCgroup bool
					} `toml:"options"`
				} `toml:"runtimes"`
			} `toml:"containerd"`
		} `toml:"io.containerd.cri.v1.runtime"`
		Transfer struct {
			UnpackConfig []struct {
				Platform    string `toml:"platform"`
				Snapshotter string `toml:"snapshotter"`
				Differ      string `toml:"differ"`
			} `toml:"unpack_config"`
		} `toml:"io.containerd.transfer.v1.local"`
	} `toml:"plugins"`
}

// Kubeadm is the configuration of a node that was set up for kubeadm with containerd 1.7.
const Kubeadm = `version = 2
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "registry.k8s.io/pause:3.9"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    default_runtime_name = "runc"
    snapshotter = "overlayfs"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = true
`

// Unpacks are the snapshotters of unpack_config, in order.
func (c Config) Unpacks() (snapshotters []string) {
	for _, entry := range c.Plugins.Transfer.UnpackConfig {
		snapshotters = append(snapshotters, entry.Snapshotter)
	}
	return snapshotters
}

// Dump returns what the containerd binary reads from the configuration file at path. The
// test fails if containerd ignores anything in it.
func Dump(t *testing.T, binary, path string) (config Config) {
	t.Helper()
	command := exec.Command(binary, "--config", path, "config", "dump")
	var stderr bytes.Buffer
	command.Stderr = &stderr
	text, err := command.Output()
	if err != nil || strings.Contains(stderr.String(), "Ignoring") {
		t.Fatalf("containerd does not accept it: %v\n%s", err, &stderr)
	}
	if err := toml.Unmarshal(text, &config); err != nil {
		t.Fatal(err)
	}
	return config
}
