// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"fmt"

	"github.com/containerd/containerd/v2/pkg/dialer"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
)

// HealthNRI is the service whose health says whether a runtime accepted the daemon's NRI
// plugin. If the plugin is not enabled it is errdefs.ErrNotFound.
const HealthNRI = "nri"

func servingIf(yes bool) grpc_health_v1.HealthCheckResponse_ServingStatus {
	if yes {
		return grpc_health_v1.HealthCheckResponse_SERVING
	}
	return grpc_health_v1.HealthCheckResponse_NOT_SERVING
}

// Health asks the daemon that serves on the Unix socket address for its health, by the gRPC
// health service. If the daemon is stopping or does not answer before ctx ends, the error is
// errdefs.ErrUnavailable.
func Health(ctx context.Context, address string) error { return HealthOf(ctx, address, "") }

// HealthOf is Health for one service of the daemon; "" is the whole daemon.
func HealthOf(ctx context.Context, address, service string) error {
	conn, err := grpc.NewClient(dialer.DialAddress(address), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	answer, err := grpc_health_v1.NewHealthClient(conn).Check(ctx, &grpc_health_v1.HealthCheckRequest{Service: service})
	if native := errgrpc.ToNative(err); errdefs.IsNotFound(native) {
		return fmt.Errorf("the daemon on %s has no service %q: is it enabled? %w", address, service, errdefs.ErrNotFound)
	}
	if err != nil {
		return fmt.Errorf("the daemon does not answer on %s: %v: %w", address, errgrpc.ToNative(err), errdefs.ErrUnavailable)
	}
	switch {
	case answer.GetStatus() == grpc_health_v1.HealthCheckResponse_SERVING:
		return nil
	case service == HealthNRI:
		return fmt.Errorf("no runtime has accepted the NRI plugin of the daemon on %s: %w", address, errdefs.ErrUnavailable)
	default:
		return fmt.Errorf("the daemon on %s is %s: %w", address, answer.GetStatus(), errdefs.ErrUnavailable)
	}
}
