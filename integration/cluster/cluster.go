// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

// Package cluster runs a real Kubernetes cluster on one machine: etcd, the API server,
// the controller manager, the scheduler and two registries, and machines with systemd,
// containerd and kubelet, which package node boots in namespaces of their own. They can be
// rebooted, lose power, and be cut off. There is no kube-proxy and no DNS: the API server
// itself has the address of its service, and registries are in /etc/hosts.
//
// The cluster is in network namespaces of its own; nothing outlives [Cluster.Stop], nor,
// thanks to a keeper, a test program that panics. It needs root.
package cluster

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/process"
)

// The registries' names in references. They have the same content; Private asks for
// node.PrivateUser and node.PrivatePassword.
const (
	Registry = "registry.test"
	Private  = "private.test"
)

// Addresses in the cluster's network.
const (
	apiAddress      = "10.254.0.1"
	registryAddress = "10.254.0.2"
	privateAddress  = "10.254.0.3"
	serviceAddress  = "10.96.0.1" // of the service "kubernetes"
)

// GuestImage is the reference of the test image, whose only program is node.Guest.
const GuestImage = Registry + "/test/guest:latest"

// Cluster is a running cluster. Its methods may be called concurrently, except for those
// that start or stop something.
type Cluster struct {
	Dir string // everything below it is the cluster's

	ctx      context.Context
	tools    string
	network  *network
	keeper   *process.Keeper
	uploads  net.Listener // forwarded to the registry
	client   *http.Client // of the API server
	parts    map[string]*process.Process
	machines []*Machine
	lastLogs string
}

// Start starts a cluster with n machines and returns when they are ready.
func Start(ctx context.Context, n int) (*Cluster, error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("a cluster needs root: run it with sudo")
	}
	dir, err := os.MkdirTemp("", "asc-")
	if err != nil {
		return nil, err
	}
	c := &Cluster{Dir: dir, ctx: ctx, parts: map[string]*process.Process{}}
	if err := c.start(n); err != nil {
		err = fmt.Errorf("start a cluster: %w\n%s", err, c.Logs())
		return nil, errors.Join(err, c.Stop())
	}
	return c, nil
}

func (c *Cluster) start(n int) (err error) {
	if err := os.Chmod(c.Dir, 0o711); err != nil { // user namespaces in pods pass through
		return err
	}
	if c.keeper, err = process.Keep(c.Dir); err != nil {
		return err
	}
	if c.tools, err = node.Tools(); err != nil {
		return err
	}
	for tool, target := range map[string]string{"kubernetes": "cluster-tools", "kubelet": "kubelet", "helm": "helm"} {
		if _, err := os.Stat(filepath.Join(c.tools, tool)); err != nil {
			return fmt.Errorf("%s is missing: run `make %s`: %w", tool, target, err)
		}
	}
	if c.network, err = newNetwork(); err != nil {
		return err
	}
	script := "ip link set lo up; ip link add br0 type bridge; ip link set br0 up\n"
	for _, address := range []string{apiAddress + "/24", registryAddress + "/24", privateAddress + "/24", serviceAddress + "/32"} {
		script += "ip addr add " + address + " dev br0\n"
	}
	if err := c.network.run(c.ctx, script); err != nil {
		return err
	}
	if c.uploads, err = c.network.forward(registryAddress + ":80"); err != nil {
		return err
	}
	var group sync.WaitGroup
	var registries, control error
	group.Go(func() {
		registries = errors.Join(c.StartRegistries(), node.PushGuest(c.ctx, c.uploads.Addr().String()))
	})
	group.Go(func() { control = c.startControlPlane() })
	group.Wait()
	if err := errors.Join(registries, control); err != nil {
		return err
	}
	errs := make([]error, n)
	for i := range n {
		m, err := c.newMachine(nil)
		if err != nil {
			return err
		}
		group.Go(func() { errs[i] = m.boot() })
	}
	group.Wait()
	return errors.Join(errs...)
}

// Stop ends everything and removes it. The error lists what the machines left.
func (c *Cluster) Stop() error {
	var errs []error
	c.ctx = context.WithoutCancel(c.ctx)
	results := make([]error, len(c.machines))
	var group sync.WaitGroup
	for i, m := range c.machines {
		group.Go(func() { results[i] = m.stop() })
	}
	group.Wait()
	errs = append(errs, results...)
	// Without etcd the API server would not end for a minute.
	for _, name := range []string{"kube-scheduler", "kube-controller-manager", "kube-apiserver", "etcd", "registry", "private"} {
		errs = append(errs, c.parts[name].Stop(syscall.SIGTERM))
	}
	if c.uploads != nil {
		errs = append(errs, c.uploads.Close())
	}
	if c.network != nil {
		errs = append(errs, c.network.close())
	}
	c.lastLogs = c.Logs()
	mounts, err := node.Mounts(c.Dir)
	if err != nil || len(mounts) > 0 { // never delete through one
		return errors.Join(append(errs, err, fmt.Errorf("%s is not removed because of mounts that stay: %q", c.Dir, mounts))...)
	}
	errs = append(errs, os.RemoveAll(c.Dir))
	if c.keeper != nil {
		errs = append(errs, c.keeper.Release())
	}
	return errors.Join(errs...)
}

// Push pushes an artifact to both registries and returns its digest.
func (c *Cluster) Push(artifact *pack.Artifact, repository, tag string) (digest.Digest, error) {
	return artifact.Push(c.ctx, c.uploads.Addr().String(), repository, tag)
}

// PushImage pushes the image of an OCI image layout to both registries.
func (c *Cluster) PushImage(layout, name string) error {
	_, err := c.run(filepath.Join(c.tools, "crane"), "push", "--index", layout, c.uploads.Addr().String()+"/"+name)
	return err
}

// Machines are those that were started, in order.
func (c *Cluster) Machines() []*Machine { return slices.Clone(c.machines) }

// run runs a program on the host, with a home directory in the cluster's.
func (c *Cluster) run(program string, args ...string) (string, error) {
	return process.Run(c.ctx, c.env(), program, args...)
}

// env has the cluster's directory in it, by which the keeper knows the cluster's
// processes.
func (c *Cluster) env() []string {
	return append(os.Environ(), "HOME="+c.Dir+"/home", "KUBECONFIG="+c.path("admin.conf"), "OTEL_TRACES_EXPORTER=none")
}

func (c *Cluster) path(name string) string { return filepath.Join(c.Dir, name) }

// await is process.Await for at most five minutes.
func (c *Cluster) await(what string, done func() error) error {
	return process.Await(c.ctx, 5*time.Minute, what, done)
}

// Logs returns the last lines of every program's log, each under a heading; after Stop,
// as they were at Stop.
func (c *Cluster) Logs() string {
	if c.lastLogs != "" {
		return c.lastLogs
	}
	var out strings.Builder
	for _, name := range []string{"etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "registry"} {
		text, err := os.ReadFile(c.path("logs/" + name))
		if err != nil {
			continue // never started
		}
		lines := strings.Split(strings.TrimSpace(string(text)), "\n")
		lines = lines[max(0, len(lines)-15):]
		fmt.Fprintf(&out, "==> %s, last %d lines of its log\n%s\n", name, len(lines), strings.Join(lines, "\n"))
	}
	for _, m := range c.machines {
		fmt.Fprintf(&out, "==> machine %s\n%s", m.Name, m.logs())
	}
	return out.String()
}
