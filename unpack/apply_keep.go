// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/containerd/v2/pkg/atomicfile"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
	"github.com/artifact-snapshotter/artifact-snapshotter/blobs"
)

// Retained are layers that a snapshot keeps, for as long as it exists and without the
// runtime's blobs. Unlike a Tree they cannot be made again, so they are synced to
// the disk. In the directory of the snapshot is
//
//	layer/                         complete as soon as it is there
//	    blobs/<algorithm>/<hex>    the contents, none compressed; by hard link
//	                               where they can be linked
//	    layers.json                the layers, with these contents
//	layer-new/                     one that is being made, or was
//	promise                        the manifest whose layers are yet to be kept
type Retained struct {
	// Format is of the directory.
	Format int `json:"format"`
	// Layers are without compression: digest and DiffID are those of the content.
	Layers []artifact.Layer `json:"layers"`
	// Size and Inodes are what keeping them adds to the disk, as of a Tree.
	Size   int64 `json:"size"`
	Inodes int64 `json:"inodes"`
}

const (
	retainedDir    = "layer"
	newRetainedDir = "layer-new"
	retainedFile   = "layers.json"
	promiseFile    = "promise"
	// retainedFormat is the one that this version writes and reads.
	retainedFormat = 1
)

// RetainedDir is where the snapshot in dir keeps its layers, if it does.
func RetainedDir(dir string) string { return filepath.Join(dir, retainedDir) }

// keep keeps layers in the snapshot in dir, by the rules of Build for an artifact
// that has no others. Nobody else may work on dir.
func keep(ctx context.Context, dir string, layers []artifact.Layer, o Options) (*Retained, error) {
	tmp := filepath.Join(dir, newRetainedDir)
	if err := os.RemoveAll(tmp); err != nil { // of one that was killed
		return nil, err
	}
	defer os.RemoveAll(tmp)
	data := filepath.Join(tmp, dataDir)
	if err := errors.Join(os.Mkdir(tmp, 0o700), os.Mkdir(data, 0o700)); err != nil {
		return nil, err
	}
	cs := newContents(data, layers, o)
	if err := errors.Join(cs.retainRaw(ctx, layers), cs.retainArchives(ctx, layers)); err != nil {
		return nil, err
	}
	_, release, err := cs.plan(ctx, time.Time{}, layers)
	if err != nil {
		return nil, err
	}
	release()
	if err := cs.settle(func(*content) bool { return true }); err != nil {
		return nil, err
	}
	k := &Retained{Format: retainedFormat, Size: cs.size, Inodes: cs.inodes}
	for _, l := range layers {
		settled, c, err := cs.found(l)
		if err == nil {
			err = k.add(ctx, settled, c, blobs.Dir(tmp))
		}
		if err != nil {
			return nil, l.Wrap(err)
		}
	}
	if err := errors.Join(os.RemoveAll(data), k.save(filepath.Join(tmp, retainedFile))); err != nil {
		return nil, err
	}
	return k, publish(tmp, RetainedDir(dir))
}

// add keeps the content c of l, nil if it has none, in blobs.
func (k *Retained) add(ctx context.Context, l artifact.Layer, c *content, blobs blobs.Dir) error {
	id, err := c.diffID(ctx, l)
	if err != nil {
		return err
	}
	l.Descriptor.Digest = id
	if c != nil {
		path := blobs.Path(id)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			return err
		}
		// Several layers may have one content.
		if _, err := os.Lstat(path); errors.Is(err, os.ErrNotExist) {
			if err := errors.Join(os.Rename(c.path, path), syncFile(path)); err != nil {
				return err
			}
		}
		fi, err := os.Lstat(path)
		if err != nil {
			return err
		}
		l.Descriptor.Size = fi.Size()
	}
	// The rest of a descriptor has said what it has to say.
	l.Descriptor = ocispec.Descriptor{MediaType: l.Descriptor.MediaType, Digest: l.Descriptor.Digest, Size: l.Descriptor.Size}
	l.Compression, l.DiffID = artifact.CompressionNone, l.Descriptor.Digest
	k.Layers = append(k.Layers, l)
	return nil
}

func (k *Retained) save(path string) error {
	b, err := json.Marshal(k)
	if err != nil {
		return err
	}
	return os.WriteFile(path, b, 0o600)
}

// publish syncs all that is below tmp to the disk and renames it to dir, in the
// place of one of before. Of contents that is done already.
func publish(tmp, dir string) error {
	err := filepath.WalkDir(tmp, func(path string, d fs.DirEntry, err error) error {
		if err == nil && (d.IsDir() || d.Name() == retainedFile) {
			err = syncFile(path)
		}
		return err
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
	// The snapshot itself is new, too.
	return errors.Join(syncFile(filepath.Dir(dir)), syncFile(filepath.Dir(filepath.Dir(dir))))
}

func syncFile(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// LoadRetained reads what the snapshot in dir keeps, and its ID, which is different
// for different layers. A snapshot that keeps nothing is os.ErrNotExist, one that
// another version of this package has made errdefs.ErrFailedPrecondition.
func LoadRetained(dir string) (*Retained, digest.Digest, error) {
	file := filepath.Join(RetainedDir(dir), retainedFile)
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, "", err
	}
	k := &Retained{}
	if err := json.Unmarshal(b, k); err != nil {
		return nil, "", fmt.Errorf("%s: %w", file, err)
	}
	if k.Format != retainedFormat {
		return nil, "", fmt.Errorf("%s is of another version of the snapshotter; delete the image and pull it again: %w", file, errdefs.ErrFailedPrecondition)
	}
	return k, digest.FromBytes(b), nil
}

// Chain is all that the snapshots in dirs keep, the lowest first, as an artifact
// whose manifest has the digest id.
func Chain(id digest.Digest, dirs []string) (*artifact.Artifact, error) {
	a := &artifact.Artifact{Manifest: ocispec.Descriptor{Digest: id}, Created: time.Unix(0, 0).UTC()}
	for _, dir := range dirs {
		k, _, err := LoadRetained(dir)
		if err != nil {
			return nil, err
		}
		for _, l := range k.Layers {
			l.Index = len(a.Layers)
			a.Layers = append(a.Layers, l)
		}
	}
	return a, nil
}

// LinkRetained links the contents that the snapshots in dirs keep into blobs.
func LinkRetained(into blobs.Dir, dirs []string) error {
	for _, dir := range dirs {
		k, _, err := LoadRetained(dir)
		if err != nil {
			return err
		}
		for _, l := range k.Layers {
			if l.Descriptor.Size == 0 || l.Format == artifact.FormatEmpty { // there may be no blob
				continue
			}
			target := into.Path(l.Descriptor.Digest)
			if err := os.MkdirAll(filepath.Dir(target), 0o700); err != nil {
				return err
			}
			kept := blobs.Dir(RetainedDir(dir)).Path(l.Descriptor.Digest)
			if err := os.Link(kept, target); err != nil && !errors.Is(err, os.ErrExist) {
				return err
			}
		}
	}
	return nil
}

// Promise says that the snapshot in dir is to keep the layers of an artifact. That
// takes time, so the next Apply on top of it does it. Another Apply may read meanwhile
// what was promised before: an empty file would be no promise.
func Promise(dir string, manifest digest.Digest) error {
	f, err := atomicfile.New(filepath.Join(dir, promiseFile), 0o600)
	if err != nil {
		return err
	}
	if _, err := f.Write([]byte(manifest)); err != nil {
		return errors.Join(err, f.Cancel())
	}
	return f.Close()
}

// promised is what Promise has said, "" if nothing.
func promised(dir string) (digest.Digest, error) {
	b, err := os.ReadFile(filepath.Join(dir, promiseFile))
	if errors.Is(err, os.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	manifest, err := digest.Parse(string(b))
	if err != nil {
		return "", fmt.Errorf("%s says no digest but %.100q; delete the image and pull it again: %w", filepath.Join(dir, promiseFile), b, err)
	}
	return manifest, nil
}
