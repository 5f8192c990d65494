// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package client

import (
	"context"
	"fmt"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"

	"github.com/artifact-snapshotter/artifact-snapshotter/images"
	"github.com/artifact-snapshotter/artifact-snapshotter/snapshot"
)

// labelSnapshot is a label of the manifest's content that names a snapshot: containerd keeps
// the snapshot as long as the content (docs/garbage-collection.md of containerd). It is not
// on the config's content, because CRI overwrites the labels of that.
func (c *Client) labelSnapshot() string { return "containerd.io/gc.ref.snapshot." + c.Snapshotter }

// Unpack makes the committed snapshot of an artifact, unless there is one, and ties it to
// the artifact's manifest, so that containerd deletes it together with the image. It waits
// while the daemon unpacks, and calls Waiting with the reason; the end of ctx does not end
// the unpacking. It returns the name of the snapshot.
//
// If Unpack is killed, containerd's next garbage collection after unpackLease removes what
// is left, or the next Unpack takes it over.
func (c *Client) Unpack(ctx context.Context, image images.Image) (string, error) {
	ctx = c.Context(ctx)
	if name, err := c.Unpacked(ctx, image); err != nil || name != "" {
		return name, err
	}
	name := image.Artifact.SnapshotName().String()
	if err := c.patiently(ctx, func() error { return c.attempt(ctx, image, name) }); err != nil {
		return "", fmt.Errorf("unpack %q: %w", image.Name, err)
	}
	return name, nil
}

// Unpacked returns the name of the snapshot that Unpack has made of the artifact. It returns
// "" if there is none, or none that containerd keeps as long as the image.
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

// attempt asks for the snapshot once. A lease keeps it until it is tied to the manifest.
func (c *Client) attempt(ctx context.Context, image images.Image, name string) (err error) {
	service := c.LeasesService()
	lease, err := service.Create(ctx, leases.WithRandomID(), leases.WithExpiration(unpackLease))
	if err != nil {
		return fmt.Errorf("create a lease: %w", err)
	}
	defer func() {
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
	if err == nil { // overlayfs, for example, makes an ordinary snapshot
		if err := snapshotter.Remove(ctx, key); err != nil {
			return err
		}
		return c.foreign()
	}
	if !errdefs.IsAlreadyExists(err) {
		return c.explain(err)
	}
	// containerd gives the same answer if it already has a snapshot of that name.
	info, err := snapshotter.Stat(ctx, name)
	if err != nil {
		return c.explain(err)
	}
	if info.Labels[snapshot.LabelArtifact] != manifest.String() {
		return fmt.Errorf("snapshot %s already exists and is not of artifact %s; remove it if it is not needed: %w", name, manifest, errdefs.ErrFailedPrecondition)
	}
	label := c.labelSnapshot()
	_, err = c.ContentStore().Update(ctx, content.Info{Digest: manifest, Labels: map[string]string{label: name}}, "labels."+label)
	if errdefs.IsNotFound(err) {
		return fmt.Errorf("the image has been deleted in the meantime: %w", err)
	}
	return err
}
