// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package client

import (
	"context"
	"fmt"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
)

// Using returns the containers of all namespaces that use the snapshotter, each as
// NAMESPACE/ID.
func (c *Client) Using(ctx context.Context) (containers []string, err error) {
	namespaces, err := c.NamespaceService().List(ctx)
	if err != nil {
		return nil, err
	}
	for _, namespace := range namespaces {
		in := c.In(namespace)
		all, err := in.ContainerService().List(in.Context(ctx))
		if err != nil {
			return nil, err
		}
		for _, container := range all {
			if container.Snapshotter == c.Snapshotter {
				containers = append(containers, namespace+"/"+container.ID)
			}
		}
	}
	return containers, nil
}

// RemoveSnapshots removes all snapshots of the snapshotter in all namespaces, and returns
// their number. Otherwise a new snapshotter of the same name would seem to have unpacked
// images. The caller checks that no container uses them.
func (c *Client) RemoveSnapshots(ctx context.Context) (removed int, err error) {
	namespaces, err := c.NamespaceService().List(ctx)
	if err != nil {
		return 0, err
	}
	for _, namespace := range namespaces {
		in := c.In(namespace)
		n, err := removeAll(in.Context(ctx), in.SnapshotService(c.Snapshotter))
		removed += n
		if err != nil {
			return removed, fmt.Errorf("remove the snapshots of %s in the namespace %s: %w", c.Snapshotter, namespace, err)
		}
	}
	return removed, c.collect(c.Context(ctx))
}

// removeAll removes snapshots, children before their parents.
func removeAll(ctx context.Context, service snapshots.Snapshotter) (removed int, err error) {
	for {
		parents := map[string]bool{}
		var keys []string
		if err := service.Walk(ctx, func(_ context.Context, i snapshots.Info) error {
			keys = append(keys, i.Name)
			parents[i.Parent] = true
			return nil
		}); err != nil {
			return removed, err
		}
		before := removed
		for _, key := range keys {
			if parents[key] {
				continue
			}
			if err := service.Remove(ctx, key); err != nil && !errdefs.IsNotFound(err) {
				return removed, err
			}
			removed++
		}
		if removed == before {
			return removed, nil
		}
	}
}
