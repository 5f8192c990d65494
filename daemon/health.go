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

// The services of the daemon.
const (
	// healthDaemon is the daemon itself. Every gRPC server may answer for the service "",
	// and containerd does.
	healthDaemon = "artifact-snapshotter"
	// HealthNRI is the service whose health says whether a runtime accepted the daemon's NRI
	// plugin. If the plugin is not enabled it is errdefs.ErrNotFound.
	HealthNRI = "nri"
	// HealthCSI is the service whose health says whether kubelet has registered the daemon's
	// CSI driver. If the driver is not enabled it is errdefs.ErrNotFound.
	HealthCSI = "csi"
)

func servingIf(yes bool) grpc_health_v1.HealthCheckResponse_ServingStatus {
	if yes {
		return grpc_health_v1.HealthCheckResponse_SERVING
	}
	return grpc_health_v1.HealthCheckResponse_NOT_SERVING
}

// Health asks the daemon that serves on the Unix socket address for its health, by the gRPC
// health service. If the daemon is stopping or does not answer before ctx ends, the error is
// errdefs.ErrUnavailable. If another server answers there, it is errdefs.ErrFailedPrecondition.
func Health(ctx context.Context, address string) error { return healthOf(ctx, address, healthDaemon) }

// HealthOfNRI is Health for the daemon's NRI plugin.
func HealthOfNRI(ctx context.Context, address string) error {
	if err := Health(ctx, address); err != nil {
		return err
	}
	return healthOf(ctx, address, HealthNRI)
}

// HealthOfCSI is Health for the daemon's CSI driver.
func HealthOfCSI(ctx context.Context, address string) error {
	if err := Health(ctx, address); err != nil {
		return err
	}
	return healthOf(ctx, address, HealthCSI)
}

func healthOf(ctx context.Context, address, service string) error {
	conn, err := grpc.NewClient(dialer.DialAddress(address), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	answer, err := grpc_health_v1.NewHealthClient(conn).Check(ctx, &grpc_health_v1.HealthCheckRequest{Service: service})
	native := errgrpc.ToNative(err)
	switch known := !errdefs.IsNotFound(native) && !errdefs.IsNotImplemented(native); {
	case !known && service == HealthNRI:
		return errdefs.ErrNotFound.WithMessage(fmt.Sprintf("the daemon on %s runs no NRI plugin: enable it with --nri or in its configuration", address))
	case !known && service == HealthCSI:
		return errdefs.ErrNotFound.WithMessage(fmt.Sprintf("the daemon on %s serves no CSI driver: enable it with --csi or in its configuration", address))
	case !known:
		return fmt.Errorf("what answers on %s is not the daemon of artifact-snapshotter, or an older one: %w", address, errdefs.ErrFailedPrecondition)
	case ctx.Err() != nil:
		return fmt.Errorf("the daemon does not answer on %s in time: %w", address, errdefs.ErrUnavailable)
	case err != nil:
		return fmt.Errorf("the daemon does not answer on %s: %v: %w", address, native, errdefs.ErrUnavailable)
	case answer.GetStatus() == grpc_health_v1.HealthCheckResponse_SERVING:
		return nil
	case service == HealthNRI:
		return fmt.Errorf("no runtime has accepted the NRI plugin of the daemon on %s: %w", address, errdefs.ErrUnavailable)
	case service == HealthCSI:
		return fmt.Errorf("kubelet has not registered the CSI driver of the daemon on %s: %w", address, errdefs.ErrUnavailable)
	default:
		return fmt.Errorf("the daemon on %s is %s: %w", address, answer.GetStatus(), errdefs.ErrUnavailable)
	}
}
