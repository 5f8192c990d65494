// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package client

import (
	"cmp"
	"context"
	"fmt"
	"slices"

	coreimages "github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
	"github.com/artifact-snapshotter/artifact-snapshotter/images"
	"github.com/artifact-snapshotter/artifact-snapshotter/internal/plain"
)

// The label of images that Kubernetes' garbage collection does not remove
// (internal/cri/labels of containerd).
const (
	labelPinned = "io.cri-containerd.pinned"
	pinned      = "pinned"
)

// Unused is an artifact that is not in use, with all its names in the namespace.
type Unused struct {
	Artifact *artifact.Artifact
	Images   []images.Image
}

// Unused returns the artifacts of the namespace that are not in use, see [Use.InUse], have no
// pinned name, and whose names that are meant for people all pass the filter, which may be
// nil. They are in the order of their first names.
func (c *Client) Unused(ctx context.Context, filter Filter) ([]Unused, error) {
	all, err := c.Images(ctx)
	if err != nil {
		return nil, err
	}
	uses, err := c.Uses(ctx, all)
	if err != nil {
		return nil, err
	}
	byManifest := map[digest.Digest]*Unused{}
	needed := map[digest.Digest]bool{}
	for _, image := range all {
		manifest := image.Manifest
		if image.Labels[labelPinned] == pinned || uses[manifest] != nil && uses[manifest].InUse() {
			needed[manifest] = true
		}
		if byManifest[manifest] == nil {
			byManifest[manifest] = &Unused{Artifact: image.Artifact}
		}
		byManifest[manifest].Images = append(byManifest[manifest].Images, image)
	}
	var unused []Unused
	for manifest, u := range byManifest {
		passes := func(i images.Image) bool { return filter == nil || filter(i) }
		if !needed[manifest] && !slices.ContainsFunc(images.Named(u.Images), func(i images.Image) bool { return !passes(i) }) {
			unused = append(unused, *u)
		}
	}
	slices.SortFunc(unused, func(a, b Unused) int { return cmp.Compare(a.Images[0].Name, b.Images[0].Name) })
	return unused, nil
}

// Names returns the names that go with ref, for Remove: ref itself, if people have another
// name for the artifact, and otherwise all of them, as if ref is a digest. If the artifact is
// in use or pinned and would lose its last name, the error is errdefs.ErrFailedPrecondition,
// unless force is set.
func (c *Client) Names(ctx context.Context, ref string, force bool) (Unused, error) {
	image, err := c.Image(ctx, ref)
	if err != nil {
		if _, unnamed := c.ImageService().Get(c.Context(ctx), ref); unnamed == nil { // it is no artifact, or is refused
			err = fmt.Errorf("%s; `ctr -n %s images rm` removes it: %w", plain.Error(err), c.Namespace, errdefs.ErrFailedPrecondition)
		}
		return Unused{}, err
	}
	all, err := c.Images(ctx)
	if err != nil {
		return Unused{}, err
	}
	u := Unused{Artifact: image.Artifact}
	for _, i := range all {
		if i.Manifest == image.Manifest {
			u.Images = append(u.Images, i)
		}
	}
	others := func(i images.Image) bool { return i.Name != ref }
	if image.Name == ref && slices.ContainsFunc(images.Named(u.Images), others) {
		u.Images = []images.Image{image}
		return u, nil
	}
	if force {
		return u, nil
	}
	uses, err := c.Uses(ctx, all)
	if err != nil {
		return Unused{}, err
	}
	if use := uses[image.Manifest]; use != nil && use.InUse() {
		return Unused{}, fmt.Errorf("%q is in use by %s; --force removes its name, and its content when nothing uses it any more: %w", ref, use, errdefs.ErrFailedPrecondition)
	}
	if i := slices.IndexFunc(u.Images, func(i images.Image) bool { return i.Labels[labelPinned] == pinned }); i >= 0 {
		return Unused{}, fmt.Errorf("%q is pinned by the label %s of %s; --force removes it all the same: %w", ref, labelPinned, u.Images[i].Name, errdefs.ErrFailedPrecondition)
	}
	return u, nil
}

// Remove removes the names of the artifacts, and waits until containerd's garbage collection
// has removed what no other image, lease or snapshot refers to. It returns how many bytes of
// the layers the namespace does not have any more, and how many it retains. It does not
// remove a name that refers to something else by now.
func (c *Client) Remove(ctx context.Context, unused []Unused) (freed, retained int64, err error) {
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
		return 0, 0, fmt.Errorf("%d images have been removed; their content will be removed later: %w", deleted, err)
	}
	for blob, size := range sizes {
		switch _, err := c.ContentStore().Info(ctx, blob); {
		case errdefs.IsNotFound(err):
			freed += size
		case err == nil:
			retained += size
		default:
			return freed, retained, fmt.Errorf("%d images have been removed; how much this has freed is unknown: blob %s: %w", deleted, blob, err)
		}
	}
	return freed, retained, nil
}

// collect runs containerd's garbage collection. The synchronous deletion of a lease waits for
// it.
func (c *Client) collect(ctx context.Context) error {
	service := c.LeasesService()
	lease, err := service.Create(ctx, leases.WithRandomID(), leases.WithExpiration(collectLease))
	if err == nil {
		err = service.Delete(ctx, lease, leases.SynchronousDelete)
	}
	if err != nil {
		return fmt.Errorf("run containerd's garbage collection: %w", err)
	}
	return nil
}
