// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"

	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
)

// Applier unpacks layers of artifacts one by one, for containerd's own unpacker.
//
// In a snapshot of the snapshotter that it belongs to, a layer is not unpacked but
// kept (see [Kept]), and a view of the snapshots shows all that are kept as one
// Tree. Everywhere else, and on top of ordinary layers, it makes files: of a raw
// layer a reflink, else a hard link, else a copy; of a tar its members.
type Applier struct {
	// Snapshots is the directory of that snapshotter's snapshots, as overlayfs has
	// them: <id>/fs.
	Snapshots string
	// Options are those of Build; the modes do not matter.
	Options Options
	// Scratch returns an empty directory and what removes it. It is for files that
	// are needed for a while.
	Scratch func() (dir string, done func(), err error)
}

var _ diff.Applier = (*Applier)(nil)

// Apply unpacks the blob desc, as [artifact.NewLayer] reads it, into the one
// snapshot that mounts are of, and returns the descriptor of its content. Its
// digest is the layer's DiffID: of a blob that is not compressed the blob's own,
// else by the canonical algorithm. It can be called again for a snapshot, after it
// has failed or was killed.
//
// A layer that breaks a rule is errdefs.ErrInvalidArgument, mounts of a kind that
// it does not know errdefs.ErrNotImplemented; other errors are those of Build.
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
	p, err := placeOf(mounts)
	if err != nil {
		return content, l.Wrap(err)
	}
	l.Index = len(p.lower) // as far as can be told
	err = guard(func() error {
		if err := checkName(ctx, l, o); err != nil {
			return l.Wrap(err)
		}
		dir, ours, err := a.ours(ctx, p)
		if err != nil {
			return l.Wrap(err)
		}
		if !ours {
			content, err = a.extract(ctx, l, p, o, config.SyncFs)
			return err
		}
		release, err := o.Budget.only(ctx, dir)
		if err != nil {
			return l.Wrap(err)
		}
		defer release()
		kept, err := keep(ctx, dir, []artifact.Layer{l}, o)
		if err == nil {
			content = kept.Layers[0].Descriptor
		}
		return err
	})
	if err != nil {
		return ocispec.Descriptor{}, outOfSpace(err)
	}
	content.MediaType, content.Annotations = ocispec.MediaTypeImageLayer, nil
	return content, nil
}

// checkName refuses a layer that would have the snapshot of another chain: its
// DiffID is that chain's ID.
func checkName(ctx context.Context, l artifact.Layer, o Options) error {
	taken, err := artifact.NamesAChain(l, func(blob ocispec.Descriptor) ([]byte, error) {
		f, err := newContents("", nil, o).open(ctx, blob)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		return io.ReadAll(f)
	})
	if taken {
		return fmt.Errorf("its content makes the digest the chain ID of other layers, whose snapshot it would take: %w", errdefs.ErrInvalidArgument)
	}
	return err
}

// place is where a layer goes.
type place struct {
	upper string
	lower []string // those below it, the uppermost first; none if they are not told
	// userxattr tells that overlayfs takes its orders from attributes that every
	// user can set.
	userxattr bool
}

// placeOf is the place that mounts show. A bind stands for an overlay with nothing
// below it; so does an overlay without lower directories, which containerd makes
// of a bind where it unpacks layers in parallel (core/unpack, bindToOverlay).
func placeOf(mounts []mount.Mount) (p place, err error) {
	if len(mounts) == 1 && !mounts[0].ReadOnly() {
		switch m := mounts[0]; m.Type {
		case "bind":
			p.upper = m.Source
		case "overlay":
			for _, option := range m.Options {
				key, value, _ := strings.Cut(option, "=")
				switch key {
				case "upperdir":
					p.upper = value
				case "lowerdir":
					p.lower = strings.Split(value, ":")
				case "userxattr":
					p.userxattr = true
				}
			}
		}
	}
	for _, dir := range append(p.lower, p.upper) {
		if !filepath.IsAbs(dir) {
			return p, fmt.Errorf("a layer can be unpacked into a bind or an overlay, and not into the mounts %.500q: %w", fmt.Sprint(mounts), errdefs.ErrNotImplemented)
		}
	}
	return p, nil
}

// ours is the directory of the snapshot that p is of, if that is one of our own in
// which layers are kept: everything below it is.
func (a *Applier) ours(ctx context.Context, p place) (dir string, ours bool, err error) {
	if dir, ours = a.snapshot(p.upper); !ours {
		return "", false, nil
	}
	for _, lower := range p.lower {
		below, ok := a.snapshot(lower)
		if ok {
			ok, err = a.keepPromise(ctx, below)
		}
		if !ok || err != nil {
			return "", false, err
		}
	}
	return dir, true, nil
}

// snapshot is the directory of the snapshot whose files are in fs.
func (a *Applier) snapshot(fs string) (dir string, ours bool) {
	dir = filepath.Dir(filepath.Clean(fs))
	return dir, a.Snapshots != "" && filepath.Dir(dir) == filepath.Clean(a.Snapshots) && filepath.Base(fs) == "fs"
}

// keepPromise reports whether the snapshot in dir keeps layers, and keeps those
// that it was promised to.
func (a *Applier) keepPromise(ctx context.Context, dir string) (bool, error) {
	release, err := a.Options.Budget.only(ctx, dir)
	if err != nil {
		return false, err
	}
	defer release()
	if _, err := os.Lstat(RetainedDir(dir)); !errors.Is(err, os.ErrNotExist) {
		return err == nil, err
	}
	manifest, err := promised(dir)
	if manifest == "" || err != nil {
		return false, err
	}
	below, err := artifact.Read(ctx, a.Options.Blobs, ocispec.Descriptor{Digest: manifest})
	if err == nil {
		_, err = keep(ctx, dir, below.Layers, a.Options)
	}
	if err != nil {
		return false, fmt.Errorf("below it is artifact %s, which can no longer be had; delete the images of both and pull again: %w", manifest, err)
	}
	return true, nil
}
