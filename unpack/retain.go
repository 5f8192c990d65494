// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
	"github.com/artifact-snapshotter/artifact-snapshotter/blobs"
)

// Retained are layers whose contents Retain has put into a directory.
type Retained struct {
	// Layers are the layers without compression: digest, size and DiffID are those of
	// the content, and the format is settled.
	Layers []artifact.Layer `json:"layers"`
	// Size, in allocated bytes, and Inodes are what the contents add to the disk; blobs
	// that are shared with the runtime do not count.
	Size   int64 `json:"size"`
	Inodes int64 `json:"inodes"`
}

// Retain puts the contents of layers, decompressed, into the directory into, which must
// exist and be empty: by hard link where that is possible. A layer without bytes has no
// content there. The layers are checked by the rules of Build, as if they were a whole
// artifact. Nothing is synced to the disk.
//
// Errors are those of Build. After an error the directory may hold anything.
func Retain(ctx context.Context, into blobs.Dir, layers []artifact.Layer, o Options) (*Retained, error) {
	r := &Retained{}
	err := guard(func() error { return r.retain(ctx, into, layers, o) })
	if err != nil {
		return nil, outOfSpace(err)
	}
	return r, nil
}

func (r *Retained) retain(ctx context.Context, into blobs.Dir, layers []artifact.Layer, o Options) error {
	data := filepath.Join(string(into), dataDir)
	if err := os.Mkdir(data, 0o700); err != nil {
		return err
	}
	cs := newContents(data, layers, o)
	if err := errors.Join(cs.retainRaw(ctx, layers), cs.retainArchives(ctx, layers)); err != nil {
		return err
	}
	_, release, err := cs.plan(ctx, time.Time{}, layers)
	if err != nil {
		return err
	}
	release()
	if err := cs.settle(func(*content) bool { return true }); err != nil {
		return err
	}
	r.Size, r.Inodes = cs.size, cs.inodes
	for _, l := range layers {
		settled, c, err := cs.found(l)
		if err == nil {
			err = r.add(ctx, settled, c, into)
		}
		if err != nil {
			return l.Wrap(err)
		}
	}
	return os.RemoveAll(data)
}

// add moves the content c of l, nil if it has none, into the directory into.
func (r *Retained) add(ctx context.Context, l artifact.Layer, c *content, into blobs.Dir) error {
	id, err := c.diffID(ctx, l)
	if err != nil {
		return err
	}
	size := l.Descriptor.Size
	if c != nil {
		path := into.Path(id)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			return err
		}
		// Several layers may have the same content.
		if _, err := os.Lstat(path); errors.Is(err, os.ErrNotExist) {
			if err := os.Rename(c.path, path); err != nil {
				return err
			}
		}
		fi, err := os.Lstat(path)
		if err != nil {
			return err
		}
		size = fi.Size()
	}
	// The annotations have been evaluated, and belong to the blob.
	l.Descriptor = ocispec.Descriptor{MediaType: l.Descriptor.MediaType, Digest: id, Size: size}
	l.Compression, l.DiffID = artifact.CompressionNone, id
	r.Layers = append(r.Layers, l)
	return nil
}
