// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package images

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
)

// Connect connects to the containerd whose Unix socket is address, and waits some
// seconds for its answer. No answer is errdefs.ErrUnavailable. The caller calls Close.
func Connect(ctx context.Context, address string) (*containerd.Client, error) {
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
	return c, nil
}

// Reader reads the images of one namespace through containerd's API.
type Reader struct {
	*containerd.Client
	// Namespace is containerd's name for the namespace.
	Namespace string
}

// Context returns ctx with the namespace, which every call of containerd's API needs.
// The methods of this package add it themselves.
func (r Reader) Context(ctx context.Context) context.Context {
	return namespaces.WithNamespace(ctx, r.Namespace)
}

// Image returns the artifact whose image has the name ref, or else the digest ref:
// that of its target or its manifest. Of several images with the digest it is the
// first by name.
//
// No such image, or no such namespace, is errdefs.ErrNotFound, an ordinary image
// errdefs.ErrInvalidArgument. What else is wrong with an artifact is an error of
// package artifact.
func (r Reader) Image(ctx context.Context, ref string) (Image, error) {
	found, err := r.ImageService().Get(r.Context(ctx), ref)
	if errdefs.IsNotFound(err) {
		return r.byDigest(ctx, ref)
	}
	if err != nil {
		return Image{}, fmt.Errorf("image %q: %w", ref, err)
	}
	return r.Read(ctx, found)
}

// byDigest returns the artifact with the digest ref, see Image.
func (r Reader) byDigest(ctx context.Context, ref string) (Image, error) {
	dgst, err := digest.Parse(ref)
	if err != nil {
		return Image{}, r.unknown(ctx, ref)
	}
	all, err := r.list(ctx)
	if err != nil {
		return Image{}, err
	}
	var id Image // what has no other name
	for _, i := range all {
		if i.Target.Digest != dgst && images.IsManifestType(i.Target.MediaType) {
			continue // it stands for no other manifest
		}
		image, err := r.Read(ctx, i)
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
		return Image{}, r.unknown(ctx, ref)
	}
	return id, nil
}

// Images returns all images of the namespace that are artifacts, by name. One that
// cannot be read, because its content is not there or is refused, is left out.
func (r Reader) Images(ctx context.Context) ([]Image, error) {
	return r.artifacts(ctx, func(i Image) Image { return i })
}

// Brief is as Images, of artifacts of which only the digests of manifest and config
// are known: the layers of all may be a lot.
func (r Reader) Brief(ctx context.Context) ([]Image, error) {
	return r.artifacts(ctx, Image.brief)
}

// artifacts is Images with what is to be kept of each.
func (r Reader) artifacts(ctx context.Context, keep func(Image) Image) ([]Image, error) {
	all, err := r.list(ctx)
	if err != nil {
		return nil, err
	}
	var found []Image
	read := map[digest.Digest]*artifact.Artifact{} // nil if it cannot be: CRI gives an image several names
	for _, i := range all {
		a, ok := read[i.Target.Digest]
		if !ok {
			if image, err := r.Read(ctx, i); err == nil {
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
func (r Reader) list(ctx context.Context) ([]images.Image, error) {
	all, err := r.ImageService().List(r.Context(ctx))
	if err != nil {
		return nil, fmt.Errorf("list the images of namespace %s: %w", r.Namespace, err)
	}
	if len(all) == 0 { // containerd lists nothing in a namespace that does not exist
		if err := r.exists(ctx); err != nil {
			return nil, err
		}
	}
	slices.SortFunc(all, func(a, b images.Image) int { return cmp.Compare(a.Name, b.Name) })
	return all, nil
}

// Read reads the artifact that the image is. The errors are those of [Reader.Image].
func (r Reader) Read(ctx context.Context, i images.Image) (Image, error) {
	a, err := artifact.Read(r.Context(ctx), r.ContentStore(), i.Target)
	if errors.Is(err, artifact.ErrNotArtifact) {
		return Image{}, fmt.Errorf("%q is an ordinary image, not an artifact: %w", i.Name, errdefs.ErrInvalidArgument)
	}
	if err != nil {
		return Image{}, fmt.Errorf("image %q: %w", i.Name, err)
	}
	return Image{Image: i, Artifact: a}, nil
}

// exists returns errdefs.ErrNotFound if the namespace does not exist.
func (r Reader) exists(ctx context.Context) error {
	all, err := r.NamespaceService().List(ctx)
	if err != nil {
		return fmt.Errorf("list containerd's namespaces: %w", err)
	}
	if slices.Contains(all, r.Namespace) {
		return nil
	}
	slices.Sort(all)
	return fmt.Errorf("containerd has no namespace %q, choose one with -n; it has %s: %w", r.Namespace, cmp.Or(strings.Join(all, ", "), "none"), errdefs.ErrNotFound)
}

// unknown says where the image is that is not in the namespace.
func (r Reader) unknown(ctx context.Context, ref string) error {
	all, err := r.NamespaceService().List(ctx)
	if err != nil {
		return fmt.Errorf("list containerd's namespaces: %w", err)
	}
	var others []string
	for _, namespace := range all {
		ctx := namespaces.WithNamespace(ctx, namespace)
		same, err := r.ImageService().List(ctx, fmt.Sprintf("name==%q", ref), fmt.Sprintf("target.digest==%q", ref))
		if err == nil && len(same) > 0 {
			others = append(others, namespace)
		}
	}
	slices.Sort(others)
	switch {
	case len(others) > 0:
		return fmt.Errorf("no image %q in namespace %s; it is in namespace %s: use -n %s: %w", ref, r.Namespace, strings.Join(others, ", "), others[0], errdefs.ErrNotFound)
	case !slices.Contains(all, r.Namespace):
		return r.exists(ctx)
	}
	return fmt.Errorf("no image %q in namespace %s; pull it, or look for the full name with `ctr -n %[2]s images ls`: %w", ref, r.Namespace, errdefs.ErrNotFound)
}
