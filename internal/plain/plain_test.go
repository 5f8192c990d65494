// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package plain

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
)

func TestKindsAreNotForPeople(t *testing.T) {
	remote := func(err error) error { return errgrpc.ToNative(errgrpc.ToGRPC(err)) }
	for want, err := range map[string]error{
		"it is wrong":                 fmt.Errorf("it is wrong: %w", errdefs.ErrInvalidArgument),
		"mount: it is wrong":          fmt.Errorf("mount: %w", remote(fmt.Errorf("it is wrong: %w", errdefs.ErrInvalidArgument))),
		"try again":                   fmt.Errorf("%w: %w", fmt.Errorf("try again: %w", errdefs.ErrUnavailable), errdefs.ErrUnavailable),
		"mount /x: invalid argument":  fmt.Errorf("mount /x: %w", unix.EINVAL), // the kernel says no more
		"content sha256:1: not found": remote(fmt.Errorf("content sha256:1: %w", errdefs.ErrNotFound)),
		"unavailable":                 errdefs.ErrUnavailable,
		"a sentence":                  errors.New("a sentence"),
	} {
		if got := Error(err); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

func TestHowASocketWasConnectedToIsNotForPeople(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "none.sock")
	_, err := net.Dial("unix", socket)
	if got, want := Error(fmt.Errorf("nobody answers on %s: %w", socket, err)), "nobody answers on "+socket+": no such file or directory"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_, err = grpc_health_v1.NewHealthClient(conn).Check(context.Background(), &grpc_health_v1.HealthCheckRequest{})
	if got, want := Error(fmt.Errorf("it does not answer: %w", errgrpc.ToNative(err))), "it does not answer: no such file or directory"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}
