// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"

	"github.com/artifact-snapshotter/artifact-snapshotter/internal/containerdtest"
)

// Every gRPC server may have the health service.
func TestOnlyTheDaemonIsHealthy(t *testing.T) {
	for name, register := range map[string]func(*grpc.Server){
		"healthy": func(s *grpc.Server) { grpc_health_v1.RegisterHealthServer(s, health.NewServer()) },
		"silent":  func(*grpc.Server) {},
	} {
		address := filepath.Join(t.TempDir(), name+".sock")
		listener, err := net.Listen("unix", address)
		if err != nil {
			t.Fatal(err)
		}
		server := grpc.NewServer()
		register(server)
		go func() { _ = server.Serve(listener) }()
		for _, ask := range []func(context.Context, string) error{Health, HealthOfNRI} {
			if err := ask(t.Context(), address); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), address+" is not the daemon") {
				t.Errorf("%s: got %v, want that it is not the daemon", name, err)
			}
		}
		server.Stop()
	}
}

func TestHealthFollowsTheDaemon(t *testing.T) {
	cfg := testConfig(t)
	ask := func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
		defer cancel()
		return Health(ctx, cfg.SocketAddress())
	}
	if err := ask(); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), cfg.SocketAddress()) {
		t.Errorf("before the daemon runs: %v", err)
	}
	stop := serve(t, cfg)
	if err := ask(); err != nil {
		t.Errorf("while the daemon serves: %v", err)
	}

	// A client that watches the health is told before the daemon stops.
	conn := containerdtest.Dial(t, cfg.SocketAddress())
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	watch, err := grpc_health_v1.NewHealthClient(conn).Watch(ctx, &grpc_health_v1.HealthCheckRequest{})
	if err != nil {
		t.Fatal(err)
	}
	stopped := make(chan error, 1)
	for _, want := range []grpc_health_v1.HealthCheckResponse_ServingStatus{
		grpc_health_v1.HealthCheckResponse_SERVING, grpc_health_v1.HealthCheckResponse_NOT_SERVING,
	} {
		got, err := watch.Recv()
		if err != nil || got.GetStatus() != want {
			t.Fatalf("%v (%v), want %v", got, err, want)
		}
		if want == grpc_health_v1.HealthCheckResponse_SERVING {
			go func() { stopped <- stop() }()
		}
	}
	cancel()
	if err := <-stopped; err != nil {
		t.Error(err)
	}
	if err := ask(); !errdefs.IsUnavailable(err) {
		t.Errorf("after the daemon stopped: %v", err)
	}
}
