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

// HealthNRI is the service by which the daemon says whether a runtime has taken its plugin
// of NRI. It is errdefs.ErrNotFound where the plugin is not enabled.
const HealthNRI = "nri"

func servingIf(yes bool) grpc_health_v1.HealthCheckResponse_ServingStatus {
	if yes {
		return grpc_health_v1.HealthCheckResponse_SERVING
	}
	return grpc_health_v1.HealthCheckResponse_NOT_SERVING
}

// Health asks the daemon that serves on the Unix socket address how it is, by the
// health service of gRPC. The error is nil if it serves, and errdefs.ErrUnavailable
// if it does not answer before ctx ends, or is about to stop.
func Health(ctx context.Context, address string) error { return HealthOf(ctx, address, "") }

// HealthOf is Health for a service of the daemon's, "" for all of it.
func HealthOf(ctx context.Context, address, service string) error {
	conn, err := grpc.NewClient(dialer.DialAddress(address), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	answer, err := grpc_health_v1.NewHealthClient(conn).Check(ctx, &grpc_health_v1.HealthCheckRequest{Service: service})
	if native := errgrpc.ToNative(err); errdefs.IsNotFound(native) {
		return fmt.Errorf("the daemon on %s does not know of %q; is it enabled? %w", address, service, errdefs.ErrNotFound)
	}
	if err != nil {
		return fmt.Errorf("the daemon does not answer on %s: %v: %w", address, errgrpc.ToNative(err), errdefs.ErrUnavailable)
	}
	switch {
	case answer.GetStatus() == grpc_health_v1.HealthCheckResponse_SERVING:
		return nil
	case service == HealthNRI:
		return fmt.Errorf("no runtime has taken the plugin of NRI of the daemon on %s: %w", address, errdefs.ErrUnavailable)
	default:
		return fmt.Errorf("the daemon on %s is %s: %w", address, answer.GetStatus(), errdefs.ErrUnavailable)
	}
}
