// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package client

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
	"github.com/artifact-snapshotter/artifact-snapshotter/images"
	"github.com/artifact-snapshotter/artifact-snapshotter/snapshot"
)

const (
	// unpackLease is how long containerd keeps a snapshot that nothing refers to yet,
	// should this process end before it has tied it to the image. One attempt takes
	// less: the daemon answers after 20 seconds.
	unpackLease = 5 * time.Minute
	// leaseTimeout bounds the deletion of the lease.
	leaseTimeout = 5 * time.Second
	// retryWait is between two attempts.
	retryWait = time.Second
	// maxUnreachable is how many attempts in a row may not reach the daemon: it may
	// just be restarting.
	maxUnreachable = 5
)

// labelSnapshot is a label of the manifest's content: as long as containerd has the
// content, it keeps the snapshot of that name (docs/garbage-collection.md of
// containerd). CRI overwrites the labels of the config, so they are no place for it.
func (c *Client) labelSnapshot() string { return "containerd.io/gc.ref.snapshot." + c.Snapshotter }

// snapshotNames are the names that the snapshot of an artifact may have: its chain
// ID, so that it is found like that of an image, and another one if that name
// belongs to something else. Chain IDs know nothing of the names of files, so that
// artifacts with different files may have the same, and an image with the same
// layers, too. An artifact can be made to have the chain ID of any image: that one
// does not get the name at all.
func (c *Client) snapshotNames(ctx context.Context, a *artifact.Artifact) ([]string, error) {
	for _, l := range a.Layers {
		collides, err := artifact.IsChainIDPreimage(ctx, l, c.ContentStore())
		if err != nil {
			return nil, l.Wrap(err)
		}
		if collides {
			return []string{a.CollisionFreeName().String()}, nil
		}
	}
	return []string{a.ChainID().String(), a.CollisionFreeName().String()}, nil
}

// Unpack makes the committed snapshot of an artifact, if there is none, and ties it
// to the artifact's manifest: containerd deletes it with the image. It waits while
// the daemon unpacks, and calls Waiting with the reason; what ends ctx does not end
// the unpacking. The result is the name of the snapshot: the artifact's chain ID,
// unless that is the name of something else.
//
// What this leaves behind when it is killed goes with containerd's next garbage
// collection after unpackLease, or is taken over by the next Unpack.
func (c *Client) Unpack(ctx context.Context, image images.Image) (string, error) {
	ctx = c.Context(ctx)
	if name, err := c.Unpacked(ctx, image); err != nil || name != "" {
		return name, err
	}
	names, err := c.snapshotNames(ctx, image.Artifact)
	if err != nil {
		return "", fmt.Errorf("unpack %q: %w", image.Name, err)
	}
	for _, name := range names {
		if err = c.unpackAs(ctx, image, name); err == nil {
			return name, nil
		}
		if !errdefs.IsFailedPrecondition(err) { // the name is not the reason
			break
		}
	}
	return "", fmt.Errorf("unpack %q: %w", image.Name, err)
}

// Unpacked returns the name of the snapshot that Unpack has made of the artifact,
// or "" if there is none, or none that lives as long as the image.
func (c *Client) Unpacked(ctx context.Context, image images.Image) (string, error) {
	ctx = c.Context(ctx)
	manifest := image.Manifest
	info, err := c.ContentStore().Info(ctx, manifest)
	if err != nil {
		return "", fmt.Errorf("manifest of %q: %w", image.Name, err)
	}
	name := info.Labels[c.labelSnapshot()]
	if name == "" {
		return "", nil
	}
	there, err := c.SnapshotService(c.Snapshotter).Stat(ctx, name)
	if errdefs.IsNotFound(err) {
		return "", nil
	}
	if err != nil {
		return "", c.explain(err)
	}
	if there.Labels[snapshot.LabelArtifact] != manifest.String() {
		return "", nil
	}
	return name, nil
}

// unpackAs makes the snapshot with that name. If something else has the name, the
// error is errdefs.ErrFailedPrecondition.
func (c *Client) unpackAs(ctx context.Context, image images.Image, name string) error {
	return c.patiently(ctx, func() error { return c.attempt(ctx, image, name) })
}

// patiently makes attempts until one does not fail because something is not ready.
func (c *Client) patiently(ctx context.Context, attempt func() error) error {
	unreachable := 0
	for {
		err := attempt()
		switch {
		case !errdefs.IsUnavailable(err):
			return err
		case !isUnreachable(err):
			unreachable = 0
		case unreachable == maxUnreachable:
			return err
		default:
			unreachable++
		}
		if c.Waiting != nil {
			c.Waiting(err)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w, while waiting: %v", ctx.Err(), err)
		case <-time.After(retryWait):
		}
	}
}

// foreign is the error for a snapshotter that has made an ordinary snapshot where an
// artifact was asked for.
func (c *Client) foreign() error {
	return fmt.Errorf("the snapshotter %q is not artifact-snapshotter, or the daemon is older than this program and must be restarted: %w", c.Snapshotter, errdefs.ErrInvalidArgument)
}

// attempt asks for the snapshot once. A lease keeps it until it is tied to the
// manifest.
func (c *Client) attempt(ctx context.Context, image images.Image, name string) (err error) {
	service := c.LeasesService()
	lease, err := service.Create(ctx, leases.WithRandomID(), leases.WithExpiration(unpackLease))
	if err != nil {
		return fmt.Errorf("create a lease: %w", err)
	}
	defer func() {
		// A containerd that hangs must not keep who waits for the end; then it expires.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), leaseTimeout)
		defer cancel()
		deleted := service.Delete(ctx, lease)
		if err == nil && deleted != nil && !errdefs.IsNotFound(deleted) {
			err = fmt.Errorf("delete the lease %s: %w", lease.ID, deleted)
		}
	}()
	ctx = leases.WithLease(ctx, lease.ID)

	manifest := image.Manifest
	key := snapshot.UnpackKey(lease.ID, manifest)
	snapshotter := c.SnapshotService(c.Snapshotter)
	_, err = snapshotter.Prepare(ctx, key, "", snapshots.WithLabels(map[string]string{snapshots.LabelSnapshotRef: name}))
	if err == nil { // overlayfs, say, has made an ordinary snapshot
		if err := snapshotter.Remove(ctx, key); err != nil {
			return err
		}
		return c.foreign()
	}
	if !errdefs.IsAlreadyExists(err) {
		return c.explain(err)
	}
	// containerd says the same of a snapshot that was there, whatever it is of.
	info, err := snapshotter.Stat(ctx, name)
	if err != nil {
		return c.explain(err)
	}
	if info.Labels[snapshot.LabelArtifact] != manifest.String() {
		return fmt.Errorf("snapshot %s is not of artifact %s; remove it, if it is not needed: %w", name, manifest, errdefs.ErrFailedPrecondition)
	}
	label := c.labelSnapshot()
	_, err = c.ContentStore().Update(ctx, content.Info{Digest: manifest, Labels: map[string]string{label: name}}, "labels."+label)
	if errdefs.IsNotFound(err) {
		return fmt.Errorf("the image has been deleted meanwhile: %w", err)
	}
	return err
}
