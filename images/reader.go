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
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
)

// Connect connects to the containerd whose Unix socket is address, and waits a few seconds
// for its answer. If there is none, the error is errdefs.ErrUnavailable. The caller calls
// Close.
func Connect(ctx context.Context, address string) (*containerd.Client, error) {
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	path := strings.TrimPrefix(address, "unix://")
	unavailable := func(err error) error {
		return fmt.Errorf("containerd does not answer on %s: %v; check that it runs and that this is its socket: %w", path, err, errdefs.ErrUnavailable)
	}
	// Dialing first gives a shorter error than gRPC's.
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
	// Namespace is containerd's name of the namespace.
	Namespace string
}

// Context returns ctx with the namespace, which every call of containerd's API needs. The
// methods of Reader add it themselves.
func (r Reader) Context(ctx context.Context) context.Context {
	return namespaces.WithNamespace(ctx, r.Namespace)
}

// Image returns the artifact that has the name ref, or else whose target or manifest has
// the digest ref. The algorithm and the last digits of a digest may be left out if only one
// digest begins so. Of several images with the digest it returns the first by name.
//
// If several digests begin so, the error is errdefs.ErrInvalidArgument. If there is no such image, or no such namespace, the error is errdefs.ErrNotFound. For a
// container image it is errdefs.ErrInvalidArgument. Other errors are those of package
// artifact.
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
	if !digestPrefix.MatchString(ref) {
		return Image{}, r.notFound(ctx, ref)
	}
	all, err := r.list(ctx)
	if errdefs.IsNotFound(err) { // the namespace; another may have the image
		return Image{}, r.notFound(ctx, ref)
	}
	if err != nil {
		return Image{}, err
	}
	dgst, err := r.complete(ctx, ref, all)
	if err != nil {
		return Image{}, err
	}
	if dgst == "" {
		return Image{}, r.notFound(ctx, ref)
	}
	var id Image // an image that has only its ID for a name
	for _, i := range all {
		if i.Target.Digest != dgst && images.IsManifestType(i.Target.MediaType) {
			continue // a manifest stands for itself only
		}
		image, err := r.Read(ctx, i)
		if i.Target.Digest != dgst && (err != nil || image.Manifest != dgst) {
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
		return Image{}, r.notFound(ctx, ref)
	}
	return id, nil
}

// Read reads the artifact that an image record refers to. The errors are those of
// [Reader.Image].
func (r Reader) Read(ctx context.Context, i images.Image) (Image, error) {
	a, err := artifact.Read(r.Context(ctx), r.ContentStore(), i.Target)
	if errors.Is(err, artifact.ErrNotArtifact) {
		return Image{}, fmt.Errorf("%q is a container image, not an artifact: %w", i.Name, errdefs.ErrInvalidArgument)
	}
	if err != nil {
		return Image{}, fmt.Errorf("image %q: %w", i.Name, err)
	}
	return Image{Image: i, Manifest: a.Manifest.Digest, Config: a.Config, Artifact: a}, nil
}

// Images returns the images of the namespace that are artifacts, by name. It leaves out
// artifacts that cannot be read, because content is missing or because they are refused.
func (r Reader) Images(ctx context.Context) ([]Image, error) {
	read := map[digest.Digest]*artifact.Artifact{}
	all, err := r.Survey(ctx, nil, func(a *artifact.Artifact) { read[a.Manifest.Digest] = a })
	if err != nil {
		return nil, err
	}
	for i := range all.Artifacts {
		all.Artifacts[i].Artifact = read[all.Artifacts[i].Manifest]
	}
	return all.Artifacts, nil
}

// Conflicts returns the conflicts of a [Survey].
func (r Reader) Conflicts(ctx context.Context) (map[digest.Digest]*Sharing, error) {
	all, err := r.Survey(ctx, nil, nil)
	if err != nil {
		return nil, err
	}
	return all.Conflicts, nil
}

// Survey is what can be said about all images of a namespace without the layers of
// artifacts, which may take a lot of memory.
type Survey struct {
	// Artifacts are the images of [Reader.Images], without Artifact.
	Artifacts []Image
	// Conflicts has, by config, the images that CRI may mount in place of one another:
	// those of [Named], by name. Artifacts that are refused count, too.
	Conflicts map[digest.Digest]*Sharing
}

// Survey reads every image of the namespace once. It prefers blobs, which may be nil, to
// containerd's API, because reading a file is many times as fast. It calls each, which may
// be nil, once for every manifest of an artifact.
func (r Reader) Survey(ctx context.Context, blobs content.Provider, each func(*artifact.Artifact)) (*Survey, error) {
	records, err := r.list(ctx)
	if err != nil {
		return nil, err
	}
	provider := content.Provider(r.ContentStore())
	if blobs != nil {
		provider = nearby{blobs, provider}
	}
	return survey(r.Context(ctx), provider, records, each)
}

// survey is [Reader.Survey] for the image records of a namespace.
func survey(ctx context.Context, provider content.Provider, records []images.Image, each func(*artifact.Artifact)) (*Survey, error) {
	s := &Survey{}
	var all []Image
	read := map[digest.Digest]Image{} // by target, since CRI gives an image several names
	told := map[digest.Digest]bool{}  // manifests
	for _, record := range records {
		image, ok := read[record.Target.Digest]
		if !ok {
			a, err := artifact.Read(ctx, provider, record.Target)
			switch {
			case ctx.Err() != nil:
				return nil, ctx.Err()
			case err != nil:
				image = identify(ctx, provider, record)
			default:
				image = Image{Manifest: a.Manifest.Digest, Config: a.Config, chain: a.ChainID()}
				if each != nil && !told[image.Manifest] {
					told[image.Manifest] = true
					each(a)
				}
			}
			read[record.Target.Digest] = image
		}
		image.Image = record
		all = append(all, image)
		if image.chain != "" {
			s.Artifacts = append(s.Artifacts, image)
		}
	}
	s.Conflicts = conflicts(all)
	return s, nil
}

// conflicts returns the conflicts of a [Survey] of all images of a namespace.
func conflicts(all []Image) map[digest.Digest]*Sharing {
	var named []*Image
	for _, i := range Named(all) {
		named = append(named, &i)
	}
	sharing, conflicting := sharings(named), map[digest.Digest]*Sharing{}
	for _, i := range all {
		if sharing[i.Config].others(i) > 0 {
			conflicting[i.Config] = sharing[i.Config]
		}
	}
	return conflicting
}

// nearby provides blobs from near, and the others from far.
type nearby struct{ near, far content.Provider }

// ReaderAt implements content.Provider.
func (n nearby) ReaderAt(ctx context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	if ra, err := n.near.ReaderAt(ctx, desc); err == nil {
		return ra, nil
	}
	return n.far.ReaderAt(ctx, desc)
}

// list returns all image records of the namespace by name. If the namespace does not
// exist, the error is errdefs.ErrNotFound.
func (r Reader) list(ctx context.Context) ([]images.Image, error) {
	all, err := r.ImageService().List(r.Context(ctx))
	if err != nil {
		return nil, fmt.Errorf("list the images of namespace %s: %w", r.Namespace, err)
	}
	if len(all) == 0 { // containerd answers the same for a namespace that does not exist
		if err := r.exists(ctx); err != nil {
			return nil, err
		}
	}
	slices.SortFunc(all, func(a, b images.Image) int { return cmp.Compare(a.Name, b.Name) })
	return all, nil
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
	return errdefs.ErrNotFound.WithMessage(fmt.Sprintf("containerd has no namespace %q, choose one with -n; it has %s", r.Namespace, cmp.Or(strings.Join(all, ", "), "none")))
}

// notFound returns the error for an image that is not in the namespace. It names the
// namespaces that have the image.
func (r Reader) notFound(ctx context.Context, ref string) error {
	all, err := r.NamespaceService().List(ctx)
	if err != nil {
		return fmt.Errorf("list containerd's namespaces: %w", err)
	}
	var others []string
	for _, namespace := range all {
		ctx := namespaces.WithNamespace(ctx, namespace)
		filters := []string{fmt.Sprintf("name==%q", ref)}
		if m := digestPrefix.FindStringSubmatch(ref); m != nil {
			filters = append(filters, fmt.Sprintf("target.digest~=%q", "^"+cmp.Or(m[1], "[a-z0-9]+")+":"+m[2]))
		}
		same, err := r.ImageService().List(ctx, filters...)
		if err == nil && len(same) > 0 {
			others = append(others, namespace)
		}
	}
	slices.Sort(others)
	switch {
	case len(others) > 0:
		return errdefs.ErrNotFound.WithMessage(fmt.Sprintf("no image %q in namespace %s; it is in namespace %s: use -n %s", ref, r.Namespace, strings.Join(others, ", "), others[0]))
	case !slices.Contains(all, r.Namespace):
		return r.exists(ctx)
	}
	return errdefs.ErrNotFound.WithMessage(fmt.Sprintf("no image %q in namespace %s; pull it, or look for its name with `artifact-snapshotter -n %[2]s ls`", ref, r.Namespace))
}
