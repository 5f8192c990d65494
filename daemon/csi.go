// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	csiapi "github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/containerd/log"
	"google.golang.org/grpc"
	registerapi "k8s.io/kubelet/pkg/apis/pluginregistration/v1"

	"github.com/artifact-snapshotter/artifact-snapshotter/blobs"
	"github.com/artifact-snapshotter/artifact-snapshotter/csi"
	"github.com/artifact-snapshotter/artifact-snapshotter/pull"
	"github.com/artifact-snapshotter/artifact-snapshotter/service"
)

// CSI is the configuration of the CSI driver, which pulls artifacts by itself.
type CSI struct {
	Enabled bool `toml:"enabled"`
	// KubeletRoot is kubelet's directory (--root-dir).
	KubeletRoot string `toml:"kubelet_root"`
	// NodeName is the node's name in Kubernetes; if empty, that of the host.
	NodeName string `toml:"node_name"`
	// HostsDir has a hosts.toml for each registry that needs one.
	HostsDir string `toml:"hosts_dir"`
	// DockerConfig has the node's own credentials; it need not exist.
	DockerConfig string `toml:"docker_config"`
	// Downloads is how many blobs are fetched at once, Connections how many connections they
	// have in all, and PullMemory, in MiB, the memory for parts that arrive early.
	Downloads   int   `toml:"downloads"`
	Connections int   `toml:"connections"`
	PullMemory  int64 `toml:"pull_memory"`
	// StallTimeout is how many seconds a host may send next to nothing.
	StallTimeout int `toml:"stall_timeout"`
	// GCHigh, GCLow (percent of the file system) and GCMaxAge (a duration; "" is for ever) say
	// which artifacts stay: see pull.Retention.
	GCHigh   int    `toml:"gc_high"`
	GCLow    int    `toml:"gc_low"`
	GCMaxAge string `toml:"gc_max_age"`
}

func defaultCSI() CSI {
	l := pull.DefaultLimits
	return CSI{
		KubeletRoot:  "/var/lib/kubelet",
		HostsDir:     "/etc/containerd/certs.d",
		DockerConfig: "/var/lib/kubelet/config.json",
		Downloads:    l.Blobs,
		Connections:  l.Connections,
		PullMemory:   l.Memory >> 20,
		StallTimeout: int(l.Stall / time.Second),
		GCHigh:       pull.DefaultRetention.High,
		GCLow:        pull.DefaultRetention.Low,
	}
}

// socket is where the driver serves, and registration where kubelet finds it.
func (c CSI) socket() string { return filepath.Join(c.KubeletRoot, "plugins", csi.Name, "csi.sock") }

func (c CSI) registration() string {
	return filepath.Join(c.KubeletRoot, "plugins_registry", csi.Name+"-reg.sock")
}

func (c CSI) validate() error {
	var errs []error
	for _, path := range []struct {
		key, value string
		optional   bool
	}{{"csi.kubelet_root", c.KubeletRoot, false}, {"csi.hosts_dir", c.HostsDir, true}, {"csi.docker_config", c.DockerConfig, true}} {
		if !filepath.IsAbs(path.value) && (path.value != "" || !path.optional) {
			errs = append(errs, fmt.Errorf("%s %q is not an absolute path", path.key, path.value))
		}
	}
	for _, socket := range []string{c.socket(), c.registration()} {
		errs = append(errs, service.ValidateSocket("csi.kubelet_root: the socket", socket))
	}
	// A node ID has at most 192 bytes in the CSI specification 1.0, and a name of Kubernetes 253.
	if len(c.NodeName) > 253 {
		errs = append(errs, fmt.Errorf("csi.node_name has %d bytes, but a node's name has at most 253", len(c.NodeName)))
	}
	for _, number := range []struct {
		key        string
		value, max int64
	}{
		{"csi.downloads", int64(c.Downloads), 64},
		{"csi.connections", int64(c.Connections), 256},
		{"csi.pull_memory", c.PullMemory, 1 << 20},
		{"csi.stall_timeout", int64(c.StallTimeout), 3600},
	} {
		if number.value < 1 || number.value > number.max {
			errs = append(errs, fmt.Errorf("%s %d is not 1 to %d", number.key, number.value, number.max))
		}
	}
	if c.GCLow < 1 || c.GCLow > c.GCHigh || c.GCHigh > 100 {
		errs = append(errs, fmt.Errorf("csi.gc_low %d and csi.gc_high %d are not 1 ≤ gc_low ≤ gc_high ≤ 100 percent", c.GCLow, c.GCHigh))
	}
	if _, err := c.maxAge(); err != nil {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

func (c CSI) maxAge() (time.Duration, error) {
	if c.GCMaxAge == "" {
		return 0, nil
	}
	age, err := time.ParseDuration(c.GCMaxAge)
	if err != nil || age <= 0 {
		return 0, fmt.Errorf("csi.gc_max_age %.60q is not a duration such as \"720h\"", c.GCMaxAge)
	}
	return age, nil
}

// pulled is the directory of the artifacts that the daemon pulls by itself.
func (c Config) pulled() blobs.Dir { return blobs.Dir(filepath.Join(c.Root, "content")) }

// driver is the CSI driver of a daemon, which serves kubelet on two sockets.
type driver struct {
	csi                    *csi.Driver
	puller                 *pull.Puller
	services, registration *server
}

// server is a gRPC server and where it listens.
type server struct {
	*grpc.Server
	listener net.Listener
}

// openCSI opens the driver on the service's store, whose garbage collection must not run before.
func openCSI(ctx context.Context, cfg Config, s *service.Service, m *metrics, h hooks) (_ *driver, err error) {
	d := &driver{}
	age, err := cfg.CSI.maxAge()
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, d.close())
		}
	}()
	d.puller, err = pull.Open(ctx, pull.Config{
		Root:   string(cfg.pulled()),
		Hosts:  cfg.CSI.HostsDir,
		Others: cfg.Blobs(),
		Limits: pull.Limits{
			Blobs: cfg.CSI.Downloads, Connections: cfg.CSI.Connections, Memory: cfg.CSI.PullMemory << 20,
			Stall: time.Duration(cfg.CSI.StallTimeout) * time.Second, Reserve: cfg.ReservedSpace,
		},
		Retention: pull.Retention{High: cfg.CSI.GCHigh, Low: cfg.CSI.GCLow, MaxAge: age},
		Observer:  m.pullObserver(),
	})
	if err != nil {
		return nil, err
	}
	m.puller.Store(d.puller)
	host, err := os.Hostname()
	if err != nil && cfg.CSI.NodeName == "" {
		return nil, fmt.Errorf("the name of the node: %w", err)
	}
	d.csi, err = csi.New(ctx, csi.Config{
		Root: cfg.Root, Node: cmp.Or(cfg.CSI.NodeName, host), Version: h.version,
		Store: s.Store(), Puller: d.puller, DockerConfig: cfg.CSI.DockerConfig,
	})
	if err != nil {
		return nil, err
	}
	if d.services, err = newServer(ctx, cfg.CSI.socket(), h.server); err != nil {
		return nil, err
	}
	csiapi.RegisterIdentityServer(d.services, d.csi)
	csiapi.RegisterNodeServer(d.services, d.csi)
	// kubelet calls the driver as soon as it finds the socket of the registration.
	if d.registration, err = newServer(ctx, cfg.CSI.registration(), h.server); err != nil {
		return nil, err
	}
	registerapi.RegisterRegistrationServer(d.registration, &csi.Registration{Endpoint: cfg.CSI.socket(), Registered: h.registered})
	return d, nil
}

func newServer(ctx context.Context, address string, options []grpc.ServerOption) (*server, error) {
	listener, err := listen(ctx, address)
	if err != nil {
		return nil, err
	}
	return &server{grpc.NewServer(options...), listener}, nil
}

// run serves the driver until ctx ends.
func (d *driver) run(ctx context.Context) {
	var running sync.WaitGroup
	running.Go(func() { d.puller.Run(ctx) })
	for _, s := range []*server{d.services, d.registration} {
		running.Go(func() {
			if err := s.Serve(s.listener); err != nil && ctx.Err() == nil {
				log.G(ctx).WithError(err).WithField("address", s.listener.Addr()).Error("the CSI driver does not serve any more")
			}
		})
	}
	log.G(ctx).WithField("address", d.services.listener.Addr()).Info("serving the CSI driver")
	<-ctx.Done()
	for _, s := range []*server{d.registration, d.services} {
		hard := time.AfterFunc(stopTimeout, s.Stop)
		s.GracefulStop()
		hard.Stop()
	}
	running.Wait()
	if err := d.puller.Close(); err != nil {
		log.G(ctx).WithError(err).Error("cannot close the artifacts")
	}
}

// close closes a driver that does not run.
func (d *driver) close() (err error) {
	for _, s := range []*server{d.services, d.registration} {
		if s != nil {
			err = errors.Join(err, s.listener.Close())
		}
	}
	if d.puller != nil {
		err = errors.Join(err, d.puller.Close())
	}
	return err
}
