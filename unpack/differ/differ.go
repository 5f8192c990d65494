// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

// Package differ applies the layers of artifacts to containerd's snapshots, for
// containerd's own unpacker (`ctr images pull`, config_type and layer_types of
// unpack_config).
//
// In a snapshot of our snapshotter a layer is not extracted: its content is retained
// ([Retained]), and a view of the snapshots mounts all their layers as one tree. In the
// snapshot of any other snapshotter, and on top of ordinary layers, a layer becomes
// files, by the rules of [unpack.ExtractLayer].
package differ

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"

	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
	"github.com/artifact-snapshotter/artifact-snapshotter/unpack"
)

// Applier implements containerd's diff.Applier for layers of artifacts.
type Applier struct {
	// Snapshots is the directory of our snapshotter's snapshots, laid out like that of
	// containerd's overlayfs snapshotter: <id>/fs.
	Snapshots string
	// Options are used as by unpack.Build, except that Modes and Progress are ignored.
	Options unpack.Options
	// Scratch creates an empty directory for temporary files, and returns it with the
	// function that removes it.
	Scratch func() (dir string, done func(), err error)
}

var _ diff.Applier = (*Applier)(nil)

// Apply applies the blob desc, read as a layer by [artifact.NewLayer], to the snapshot
// whose mounts are given, and returns the descriptor of the layer's content: its digest
// is the layer's DiffID, which is the blob's own digest if the blob is not compressed,
// and of the canonical algorithm otherwise. A call that failed or was killed can be
// repeated on the same snapshot.
//
// A layer that breaks a rule is errdefs.ErrInvalidArgument, mounts of an unknown kind
// are errdefs.ErrNotImplemented; other errors are those of unpack.Build.
func (a *Applier) Apply(ctx context.Context, desc ocispec.Descriptor, mounts []mount.Mount, opts ...diff.ApplyOpt) (content ocispec.Descriptor, err error) {
	var config diff.ApplyConfig
	for _, opt := range opts {
		if err := opt(ctx, desc, &config); err != nil {
			return content, err
		}
	}
	o := a.Options
	if config.Progress != nil {
		var done atomic.Int64
		config.Progress(0)
		o.Progress = func(n int64) { config.Progress(done.Add(n)) }
	}
	l, err := artifact.NewLayer(desc)
	if err != nil {
		return content, err
	}
	into, err := targetOf(mounts)
	if err != nil {
		return content, l.Wrap(err)
	}
	into.Sync = config.SyncFs
	l.Index = len(into.Lower) // the layer's index in the image, if every lower directory is one of its layers
	if content, err = a.apply(ctx, l, into, o); err != nil {
		return ocispec.Descriptor{}, err
	}
	return ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: content.Digest, Size: content.Size}, nil
}

func (a *Applier) apply(ctx context.Context, l artifact.Layer, into unpack.Target, o unpack.Options) (content ocispec.Descriptor, err error) {
	collides, err := artifact.IsChainIDPreimage(ctx, l, o.Blobs)
	if err == nil && collides {
		err = fmt.Errorf("its bytes are the text that the chain ID of other layers is the digest of, so its snapshot would be taken for theirs: %w", errdefs.ErrInvalidArgument)
	}
	if err != nil {
		return content, l.Wrap(err)
	}
	dir, retains, err := a.retains(into)
	if err != nil {
		return content, l.Wrap(err)
	}
	if !retains {
		scratch, done, err := a.Scratch()
		if err != nil {
			return content, l.Wrap(err)
		}
		defer done()
		return unpack.ExtractLayer(ctx, l, into, scratch, o)
	}
	unlock, err := o.Budget.Lock(ctx, dir)
	if err != nil {
		return content, l.Wrap(err)
	}
	defer unlock()
	retained, err := retain(ctx, dir, l, o)
	if err != nil {
		return content, err
	}
	return retained.Layers[0].Descriptor, nil
}

// targetOf returns the target that mounts describe. A bind mount is an overlay without
// lower directories; so is an overlay mount without a lowerdir, into which containerd
// turns a bind mount when it unpacks layers in parallel (core/unpack, bindToOverlay).
func targetOf(mounts []mount.Mount) (into unpack.Target, err error) {
	if len(mounts) == 1 && !mounts[0].ReadOnly() {
		switch m := mounts[0]; m.Type {
		case "bind":
			into.Upper = m.Source
		case "overlay":
			for _, option := range m.Options {
				key, value, _ := strings.Cut(option, "=")
				switch key {
				case "upperdir":
					into.Upper = value
				case "lowerdir":
					into.Lower = strings.Split(value, ":")
				case "userxattr":
					into.UserXattr = true
				}
			}
		}
	}
	for _, dir := range append(into.Lower, into.Upper) {
		if !filepath.IsAbs(dir) {
			return into, fmt.Errorf("a layer can be unpacked into one writable bind or overlay mount, not into %.500q: %w", fmt.Sprint(mounts), errdefs.ErrNotImplemented)
		}
	}
	return into, nil
}

// retains returns the directory of the snapshot at into, and whether layers are retained
// in it: it and all snapshots below it must be our own, and each below must retain
// layers.
func (a *Applier) retains(into unpack.Target) (dir string, retains bool, err error) {
	dir, ours := a.snapshotOf(into.Upper)
	if !ours {
		return "", false, nil
	}
	for _, lower := range into.Lower {
		below, ours := a.snapshotOf(lower)
		if !ours {
			return "", false, nil
		}
		if _, err := os.Lstat(RetainedDir(below)); errors.Is(err, os.ErrNotExist) {
			return "", false, nil
		} else if err != nil {
			return "", false, err
		}
	}
	return dir, true, nil
}

// snapshotOf returns the directory of the snapshot whose files are in fs.
func (a *Applier) snapshotOf(fs string) (dir string, ours bool) {
	dir = filepath.Dir(filepath.Clean(fs))
	return dir, a.Snapshots != "" && filepath.Dir(dir) == filepath.Clean(a.Snapshots) && filepath.Base(fs) == "fs"
}
