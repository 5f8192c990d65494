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

// content is a file in data/: what the blob of one or more layers holds, or a sparse
// member.
type content struct {
	// name is the name in data/, and path the whole path. Names are short, so that the
	// redirect of a file fits into the 92 of 256 bytes that an ext4 inode has for
	// attributes; otherwise each file would take a block for it.
	name, path string
	// layer is the first layer with the blob. own says that there is none, because the
	// content is a sparse member.
	layer artifact.Layer
	own   bool
	end   int64 // the end of a sparse member in its archive
	// digest is the digest of the content: the blob's own, or the DiffID if the blob is
	// compressed.
	digest digest.Digest
	// format and compression are what the blob was found to be, which is tried once.
	detected    sync.Once
	format      artifact.Format
	compression artifact.Compression
	undetected  error
	// digests are digests of the content by other algorithms.
	digests map[digest.Algorithm]digest.Digest
	// retained is the result of retaining the content, which is done once: the same blob
	// may be in several layers, as a file in one and as a tar in another.
	once     sync.Once
	retained error
	// info is of the retained file. made says that this build has copied or decompressed
	// it, so that it takes disk space which this tree counts.
	info os.FileInfo
	made bool
}

// contentKey identifies a content. The format is as in the manifest, since a blob may be a
// tar in one layer and a file in another.
type contentKey struct {
	blob   digest.Digest
	format artifact.Format
}

func keyOf(l artifact.Layer) contentKey { return contentKey{l.Descriptor.Digest, l.Format} }

// memberKey identifies a member by its archive and its offset there.
type memberKey struct {
	archive *content
	offset  int64
}

// contents are the files in data/ of a tree that is being built. The runtime's garbage
// collection cannot remove them.
type contents struct {
	Options
	dir     string // data/
	files   map[contentKey]*content
	members map[memberKey]*content // sparse members
	// count is the number of the next file.
	count int
	// size and inodes are what the files add to the disk.
	size, inodes int64
	// written and holes are the bytes of data and of holes of all sparse members;
	// compressed is the size of all blobs.
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
		// addLayer reports a layer that claims to be empty but has the blob of another
		// layer.
		if l.Format != artifact.FormatRaw || c == nil || l.Descriptor.Size == 0 {
			return nil
		}
		return cs.retain(ctx, c, l.Descriptor)
	})
}

// retainArchives retains the blobs of all layers that are or may be archives, several at a
// time: compressed blobs as their decompressed content.
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
				// The blob has the size that the first layer says; another layer may claim
				// another size.
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

// detect finds out once what the blob of c is.
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

// found returns the layer with the format and compression that its blob was found to have,
// and its content, nil if it has none. The archives must have been retained.
func (cs *contents) found(l artifact.Layer) (artifact.Layer, *content, error) {
	c := cs.files[keyOf(l)]
	format, compression := artifact.FormatRaw, artifact.CompressionNone
	switch {
	case c != nil:
		format, compression = c.format, c.compression
	case l.Format == artifact.FormatTar: // no bytes are an archive without members
		format = artifact.FormatTar
	}
	settled, err := l.Settle(format, compression)
	return settled, c, err
}

// each calls f for each layer in turn, and adds to an error which layer failed.
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

// open opens a blob of the runtime and checks its size. The runtime has checked the digest
// when it stored the blob.
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

// retain makes c the runtime's blob, once, and checks its size, which layers with the same
// blob may state differently.
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

// link makes c a link to the runtime's blob, else to a copy that was made for another tree,
// else a new copy that later trees can link to.
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
		log.G(ctx).WithError(err).WithFields(log.Fields{"blob": blob.Digest, "blobs": cs.Blobs}).Warn("copying a blob, because it cannot be linked into the snapshotter's root")
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

// share lets other trees link to c, whose content is not in the runtime's directory of
// blobs. If another build was first, its file replaces c; ours says whether c is still the
// file that this build made.
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
		return true, nil //nolint:nilerr // garbage collection has just removed it, or it has too many links
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

// fill gives dst the content of blob. It tries a reflink (FICLONE) first, which on btrfs
// also works between subvolumes, where a hard link does not; then it copies, and checks the
// digest, since it reads every byte anyway.
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
	if _, err := io.Copy(io.MultiWriter(dst, verifier), reader{ctx, src, nil}); err != nil {
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

// sparse makes a content of a sparse member of size bytes, since an EROFS image cannot
// refer to it in its archive. Holes stay holes. The same archive may be in several layers.
func (cs *contents) sparse(ctx context.Context, r io.Reader, key memberKey, size int64) (*content, error) {
	if c, ok := cs.members[key]; ok {
		return c, nil
	}
	c := cs.add()
	c.own = true
	r = reader{ctx, r, nil} // reading holes does not look at ctx otherwise
	f, err := os.OpenFile(c.path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o444)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	// Holes take no disk space, but time: the sizes of all sparse members together must fit
	// the disk all the same.
	if size > math.MaxInt64-cs.holes {
		return nil, fmt.Errorf("the files have more bytes than can be counted: %w", errdefs.ErrInvalidArgument)
	}
	if err := cs.Budget.room(f, cs.holes+size); err != nil {
		return nil, err
	}
	// copySparse limits what is written, since a fragment of one byte takes a block.
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

// settle removes the contents that are not needed, except for those of raw layers, and
// counts the disk usage of the others that this build has made. It must be called when all
// layers are retained, since a later one may have the same blob.
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

// sparseBlock, in bytes, is the unit that copySparse leaves out: a block of most file
// systems.
const sparseBlock = 4 << 10

// copySparse copies size bytes of r to the empty file f. It leaves out blocks of zeros, so
// that holes stay holes, and writes no more than limit bytes.
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
					return written, fmt.Errorf("its sparse files take more than %d bytes of the disk; raise max_expansion in the snapshotter's configuration if this is intended: %w", limit, errdefs.ErrInvalidArgument)
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

// reader reads until ctx ends, and tells done, if it is not nil, of every n bytes.
type reader struct {
	ctx context.Context
	io.Reader
	done func(n int64)
}

func (r reader) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := r.Reader.Read(p)
	if r.done != nil {
		r.done(int64(n))
	}
	return n, err
}
