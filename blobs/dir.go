// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

// Package blobs reads blobs from directories that have them as blobs/<algorithm>/<hex>: the
// root of containerd's content store, or an OCI image layout such as CRI-O's
// (https://github.com/opencontainers/image-spec/blob/main/image-layout.md).
//
// It reads complete blobs by their digest. It does not write, knows neither containerd's
// metadata nor unfinished downloads, and does not verify a content against its digest,
// which is left to whoever reads all of it.
package blobs

import (
	"context"
	_ "crypto/sha256" // for go-digest, which validates only what is linked in
	_ "crypto/sha512"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Dir is the path of a directory that has blobs/<algorithm>/<hex>.
type Dir string

// Source is where blobs are: a Dir, or several Dirs.
type Source interface {
	content.Provider
	// String names the directories, for errors and logs.
	fmt.Stringer
	// Path returns where the blob is, or would be. For an invalid digest it returns "",
	// which no file has as its path.
	Path(digest.Digest) string
	// Find returns the descriptor of the blob with this digest, in hex.
	Find(hex string) (ocispec.Descriptor, error)
	// All returns the directories in the order in which they are searched.
	All() []Dir
}

var (
	_ Source = Dir("")
	_ Source = Dirs{}
)

// String implements fmt.Stringer.
func (d Dir) String() string { return string(d) }

// All implements Source.
func (d Dir) All() []Dir { return []Dir{d} }

// algorithms are the digest algorithms by the length of a digest in hex.
var algorithms = map[int]digest.Algorithm{
	64:  digest.SHA256,
	96:  digest.SHA384,
	128: digest.SHA512,
}

// Path returns where the blob is, or would be: always below the directory, or "" for an
// invalid digest, which no file has as its path.
func (d Dir) Path(dgst digest.Digest) string {
	if dgst.Validate() != nil {
		return ""
	}
	return filepath.Join(string(d), "blobs", dgst.Algorithm().String(), dgst.Encoded())
}

// Find returns the descriptor, digest and size without a media type, of the blob with this
// digest in hex. The length tells the algorithm: 64 digits are sha256, 96 sha384, 128
// sha512.
//
// A blob that is not there is errdefs.ErrNotFound; hex that is not a digest is
// errdefs.ErrInvalidArgument.
func (d Dir) Find(hex string) (ocispec.Descriptor, error) {
	algorithm, ok := algorithms[len(hex)]
	if !ok || algorithm.Validate(hex) != nil {
		return ocispec.Descriptor{}, fmt.Errorf("%.150q is not the hex of a sha256, sha384 or sha512 digest: %w", hex, errdefs.ErrInvalidArgument)
	}
	dgst := digest.NewDigestFromEncoded(algorithm, hex)
	size, err := d.stat(dgst)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	return ocispec.Descriptor{Digest: dgst, Size: size}, nil
}

// ReaderAt opens the blob that desc names; the caller closes it. If the size in desc is
// more than 0 and not that of the blob, the error is errdefs.ErrFailedPrecondition. A blob
// that is not there is errdefs.ErrNotFound, an invalid digest errdefs.ErrInvalidArgument.
func (d Dir) ReaderAt(_ context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	if err := desc.Digest.Validate(); err != nil {
		return nil, fmt.Errorf("digest %.255q: %v: %w", desc.Digest, err, errdefs.ErrInvalidArgument)
	}
	if _, err := d.stat(desc.Digest); err != nil {
		return nil, err
	}
	ra, err := local.OpenReader(d.Path(desc.Digest))
	if err != nil {
		return nil, fmt.Errorf("blob %s in %s: %w", desc.Digest, d, err)
	}
	if desc.Size > 0 && desc.Size != ra.Size() {
		ra.Close()
		return nil, fmt.Errorf("blob %s in %s has %d bytes, its descriptor says %d: %w", desc.Digest, d, ra.Size(), desc.Size, errdefs.ErrFailedPrecondition)
	}
	return ra, nil
}

// stat returns the size of a blob. It refuses symbolic links, which could lead out of the
// directory, and everything else that is not a regular file: opening a FIFO would block.
func (d Dir) stat(dgst digest.Digest) (int64, error) {
	path := d.Path(dgst)
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return 0, fmt.Errorf("no blob %s in %s; check that this is the runtime's content root: %w", dgst, d, errdefs.ErrNotFound)
	case err != nil:
		return 0, fmt.Errorf("blob %s in %s cannot be read; check that this is the runtime's content root: %w", dgst, d, err)
	case !info.Mode().IsRegular():
		return 0, fmt.Errorf("blob %s: %s is not a regular file but %s: %w", dgst, path, info.Mode(), errdefs.ErrFailedPrecondition)
	}
	return info.Size(), nil
}
