// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
	"github.com/artifact-snapshotter/artifact-snapshotter/blobs"
)

// content is a file in data/, which holds what the layers with one blob hold.
type content struct {
	// name is the file's in data/, path where it is. Names are short, for a
	// file of an ext4 has to fit its redirect to one into what its inode has
	// left for attributes (92 bytes of 256), or each takes a block for it.
	name, path string
	// layer is the first that has the blob; it is none if own is set, and the
	// content no blob but a sparse member.
	layer artifact.Layer
	own   bool
	end   int64 // of a sparse member, in its archive
	// digest is of the content: the blob's own, or the DiffID if it is
	// compressed.
	digest digest.Digest
	// format and compression are what the blob was found to be, once.
	detected    sync.Once
	format      artifact.Format
	compression artifact.Compression
	undetected  error
	// digests are of the content by other algorithms.
	digests map[digest.Algorithm]digest.Digest
	// retained is how retaining it went, which is done once: the same blob may
	// stand in many layers, as a file in one and as a tar in another.
	once     sync.Once
	retained error
	// info is of the retained file. made tells that this build has copied or
	// decompressed it, so that it takes disk and this Tree counts it.
	info os.FileInfo
	made bool
}

// contentKey tells contents apart. A blob may be a tar for one layer and a file
// for another. The format is what the manifest says.
type contentKey struct {
	blob   digest.Digest
	format artifact.Format
}

func keyOf(l artifact.Layer) contentKey { return contentKey{l.Descriptor.Digest, l.Format} }

// memberKey tells a member by its archive and where it is there.
type memberKey struct {
	archive *content
	offset  int64
}

// contents are the files in data/ of a Tree that is being built: no garbage
// collection of the runtime takes them away.
type contents struct {
	Options
	dir     string // data/
	files   map[contentKey]*content
	members map[memberKey]*content // the sparse ones
	// count numbers the files.
	count int
	// size and inodes are what they add to the disk.
	size, inodes int64
	// written and holes are what sparse members have together, and compressed the
	// size of all blobs.
	written, holes, compressed int64
}

func newContents(dir string, layers []artifact.Layer, o Options) *contents {
	cs := &contents{Options: o, dir: dir, files: map[contentKey]*content{}, members: map[memberKey]*content{}}
	for _, l := range layers {
		cs.compressed += min(l.Descriptor.Size, math.MaxInt64-cs.compressed)
		if _, ok := cs.files[keyOf(l)]; !ok && l.Descriptor.Size > 0 && l.Format != artifact.FormatEmpty {
			c := cs.add()
			c.layer, c.digest, c.format = l, l.Descriptor.Digest, l.Format
			cs.files[keyOf(l)] = c
		}
	}
	return cs
}

func (cs *contents) add() *content {
	name := strconv.Itoa(cs.count)
	cs.count++
	return &content{name: name, path: filepath.Join(cs.dir, name)}
}

// retainRaw retains the blobs of all raw layers: by hard link, else by copy.
func (cs *contents) retainRaw(ctx context.Context, layers []artifact.Layer) error {
	return each(ctx, layers, func(l artifact.Layer) error {
		c := cs.files[keyOf(l)]
		// Of an empty one, addLayer says what is wrong if another layer has its blob.
		if l.Format != artifact.FormatRaw || c == nil || l.Descriptor.Size == 0 {
			return nil
		}
		return cs.retain(ctx, c, l.Descriptor)
	})
}

// retainArchives retains the blobs of all layers that are, or may be, archives:
// compressed ones as what they hold, several at a time.
func (cs *contents) retainArchives(ctx context.Context, layers []artifact.Layer) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(maxWaiting)
	for _, l := range layers {
		c := cs.files[keyOf(l)]
		if !isDetected(l) || c == nil {
			continue
		}
		g.Go(func() error {
			err := guard(func() error {
				if err := cs.detect(ctx, c); err != nil {
					return err
				}
				if c.compression == artifact.CompressionNone {
					defer cs.done(l.Descriptor.Size)
					return cs.retain(ctx, c, l.Descriptor)
				}
				// The blob has the size of the first layer; another may say another one.
				if want := c.layer.Descriptor.Size; l.Descriptor.Size != want {
					return wrongSize(want, l.Descriptor)
				}
				first := false
				c.once.Do(func() {
					first = true
					c.retained = guard(func() error { return cs.retainFlat(ctx, c) })
				})
				if !first {
					cs.done(l.Descriptor.Size)
				}
				return c.retained
			})
			if err != nil {
				return l.Wrap(outOfSpace(err))
			}
			return nil
		})
	}
	return g.Wait()
}

// detect looks once at what the blob of c is.
func (cs *contents) detect(ctx context.Context, c *content) error {
	c.detected.Do(func() {
		c.undetected = guard(func() error {
			blob, err := cs.open(ctx, c.layer.Descriptor)
			if err != nil {
				return err
			}
			defer blob.Close()
			c.format, c.compression, err = detect(ctx, c.layer, blob, cs.Budget)
			return err
		})
	})
	return c.undetected
}

// found returns the layer as its blob was found to be when it was retained, and its
// content, nil if it has none.
func (cs *contents) found(l artifact.Layer) (artifact.Layer, *content, error) {
	c := cs.files[keyOf(l)]
	format, compression := artifact.FormatRaw, artifact.CompressionNone
	switch {
	case c != nil:
		format, compression = c.format, c.compression
	case l.Format == artifact.FormatTar: // of no bytes, an archive without members
		format = artifact.FormatTar
	}
	settled, err := l.Settle(format, compression)
	return settled, c, err
}

// maxWaiting is how many archives are retained at once. What they take of the node
// is the Budget's; this is of goroutines.
const maxWaiting = 64

// each calls f with the layers in turn and says which one failed.
func each(ctx context.Context, layers []artifact.Layer, f func(artifact.Layer) error) error {
	for _, l := range layers {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := f(l); err != nil {
			return l.Wrap(outOfSpace(err))
		}
	}
	return nil
}

// open opens a blob of the runtime and checks its size: the digest was checked
// when the runtime stored it.
func (cs *contents) open(ctx context.Context, blob ocispec.Descriptor) (*os.File, error) {
	if err := cs.await(ctx, blob.Digest); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(cs.Blobs.Path(blob.Digest), os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0) // it may be a FIFO
	if err != nil {
		return nil, explainMissing(err, cs.Blobs, blob)
	}
	fi, err := f.Stat()
	if err == nil {
		err = checkSize(fi, blob)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

func explainMissing(err error, blobs blobs.Source, blob ocispec.Descriptor) error {
	if errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("its blob is not in %s; %s: %w", blobs, artifact.Refetch(blob), errdefs.ErrNotFound)
	}
	return err
}

func checkSize(fi os.FileInfo, blob ocispec.Descriptor) error {
	if !fi.Mode().IsRegular() {
		return fmt.Errorf("its blob is not a regular file: %w", errdefs.ErrFailedPrecondition)
	}
	if fi.Size() != blob.Size {
		return wrongSize(fi.Size(), blob)
	}
	return nil
}

func wrongSize(size int64, blob ocispec.Descriptor) error {
	return fmt.Errorf("its blob has %d bytes, its descriptor says %d: %w", size, blob.Size, errdefs.ErrFailedPrecondition)
}

// retain makes c the runtime's blob, unless it is that already, and checks the
// size, which layers with the same blob may say differently.
func (cs *contents) retain(ctx context.Context, c *content, blob ocispec.Descriptor) error {
	c.once.Do(func() {
		var linked bool
		if linked, c.retained = cs.link(ctx, c, blob); c.retained != nil {
			return
		}
		if c.info, c.retained = os.Lstat(c.path); c.retained == nil && linked {
			cs.counted(Linked, c.info.Size())
		}
	})
	if c.retained != nil {
		return c.retained
	}
	return checkSize(c.info, blob)
}

// link makes c a link to the runtime's blob, else to a copy made for another
// Tree, else a new copy that later Trees can link to.
func (cs *contents) link(ctx context.Context, c *content, blob ocispec.Descriptor) (linked bool, err error) {
	if err := cs.await(ctx, blob.Digest); err != nil {
		return false, err
	}
	err = os.Link(cs.Blobs.Path(blob.Digest), c.path)
	switch {
	case err == nil:
		return true, nil
	case errors.Is(err, unix.EXDEV), errors.Is(err, unix.EMLINK), errors.Is(err, unix.EPERM), errors.Is(err, unix.EOPNOTSUPP):
		if err := os.Link(cs.Shared.Path(blob.Digest), c.path); err == nil {
			return true, nil
		}
		log.G(ctx).WithError(err).WithField("blob", blob.Digest).Warnf("copying a blob of %s, since it cannot be linked into the snapshotter's root", cs.Blobs)
		copied, err := cs.copy(ctx, c.path, blob)
		if err != nil {
			return false, err
		}
		ours, err := cs.share(c)
		c.made = copied && ours
		return false, err
	default:
		return false, explainMissing(err, cs.Blobs, blob)
	}
}

// share lets other Trees link to c, which is not in the runtime's directory of
// blobs. Whoever is first shares, and the others take his; ours tells whether this
// one was kept.
func (cs *contents) share(c *content) (ours bool, err error) {
	shared := cs.Shared.Path(c.digest)
	err = os.Link(c.path, shared)
	if errors.Is(err, os.ErrNotExist) {
		if err := os.MkdirAll(filepath.Dir(shared), 0o700); err != nil {
			return true, err
		}
		err = os.Link(c.path, shared)
	}
	if !errors.Is(err, os.ErrExist) {
		return true, err
	}
	theirs := c.path + ".shared"
	if err := os.Link(shared, theirs); err != nil {
		return true, nil //nolint:nilerr // it has just been swept, or has too many links
	}
	return false, os.Rename(theirs, c.path)
}

func (cs *contents) copy(ctx context.Context, target string, blob ocispec.Descriptor) (copied bool, err error) {
	dst, err := os.OpenFile(target, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o444)
	if err != nil {
		return false, err
	}
	copied, err = cs.fill(ctx, dst, blob)
	return copied, errors.Join(err, dst.Close())
}

// fill gives dst the content of blob: by reflink (FICLONE) where the file system
// can, which also works between the subvolumes of btrfs where a link does not;
// else by a copy, whose digest is checked since every byte passes by.
func (cs *contents) fill(ctx context.Context, dst *os.File, blob ocispec.Descriptor) (copied bool, err error) {
	src, err := cs.open(ctx, blob)
	if err != nil {
		return false, err
	}
	defer src.Close()
	err = unix.IoctlFileClone(int(dst.Fd()), int(src.Fd()))
	runtime.KeepAlive(src)
	if err == nil {
		cs.counted(Reflinked, blob.Size)
		return false, nil
	}
	if err := cs.Budget.room(dst, blob.Size); err != nil {
		return false, err
	}
	verifier := blob.Digest.Verifier()
	if _, err := io.Copy(io.MultiWriter(dst, verifier), reader{ctx, src}); err != nil {
		return false, err
	}
	if !verifier.Verified() {
		return false, wrongBlob(blob.Digest)
	}
	cs.counted(Copied, blob.Size)
	return true, nil
}

func wrongBlob(d digest.Digest) error {
	return fmt.Errorf("its blob does not have the digest %s; delete the image and pull it again: %w", d, errdefs.ErrFailedPrecondition)
}

// sparse makes a content of the size bytes of a member with holes, which keep
// being holes: what an index cannot point to. The same archive may stand in many
// layers.
func (cs *contents) sparse(ctx context.Context, r io.Reader, key memberKey, size int64) (*content, error) {
	if c, ok := cs.members[key]; ok {
		return c, nil
	}
	c := cs.add()
	c.own = true
	r = reader{ctx, r} // of holes nothing is read that would look at ctx
	f, err := os.OpenFile(c.path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o444)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	// Holes take no disk, but time: what would not fit it, all of them
	// together, is refused all the same.
	if size > math.MaxInt64-cs.holes {
		return nil, fmt.Errorf("the files have more bytes than can be counted: %w", errdefs.ErrInvalidArgument)
	}
	if err := cs.Budget.room(f, cs.holes+size); err != nil {
		return nil, err
	}
	// A fragment of one byte takes a block.
	limit := cs.Budget.expanded(cs.compressed) - cs.written
	written, err := copySparse(f, r, size, limit)
	if err != nil {
		return nil, err
	}
	if n, err := io.ReadFull(r, make([]byte, 1)); n > 0 {
		return nil, fmt.Errorf("it has more data than its size says: %w", errdefs.ErrInvalidArgument)
	} else if !errors.Is(err, io.EOF) {
		return nil, err
	}
	cs.counted(Copied, written)
	cs.written += written
	cs.holes += size - written
	cs.members[key] = c
	return c, f.Close()
}

// settle removes the contents that are not needed, but not those of raw layers, and counts
// the disk usage of the others that this build has made. Call it when all layers are
// retained: a later one may have the same blob.
func (cs *contents) settle(needed func(*content) bool) error {
	for _, c := range slices.Concat(slices.Collect(maps.Values(cs.members)), slices.Collect(maps.Values(cs.files))) {
		if (c.own || c.layer.Format != artifact.FormatRaw) && !needed(c) {
			if err := os.Remove(c.path); err != nil && !errors.Is(err, os.ErrNotExist) {
				return err
			}
			continue
		}
		if !c.own && !c.made {
			continue
		}
		var st unix.Stat_t
		if err := unix.Stat(c.path, &st); err != nil {
			return pathError("stat", c.path, err)
		}
		cs.inodes++
		cs.size += st.Blocks * 512
	}
	return nil
}

// sparseBlock is the unit that copySparse leaves out: a block of most file systems.
const sparseBlock = 4 << 10

// copySparse copies size bytes of r to the empty file f and leaves out blocks of
// zeros, so that holes stay holes. It writes no more than limit.
func copySparse(f *os.File, r io.Reader, size, limit int64) (written int64, err error) {
	buf := make([]byte, 64*sparseBlock)
	for off := int64(0); off < size; {
		b := buf[:min(int64(len(buf)), size-off)]
		if _, err := io.ReadFull(r, b); err != nil {
			return written, err
		}
		for len(b) > 0 {
			// A run of blocks that are all zeros, or all not.
			zeros := isZero(b[:min(len(b), sparseBlock)])
			n := min(len(b), sparseBlock)
			for n < len(b) && isZero(b[n:min(len(b), n+sparseBlock)]) == zeros {
				n = min(len(b), n+sparseBlock)
			}
			if !zeros {
				if written += int64(n); written > limit {
					return written, fmt.Errorf("its data take more than %d bytes of the disk; raise max_expansion in the snapshotter's configuration if that is as it should be: %w", limit, errdefs.ErrInvalidArgument)
				}
				if _, err := f.WriteAt(b[:n], off); err != nil {
					return written, err
				}
			}
			b, off = b[n:], off+int64(n)
		}
	}
	return written, f.Truncate(size)
}

func isZero(b []byte) bool { return b[0] == 0 && bytes.Equal(b[:len(b)-1], b[1:]) }

// reader reads until ctx ends.
type reader struct {
	ctx context.Context
	io.Reader
}

func (r reader) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	return r.Reader.Read(p)
}
