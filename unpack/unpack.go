// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

// Package unpack builds and mounts the tree of an artifact: the prepared files of one
// artifact, in a directory of its own, which mounted is exactly the artifact's files.
//
// A tree is metadata wherever the kernel allows that. The bytes of raw layers and of tars
// that are not compressed stay in the runtime's directory of blobs; compressed tars are
// decompressed once. The tree retains them all by hard link, so that the runtime's garbage
// collection cannot remove the bytes of a running pod.
//
// [Build] works in three steps: it retains the contents (content.go, flat.go); it plans the
// layers, where all rules about names and precedence are (plan.go, index.go); and it writes
// the plan, as an EROFS image of metadata (image.go) or, where the kernel has no use for an
// image, as files (directory.go). The [Modes] say how; [Probe] chooses the best that work.
// [Tree.Mount] makes the mount that all share, and [Bind] that of each pod; their options are
// in mountoptions.go. The limits are in limits.go.
//
// [ExtractLayer] and [Retain] do the same for single layers, for unpack/differ. The package
// knows nothing of containerd's snapshots and of who uses a tree.
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

// The entries of a tree's directory.
const (
	fsDir     = "fs"        // the files; if there is an image, where it is mounted for a moment
	imageFile = "image"     // the metadata as an EROFS image, if there is one
	dataDir   = "data"      // the retained contents, numbered
	nowhere   = "nowhere"   // the empty device of the image, see buildImage
	metaFile  = "tree.json" // the Tree
)

// Tree is an artifact prepared in a directory. Its exported fields are stored there.
type Tree struct {
	// Manifest is the digest of the artifact's manifest.
	Manifest digest.Digest `json:"manifest"`
	// Modes are the modes with which the tree was built.
	Modes Modes `json:"modes"`
	// Image says that the metadata are an EROFS image, whose extra devices are the files
	// Devices, relative to the tree's directory. Otherwise the metadata are files.
	Image   bool     `json:"image"`
	Devices []string `json:"devices,omitempty"`
	// Redirects says that files have their bytes by redirects into data/, which overlayfs
	// follows.
	Redirects bool `json:"redirects"`
	// Size, in allocated bytes (as du counts them), and Inodes are what the tree adds to
	// the disk, without the blobs that it shares with the runtime. A copy or a decompressed
	// tar that trees share counts for the tree that made it.
	Size   int64 `json:"size"`
	Inodes int64 `json:"inodes"`
	// Source identifies the file of the manifest, see Stale.
	Source string `json:"source"`

	// Format is the version of this file and of the directory.
	Format int `json:"format"`

	dir string
}

// format is the one that this version writes and reads. It also changes when the rules do,
// since a tree is not built again while its manifest exists: one of format 2 names some
// files differently, and may lack one.
const format = 4

// Options say how to build a tree.
type Options struct {
	// Modes are how layers are prepared; see Probe.
	Modes Modes
	// Blobs has the artifact's blobs.
	Blobs blobs.Source
	// Shared is a directory for contents that are not in Blobs, or could be neither linked
	// nor reflinked from there: blobs/<algorithm>/<hex> is the content with that digest,
	// and <hex>.tar beside it a symlink from a compressed blob to its content. Trees link
	// to the contents, so a content with one link is unused.
	Shared blobs.Dir
	// Budget bounds what all builds take of the node.
	Budget *Budget
	// Owners maps all owners for a pod with a user namespace; the zero value changes none.
	Owners IDMap
	// Await, if it is not nil, waits for a blob that may not be in Blobs yet. Several
	// goroutines call it.
	Await func(ctx context.Context, blob digest.Digest) error
	// Progress, if it is not nil, is called when n more bytes of the artifact's blobs are
	// done, by several goroutines.
	Progress func(n int64)
	// Counted, if it is not nil, is called when a tree has got n bytes of contents in the
	// way how, by several goroutines.
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

// Build builds the tree of a in dir, which must not exist. After an error nothing is left.
// A layer that breaks a rule refuses the whole artifact: errdefs.ErrInvalidArgument, with
// the layer in the text. A missing blob is errdefs.ErrNotFound, a full disk
// errdefs.ErrResourceExhausted.
func Build(ctx context.Context, dir string, a *artifact.Artifact, o Options) (*Tree, error) {
	t := &Tree{Format: format, Manifest: a.Manifest.Digest, Modes: o.Modes, Source: source(o.Blobs, a.Manifest.Digest), dir: dir}
	return t, t.make(func() error { return t.build(ctx, a, o) })
}

// make makes the tree's directory, calls build to fill it, and saves the tree.
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

// build fills the tree's directory. With redirects, the blobs of raw layers are retained
// while the metadata are written, since with thousands of layers each takes about as long.
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
	case Link: // files are linked from them
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

// write plans the artifact and writes the plan. needed reports whether the tree still needs
// a content.
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
	t.Image = len(archives) <= modes[t.Modes.Tar].devices && (len(whole) == 0 || t.Redirects) && !p.tooLarge
	if t.Image {
		return func(c *content) bool { return whole[c] || archives[c] }, t.writeImage(p, s, len(whole) > 0)
	}
	// Contents that have been extracted or linked are not needed any more.
	err = buildDirectory(ctx, filepath.Join(t.dir, fsDir), p, cs, s)
	if errdefs.IsResourceExhausted(err) && p.tooLarge && t.Modes.Tar != Extract {
		err = fmt.Errorf("its tars have to be extracted, since one is larger than 1 TiB and EROFS cannot address all of it; pack its files as raw layers, or in several tars: %w", err)
	}
	return func(c *content) bool { return whole[c] && t.Redirects }, err
}

// plan plans the layers, whose archives must have been retained. The caller calls release
// when it no longer needs the plan.
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

// addLayer adds a layer, as the manifest has it, to the plan.
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
	if said.Format == artifact.FormatRaw { // others were done when they were retained
		cs.done(d.Size)
	}
	return nil
}

// writeImage writes the plan as an EROFS image.
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

// guard calls f and turns a panic into an error: a hostile input to a decoder must not end
// the daemon.
func guard(f func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			log.L.WithFields(log.Fields{"panic": p, "stack": string(debug.Stack())}).Error("the snapshotter has a bug")
			err = fmt.Errorf("the snapshotter has a bug; please report it with the log of the snapshotter: panic: %v: %w", p, errdefs.ErrInternal)
		}
	}()
	return f()
}

// Load reads the tree in dir. A tree of another format is errdefs.ErrFailedPrecondition.
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
		return nil, fmt.Errorf("%s was written by another version of the snapshotter, and pods may still use it; remove these pods and try again: %w", dir, errdefs.ErrFailedPrecondition)
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

// Stale reports whether the runtime has deleted the manifest and pulled it again since the
// tree was built, or only another runtime has it. What the tree retains is a second copy
// then.
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

// source identifies the file of a blob, so that another file with the same content differs;
// "" if there is none. The inode number alone would not do, since it may be used again, and
// neither would the time of modification: containerd sets that after it has renamed the blob
// into place (plugins/content/local/writer.go, Commit), when a build may have begun. Where the
// file system does not know when a file was made, that time has to do.
func source(blobs blobs.Source, blob digest.Digest) string {
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, blobs.Path(blob), unix.AT_SYMLINK_NOFOLLOW, unix.STATX_INO|unix.STATX_MTIME|unix.STATX_BTIME, &st); err != nil {
		return ""
	}
	made := st.Btime
	if st.Mask&unix.STATX_BTIME == 0 {
		made = st.Mtime
	}
	return fmt.Sprintf("%d at %d.%09d", st.Ino, made.Sec, made.Nsec)
}

// outOfSpace is OutOfSpace for files below the snapshotter's root.
func outOfSpace(err error) error { return OutOfSpace(err, "the snapshotter's root") }

// OutOfSpace turns an error of a full disk or an exhausted quota into an
// errdefs.ErrResourceExhausted that says what to do; where names the directory on the full
// file system. It returns any other error unchanged. The cause is text only, here and
// elsewhere: gRPC turns an error that wraps two into one that says its kind twice (errdefs,
// pkg/errgrpc).
func OutOfSpace(err error, where string) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return fmt.Errorf("%v: free space on the file system of %s and try again: %w", err, where, errdefs.ErrResourceExhausted)
	}
	return err
}
