// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package blobs

import (
	"context"
	"fmt"
	"os"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Dirs are one or more directories of blobs, those of containerd and CRI-O for example. A
// blob that several of them have is taken from the first.
type Dirs []Dir

// All implements Source.
func (ds Dirs) All() []Dir { return ds }

// String implements fmt.Stringer.
func (ds Dirs) String() string {
	var names []string
	for _, d := range ds {
		names = append(names, string(d))
	}
	return strings.Join(names, ", ")
}

// Path implements Source. If no directory has the blob, the path is in the first.
func (ds Dirs) Path(dgst digest.Digest) string {
	for _, d := range ds {
		path := d.Path(dgst)
		if _, err := os.Lstat(path); err == nil {
			return path
		}
	}
	return ds[0].Path(dgst)
}

// Find implements Source, with the errors of Dir.Find. A blob is errdefs.ErrNotFound only
// if every directory can be read.
func (ds Dirs) Find(hex string) (ocispec.Descriptor, error) {
	return first(ds, hex, func(d Dir) (ocispec.Descriptor, error) { return d.Find(hex) })
}

// ReaderAt implements content.Provider, with the errors of Dir.ReaderAt.
func (ds Dirs) ReaderAt(ctx context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	return first(ds, desc.Digest.String(), func(d Dir) (content.ReaderAt, error) { return d.ReaderAt(ctx, desc) })
}

// first returns what get returns for the first directory that has the blob.
func first[T any](ds Dirs, blob string, get func(Dir) (T, error)) (found T, err error) {
	var none T
	for _, d := range ds {
		found, gerr := get(d)
		if gerr == nil {
			return found, nil
		}
		if err == nil || errdefs.IsNotFound(err) && !errdefs.IsNotFound(gerr) {
			err = gerr
		}
	}
	if len(ds) > 1 && errdefs.IsNotFound(err) {
		err = fmt.Errorf("no blob %s in %s; check that these are the runtime's directories: %w", blob, ds, errdefs.ErrNotFound)
	}
	return none, err
}
