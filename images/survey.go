// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package images

import (
	"context"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
)

// Survey is what there is to know of all images of a namespace but their layers, which
// may be a lot.
type Survey struct {
	// Artifacts are those of [Reader.Images], with only the digests of the manifest and
	// the config.
	Artifacts []Image
	// Conflicts are those of [Reader.Conflicts].
	Conflicts map[digest.Digest]*Sharing
}

// Survey reads each image of the namespace once. What it reads it takes from blobs, if
// they are not nil and have it, which is many times as fast as containerd's API. each,
// if it is not nil, is called once for each manifest of an artifact, with its layers.
func (r Reader) Survey(ctx context.Context, blobs content.Provider, each func(*artifact.Artifact)) (*Survey, error) {
	all, err := r.list(ctx)
	if err != nil {
		return nil, err
	}
	provider := content.Provider(r.ContentStore())
	if blobs != nil {
		provider = nearby{blobs, provider}
	}
	told := map[digest.Digest]bool{}
	known := readAll(r.Context(ctx), provider, all, map[digest.Digest]Image{}, func(i *Image) {
		if !i.isArtifact() {
			return
		}
		i.chain = i.Artifact.ChainID()
		if each != nil && !told[i.Artifact.Manifest.Digest] {
			told[i.Artifact.Manifest.Digest] = true
			each(i.Artifact)
		}
	})
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	var s Survey
	var inOrder []Image
	for _, i := range all {
		image := *known.byName[i.Name]
		inOrder = append(inOrder, image)
		if image.isArtifact() {
			image.Labels = i.Labels
			s.Artifacts = append(s.Artifacts, image)
		}
	}
	s.Conflicts = conflicts(inOrder)
	return &s, nil
}

// Conflicts returns, by the config, the images of the namespace that have it, if one
// of them is an artifact and another one has another manifest: those of [Named], in the
// order of their names. Artifacts that [Reader.Images] leaves out because they are
// refused count, too.
func (r Reader) Conflicts(ctx context.Context) (map[digest.Digest]*Sharing, error) {
	all, err := r.Survey(ctx, nil, nil)
	if err != nil {
		return nil, err
	}
	return all.Conflicts, nil
}

// conflicts are those of Reader.Conflicts among all images of a namespace.
func conflicts(inOrder []Image) map[digest.Digest]*Sharing {
	var named []*Image
	for _, i := range Named(inOrder) {
		named = append(named, &i)
	}
	sharing, conflicting := sharings(named), map[digest.Digest]*Sharing{}
	for _, i := range inOrder {
		if i.Artifact != nil && sharing[i.Artifact.Config].others(i) > 0 {
			conflicting[i.Artifact.Config] = sharing[i.Artifact.Config]
		}
	}
	return conflicting
}

// nearby are blobs, and those that are not among them.
type nearby struct{ near, far content.Provider }

// ReaderAt implements content.Provider. Whoever reads a manifest checks its digest.
func (n nearby) ReaderAt(ctx context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	if ra, err := n.near.ReaderAt(ctx, desc); err == nil {
		return ra, nil
	}
	return n.far.ReaderAt(ctx, desc)
}
