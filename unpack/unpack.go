// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

// Package unpack lays an artifact out as a Tree: a directory that, mounted,
// shows exactly the artifact's files.
//
// A Tree is metadata wherever the kernel allows it. The bytes of raw layers
// stay in the runtime's blob directory; the Tree retains them by hard link, so
// that no garbage collection can take them from under a running pod. Layers
// that are tar archives are extracted.
//
// The package knows nothing of who uses a Tree, of containerd or of
// snapshots: that is package view and package snapshot.
package unpack

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
	"github.com/artifact-snapshotter/artifact-snapshotter/internal/blobdir"
)

// The entries of a Tree's directory.
const (
	fsDir    = "fs"        // what the mounted Tree shows
	dataDir  = "data"      // the blobs that it retains, numbered
	metaFile = "tree.json" // the Tree itself, see Tree
)

// Tree is an artifact laid out in a directory of its own. Its exported fields
// are kept in that directory.
type Tree struct {
	// Manifest is the digest of the manifest the Tree was built from.
	Manifest digest.Digest `json:"manifest"`
	// Rung is how the raw layers were laid out, and so how to mount the Tree.
	Rung Rung `json:"rung"`
	// Size and Inodes are what the files of the Tree add to the disk: allocated
	// bytes (as du counts them) and entries, without the blobs that it shares
	// with the runtime. A file replaced by a later layer is still counted.
	Size   int64 `json:"size"`
	Inodes int64 `json:"inodes"`
	// Source is the file of the manifest, see Stale.
	Source string `json:"source"`

	dir string
}

// Options say how to build a Tree.
type Options struct {
	// Rung is how raw layers are laid out; see Probe.
	Rung Rung
	// Blobs is where the runtime keeps the artifact's blobs.
	Blobs blobdir.Dir
	// Copies is a directory for the blobs that could not be linked or
	// reflinked from Blobs (another file system) and had to be copied. Trees
	// link to them there, so a copy with a single link is unused.
	Copies string
	// Owners shifts every owner for a pod with a user namespace; the zero
	// value leaves owners alone.
	Owners IDMap
	// Progress, if it is not nil, is told of every n bytes of the artifact's
	// blobs that are done.
	Progress func(n int64)
}

// Build lays a out in dir, which must not exist, and returns the Tree. On
// failure nothing is left behind. A layer that breaks a rule refuses the whole
// artifact: errdefs.ErrInvalidArgument, naming the layer. A missing blob is
// errdefs.ErrNotFound, a full disk errdefs.ErrResourceExhausted.
func Build(ctx context.Context, dir string, a *artifact.Artifact, o Options) (*Tree, error) {
	t := &Tree{Manifest: a.Manifest.Digest, Rung: o.Rung, Source: source(o.Blobs, a.Manifest.Digest), dir: dir}
	return t, t.make(o, func(w *writer) error { return w.write(ctx, a) })
}

// make makes the Tree's directory and has write fill it.
func (t *Tree) make(o Options, write func(*writer) error) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("artifact %s: %w", t.Manifest, outOfSpace(err))
		}
	}()
	if err := os.Mkdir(t.dir, 0o700); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.RemoveAll(t.dir)
		}
	}()
	w, err := newWriter(t.dir, o)
	if err != nil {
		return err
	}
	defer w.close()
	if err := write(w); err != nil {
		return err
	}
	t.Size, t.Inodes = w.size, w.inodes
	return t.save()
}

// Load reads the Tree in dir.
func Load(dir string) (*Tree, error) {
	b, err := os.ReadFile(filepath.Join(dir, metaFile))
	if err != nil {
		return nil, err
	}
	t := &Tree{dir: dir}
	if err := json.Unmarshal(b, t); err != nil {
		return nil, fmt.Errorf("%s: %w", filepath.Join(dir, metaFile), err)
	}
	return t, nil
}

func (t *Tree) save() error {
	b, err := json.Marshal(t)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(t.dir, metaFile), b, 0o600)
}

// Mount shows the Tree at target, an existing directory: read-only, nosuid and
// nodev.
func (t *Tree) Mount(target string) error {
	fs := filepath.Join(t.dir, fsDir)
	m := mount.Mount{Type: "bind", Source: fs, Options: []string{"bind", "ro", "nosuid", "nodev"}}
	if t.Rung == Overlay {
		m = overlayMount(fs, filepath.Join(t.dir, dataDir))
	}
	if err := m.Mount(target); err != nil {
		// A bind is made read-only by a second step.
		err = errors.Join(err, mount.UnmountAll(target, 0))
		return fmt.Errorf("cannot mount the tree of artifact %s (%s) at %s: %w", t.Manifest, t.Rung, target, err)
	}
	return nil
}

// Stale reports whether the runtime has deleted the manifest and pulled it again
// since the Tree was built: what the Tree retains is a second copy then.
func (t *Tree) Stale(blobs blobdir.Dir) bool {
	now := source(blobs, t.Manifest)
	return now != "" && now != t.Source
}

// source tells the file of a blob from another one with the same content; it is
// "" if there is none. An inode number alone may have been used again.
func source(blobs blobdir.Dir, blob digest.Digest) string {
	var st unix.Stat_t
	if err := unix.Lstat(blobs.Path(blob), &st); err != nil {
		return ""
	}
	return fmt.Sprintf("%d at %d.%09d", st.Ino, st.Mtim.Sec, st.Mtim.Nsec)
}

// overlayMount is a read-only overlay of lower whose files take their content
// from data, a data-only lower layer (Documentation/filesystems/overlayfs.rst,
// "Data-only lower layers", Linux 6.5). Two paths never come near the page
// that mount(2) allows for options.
func overlayMount(lower, data string) mount.Mount {
	return mount.Mount{Type: "overlay", Source: "overlay", Options: []string{
		"ro", "nosuid", "nodev",
		"lowerdir=" + escapeOverlay.Replace(lower) + "::" + escapeOverlay.Replace(data),
		"metacopy=on", "redirect_dir=follow", "index=off", "nfs_export=off",
	}}
}

// escapeOverlay escapes what overlayfs gives a meaning in the value of
// lowerdir= (fs/overlayfs/params.c: ovl_next_opt, ovl_parse_param_split_lowerdirs).
var escapeOverlay = strings.NewReplacer(`\`, `\\`, `:`, `\:`, `,`, `\,`)
