// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"errors"
	"fmt"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
)

// Machine is a node of the cluster.
type Machine struct {
	*node.Node
	Name string // the Kubernetes node's

	cluster *Cluster
	network *network
	address string
	pods    string // its pods' subnet
	kubelet map[string]any
}

// Join boots another machine and returns when it is ready. The fields of kubelet, a
// KubeletConfiguration or nil, replace the defaults.
func (c *Cluster) Join(kubelet map[string]any) (*Machine, error) {
	m, err := c.newMachine(kubelet)
	if err != nil {
		return nil, err
	}
	return m, m.boot()
}

// newMachine connects another machine to the cluster's network. Machines reach each
// other's pods by routes.
func (c *Cluster) newMachine(kubelet map[string]any) (*Machine, error) {
	number := len(c.machines)
	if number == maxMachines {
		return nil, fmt.Errorf("a cluster has at most %d machines", maxMachines)
	}
	m := &Machine{
		Name:    machineName(number),
		cluster: c,
		address: fmt.Sprintf("10.254.0.%d", 11+number),
		pods:    fmt.Sprintf("10.253.%d.0/24", 11+number),
		kubelet: kubelet,
	}
	var err error
	if m.network, err = newNetwork(); err != nil {
		return nil, err
	}
	script := fmt.Sprintf("ip link set lo up; ip addr add %s/24 dev eth0; ip link set eth0 up; ip route add default via %s; echo 1 > /proc/sys/net/ipv4/ip_forward\n", m.address, apiAddress)
	for _, other := range c.machines {
		script += fmt.Sprintf("ip route add %s via %s\n", other.pods, other.address)
	}
	errs := []error{
		c.network.run(c.ctx, fmt.Sprintf("ip link add %s type veth peer name eth0 netns %s; ip link set %[1]s master br0 up", m.Name, m.network.path())),
		m.network.run(c.ctx, script),
	}
	route := fmt.Sprintf("ip route add %s via %s", m.pods, m.address)
	errs = append(errs, c.network.run(c.ctx, route))
	for _, other := range c.machines {
		errs = append(errs, other.network.run(c.ctx, route))
	}
	c.machines = append(c.machines, m)
	return m, errors.Join(errs...)
}

// boot boots the machine for the first time and waits until Kubernetes calls it ready.
func (m *Machine) boot() error {
	kubeconfig, err := m.cluster.kubeconfig(machineToken(m.Name))
	if err != nil {
		return err
	}
	m.Node, err = node.Start(m.cluster.ctx, node.Options{Stock: true, Systemd: true, Member: &node.Member{
		Dir:        m.cluster.Dir,
		Name:       m.Name,
		Network:    m.network.path(),
		Address:    m.address,
		PodSubnet:  m.pods,
		Hosts:      map[string]string{Registry: registryAddress, Private: privateAddress},
		Registries: []string{Registry, Private},
		Kubeconfig: kubeconfig,
		Kubelet:    m.kubelet,
	}})
	if err != nil {
		return err
	}
	return m.WaitReady("")
}

func (m *Machine) stop() error {
	var err error
	if m.Node != nil {
		err = m.Stop()
	}
	return errors.Join(err, m.network.close())
}

func (m *Machine) logs() string {
	if m.Node == nil {
		return ""
	}
	return m.Logs()
}

// BootID is the ID of the machine's boot that the API server knows.
func (m *Machine) BootID() (string, error) {
	var n object
	err := m.cluster.Get("/api/v1/nodes/"+m.Name, &n)
	return n.text("status", "nodeInfo", "bootID"), err
}

// WaitReady waits until the API server knows that the machine is ready, after another
// boot than previous; "" is any.
func (m *Machine) WaitReady(previous string) error {
	return m.cluster.await("the node "+m.Name, func() error {
		var n object
		if err := m.cluster.Get("/api/v1/nodes/"+m.Name, &n); err != nil {
			return err
		}
		if id := n.text("status", "nodeInfo", "bootID"); id == previous {
			return errors.New("it has not been rebooted")
		}
		for _, condition := range n.list("status", "conditions") {
			if condition.text("type") == "Ready" && condition.text("status") == "True" {
				return nil
			}
		}
		return errors.New("it is not ready")
	})
}

// Reboot shuts the machine down and boots it, and waits until it is ready.
func (m *Machine) Reboot() error { return m.restart(m.Shutdown) }

// PowerCut ends all that runs on the machine at once and boots it, and waits until it is
// ready.
func (m *Machine) PowerCut() error { return m.restart(m.Cut) }

func (m *Machine) restart(off func() error) error {
	previous, err := m.BootID()
	if err != nil {
		return err
	}
	if err := off(); err != nil {
		return err
	}
	if err := m.Boot(); err != nil {
		return err
	}
	return m.WaitReady(previous)
}

// Disconnect pulls the machine's network cable, and Connect plugs it in again.
func (m *Machine) Disconnect() error {
	return m.cluster.network.run(m.cluster.ctx, "ip link set "+m.Name+" down")
}

// Connect undoes Disconnect.
func (m *Machine) Connect() error {
	return m.cluster.network.run(m.cluster.ctx, "ip link set "+m.Name+" up")
}
