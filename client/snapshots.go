// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package client

import (
	"context"
	"fmt"

	"github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// The labels that containerd's CRI plugin gives a container (internal/cri/labels, and kubelet's
// in k8s.io/kubelet/pkg/types).
const (
	labelKind         = "io.cri-containerd.kind"
	labelPodNamespace = "io.kubernetes.pod.namespace"
	labelPodName      = "io.kubernetes.pod.name"
	labelPodUID       = "io.kubernetes.pod.uid"
)

// User is a container that uses the snapshotter.
type User struct {
	Namespace, ID string
	// Pod is the container's pod, as namespace/name, and UID the pod's; both are empty for a
	// container of no pod. Sandbox is set for the container that a pod begins with.
	Pod, UID string
	Sandbox  bool
}

func (u User) String() string {
	if u.Pod != "" {
		return "pod " + u.Pod
	}
	return u.Namespace + "/" + u.ID
}

// Using returns the containers of all namespaces that use the snapshotter.
func (c *Client) Using(ctx context.Context) (users []User, err error) {
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
			if container.Snapshotter != c.Snapshotter {
				continue
			}
			l := container.Labels
			user := User{Namespace: namespace, ID: container.ID, UID: l[labelPodUID], Sandbox: l[labelKind] == "sandbox"}
			if l[labelPodName] != "" {
				user.Pod = l[labelPodNamespace] + "/" + l[labelPodName]
			}
			users = append(users, user)
		}
	}
	return users, nil
}

// Kill kills the processes of a container. Whoever has made it finds it dead.
func (c *Client) Kill(ctx context.Context, u User) error {
	in := c.In(u.Namespace)
	_, err := in.TaskService().Kill(in.Context(ctx), &tasks.KillRequest{ContainerID: u.ID, Signal: uint32(unix.SIGKILL), All: true})
	return err
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
