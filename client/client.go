// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

// Package client does what is done through containerd's API: it finds the
// artifacts among containerd's images, and makes and removes their snapshots. The
// node tool uses it, and the daemon in the background.
//
// It must not be used inside of a snapshotter call, where a call back to
// containerd can deadlock against its garbage collector. Package snapshot is what
// containerd calls; this package calls containerd.
package client

import (
	"context"
	"fmt"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/artifact-snapshotter/artifact-snapshotter/images"
)

// Client talks to one containerd about one namespace and one snapshotter.
type Client struct {
	images.Reader
	// Snapshotter is containerd's name for the snapshotter.
	Snapshotter string
	// Waiting, if not nil, is called with the reason while [Client.Unpack] waits.
	Waiting func(why error)
}

// Connect connects to the containerd whose Unix socket is address, see
// [images.Connect]. The caller calls Close.
func Connect(ctx context.Context, address, namespace, snapshotter string) (*Client, error) {
	c, err := images.Connect(ctx, address)
	if err != nil {
		return nil, err
	}
	return &Client{Reader: images.Reader{Client: c, Namespace: namespace}, Snapshotter: snapshotter}, nil
}

// In returns a client for another namespace that shares the connection: only one of the
// two is to be closed.
func (c *Client) In(namespace string) *Client {
	other := *c
	other.Namespace = namespace
	return &other
}

// explain turns an error of a snapshotter's method into what a person can do about
// it.
func (c *Client) explain(err error) error {
	switch {
	case err == nil:
		return nil
	case strings.Contains(err.Error(), "snapshotter not loaded"): // containerd's plugins/services/snapshots
		return fmt.Errorf("containerd has no snapshotter %q; add to its configuration what `artifact-snapshotter config containerd` prints, and restart it: %w", c.Snapshotter, errdefs.ErrFailedPrecondition)
	case isUnreachable(err):
		return fmt.Errorf("containerd does not reach the daemon, check that `artifact-snapshotter serve` runs and that its address is that of [proxy_plugins.%s] in containerd's configuration: %w", c.Snapshotter, err)
	}
	return err
}

// isUnreachable reports whether err is gRPC's for a server that there is none of,
// and not the answer of one. What is walked through loses its kind on the way
// (containerd's plugins/services/snapshots/service.go, List).
func isUnreachable(err error) bool {
	return err != nil && strings.Contains(err.Error(), "connection error: desc = ")
}
