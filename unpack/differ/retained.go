// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package differ

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
	"github.com/artifact-snapshotter/artifact-snapshotter/blobs"
	"github.com/artifact-snapshotter/artifact-snapshotter/unpack"
)

// Retained are the layers that a snapshot retains as long as it exists, independently of
// the runtime's blobs. A tree can be built again, these cannot, so they are synced to the
// disk. The directory of the snapshot holds
//
//	layer/                         complete as soon as it exists
//	    blobs/<algorithm>/<hex>    the contents, never compressed; hard links to the
//	                               runtime's blobs where possible
//	    layers.json                this struct
//	layer-new/                     work in progress, or what a killed process left
type Retained struct {
	// Format is the version of the layout of the directory.
	Format int `json:"format"`
	unpack.Retained
}

const (
	retainedDir    = "layer"
	newRetainedDir = "layer-new"
	retainedFile   = "layers.json"
	// retainedFormat is the format that this version writes and reads.
	retainedFormat = 1
)

// RetainedDir returns where the snapshot in dir retains layers, if it does.
func RetainedDir(dir string) string { return filepath.Join(dir, retainedDir) }

// retain retains a layer in the snapshot in dir. The caller holds the lock on dir.
func retain(ctx context.Context, dir string, l artifact.Layer, o unpack.Options) (*Retained, error) {
	tmp := filepath.Join(dir, newRetainedDir)
	if err := os.RemoveAll(tmp); err != nil { // left by a killed process
		return nil, l.Wrap(err)
	}
	defer os.RemoveAll(tmp)
	failed := func(err error) error { return l.Wrap(unpack.OutOfSpace(err, "the snapshotter's root")) }
	if err := os.Mkdir(tmp, 0o700); err != nil {
		return nil, failed(err)
	}
	retained, err := unpack.Retain(ctx, blobs.Dir(tmp), []artifact.Layer{l}, o)
	if err != nil {
		return nil, err
	}
	r := &Retained{Format: retainedFormat, Retained: *retained}
	err = r.save(filepath.Join(tmp, retainedFile))
	if err == nil {
		err = publish(tmp, RetainedDir(dir))
	}
	if err != nil {
		return nil, failed(err)
	}
	return r, nil
}

func (r *Retained) save(path string) error {
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	return os.WriteFile(path, b, 0o600)
}

// publish syncs tmp to the disk and renames it to dir, in exchange for a directory that
// may be there.
func publish(tmp, dir string) error {
	err := filepath.WalkDir(tmp, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return syncFile(path)
	})
	if err != nil {
		return err
	}
	err = os.Rename(tmp, dir)
	if errors.Is(err, unix.EEXIST) || errors.Is(err, unix.ENOTEMPTY) {
		err = unix.Renameat2(unix.AT_FDCWD, tmp, unix.AT_FDCWD, dir, unix.RENAME_EXCHANGE)
	}
	if err != nil {
		return err
	}
	// The directory of the snapshot is new, too.
	return errors.Join(syncFile(filepath.Dir(dir)), syncFile(filepath.Dir(filepath.Dir(dir))))
}

func syncFile(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// LoadRetained reads what the snapshot in dir retains, and its ID, which differs for
// different layers. A snapshot that retains nothing is os.ErrNotExist, one written by a
// version of this package with another format errdefs.ErrFailedPrecondition.
func LoadRetained(dir string) (*Retained, digest.Digest, error) {
	file := filepath.Join(RetainedDir(dir), retainedFile)
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, "", err
	}
	r := &Retained{}
	if err := json.Unmarshal(b, r); err != nil {
		return nil, "", fmt.Errorf("%s: %w", file, err)
	}
	if r.Format != retainedFormat {
		return nil, "", fmt.Errorf("%s was written by another version of the snapshotter; delete the image and pull it again: %w", file, errdefs.ErrFailedPrecondition)
	}
	return r, digest.FromBytes(b), nil
}

// Chain returns all layers that the snapshots in dirs retain, the lowest snapshot first,
// as an artifact whose manifest has the digest id.
func Chain(id digest.Digest, dirs []string) (*artifact.Artifact, error) {
	a := &artifact.Artifact{Manifest: ocispec.Descriptor{Digest: id}, Created: time.Unix(0, 0).UTC()}
	for _, dir := range dirs {
		r, _, err := LoadRetained(dir)
		if err != nil {
			return nil, err
		}
		for _, l := range r.Layers {
			l.Index = len(a.Layers)
			a.Layers = append(a.Layers, l)
		}
	}
	return a, nil
}

// Contents returns where the contents are that the snapshots in dirs retain.
func Contents(dirs []string) (contents blobs.Dirs) {
	for _, dir := range dirs {
		contents = append(contents, blobs.Dir(RetainedDir(dir)))
	}
	return contents
}
