// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
)

const (
	// maxEntries and maxNames, in bytes, bound the inodes, the memory and the
	// time that one artifact can claim: a kilobyte of gzip can hold a thousand
	// tar headers.
	maxEntries = 1 << 20
	maxNames   = 64 << 20
)

// kind is what an entry of the Tree is, as far as the rules of precedence care.
type kind uint8

const (
	directory kind = iota + 1
	regular
	symlink
)

// node is an entry of the Tree under construction.
type node struct {
	kind  kind
	layer int // the last layer that said something about it; -1 for none
	// attrs are of directories alone: they are set when the Tree is complete,
	// for every new child changes its directory's time.
	attrs attrs
}

// attrs are what a layer says about an entry.
type attrs struct {
	mode     fs.FileMode // permission bits; of directories the special bits too
	uid, gid uint32
	mtime    time.Time
}

// writer builds a Tree. It is the one place where a name from an artifact
// becomes a file: every access goes through root, which no name and no symlink
// leaves, and every name has passed artifact.CleanPath.
type writer struct {
	Options
	root  *os.Root // the Tree's directory
	dir   string   // its path
	shift shift
	// parent is the directory that the last entry was made in, open: files come
	// directory by directory, and each walk from root costs an open per level.
	parent     *os.File
	parentName string
	// blobs names the blobs of raw layers in data/. The names are short, for a
	// file has to fit its redirect to one into what an inode of ext4 has left
	// for attributes (92 bytes of 256), or each takes a block for it.
	blobs map[digest.Digest]string
	// nodes is every entry of fs by its clean path, "." for fs itself.
	nodes map[string]*node
	// entries and names count what the limits are for.
	entries, names int
	// logical and written are the bytes of all extracted files, with their holes
	// and without. Holes take no disk, but time: what does not fit the disk is
	// refused all the same.
	logical, written int64
	// implied are the attributes of a directory that no layer describes.
	implied attrs
	// size and inodes are what the Tree takes, see Tree.
	size, inodes int64
	buf          []byte
}

func newWriter(dir string, o Options) (*writer, error) {
	s, err := o.Owners.parse()
	if err != nil {
		return nil, err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	w := &writer{
		Options: o,
		root:    root,
		dir:     dir,
		shift:   s,
		buf:     make([]byte, 256<<10),
		blobs:   map[digest.Digest]string{},
		nodes:   map[string]*node{".": {kind: directory, layer: -1}},
	}
	for _, d := range []string{fsDir, dataDir} {
		if err := root.Mkdir(d, 0o700); err != nil {
			return nil, errors.Join(err, root.Close())
		}
	}
	return w, nil
}

// close closes what the writer has open.
func (w *writer) close() {
	if w.parent != nil {
		w.parent.Close()
	}
	w.root.Close()
}

// write makes the Tree. Blobs are retained while the files are made: with
// thousands of them each is about as much work for the file system.
func (w *writer) write(ctx context.Context, a *artifact.Artifact) error {
	w.implied = attrs{mode: 0o755, mtime: a.Created}
	w.nodes["."].attrs = w.implied
	for _, l := range a.Layers {
		if _, ok := w.blobs[l.Descriptor.Digest]; !ok && l.Format == artifact.FormatRaw {
			w.blobs[l.Descriptor.Digest] = strconv.Itoa(len(w.blobs))
		}
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return w.retainAll(ctx, a) })
	// Archives are decoded in the caller's goroutine, where it can recover.
	err := each(ctx, a.Layers, w.layer)
	if err == nil {
		err = outOfSpace(w.finish())
	}
	if err != nil {
		cancel()
	}
	if rerr := g.Wait(); err == nil || errors.Is(err, context.Canceled) && rerr != nil {
		return rerr
	}
	return err
}

// each calls f with the layers in turn and says which one failed.
func each(ctx context.Context, layers []artifact.Layer, f func(context.Context, artifact.Layer) error) error {
	for _, l := range layers {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := f(ctx, l); err != nil {
			return l.Wrap(outOfSpace(err))
		}
	}
	return nil
}

func (w *writer) layer(ctx context.Context, l artifact.Layer) error {
	if l.Format != artifact.FormatRaw {
		return w.tar(ctx, l)
	}
	if err := w.raw(ctx, l); err != nil {
		return err
	}
	w.done(l.Descriptor.Size)
	return nil
}

func (w *writer) done(n int64) {
	if w.Progress != nil {
		w.Progress(n)
	}
}

// in is the path of the entry name below root.
func in(name string) string { return path.Join(fsDir, name) }

// mkdir makes the directory name and those above it, for layer. It refuses to
// go through anything that is not a directory: a symlink in a path of a
// hostile archive is how files end up elsewhere.
func (w *writer) mkdir(name string, layer int) (*node, error) {
	if n, ok := w.nodes[name]; ok {
		switch n.kind {
		case directory:
			return n, nil
		case symlink:
			return nil, fmt.Errorf("%q passes through a symlink of layer %d: %w", name, n.layer, errdefs.ErrInvalidArgument)
		default:
			return nil, fmt.Errorf("%q must be a directory but is a file of layer %d: %w", name, n.layer, errdefs.ErrInvalidArgument)
		}
	}
	if _, err := w.mkdir(path.Dir(name), layer); err != nil {
		return nil, err
	}
	dir, base, err := w.at(name)
	if err != nil {
		return nil, err
	}
	if err := unix.Mkdirat(dir, base, 0o700); err != nil {
		return nil, &fs.PathError{Op: "mkdir", Path: name, Err: err}
	}
	return w.add(name, &node{kind: directory, layer: layer, attrs: w.implied})
}

// at is the open directory that holds name, and name's last element. The
// descriptor is good until the next call.
func (w *writer) at(name string) (int, string, error) {
	if name == "." {
		name = "" // fs itself, in the Tree's directory
	}
	dir, base := path.Split(in(name))
	if w.parent != nil && w.parentName == dir {
		return int(w.parent.Fd()), base, nil
	}
	if w.parent != nil {
		w.parent.Close()
	}
	var err error
	if w.parent, err = w.root.Open(path.Clean(dir)); err != nil {
		return 0, "", err
	}
	w.parentName = dir
	return int(w.parent.Fd()), base, nil
}

// place makes room for a file (anything but a directory) of layer at name: its
// parents are made, and a file of an earlier layer goes. A later layer wins
// over an earlier one, file over file.
func (w *writer) place(name string, layer int, k kind) error {
	if n, ok := w.nodes[name]; ok {
		if n.kind == directory {
			if n.layer < 0 {
				return fmt.Errorf("a file would replace the root of the volume: %w", errdefs.ErrInvalidArgument)
			}
			return fmt.Errorf("file %q is a directory for layer %d: %w", name, n.layer, errdefs.ErrInvalidArgument)
		}
		dir, base, err := w.at(name)
		if err != nil {
			return err
		}
		if err := unix.Unlinkat(dir, base, 0); err != nil {
			return &fs.PathError{Op: "unlink", Path: name, Err: err}
		}
	} else if _, err := w.mkdir(path.Dir(name), layer); err != nil {
		return err
	}
	_, err := w.add(name, &node{kind: k, layer: layer})
	return err
}

// add adds an entry, or one in the place of another.
func (w *writer) add(name string, n *node) (*node, error) {
	w.entries++
	w.names += len(name)
	if w.entries > maxEntries || w.names > maxNames {
		return nil, fmt.Errorf("more than %d files and directories, or %d MiB of names: %w",
			maxEntries, maxNames>>20, errdefs.ErrInvalidArgument)
	}
	w.nodes[name] = n
	return n, nil
}

// create opens a new file at name, which place has made room for. Its mode is
// the wanted one already, unless the umask is in the way.
func (w *writer) create(name string, mode fs.FileMode) (*os.File, error) {
	dir, base, err := w.at(name)
	if err != nil {
		return nil, err
	}
	fd, err := unix.Openat(dir, base, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, uint32(mode.Perm()))
	if err != nil {
		return nil, &fs.PathError{Op: "create", Path: name, Err: err}
	}
	return os.NewFile(uintptr(fd), name), nil
}

// setAttrs gives the complete entry its owner, mode and time, and counts what
// it takes.
func (w *writer) setAttrs(name string, k kind, a attrs) error {
	if a.uid == math.MaxUint32 || a.gid == math.MaxUint32 {
		return fmt.Errorf("%q: owner %d:%d is not a user: %w", name, a.uid, a.gid, errdefs.ErrInvalidArgument)
	}
	dir, base, err := w.at(name)
	if err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Fstatat(dir, base, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return &fs.PathError{Op: "stat", Path: name, Err: err}
	}
	w.inodes++
	w.size += st.Blocks * 512
	uid, gid := w.shift.owner(a.uid, a.gid)
	if st.Uid != uid || st.Gid != gid {
		if err := unix.Fchownat(dir, base, int(uid), int(gid), unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return &fs.PathError{Op: "chown", Path: name, Err: err}
		}
	}
	mode := unixMode(a.mode)
	if k != directory {
		mode &= 0o777 // whatever the caller says
	}
	// The chown has cleared the special bits that a directory may have.
	if k != symlink && (mode > 0o777 || st.Mode&0o7777 != mode) {
		if err := unix.Fchmodat(dir, base, mode, 0); err != nil {
			return &fs.PathError{Op: "chmod", Path: name, Err: err}
		}
	}
	t, err := unix.TimeToTimespec(a.mtime)
	if err != nil {
		return &fs.PathError{Op: "utimensat", Path: name, Err: err}
	}
	if err := unix.UtimesNanoAt(dir, base, []unix.Timespec{t, t}, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return &fs.PathError{Op: "utimensat", Path: name, Err: err}
	}
	return nil
}

// specialBits are the mode bits that a directory keeps, for the kernel and for
// Go.
var specialBits = map[uint32]fs.FileMode{
	unix.S_ISUID: fs.ModeSetuid, unix.S_ISGID: fs.ModeSetgid, unix.S_ISVTX: fs.ModeSticky,
}

func unixMode(m fs.FileMode) uint32 {
	mode := uint32(m.Perm())
	for u, bit := range specialBits {
		if m&bit != 0 {
			mode |= u
		}
	}
	return mode
}

// finish gives the directories their attributes, children first.
func (w *writer) finish() error {
	var dirs []string
	for name, n := range w.nodes {
		if n.kind == directory {
			dirs = append(dirs, name)
		}
	}
	slices.SortFunc(dirs, func(a, b string) int { return depth(b) - depth(a) })
	for _, name := range dirs {
		if err := w.setAttrs(name, directory, w.nodes[name].attrs); err != nil {
			return err
		}
	}
	return nil
}

func depth(name string) int {
	if name == "." {
		return 0
	}
	return 1 + strings.Count(name, "/")
}

// outOfSpace gives a full disk or an exhausted quota its errdefs kind, and
// says what to do. The cause is text only, here and elsewhere: of an error that
// wraps two, gRPC makes one that says its kind twice (errdefs, pkg/errgrpc).
func outOfSpace(err error) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return fmt.Errorf("%v: free space on the file system of the snapshotter's root and try again: %w", err, errdefs.ErrResourceExhausted)
	}
	return err
}
