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
	"net"
	"strings"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
)

// connectTimeout is how long Connect waits for an answer.
const connectTimeout = 5 * time.Second

// Client talks to one containerd about one namespace and one snapshotter.
type Client struct {
	*containerd.Client
	// Namespace is that of containerd's which [Client.Context] names.
	Namespace string
	// Snapshotter is the name that containerd knows the snapshotter by.
	Snapshotter string
	// Waiting, if it is not nil, is told why [Client.Unpack] waits.
	Waiting func(why error)
}

// Connect connects to the containerd whose Unix socket is address, and waits some
// seconds for its answer. If there is none, the error is errdefs.ErrUnavailable.
// The caller calls Close.
func Connect(ctx context.Context, address, namespace, snapshotter string) (*Client, error) {
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	path := strings.TrimPrefix(address, "unix://")
	unavailable := func(err error) error {
		return fmt.Errorf("containerd does not answer on %s, check that it runs and that this is its socket: %v: %w", path, err, errdefs.ErrUnavailable)
	}
	// gRPC says the same in many more words.
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", path)
	if err != nil {
		return nil, unavailable(err)
	}
	_ = conn.Close()
	c, err := containerd.New(path, containerd.WithTimeout(connectTimeout))
	if err != nil {
		return nil, unavailable(err)
	}
	if _, err := c.Version(ctx); err != nil {
		_ = c.Close()
		return nil, unavailable(err)
	}
	return &Client{Client: c, Namespace: namespace, Snapshotter: snapshotter}, nil
}

// Context returns ctx with the namespace, as every call of containerd's API needs
// it. The methods of this package do it themselves.
func (c *Client) Context(ctx context.Context) context.Context {
	return namespaces.WithNamespace(ctx, c.Namespace)
}

// In returns a client for another namespace that shares the connection: only one
// of the two is to be closed.
func (c *Client) In(namespace string) *Client {
	return &Client{Client: c.Client, Namespace: namespace, Snapshotter: c.Snapshotter, Waiting: c.Waiting}
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
