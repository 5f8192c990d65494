// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package node

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
)

// Member makes a machine a member of a cluster: it has its own network, its kubelet
// registers with the API server, and images come from the cluster's registries. Its
// kubelet starts when the machine boots.
type Member struct {
	Dir       string // the parent of the node's directory
	Name      string // the Kubernetes node's
	Network   string // path of its network namespace
	Address   string // its IP address in it
	PodSubnet string // its pods' addresses

	// Hosts are names with their addresses; Registries are the host names of plain HTTP
	// registries. The first has the test image.
	Hosts      map[string]string
	Registries []string

	Kubeconfig string         // kubelet's, the content of the file
	Kubelet    map[string]any // fields of KubeletConfiguration that replace the defaults
}

// memberConfig is merged into machineConfig.
const memberConfig = `
[plugins.'io.containerd.cri.v1.images'.registry]
  config_path = '/etc/containerd/certs.d'
`

const memberHosts = `server = "http://%[1]s"

[host."http://%[1]s"]
  capabilities = ["pull", "resolve"]
`

// memberKubelet is kubelet as a service, with its own default directories.
const memberKubelet = `[Unit]
Description=kubelet
After=containerd.service

[Service]
Environment='PATH={{.Tools}}:/usr/sbin:/usr/bin'
ExecStart='{{.Tools}}/kubelet' --config /etc/kubernetes/kubelet.json --kubeconfig /etc/kubernetes/kubelet.conf \
	--hostname-override {{.Member.Name}} --node-ip {{.Member.Address}} --v 2
KillMode=process
Restart=always
RestartSec=2

[Install]
WantedBy=multi-user.target
`

// memberCNI gives pods that have their own network the machine's subnet.
const memberCNI = `{
  "cniVersion": "1.0.0",
  "name": "test",
  "plugins": [{
    "type": "ptp",
    "ipam": {"type": "host-local", "ranges": [[{"subnet": "{{.Member.PodSubnet}}"}]], "routes": [{"dst": "0.0.0.0/0"}]}
  }]
}
`

func (n *Node) writeMember() error {
	m := n.options.Member
	config := map[string]any{
		"apiVersion":                  "kubelet.config.k8s.io/v1beta1",
		"kind":                        "KubeletConfiguration",
		"containerRuntimeEndpoint":    "unix:///run/containerd/containerd.sock",
		"volumePluginDir":             "/var/lib/kubelet/volume-plugins", // the default is in /usr
		"authentication":              map[string]any{"anonymous": map[string]any{"enabled": true}, "webhook": map[string]any{"enabled": false}},
		"authorization":               map[string]any{"mode": "AlwaysAllow"},
		"failSwapOn":                  false,
		"failCgroupV1":                false,
		"cgroupDriver":                "cgroupfs",
		"cgroupsPerQOS":               false,
		"enforceNodeAllocatable":      []string{},
		"oomScoreAdj":                 0,
		"makeIPTablesUtilChains":      false,
		"clusterDNS":                  []string{"10.96.0.10"}, // nobody answers, but without it every pod has a warning
		"clusterDomain":               "cluster.local",
		"maxPods":                     60,
		"evictionHard":                map[string]string{"imagefs.available": "1%", "nodefs.available": "1%", "memory.available": "1Mi"},
		"imageGCHighThresholdPercent": 100, // never, unless a test asks for it
		"imageGCLowThresholdPercent":  99,
		"nodeStatusUpdateFrequency":   "5s", // half a minute less until the API server knows of a reboot
		"syncFrequency":               "10s",
	}
	maps.Copy(config, m.Kubelet)
	kubelet, err := json.MarshalIndent(config, "", "  ")
	hosts := "127.0.0.1 localhost\n" + m.Address + " " + m.Name + "\n"
	for name, address := range m.Hosts {
		hosts += address + " " + name + "\n"
	}
	errs := []error{
		err,
		n.writeVerbatim("machine/etc/hostname", m.Name+"\n"),
		n.writeVerbatim("machine/etc/hosts", hosts),
		n.writeFile("machine/etc/cni/net.d/10-test.conflist", memberCNI),
		n.writeVerbatim("machine/etc/kubernetes/kubelet.json", string(kubelet)),
		n.writeVerbatim("machine/etc/kubernetes/kubelet.conf", m.Kubeconfig),
		n.writeFile("machine/etc/systemd/system/kubelet.service", memberKubelet),
		n.link("../kubelet.service", "machine/etc/systemd/system/multi-user.target.wants/kubelet.service"),
		n.writeFile("machine/etc/containerd/config.toml", machineConfig+memberConfig),
		// The journal is on the disk, so that it can be read after a power cut.
		os.MkdirAll(n.path("machine/var/log/journal"), 0o755),
	}
	for _, host := range m.Registries {
		errs = append(errs, n.writeVerbatim("machine/etc/containerd/certs.d/"+host+"/hosts.toml", fmt.Sprintf(memberHosts, host)))
	}
	return errors.Join(errs...)
}

// File is the host's path of a file of the machine below /etc, /var or /usr/local.
func (n *Node) File(path string) string {
	if rest, ok := strings.CutPrefix(path, "/usr/local"); ok {
		return n.path(filepath.Join("machine/local", rest))
	}
	return n.path(filepath.Join("machine", path))
}
