// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

// Package client does what the node tool does through containerd's API: it pulls, mounts,
// unpacks, verifies, lists and removes artifacts. Package images finds the artifacts among
// containerd's images.
//
// It must not be used inside a snapshotter call, where a call to containerd can deadlock
// with containerd's garbage collection. Package snapshot is what containerd calls; this
// package calls containerd.
package client

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/artifact-snapshotter/artifact-snapshotter/images"
	"github.com/artifact-snapshotter/artifact-snapshotter/internal/retry"
)

// Client talks to one containerd about one namespace and one snapshotter.
type Client struct {
	images.Reader
	// Snapshotter is containerd's name of the snapshotter.
	Snapshotter string
	// Warning, if not nil, is called with what a user should know before a method goes on.
	Warning func(text string)
	// Waiting, if not nil, is called with the reason before a method waits to try again.
	Waiting func(why error)
}

// Connect connects to the containerd whose Unix socket is address, see [images.Connect].
// The caller calls Close.
func Connect(ctx context.Context, address, namespace, snapshotter string) (*Client, error) {
	c, err := images.Connect(ctx, address)
	if err != nil {
		return nil, err
	}
	return &Client{Reader: images.Reader{Client: c, Namespace: namespace}, Snapshotter: snapshotter}, nil
}

// In returns a client for another namespace, which shares the connection: close only one of
// the two.
func (c *Client) In(namespace string) *Client {
	other := *c
	other.Namespace = namespace
	return &other
}

// explain adds to an error of a snapshotter's method what to do about it.
func (c *Client) explain(err error) error {
	switch {
	case err == nil:
		return nil
	case strings.Contains(err.Error(), "snapshotter not loaded"): // containerd's plugins/services/snapshots
		return fmt.Errorf("containerd has no snapshotter %q; add to its configuration what `artifact-snapshotter config containerd` prints, and restart it: %w", c.Snapshotter, errdefs.ErrFailedPrecondition)
	case isUnreachable(err):
		return unreachable{fmt.Sprintf("containerd cannot reach the daemon; check that `artifact-snapshotter serve` runs and that its address is the one of [proxy_plugins.%s] in containerd's configuration", c.Snapshotter), err}
	}
	return err
}

// unreachable is the error of explain for a daemon that containerd cannot reach.
type unreachable struct {
	text string
	err  error // gRPC's
}

func (u unreachable) Error() string { return u.text }
func (u unreachable) Unwrap() error { return u.err }

// isUnreachable reports whether err is gRPC's error for a server that cannot be reached, as
// opposed to an answer. Its kind is lost when snapshots are listed (containerd's
// plugins/services/snapshots/service.go, List).
func isUnreachable(err error) bool {
	return err != nil && (errors.As(err, new(unreachable)) || strings.Contains(err.Error(), "connection error: desc = "))
}

// foreign is the error for a snapshotter that has made an ordinary snapshot in place of an
// artifact's.
func (c *Client) foreign() error {
	return fmt.Errorf("the snapshotter %q is not artifact-snapshotter, or the daemon is older than this program and must be restarted: %w", c.Snapshotter, errdefs.ErrInvalidArgument)
}

// patiently calls attempt until it returns something other than errdefs.ErrUnavailable, the
// daemon has been out of reach too often, or ctx ends.
func (c *Client) patiently(ctx context.Context, attempt func() error) error {
	for unreachable := 0; ; {
		err := attempt()
		if !errdefs.IsUnavailable(err) {
			return err
		}
		if !isUnreachable(err) {
			unreachable = 0
		} else if unreachable++; unreachable > maxUnreachable {
			return err
		}
		if c.Waiting != nil {
			c.Waiting(err)
		}
		if ended := retry.Sleep(ctx, retryWait); ended != nil {
			return fmt.Errorf("%w, while waiting: %v", ended, err)
		}
	}
}
