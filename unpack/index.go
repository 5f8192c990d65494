// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
)

const (
	// xattrPrefix is of the PAX records that hold extended attributes,
	// sparsePrefix of those that describe a sparse file (GNU tar, "Storing
	// Sparse Files").
	xattrPrefix  = "SCHILY.xattr."
	sparsePrefix = "GNU.sparse."
	tarBlock     = 512
	// The types of members that archive/tar has no names for: the label of a volume
	// and a directory with the names of what was in it, by GNU tar ("Basic Tar
	// Format"), and the extended header of Solaris.
	typeLabel   = 'V'
	typeDumpDir = 'D'
	typeSolaris = 'X'
	// headerBytes is how much of extended headers counts as an entry of the plan.
	headerBytes = 4096
	// maxTarget is the longest target of a symlink (PATH_MAX).
	maxTarget = 4095
	// maxXattrName and maxXattrValue are the kernel's XATTR_NAME_MAX and one
	// less than XATTR_SIZE_MAX, which is what the length field of an EROFS
	// attribute holds. maxXattrs is for all of an inode, whose own field counts
	// them in units of four bytes.
	maxXattrName  = 255
	maxXattrValue = 1<<16 - 1
	maxXattrs     = 4 * (1<<16 - 16)
	// maxXattrNames is XATTR_LIST_MAX.
	maxXattrNames = 1 << 16
)

// index is the indexing of one archive.
type index struct {
	*plan
	archive *content
	layer   int
	// files are the regular files and symlinks of this archive, for its hard links.
	files map[string]*node
	// sparse makes a content of its own from a member with holes.
	sparse func(r io.Reader, key memberKey, size int64) (*content, error)
}

// addArchive plans the members of the archive c. It reads headers and skips
// what is between them. sparse is called for a sparse member.
func (p *plan) addArchive(ctx context.Context, c *content, layer int, sparse func(io.Reader, memberKey, int64) (*content, error)) error {
	f, err := os.Open(c.path)
	if err != nil {
		return err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	p.tooLarge = p.tooLarge || fi.Size() >= maxDevice
	x := &index{plan: p, archive: c, layer: layer, files: map[string]*node{}, sparse: sparse}
	return badStream(x.members(ctx, io.NewSectionReader(f, 0, fi.Size())))
}

// members plans all members and checks that nothing but zeros is behind the last one.
// POSIX wants two blocks of them there (pax, "ustar Interchange Format"); GNU tar, bsdtar
// and archive/tar also take one for the end, and the end of the file.
func (x *index) members(ctx context.Context, s *io.SectionReader) error {
	r := tar.NewReader(seeking{ctx, s})
	end := int64(0) // of the last member
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return checkEnd(ctx, s, end)
		}
		if err != nil {
			return err
		}
		at, err := s.Seek(0, io.SeekCurrent)
		if err != nil {
			return err
		}
		before := x.entries
		if err := x.count((at - end) / headerBytes); err != nil { // of extended headers
			return err
		}
		if end, err = x.member(r, h, s, at); err == nil && x.entries == before {
			err = x.count(1)
		}
		if err != nil {
			return fmt.Errorf("member %.255q: %w", h.Name, err)
		}
	}
}

// seeking is a stream until ctx ends. archive/tar skips by seeking, and reads
// the last byte of what it skips to see that it is there.
type seeking struct {
	ctx context.Context
	*io.SectionReader
}

func (s seeking) Read(p []byte) (int, error) {
	if err := s.ctx.Err(); err != nil {
		return 0, err
	}
	return s.SectionReader.Read(p)
}

// checkEnd checks that there are only zeros behind the last member, which ends at end. There
// may be any number of them, since tars pad to a record of any size (tar
// --blocking-factor).
func checkEnd(ctx context.Context, s *io.SectionReader, end int64) error {
	if end > s.Size() { // GNU tar and bsdtar refuse this, too
		return fmt.Errorf("it ends within the padding of its last member: %w", io.ErrUnexpectedEOF)
	}
	rest := seeking{ctx, io.NewSectionReader(s, end, s.Size()-end)}
	buf := make([]byte, tarBlock)
	for {
		n, err := io.ReadFull(rest, buf)
		switch {
		case n > 0 && !isZero(buf[:n]) && len(buf) == tarBlock:
			return fmt.Errorf("it ends behind the extended header of a member: %w", io.ErrUnexpectedEOF)
		case n > 0 && !isZero(buf[:n]):
			return fmt.Errorf("there is garbage behind the end of the archive: pack it again without: %w", errdefs.ErrInvalidArgument)
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			return nil
		case err != nil:
			return err
		}
		if len(buf) == tarBlock {
			buf = make([]byte, chunk)
		}
	}
}

// member plans one member, whose content begins at the offset at of s, and
// returns where it ends.
func (x *index) member(r *tar.Reader, h *tar.Header, s *io.SectionReader, at int64) (end int64, err error) {
	end = roundUp(at)
	switch h.Typeflag {
	case tar.TypeXGlobalHeader:
		return end, checkGlobal(h)
	case typeLabel:
		return endOf(h, at)
	case typeDumpDir:
		if end, err = endOf(h, at); err != nil {
			return 0, err
		}
		h.Typeflag = tar.TypeDir
	case tar.TypeReg, tar.TypeCont, tar.TypeGNUSparse:
		if !strings.HasSuffix(h.Name, "/") {
			break
		}
		// GNU tar and bsdtar make a directory of it, and archive/tar does if the header
		// is of the old format. If it has content, GNU tar and bsdtar read that as
		// headers, and archive/tar skips it.
		if h.Size > 0 || isSparse(h) {
			return 0, fmt.Errorf("its name ends in a slash, which makes it a directory, but it has %d bytes of content, which tars read in different ways: pack the archive again: %w", h.Size, errdefs.ErrInvalidArgument)
		}
		h.Typeflag = tar.TypeDir
	}
	a, err := tarAttrs(h)
	if err != nil {
		return 0, err
	}
	xattrs, err := userXattrs(h)
	if err != nil {
		return 0, err
	}
	if h.Typeflag == tar.TypeDir && isRoot(h.Name) {
		root := x.nodes["."]
		root.attrs, root.xattrs, root.implied = a, xattrs, false // tar -C DIR . begins with it
		return end, x.countXattrs(xattrs)
	}
	name, err := memberPath(h.Name)
	if err != nil {
		return 0, err
	}
	n := &node{layer: x.layer, attrs: a, xattrs: xattrs}
	switch h.Typeflag {
	case tar.TypeDir:
		d, err := x.mkdir(name, x.layer)
		if err != nil {
			return 0, err
		}
		d.layer, d.attrs, d.xattrs, d.implied = x.layer, a, xattrs, false
		return end, x.countXattrs(xattrs)
	case tar.TypeReg, tar.TypeGNUSparse, tar.TypeCont:
		n.kind = regular
		if n.bytes, end, err = x.bytes(r, h, s, at); err != nil {
			return 0, err
		}
		x.files[name] = n
	case tar.TypeSymlink:
		// Where it points to does not matter here: nothing is ever opened
		// through it, and the container resolves it in its own root.
		if h.Linkname == "" || len(h.Linkname) > maxTarget {
			return 0, fmt.Errorf("a symlink with a target of %d bytes: %w", len(h.Linkname), errdefs.ErrInvalidArgument)
		}
		// Cloned, here and for attributes: what archive/tar returns is part of an
		// extended header of up to a MiB, which would stay in memory.
		n.kind, n.target, n.xattrs = symlink, strings.Clone(h.Linkname), nil // no symlink has any of user.*
		x.files[name] = n
	case tar.TypeLink:
		if n, err = x.linked(h.Linkname); err != nil {
			return 0, err
		}
		x.relink(n, name, a, xattrs)
		x.files[name] = n
	case typeSolaris:
		return 0, fmt.Errorf("an extended header of Solaris (type 'X') is not supported: pack the archive in the pax format of POSIX (type 'x'): %w", errdefs.ErrInvalidArgument)
	default:
		return 0, fmt.Errorf("%s is not a file that a volume may hold: %w", typeName(h.Typeflag), errdefs.ErrInvalidArgument)
	}
	return end, x.place(name, n)
}

// memberPath is the path in the volume of the member name, or of the target of a hard
// link. Every tar strips the slashes before it ("Absolute File Names" of GNU tar).
func memberPath(name string) (string, error) {
	return artifact.CleanPath(strings.TrimLeft(name, "/"))
}

// endOf is where a member ends whose content begins at the offset at. Of a sparse one
// the size does not say it.
func endOf(h *tar.Header, at int64) (end int64, err error) {
	switch {
	case isSparse(h):
		return 0, fmt.Errorf("%s cannot be sparse: %w", typeName(h.Typeflag), errdefs.ErrInvalidArgument)
	case at > math.MaxInt64-tarBlock-h.Size:
		return 0, fmt.Errorf("%d bytes of content: %w", h.Size, io.ErrUnexpectedEOF)
	}
	return roundUp(at + h.Size), nil
}

// checkGlobal refuses an extended header for all members behind it that says anything
// of what is shown. archive/tar does not apply it, and nor does containerd: a reader
// that did would see other files. That of git-archive has a comment alone.
func checkGlobal(h *tar.Header) error {
	if h.PAXRecords == nil { // so archive/tar says of numbers that are none
		return tar.ErrHeader
	}
	for key, value := range h.PAXRecords {
		switch {
		case value == "": // "the header's own"
		case slices.Contains([]string{"path", "linkpath", "size", "uid", "gid", "mtime"}, key),
			strings.HasPrefix(key, xattrPrefix), strings.HasPrefix(key, sparsePrefix):
			return fmt.Errorf("a global extended header that sets %.255q for all members behind it is not supported: pack the archive without one: %w", key, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

// bytes is where the content of a regular member is, and where it ends.
func (x *index) bytes(r *tar.Reader, h *tar.Header, s *io.SectionReader, at int64) (extent, int64, error) {
	if !isSparse(h) {
		e := extent{content: x.archive, size: h.Size, member: true, offset: at}
		if h.Size == 0 {
			e = extent{}
		}
		x.tooLarge = x.tooLarge || e.tooLarge()
		end, err := endOf(h, at)
		return e, end, err
	}
	if !isKnownSparse(h) {
		return extent{}, 0, fmt.Errorf("a sparse file in a format that is not known: pack the archive without --sparse: %w", errdefs.ErrInvalidArgument)
	}
	// Only archive/tar knows where its holes are.
	c, err := x.sparse(r, memberKey{x.archive, at}, h.Size)
	if err != nil {
		return extent{}, 0, err
	}
	if c.end == 0 { // it has just been read
		if at, err = s.Seek(0, io.SeekCurrent); err != nil {
			return extent{}, 0, err
		}
		c.end = roundUp(at)
	}
	return extent{content: c, size: h.Size}, c.end, nil
}

// isSparse reports whether the member may have holes, and so a content that is
// not what stands in the archive: by its type (old GNU format) or by records of
// its extended header (PAX formats 0.0, 0.1 and 1.0).
func isSparse(h *tar.Header) bool {
	if h.Typeflag == tar.TypeGNUSparse {
		return true
	}
	for key := range h.PAXRecords {
		if strings.HasPrefix(key, sparsePrefix) {
			return true
		}
	}
	return false
}

// isKnownSparse reports whether archive/tar knows the format of a sparse member. Of
// one that it does not know it returns as content what stands in the archive, a map
// of the holes perhaps.
func isKnownSparse(h *tar.Header) bool {
	major, minor := h.PAXRecords[sparsePrefix+"major"], h.PAXRecords[sparsePrefix+"minor"]
	switch {
	case h.Typeflag == tar.TypeGNUSparse:
		return true
	case major == "" && minor == "": // before formats had numbers
		return h.PAXRecords[sparsePrefix+"map"] != ""
	default:
		return major == "0" && (minor == "0" || minor == "1") || major == "1" && minor == "0"
	}
}

func roundUp(n int64) int64 { return (n + tarBlock - 1) / tarBlock * tarBlock }

// linked is the regular file or symlink that a hard link is another name of: one that
// came before it in the same layer. Target, owner, mode and time are that file's.
func (x *index) linked(linkname string) (*node, error) {
	target, err := memberPath(linkname)
	if err != nil {
		return nil, fmt.Errorf("hard link to %.255q: %w", linkname, err)
	}
	n, ok := x.files[target]
	if !ok {
		return nil, fmt.Errorf("hard link to %.255q, which is neither a regular file nor a symlink before it in the same layer: %w", linkname, errdefs.ErrInvalidArgument)
	}
	return n, nil
}

// userXattrs are the extended attributes of the user namespace. The others are
// dropped: trusted and security attributes mean something to the node's kernel
// (overlayfs, file capabilities, SELinux), and the system ones hold IDs that
// no owner rule has seen.
func userXattrs(h *tar.Header) (map[string]string, error) {
	var attrs map[string]string
	total, names := 0, 0
	for key, value := range h.PAXRecords {
		attr, ok := strings.CutPrefix(key, xattrPrefix)
		if !ok || !strings.HasPrefix(attr, "user.") {
			continue
		}
		total += len(attr) + len(value)
		names += len(attr) + 1
		if attr == "user." || len(attr) > maxXattrName || len(value) > maxXattrValue || total+8*len(attrs) > maxXattrs || names > maxXattrNames {
			return nil, fmt.Errorf("extended attribute %.255q of %d bytes does not fit: %w", attr, len(value), errdefs.ErrInvalidArgument)
		}
		if attrs == nil {
			attrs = map[string]string{}
		}
		attrs[strings.Clone(attr)] = strings.Clone(value)
	}
	return attrs, nil
}

// isRoot reports whether name, such as "./" or "/", is that of the volume itself.
func isRoot(name string) bool {
	for part := range strings.SplitSeq(name, "/") {
		if part != "." && part != "" {
			return false
		}
	}
	return true
}

func typeName(flag byte) string {
	switch flag {
	case tar.TypeChar:
		return "a character device"
	case tar.TypeBlock:
		return "a block device"
	case tar.TypeFifo:
		return "a FIFO"
	case typeLabel:
		return "the label of a volume"
	case typeDumpDir:
		return "a listed directory"
	}
	return fmt.Sprintf("a member of type %q", flag)
}

// tarAttrs are the attributes in the header h. Setuid, setgid and sticky bits
// are kept on directories alone.
func tarAttrs(h *tar.Header) (attrs, error) {
	if h.Uid < 0 || h.Uid >= math.MaxUint32 || h.Gid < 0 || h.Gid >= math.MaxUint32 {
		return attrs{}, fmt.Errorf("owner %d:%d is not a user: %w", h.Uid, h.Gid, errdefs.ErrInvalidArgument)
	}
	mode := h.FileInfo().Mode()
	// Not mode.IsDir(): the mode field of a file's header may say so, too.
	if h.Typeflag == tar.TypeDir {
		mode &= fs.ModePerm | fs.ModeSetuid | fs.ModeSetgid | fs.ModeSticky
	} else {
		mode &= fs.ModePerm
	}
	return attrs{mode: mode, uid: uint32(h.Uid), gid: uint32(h.Gid), mtime: h.ModTime}, nil
}

// badStream names an error of the archive's format or compression for what it
// is. An error of the node's (a full disk, an unreadable blob) stays one.
func badStream(err error) error {
	var path *fs.PathError
	var link *os.LinkError
	switch {
	case err == nil, errors.As(err, &path), errors.As(err, &link), errors.Is(err, context.Canceled),
		errors.Is(err, context.DeadlineExceeded), errors.Is(err, unix.ENOSPC),
		errdefs.IsInvalidArgument(err), errdefs.IsNotImplemented(err), errdefs.IsResourceExhausted(err):
		return err
	case errors.Is(err, io.ErrUnexpectedEOF):
		return fmt.Errorf("the archive is truncated: %v: %w", err, errdefs.ErrInvalidArgument)
	}
	return fmt.Errorf("the archive cannot be read: %v: %w", err, errdefs.ErrInvalidArgument)
}
