// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

// Package unpack lays an artifact out as a Tree: a directory that, mounted,
// shows exactly the artifact's files.
//
// A Tree is metadata wherever the kernel allows it. The bytes of raw layers and
// of plain tars stay in the runtime's blob directory, those of compressed tars
// are decompressed once; the Tree retains them all by hard link, so that no
// garbage collection can take them from under a running pod.
//
// A Tree is built in three steps. The contents that it needs are retained, the
// layers are planned (plan.go, index.go), which is where every rule about names
// and precedence is, and the plan is written: as an image of metadata (image.go),
// or where the kernel has no use for one, as files (directory.go).
//
// The package knows nothing of who uses a Tree, of containerd or of
// snapshots: that is package view and package snapshot.
package unpack

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
	"github.com/artifact-snapshotter/artifact-snapshotter/blobs"
)

// The entries of a Tree's directory.
const (
	fsDir     = "fs"        // what the mounted Tree shows, or where the image is mounted meanwhile
	imageFile = "image"     // the metadata, if they are an EROFS image
	dataDir   = "data"      // the contents that it retains, numbered
	nowhere   = "nowhere"   // the empty device of the image, see buildImage
	metaFile  = "tree.json" // the Tree itself, see Tree
)

// Tree is an artifact laid out in a directory of its own. Its exported fields
// are kept in that directory.
type Tree struct {
	// Manifest is the digest of the manifest the Tree was built from.
	Manifest digest.Digest `json:"manifest"`
	// Modes are those of the ladder when the Tree was built.
	Modes Modes `json:"modes"`
	// Image tells that the metadata are an EROFS image, whose extra devices
	// are the files in Devices, relative to the Tree's directory. Otherwise they
	// are files.
	Image   bool     `json:"image"`
	Devices []string `json:"devices,omitempty"`
	// Redirects tells that files have their bytes by redirects into data/, for
	// overlayfs.
	Redirects bool `json:"redirects"`
	// Size and Inodes are what the files of the Tree add to the disk: allocated
	// bytes (as du counts them) and entries, without the blobs that it shares
	// with the runtime. A copy or a flat tar that Trees share is counted where it was
	// made.
	Size   int64 `json:"size"`
	Inodes int64 `json:"inodes"`
	// Source is the file of the manifest, see Stale.
	Source string `json:"source"`

	// Format is of this file and what it describes.
	Format int `json:"format"`

	dir string
}

// format is the one that this version writes and reads. It also changes when the
// rules do, for a Tree is not made again while its manifest is there: one of format 2 names
// some files in another way, and may lack one.
const format = 4

// Options say how to build a Tree.
type Options struct {
	// Modes are how layers are laid out; see Probe.
	Modes Modes
	// Blobs is where the runtime keeps the artifact's blobs.
	Blobs blobs.Source
	// Shared is a directory for what is not in Blobs, or could not be linked or
	// reflinked from there (another file system): blobs/<algorithm>/<hex> is the
	// content with that digest, and <hex>.tar beside it a symlink from a
	// compressed blob to what it holds. Trees link to the contents, so one with a
	// single link is unused.
	Shared blobs.Dir
	// Budget bounds what building takes of the node.
	Budget *Budget
	// Owners shifts every owner for a pod with a user namespace; the zero
	// value leaves owners alone.
	Owners IDMap
	// Await, if it is not nil, waits for a blob that Blobs may not have yet. It is
	// called by several goroutines.
	Await func(ctx context.Context, blob digest.Digest) error
	// Progress, if it is not nil, is told of every n bytes of the artifact's
	// blobs that are done, by several goroutines.
	Progress func(n int64)
	// Counted, if it is not nil, is told of every n bytes of contents that a Tree has
	// come by, by several goroutines.
	Counted func(how Retention, n int64)
}

func (o Options) counted(how Retention, n int64) {
	if o.Counted != nil {
		o.Counted(how, n)
	}
}

func (o Options) await(ctx context.Context, blob digest.Digest) error {
	if o.Await == nil {
		return nil
	}
	return o.Await(ctx, blob)
}

func (o Options) done(n int64) {
	if o.Progress != nil {
		o.Progress(n)
	}
}

// Build lays a out in dir, which must not exist, and returns the Tree. On
// failure nothing is left behind. A layer that breaks a rule refuses the whole
// artifact: errdefs.ErrInvalidArgument, naming the layer. A missing blob is
// errdefs.ErrNotFound, a full disk errdefs.ErrResourceExhausted.
func Build(ctx context.Context, dir string, a *artifact.Artifact, o Options) (*Tree, error) {
	t := &Tree{Format: format, Manifest: a.Manifest.Digest, Modes: o.Modes, Source: source(o.Blobs, a.Manifest.Digest), dir: dir}
	return t, t.make(func() error { return t.build(ctx, a, o) })
}

// make makes the Tree's directory and has build fill it.
func (t *Tree) make(build func() error) (err error) {
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
	for _, d := range []string{fsDir, dataDir} {
		if err := os.Mkdir(filepath.Join(t.dir, d), 0o700); err != nil {
			return err
		}
	}
	if err := guard(build); err != nil {
		return err
	}
	return t.save()
}

// build fills the Tree's directory. With redirects, the blobs of raw layers are
// retained while the metadata are written: with thousands of them each is about
// as much work for the file system.
func (t *Tree) build(ctx context.Context, a *artifact.Artifact, o Options) error {
	s, err := o.Owners.parse()
	if err != nil {
		return err
	}
	if !slices.ContainsFunc(a.Layers, func(l artifact.Layer) bool { return l.Format != artifact.FormatEmpty }) {
		log.G(ctx).WithField("artifact", a.Manifest.Digest).Warn("the artifact has no files, only the empty descriptor: its volume is empty")
	}
	cs := newContents(filepath.Join(t.dir, dataDir), a.Layers, o)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	g, gctx := errgroup.WithContext(ctx)
	switch o.Modes.Raw {
	case Overlay:
		g.Go(func() error { return cs.retainRaw(gctx, a.Layers) })
	case Link: // it is they that files are linked from
		err = cs.retainRaw(ctx, a.Layers)
	default: // they are opened when they are copied
		err = each(ctx, a.Layers, func(l artifact.Layer) error {
			if cs.files[keyOf(l)] == nil {
				return nil
			}
			return cs.await(ctx, l.Descriptor.Digest)
		})
	}
	var needed func(*content) bool
	if err == nil {
		needed, err = t.write(gctx, a, cs, s)
	}
	if err != nil {
		cancel()
	}
	if rerr := g.Wait(); rerr != nil && (err == nil || errors.Is(err, context.Canceled)) {
		err = rerr
	}
	if err == nil {
		err = cs.settle(needed)
	}
	t.Size, t.Inodes = t.Size+cs.size, t.Inodes+cs.inodes
	return err
}

// write plans the artifact and writes the plan. It returns which contents the Tree still
// needs.
func (t *Tree) write(ctx context.Context, a *artifact.Artifact, cs *contents, s shift) (needed func(*content) bool, err error) {
	if err := cs.retainArchives(ctx, a.Layers); err != nil {
		return nil, err
	}
	p, release, err := cs.plan(ctx, a.Created, a.Layers)
	if err != nil {
		return nil, err
	}
	defer release()
	whole, archives := p.contents()
	t.Redirects = len(whole) > 0 && t.Modes.Raw == Overlay
	t.Image = len(archives) <= maxDevices[t.Modes.Tar] && (len(whole) == 0 || t.Redirects) && !p.tooLarge
	if t.Image {
		return func(c *content) bool { return whole[c] || archives[c] }, t.writeImage(p, s, len(whole) > 0)
	}
	// What has been extracted, or linked from, is needed no more.
	err = buildDirectory(ctx, filepath.Join(t.dir, fsDir), p, cs, s)
	if errdefs.IsResourceExhausted(err) && p.tooLarge && t.Modes.Tar != Extract {
		err = fmt.Errorf("its tars have to be extracted, since one is larger than 1 TiB and EROFS cannot address all of it; pack its files as raw layers, or in several tars: %w", err)
	}
	return func(c *content) bool { return whole[c] && t.Redirects }, err
}

// plan plans the layers, whose archives are retained. The caller calls release
// when the plan is no longer needed.
func (cs *contents) plan(ctx context.Context, created time.Time, layers []artifact.Layer) (p *plan, release func(), err error) {
	p, release = newPlan(created, layers), func() {}
	p.grow = func() error {
		r, err := cs.Budget.largePlan(ctx)
		if err == nil {
			release = r
		}
		return err
	}
	if err := each(ctx, layers, func(l artifact.Layer) error { return p.addLayer(ctx, l, cs) }); err != nil {
		release()
		return nil, nil, err
	}
	return p, release, nil
}

// addLayer plans a layer.
func (p *plan) addLayer(ctx context.Context, said artifact.Layer, cs *contents) error {
	l, c, err := cs.found(said)
	if err != nil {
		return err
	}
	f, d := l.File, l.Descriptor
	if d.Size == 0 {
		if err := checkEmpty(l); err != nil {
			return err
		}
	}
	switch l.Format {
	case artifact.FormatEmpty:
		cs.done(d.Size)
		return nil
	case artifact.FormatTar:
		if d.Size == 0 {
			return nil // an archive without members
		}
		if err := cs.checkDiffID(ctx, c, said); err != nil {
			return err
		}
		err := p.addArchive(ctx, c, l.Index, func(r io.Reader, key memberKey, size int64) (*content, error) {
			return cs.sparse(ctx, r, key, size)
		})
		if unlike := said.Unlike(c.compression); unlike != "" && errdefs.IsInvalidArgument(err) {
			err = fmt.Errorf("%s: %w", unlike, err)
		}
		return err
	default:
	}
	n := &node{kind: regular, layer: l.Index, attrs: attrs{mode: f.Mode, uid: f.UID, gid: f.GID, mtime: f.ModTime}}
	if d.Size > 0 {
		n.bytes = extent{content: c, size: d.Size}
	}
	if err := p.placeRaw(l, n); err != nil {
		return err
	}
	if said.Format == artifact.FormatRaw { // else it was done when it was retained
		cs.done(d.Size)
	}
	return nil
}

// writeImage writes the plan as an image.
func (t *Tree) writeImage(p *plan, s shift, redirects bool) error {
	empty := &content{path: filepath.Join(t.dir, nowhere)}
	if redirects {
		if err := os.WriteFile(empty.path, nil, 0o400); err != nil {
			return err
		}
	}
	file := filepath.Join(t.dir, imageFile)
	devices, err := buildImage(file, p, s, empty)
	if err != nil {
		return fmt.Errorf("the image of metadata: %w", err)
	}
	for _, c := range devices {
		device, err := filepath.Rel(t.dir, c.path)
		if err != nil {
			return err
		}
		t.Devices = append(t.Devices, device)
	}
	var st unix.Stat_t
	if err := unix.Stat(file, &st); err != nil {
		return &os.PathError{Op: "stat", Path: file, Err: err}
	}
	t.Size, t.Inodes = st.Blocks*512, 1
	return nil
}

// guard calls f and makes an error of a panic: a decoder that has met what its
// authors have not thought of must not end the daemon.
func guard(f func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			log.L.Errorf("panic: %v\n%s", p, debug.Stack())
			err = fmt.Errorf("the snapshotter has failed, please report it with its log: panic: %v: %w", p, errdefs.ErrInternal)
		}
	}()
	return f()
}

// Load reads the Tree in dir. One that another version of this package has made
// is errdefs.ErrFailedPrecondition.
func Load(dir string) (*Tree, error) {
	b, err := os.ReadFile(filepath.Join(dir, metaFile))
	if err != nil {
		return nil, err
	}
	t := &Tree{dir: dir}
	if err := json.Unmarshal(b, t); err != nil {
		return nil, fmt.Errorf("%s: %w", filepath.Join(dir, metaFile), err)
	}
	if t.Format != format {
		return nil, fmt.Errorf("%s is of another version of the snapshotter, which pods may still show; remove them and try again: %w", dir, errdefs.ErrFailedPrecondition)
	}
	return t, nil
}

// Rename moves the tree's directory.
func (t *Tree) Rename(dir string) error {
	if err := os.Rename(t.dir, dir); err != nil {
		return err
	}
	t.dir = dir
	return nil
}

func (t *Tree) save() error {
	b, err := json.Marshal(t)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(t.dir, metaFile), b, 0o600)
}

// Stale reports whether the runtime has deleted the manifest and pulled it again
// since the Tree was built, or only another runtime has it: what the Tree retains is a
// second copy then.
func (t *Tree) Stale(blobs blobs.Source) bool {
	there := false
	for _, dir := range blobs.All() {
		now := source(dir, t.Manifest)
		if now == t.Source {
			return false
		}
		there = there || now != ""
	}
	return there
}

// source tells the file of a blob from another one with the same content; it is
// "" if there is none. An inode number alone may have been used again.
func source(blobs blobs.Source, blob digest.Digest) string {
	var st unix.Stat_t
	if err := unix.Lstat(blobs.Path(blob), &st); err != nil {
		return ""
	}
	return fmt.Sprintf("%d at %d.%09d", st.Ino, st.Mtim.Sec, st.Mtim.Nsec)
}

// outOfSpace is OutOfSpace for files in root.
func outOfSpace(err error) error { return OutOfSpace(err, "the snapshotter's root") }

// OutOfSpace gives a full disk or an exhausted quota its kind, errdefs.ErrResourceExhausted,
// and says what to do: where is the directory whose file system it is. It returns any
// other error as it is. The cause is text only, here and elsewhere: of an error that
// wraps two, gRPC makes one that says its kind twice (errdefs, pkg/errgrpc).
func OutOfSpace(err error, where string) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return fmt.Errorf("%v: free space on the file system of %s and try again: %w", err, where, errdefs.ErrResourceExhausted)
	}
	return err
}
