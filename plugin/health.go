// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package plugin

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

// Health asks the daemon that serves on the Unix socket address how it is, by the
// health service of gRPC. The error is nil if it serves, and errdefs.ErrUnavailable
// if it does not answer before ctx ends, or is about to stop.
func Health(ctx context.Context, address string) error {
	conn, err := grpc.NewClient(dialer.DialAddress(address), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	answer, err := grpc_health_v1.NewHealthClient(conn).Check(ctx, &grpc_health_v1.HealthCheckRequest{})
	if err != nil {
		return fmt.Errorf("the daemon does not answer on %s: %v: %w", address, errgrpc.ToNative(err), errdefs.ErrUnavailable)
	}
	if answer.GetStatus() != grpc_health_v1.HealthCheckResponse_SERVING {
		return fmt.Errorf("the daemon on %s is %s: %w", address, answer.GetStatus(), errdefs.ErrUnavailable)
	}
	return nil
}
