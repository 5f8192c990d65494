// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package client

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
)

// Image is an image of containerd's that is an artifact: a name for it.
type Image struct {
	images.Image
	// Artifact is what the image's target, a manifest or an index, stands for on
	// this node. Those of [Client.Conflicts] have only the digests of the manifest
	// and the config.
	Artifact *artifact.Artifact
	// chain is the artifact's chain ID, if it has no layers here.
	chain digest.Digest
	// ordinary is an image that is no artifact.
	ordinary bool
	// refused is why an artifact cannot be shown, nil if it can.
	refused error
	// unread is why the image could not be read, if that may pass.
	unread error
}

// isArtifact reports whether the image is an artifact that can be shown.
func (i Image) isArtifact() bool { return i.Artifact != nil && !i.ordinary && i.refused == nil }

// IsID reports whether the name is no reference but the image ID of CRI, the
// digest of the config. CRI makes an image of that name for all images with the
// config, whichever was the last; it is no name to show to people.
func (i Image) IsID() bool { return i.Artifact != nil && i.Name == i.Artifact.Config.String() }

// Image returns the artifact whose image has the name ref, or else the digest ref:
// that of its target or its manifest. Of several images with the digest it is the
// first by name.
//
// No such image, or no such namespace, is errdefs.ErrNotFound, an ordinary image
// errdefs.ErrInvalidArgument. What else is wrong with an artifact is an error of
// package artifact.
func (c *Client) Image(ctx context.Context, ref string) (Image, error) {
	found, err := c.ImageService().Get(c.Context(ctx), ref)
	if errdefs.IsNotFound(err) {
		return c.byDigest(ctx, ref)
	}
	if err != nil {
		return Image{}, fmt.Errorf("image %q: %w", ref, err)
	}
	return c.read(ctx, found)
}

// byDigest returns the artifact with the digest ref, see Image.
func (c *Client) byDigest(ctx context.Context, ref string) (Image, error) {
	dgst, err := digest.Parse(ref)
	if err != nil {
		return Image{}, c.unknown(ctx, ref)
	}
	all, err := c.list(ctx)
	if err != nil {
		return Image{}, err
	}
	var id Image // what has no other name
	for _, i := range all {
		if i.Target.Digest != dgst && images.IsManifestType(i.Target.MediaType) {
			continue // it stands for no other manifest
		}
		image, err := c.read(ctx, i)
		if i.Target.Digest != dgst && (err != nil || image.Artifact.Manifest.Digest != dgst) {
			continue
		}
		if err != nil {
			return Image{}, err
		}
		if !image.IsID() {
			return image, nil
		}
		id = image
	}
	if id.Artifact == nil {
		return Image{}, c.unknown(ctx, ref)
	}
	return id, nil
}

// Images returns all images of the namespace that are artifacts, by name. One that
// cannot be read, because its content is not there or is refused, is left out.
func (c *Client) Images(ctx context.Context) ([]Image, error) {
	return c.artifacts(ctx, func(i Image) Image { return i })
}

// Brief is as Images, of artifacts of which only the digests of manifest and config
// are known: the layers of all may be a lot.
func (c *Client) Brief(ctx context.Context) ([]Image, error) {
	return c.artifacts(ctx, Image.brief)
}

// artifacts is Images with what is to be kept of each.
func (c *Client) artifacts(ctx context.Context, keep func(Image) Image) ([]Image, error) {
	all, err := c.list(ctx)
	if err != nil {
		return nil, err
	}
	var found []Image
	read := map[digest.Digest]*artifact.Artifact{} // nil if it cannot be: CRI gives an image several names
	for _, i := range all {
		a, ok := read[i.Target.Digest]
		if !ok {
			if image, err := c.read(ctx, i); err == nil {
				a = keep(image).Artifact
			} else if ctx.Err() != nil {
				return nil, ctx.Err()
			}
			read[i.Target.Digest] = a
		}
		if a != nil {
			found = append(found, keep(Image{Image: i, Artifact: a}))
		}
	}
	return found, nil
}

// list returns all images of the namespace by name. One that does not exist is
// errdefs.ErrNotFound.
func (c *Client) list(ctx context.Context) ([]images.Image, error) {
	all, err := c.ImageService().List(c.Context(ctx))
	if err != nil {
		return nil, fmt.Errorf("list the images of namespace %s: %w", c.Namespace, err)
	}
	if len(all) == 0 { // containerd lists nothing in a namespace that does not exist
		if err := c.exists(ctx); err != nil {
			return nil, err
		}
	}
	slices.SortFunc(all, func(a, b images.Image) int { return cmp.Compare(a.Name, b.Name) })
	return all, nil
}

// read reads the artifact that the image is.
func (c *Client) read(ctx context.Context, i images.Image) (Image, error) {
	a, err := artifact.Read(c.Context(ctx), c.ContentStore(), i.Target)
	if errors.Is(err, artifact.ErrNotArtifact) {
		return Image{}, fmt.Errorf("%q is an ordinary image, not an artifact: %w", i.Name, errdefs.ErrInvalidArgument)
	}
	if err != nil {
		return Image{}, fmt.Errorf("image %q: %w", i.Name, err)
	}
	return Image{Image: i, Artifact: a}, nil
}

// exists returns errdefs.ErrNotFound if the namespace does not exist.
func (c *Client) exists(ctx context.Context) error {
	all, err := c.NamespaceService().List(ctx)
	if err != nil {
		return fmt.Errorf("list containerd's namespaces: %w", err)
	}
	if slices.Contains(all, c.Namespace) {
		return nil
	}
	slices.Sort(all)
	return fmt.Errorf("containerd has no namespace %q, choose one with -n; it has %s: %w", c.Namespace, cmp.Or(strings.Join(all, ", "), "none"), errdefs.ErrNotFound)
}

// unknown says where the image is that is not in the namespace.
func (c *Client) unknown(ctx context.Context, ref string) error {
	all, err := c.NamespaceService().List(ctx)
	if err != nil {
		return fmt.Errorf("list containerd's namespaces: %w", err)
	}
	var others []string
	for _, namespace := range all {
		ctx := namespaces.WithNamespace(ctx, namespace)
		same, err := c.ImageService().List(ctx, fmt.Sprintf("name==%q", ref), fmt.Sprintf("target.digest==%q", ref))
		if err == nil && len(same) > 0 {
			others = append(others, namespace)
		}
	}
	slices.Sort(others)
	switch {
	case len(others) > 0:
		return fmt.Errorf("no image %q in namespace %s; it is in namespace %s: use -n %s: %w", ref, c.Namespace, strings.Join(others, ", "), others[0], errdefs.ErrNotFound)
	case !slices.Contains(all, c.Namespace):
		return c.exists(ctx)
	}
	return fmt.Errorf("no image %q in namespace %s; pull it, or look for the full name with `ctr -n %[2]s images ls`: %w", ref, c.Namespace, errdefs.ErrNotFound)
}
