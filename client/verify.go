// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package client

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/containerd/containerd/v2/core/content"
	coreimages "github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
	"github.com/artifact-snapshotter/artifact-snapshotter/unpack"
)

// The kinds of blobs.
const (
	KindIndex    = "index"
	KindManifest = "manifest"
	KindConfig   = "config"
	KindLayer    = "layer"
)

// Checked is a blob of an artifact that [Client.Verify] has read.
type Checked struct {
	Kind       string
	Descriptor ocispec.Descriptor
	// Layer is set for KindLayer. It is the first of Layers, those with the same blob and
	// DiffID.
	Layer  artifact.Layer
	Layers []artifact.Layer
	// DiffID is the digest that the decompressed content should have. It is empty if the
	// blob is not decompressed.
	DiffID digest.Digest
	// Err is what is wrong with the blob, or nil.
	Err error

	said    artifact.Layer // the layer according to the manifest
	refused error          // why the layer cannot be mounted
}

// Verify reads all blobs of an image through containerd. It compares them with their digests
// and sizes, and the content of compressed layers with the DiffIDs of the config. ref is as
// for [images.Reader.Image]. Verify reports every blob, good or bad, once it has read it, and
// meanwhile calls reading, if it is not nil, with how many bytes it has read. It returns an error if there is no such artifact, or if the artifact is refused although its
// blobs are intact.
func (c *Client) Verify(ctx context.Context, ref string, limits unpack.Limits, reading func(k Checked, read int64), report func(Checked)) error {
	ctx = c.Context(ctx)
	found, err := c.ImageService().Get(ctx, ref)
	if err != nil { // ref may be a digest; besides, this error says more
		image, err := c.Image(ctx, ref)
		if err != nil {
			return err
		}
		found = image.Image
	}
	store := c.ContentStore()
	all, refused := checks(ctx, store, found.Target)
	if errors.Is(refused, artifact.ErrNotArtifact) {
		return fmt.Errorf("%q is a container image, not an artifact: %w", ref, errdefs.ErrInvalidArgument)
	}
	bad, err := verifyAll(ctx, store, all, unpack.NewBudget(limits), reading, report)
	if err != nil || bad { // a bad blob has been reported, and explains the refusal
		return err
	}
	return refused
}

// verifyAll checks and reports the blobs.
func verifyAll(ctx context.Context, store content.Provider, all []Checked, budget *unpack.Budget, reading func(Checked, int64), report func(Checked)) (bad bool, err error) {
	done := map[way]result{}
	for _, check := range all {
		how := way{blob: check.Descriptor.Digest}
		if check.DiffID != "" {
			how.compression, how.diffID = check.Layer.Compression, check.DiffID.Algorithm()
		}
		found, ok := done[how]
		if !ok { // many layers may have the same blob
			found = check.read(ctx, store, budget, reading)
			done[how] = found
		}
		check.Err = check.compare(found)
		if err := ctx.Err(); err != nil {
			return bad, err
		}
		bad = bad || check.Err != nil
		report(check)
	}
	return bad, nil
}

// checks returns the known blobs of target, each once, and why target cannot be mounted.
func checks(ctx context.Context, store content.Provider, target ocispec.Descriptor) ([]Checked, error) {
	read := &recorder{Provider: store}
	a, err := artifact.Read(ctx, read, target)
	var all []Checked
	var layers []artifact.Layer
	for _, desc := range read.descs {
		kind := KindConfig
		switch {
		case coreimages.IsIndexType(desc.MediaType):
			kind = KindIndex
		case coreimages.IsManifestType(desc.MediaType):
			kind = KindManifest
			layers = artifact.Layers(ctx, store, desc) // if its config cannot be read
		}
		all = append(all, Checked{Kind: kind, Descriptor: desc})
	}
	if err == nil {
		layers = a.Layers
	}
	type key struct{ blob, diffID digest.Digest }
	seen := map[key]int{} // indexes in all
	for _, l := range layers {
		if l.Format == artifact.FormatEmpty { // its blob need not exist
			continue
		}
		k := Checked{Kind: KindLayer, Descriptor: l.Descriptor, said: l}
		if k.Layer, k.refused = unpack.Settle(ctx, l, store); !errdefs.IsInvalidArgument(k.refused) {
			k.refused = nil // compare reports a blob that is missing, for example
		}
		if k.refused == nil && k.Layer.Format == artifact.FormatTar && l.DiffID != l.Descriptor.Digest {
			k.DiffID = l.DiffID
		}
		i, ok := seen[key{l.Descriptor.Digest, k.DiffID}]
		if !ok {
			i = len(all)
			seen[key{l.Descriptor.Digest, k.DiffID}] = i
			all = append(all, k)
		}
		all[i].Layers = append(all[i].Layers, k.Layer)
	}
	return all, err
}

// recorder records the descriptors of what is read.
type recorder struct {
	content.Provider
	descs []ocispec.Descriptor
}

func (r *recorder) ReaderAt(ctx context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	r.descs = append(r.descs, desc)
	return r.Provider.ReaderAt(ctx, desc)
}

// way is a way to read a blob: the compression, and the algorithm of the DiffID.
type way struct {
	blob        digest.Digest
	compression artifact.Compression
	diffID      digest.Algorithm
}

// result is what reading a blob has found.
type result struct {
	size   int64 // as read; containerd reports the size that it stored
	digest digest.Digest
	err    error // why the blob could not be read
	// diffID is the digest of the decompressed content, or notDecompressed the reason why
	// there is none.
	diffID          digest.Digest
	notDecompressed error
}

// read reads the blob once, to its end.
func (k Checked) read(ctx context.Context, store content.Provider, budget *unpack.Budget, reading func(Checked, int64)) (r result) {
	blob, err := store.ReaderAt(ctx, ocispec.Descriptor{Digest: k.Descriptor.Digest})
	if err != nil {
		return result{err: err}
	}
	defer blob.Close()
	sum := k.Descriptor.Digest.Algorithm().Digester()
	section := io.NewSectionReader(blob, 0, blob.Size())
	in := io.TeeReader(section, sum.Hash())
	if reading != nil {
		in = &followed{Reader: in, told: func(n int64) { reading(k, n) }}
	}
	if k.DiffID != "" {
		k.Layer.Descriptor.Size = blob.Size() // the limit of the content is a multiple of the real size
		r.diffID, r.notDecompressed = unpack.DiffID(ctx, k.Layer, in, budget)
	}
	_, r.err = io.Copy(io.Discard, in)
	r.size, _ = section.Seek(0, io.SeekCurrent)
	r.digest = sum.Digest()
	return r
}

// followed tells how many bytes have been read.
type followed struct {
	io.Reader
	n    int64
	told func(n int64)
}

func (f *followed) Read(p []byte) (int, error) {
	n, err := f.Reader.Read(p)
	f.n += int64(n)
	f.told(f.n)
	return n, err
}

// compare returns what is wrong with the blob.
func (k Checked) compare(r result) error {
	switch desc := k.Descriptor; {
	case r.err != nil:
		return r.err
	case r.size != desc.Size:
		return fmt.Errorf("it has %d bytes, its descriptor says %d: %w", r.size, desc.Size, errdefs.ErrDataLoss)
	case r.digest != desc.Digest: // it may also be why the blob cannot be decompressed
		return fmt.Errorf("it has the digest %s: %w", r.digest, errdefs.ErrDataLoss)
	case k.refused != nil:
		return k.refused
	case k.DiffID == "":
		return nil
	case r.notDecompressed != nil:
		return r.notDecompressed
	case r.diffID != k.DiffID:
		return fmt.Errorf("%s: %w", k.said.WrongDiffID(k.Layer.Compression, r.diffID), errdefs.ErrDataLoss)
	}
	return nil
}
