// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

// Package daemon is the process of its own beside containerd or CRI-O. It reads its
// configuration from a TOML file, serves the snapshotter and the differ of package service as
// proxy plugins of a containerd, runs the NRI plugin and the CSI driver on the same store, and
// exports health, metrics and traces.
//
// Flags are parsed by cmd/artifact-snapshotter.
package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	diffapi "github.com/containerd/containerd/api/services/diff/v1"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/diffservice"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"github.com/containerd/containerd/v2/defaults"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"

	"github.com/artifact-snapshotter/artifact-snapshotter/csi"
	"github.com/artifact-snapshotter/artifact-snapshotter/nri"
	"github.com/artifact-snapshotter/artifact-snapshotter/service"
)

// Serve opens the service and serves its snapshotter and its differ, as proxy plugins of a
// containerd, until ctx ends. Then it lets running calls finish, for a bounded time, and
// returns nil. Mounts stay, so that running pods can read on.
//
// systemd is told when the server is ready and when it stops (sd_notify(3)), and so are
// clients of the gRPC health service. Metrics and traces are exported if cfg and the
// environment say where to; version is the program's version in them.
func Serve(ctx context.Context, cfg Config, version string) (err error) {
	if err := cfg.Validate(); err != nil {
		return err
	}
	traced, stopTracing, err := startTracing(ctx, version)
	if err != nil {
		return err
	}
	defer stopTracing()
	metrics := newMetrics(version)
	healthy := health.NewServer()
	options := append(slices.Clip(traced), grpc.UnaryInterceptor(metrics.count))
	h := hooks{version: version, server: options, connected: func(bool) {}, registered: func(bool) {}}
	for _, part := range []struct {
		service string
		enabled bool
		tell    *func(bool)
	}{{HealthNRI, cfg.NRI.Enabled, &h.connected}, {HealthCSI, cfg.CSI.Enabled, &h.registered}} {
		if part.enabled {
			*part.tell = func(yes bool) { healthy.SetServingStatus(part.service, servingIf(yes)) }
			(*part.tell)(false)
		}
	}
	s, err := open(ctx, cfg, metrics, h)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	if cfg.MetricsAddress != "" {
		defer metrics.serve(ctx, cfg.MetricsAddress, metricsRetry)()
	}

	address := cfg.SocketAddress()
	listener, err := listen(ctx, address)
	if err != nil {
		return err
	}
	server := grpc.NewServer(append(options,
		grpc.MaxRecvMsgSize(defaults.DefaultMaxRecvMsgSize),
		grpc.MaxSendMsgSize(defaults.DefaultMaxSendMsgSize))...)
	snapshotsapi.RegisterSnapshotsServer(server, snapshotservice.FromSnapshotter(s))
	diffapi.RegisterDiffServer(server, diffservice.FromApplierAndComparer(s, nil))
	healthy.SetServingStatus(healthDaemon, grpc_health_v1.HealthCheckResponse_SERVING) // the service is open
	grpc_health_v1.RegisterHealthServer(server, healthy)

	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	notify(ctx, daemon.SdNotifyReady)
	log.G(ctx).WithField("address", address).Info("serving")

	select {
	case err := <-served:
		return fmt.Errorf("serve on %s: %w", address, err)
	case <-ctx.Done():
	}
	log.G(ctx).Info("stopping; running pods keep their volumes")
	notify(ctx, daemon.SdNotifyStopping)
	healthy.Shutdown()
	hard := time.AfterFunc(stopTimeout, server.Stop)
	defer hard.Stop()
	server.GracefulStop()
	return nil
}

// hooks are what the front ends of a daemon need of it.
type hooks struct {
	version string
	// server are the options of each gRPC server.
	server []grpc.ServerOption
	// connected is told when a runtime accepts the NRI plugin and when it is lost, and
	// registered whether kubelet has registered the CSI driver.
	connected, registered func(bool)
}

// open opens the service and starts its background work, and the NRI plugin and the CSI driver
// if they are enabled.
func open(ctx context.Context, cfg Config, m *metrics, h hooks) (_ *service.Service, err error) {
	cfg = cfg.Discover(ctx)
	if cfg.CSI.Enabled {
		cfg.Pulled = cfg.pulled()
	}
	s, err := service.Open(ctx, cfg.Config, m.observer())
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	m.watch(s.Store(), s.Watcher())
	var frontEnds []func(context.Context)
	if cfg.NRI.Enabled {
		plugin, err := newNRI(ctx, cfg, s, m, h)
		if err != nil {
			return nil, err
		}
		frontEnds = append(frontEnds, plugin.Run)
	} else if err := nri.ProtectRecorded(ctx, cfg.Root, s.Store()); err != nil {
		return nil, err
	}
	if cfg.CSI.Enabled {
		d, err := openCSI(ctx, cfg, s, m, h)
		if err != nil {
			return nil, fmt.Errorf("the CSI driver: %w", err)
		}
		frontEnds = append(frontEnds, d.run)
	} else if err := csi.ProtectRecorded(ctx, cfg.Root, s.Store()); err != nil {
		return nil, err
	}
	// A node that needs NRI or CSI may have no containerd.
	s.Start(ctx, len(frontEnds) > 0, frontEnds...)
	return s, nil
}

func newNRI(ctx context.Context, cfg Config, s *service.Service, m *metrics, h hooks) (*nri.Plugin, error) {
	return nri.New(ctx, nri.Config{
		Socket: cfg.NRI.Socket, Index: cfg.NRI.Index, Name: cfg.NRI.Name,
		Root:              cfg.Root,
		Store:             s.Store(),
		Blobs:             cfg.Blobs(),
		Layouts:           cfg.Blobs()[1:],
		ContainerdAddress: cfg.ContainerdAddress,
		Passthrough:       cfg.NRI.OnError == onErrorPassthrough,
		Observer:          nri.Observer{Connected: h.connected, Missed: func(n int) { m.missed.Set(float64(n)) }},
	})
}

func notify(ctx context.Context, state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		log.G(ctx).WithError(err).WithField("state", state).Warn("cannot notify systemd")
	}
}

// listen listens on a Unix socket that only its owner can connect to. It replaces a socket
// that no process listens on any more; one on which a server answers is
// errdefs.ErrFailedPrecondition.
func listen(ctx context.Context, address string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(address), service.DirMode); err != nil {
		return nil, fmt.Errorf("create directory of the socket: %w", err)
	}
	if err := removeStale(address); err != nil {
		return nil, err
	}
	config := net.ListenConfig{
		// bind(2) creates the file with the mode of the socket, so the file never has
		// another mode.
		Control: func(_, _ string, conn syscall.RawConn) error {
			var chmod error
			err := conn.Control(func(fd uintptr) { chmod = unix.Fchmod(int(fd), 0o600) })
			return errors.Join(err, chmod)
		},
	}
	return config.Listen(ctx, "unix", address)
}

// removeStale removes the socket at address unless a server answers on it.
func removeStale(address string) error {
	info, err := os.Lstat(address)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if info.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("cannot create the socket %s: the path is another kind of file: %w",
			address, errdefs.ErrFailedPrecondition)
	}
	conn, err := net.Dial("unix", address)
	if err == nil {
		return errors.Join(fmt.Errorf("another server answers on %s; stop it, or choose another address: %w",
			address, errdefs.ErrFailedPrecondition), conn.Close())
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Errorf("connect to the existing socket %s: %w", address, err)
	}
	return os.Remove(address)
}
