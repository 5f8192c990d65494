// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package client

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"

	coreimages "github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
	"github.com/artifact-snapshotter/artifact-snapshotter/images"
)

// The label of images that no garbage collection of Kubernetes takes
// (internal/cri/labels of containerd).
const (
	labelPinned = "io.cri-containerd.pinned"
	pinned      = "pinned"
)

// Unused is an artifact that nobody uses, with all names that it has in the
// namespace.
type Unused struct {
	Artifact *artifact.Artifact
	Images   []images.Image
}

// Unused lists the artifacts of the namespace that no pod, no [Client.Mount] and no
// other view shows, that are no container's image, and none of whose names is pinned,
// by their first names.
func (c *Client) Unused(ctx context.Context) ([]Unused, error) {
	all, err := c.Images(ctx)
	if err != nil {
		return nil, err
	}
	uses, err := c.Uses(ctx, all)
	if err != nil {
		return nil, err
	}
	byManifest := map[digest.Digest]*Unused{}
	kept := map[digest.Digest]bool{}
	for _, image := range all {
		manifest := image.Manifest
		if image.Labels[labelPinned] == pinned || uses[manifest] != nil && uses[manifest].InUse() {
			kept[manifest] = true
		}
		if byManifest[manifest] == nil {
			byManifest[manifest] = &Unused{Artifact: image.Artifact}
		}
		byManifest[manifest].Images = append(byManifest[manifest].Images, image)
	}
	var unused []Unused
	for manifest, u := range byManifest {
		if !kept[manifest] {
			unused = append(unused, *u)
		}
	}
	slices.SortFunc(unused, func(a, b Unused) int { return cmp.Compare(a.Images[0].Name, b.Images[0].Name) })
	return unused, nil
}

// Remove removes the names of the artifacts, and waits for containerd's garbage
// collector, which takes what no other image, lease or snapshot needs. It returns
// how many bytes of the layers have gone from the namespace, and how many are kept. A
// name that somebody has given to something else meanwhile stays.
func (c *Client) Remove(ctx context.Context, unused []Unused) (freed, kept int64, err error) {
	ctx = c.Context(ctx)
	service := c.ImageService()
	sizes := map[digest.Digest]int64{}
	deleted := 0
	for _, u := range unused {
		for blob, size := range blobsOf(u.Artifact) {
			sizes[blob] = size
		}
		for _, image := range u.Images {
			err := service.Delete(ctx, image.Name, coreimages.DeleteTarget(&image.Target))
			if err != nil && !errdefs.IsNotFound(err) {
				return 0, 0, fmt.Errorf("remove image %q, after %d others have been removed: %w", image.Name, deleted, err)
			}
			deleted++
		}
	}
	if err := c.collect(ctx); err != nil {
		return 0, 0, fmt.Errorf("%d images have been removed, and their content goes later: %w", deleted, err)
	}
	for blob, size := range sizes {
		switch _, err := c.ContentStore().Info(ctx, blob); {
		case errdefs.IsNotFound(err):
			freed += size
		case err == nil:
			kept += size
		default:
			return freed, kept, fmt.Errorf("%d images have been removed; what was freed is not known: blob %s: %w", deleted, blob, err)
		}
	}
	return freed, kept, nil
}

// collect runs containerd's garbage collector: deleting a lease waits for it.
func (c *Client) collect(ctx context.Context) error {
	service := c.LeasesService()
	lease, err := service.Create(ctx, leases.WithRandomID(), leases.WithExpiration(time.Minute))
	if err == nil {
		err = service.Delete(ctx, lease, leases.SynchronousDelete)
	}
	if err != nil {
		return fmt.Errorf("run containerd's garbage collector: %w", err)
	}
	return nil
}
