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
	// xattrPrefix begins the PAX records of extended attributes, and sparsePrefix those
	// that describe a sparse file (GNU tar, "Storing Sparse Files").
	xattrPrefix  = "SCHILY.xattr."
	sparsePrefix = "GNU.sparse."
	tarBlock     = 512
	// Types of members that archive/tar has no names for: GNU tar's label of a volume and
	// directory with the list of its files ("Basic Tar Format"), and the extended header of
	// Solaris.
	typeLabel   = 'V'
	typeDumpDir = 'D'
	typeSolaris = 'X'
)

// index adds the members of one archive to a plan.
type index struct {
	*plan
	archive *content
	layer   int
	// files are the regular files and symlinks of this archive, for its hard links.
	files map[string]*node
	// sparse makes a content of a member with holes.
	sparse func(r io.Reader, key memberKey, size int64) (*content, error)
}

// addArchive adds the members of the archive c to the plan. It reads the headers and seeks
// over the rest. It calls sparse for a sparse member.
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

// members adds all members, and checks that only zeros follow the last one. POSIX requires
// two blocks of zeros there (pax, "ustar Interchange Format"); GNU tar, bsdtar and
// archive/tar also accept one block, or the end of the file.
func (x *index) members(ctx context.Context, s *io.SectionReader) error {
	r := tar.NewReader(seeking{ctx, s})
	end := int64(0) // where the last member ends
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
		if err := x.count((at - end) / headerBytes); err != nil { // extended headers
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

// seeking fails when ctx ends. archive/tar seeks over what it skips, and reads the last
// byte to see that it exists.
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

// checkEnd checks that only zeros follow the last member, which ends at end: any number of
// them, since a tar is padded to records of any size (tar --blocking-factor).
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
			return fmt.Errorf("it ends after the extended header of a member: %w", io.ErrUnexpectedEOF)
		case n > 0 && !isZero(buf[:n]):
			return fmt.Errorf("garbage follows the end of the archive; pack it again without: %w", errdefs.ErrInvalidArgument)
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

// member adds one member, whose content begins at the offset at of s, and returns where it
// ends.
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
		// To GNU tar and bsdtar it is a directory, and to archive/tar if the header is of
		// the old format. If it has content, GNU tar and bsdtar read that as headers, and
		// archive/tar skips it.
		if h.Size > 0 || isSparse(h) {
			return 0, fmt.Errorf("its name ends in a slash, which makes it a directory, but it has %d bytes of content, which tools for tar read in different ways; pack the archive again: %w", h.Size, errdefs.ErrInvalidArgument)
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
		root.attrs, root.xattrs, root.implied = a, xattrs, false // the first member of tar -C DIR .
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
		// The target does not matter: nothing is opened through the symlink here, and the
		// container resolves it in its own root.
		if h.Linkname == "" || len(h.Linkname) > maxTarget {
			return 0, fmt.Errorf("a symlink must have a target of 1 to 4095 bytes, and this one has %d bytes: %w", len(h.Linkname), errdefs.ErrInvalidArgument)
		}
		// Cloned, as are attributes: the string is part of an extended header of up to 1
		// MiB, which would stay in memory.
		n.kind, n.target, n.xattrs = symlink, strings.Clone(h.Linkname), nil // symlinks cannot have user.* attributes
		x.files[name] = n
	case tar.TypeLink:
		if n, err = x.linked(h.Linkname); err != nil {
			return 0, err
		}
		x.relink(n, name, a, xattrs)
		x.files[name] = n
	case typeSolaris:
		return 0, fmt.Errorf("an extended header of Solaris (type 'X') is not supported; pack the archive in the pax format of POSIX (type 'x'): %w", errdefs.ErrInvalidArgument)
	default:
		return 0, fmt.Errorf("%s cannot be in a volume; pack the archive without it: %w", typeName(h.Typeflag), errdefs.ErrInvalidArgument)
	}
	return end, x.place(name, n)
}

// memberPath returns the path in the volume of a member's name or a hard link's target.
// Every tool for tar strips leading slashes (GNU tar, "Absolute File Names").
func memberPath(name string) (string, error) {
	return artifact.CleanPath(strings.TrimLeft(name, "/"))
}

// endOf returns where a member ends whose content begins at the offset at. The size of a
// sparse member does not tell.
func endOf(h *tar.Header, at int64) (end int64, err error) {
	switch {
	case isSparse(h):
		return 0, fmt.Errorf("%s cannot be sparse: %w", typeName(h.Typeflag), errdefs.ErrInvalidArgument)
	case at > math.MaxInt64-tarBlock-h.Size:
		return 0, fmt.Errorf("%d bytes of content: %w", h.Size, io.ErrUnexpectedEOF)
	}
	return roundUp(at + h.Size), nil
}

// checkGlobal refuses a global extended header, for all members after it, that would change
// the files. archive/tar ignores it and so does containerd, but a reader that does not
// would get other files. The one of git-archive has only a comment.
func checkGlobal(h *tar.Header) error {
	if h.PAXRecords == nil { // archive/tar has found malformed numbers
		return tar.ErrHeader
	}
	for key, value := range h.PAXRecords {
		switch {
		case value == "": // it leaves the headers' own values (pax)
		case slices.Contains([]string{"path", "linkpath", "size", "uid", "gid", "mtime"}, key),
			strings.HasPrefix(key, xattrPrefix), strings.HasPrefix(key, sparsePrefix):
			return fmt.Errorf("a global extended header that sets %.255q for all members after it is not supported; pack the archive without it: %w", key, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

// bytes returns where the content of a regular member is, and where the member ends.
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
		return extent{}, 0, fmt.Errorf("a sparse file in an unknown format; pack the archive without --sparse: %w", errdefs.ErrInvalidArgument)
	}
	// Only archive/tar knows where the holes are.
	c, err := x.sparse(r, memberKey{x.archive, at}, h.Size)
	if err != nil {
		return extent{}, 0, err
	}
	if c.end == 0 { // sparse has just read it
		if at, err = s.Seek(0, io.SeekCurrent); err != nil {
			return extent{}, 0, err
		}
		c.end = roundUp(at)
	}
	return extent{content: c, size: h.Size}, c.end, nil
}

// isSparse reports whether the member may have holes, so that its content is not what the
// archive has: by its type (old GNU format) or by records of its extended header (PAX
// formats 0.0, 0.1 and 1.0).
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

// isKnownSparse reports whether archive/tar knows the format of a sparse member. For an
// unknown format it would return what the archive has, perhaps the map of the holes.
func isKnownSparse(h *tar.Header) bool {
	major, minor := h.PAXRecords[sparsePrefix+"major"], h.PAXRecords[sparsePrefix+"minor"]
	switch {
	case h.Typeflag == tar.TypeGNUSparse:
		return true
	case major == "" && minor == "": // formats without numbers
		return h.PAXRecords[sparsePrefix+"map"] != ""
	default:
		return major == "0" && (minor == "0" || minor == "1") || major == "1" && minor == "0"
	}
}

func roundUp(n int64) int64 { return (n + tarBlock - 1) / tarBlock * tarBlock }

// linked returns the regular file or symlink that a hard link names, which must come before
// it in the same layer. The link has the target, owner, mode and time of that file.
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

// userXattrs returns the extended attributes user.*. The others are dropped: trusted and
// security attributes have a meaning to the node's kernel (overlayfs, file capabilities,
// SELinux), and system attributes hold IDs that no rule about owners has checked.
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
			return nil, fmt.Errorf("extended attribute %.255q of %d bytes exceeds the limits of Linux or EROFS: %w", attr, len(value), errdefs.ErrInvalidArgument)
		}
		if attrs == nil {
			attrs = map[string]string{}
		}
		attrs[strings.Clone(attr)] = strings.Clone(value)
	}
	return attrs, nil
}

// isRoot reports whether name, such as "./" or "/", is the root of the volume.
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
		return "a directory of an incremental archive"
	}
	return fmt.Sprintf("a member of type %q", flag)
}

// tarAttrs returns the attributes in the header h. Only directories keep setuid, setgid and
// sticky.
func tarAttrs(h *tar.Header) (attrs, error) {
	if h.Uid < 0 || h.Uid >= math.MaxUint32 || h.Gid < 0 || h.Gid >= math.MaxUint32 {
		return attrs{}, fmt.Errorf("owner %d:%d is not a valid user and group: %w", h.Uid, h.Gid, errdefs.ErrInvalidArgument)
	}
	mode := h.FileInfo().Mode()
	// Not mode.IsDir(), since the mode field of a file may claim that, too.
	if h.Typeflag == tar.TypeDir {
		mode &= fs.ModePerm | fs.ModeSetuid | fs.ModeSetgid | fs.ModeSticky
	} else {
		mode &= fs.ModePerm
	}
	return attrs{mode: mode, uid: uint32(h.Uid), gid: uint32(h.Gid), mtime: h.ModTime}, nil
}

// badStream turns an error of an archive's format or compression into
// errdefs.ErrInvalidArgument. An error of the node, such as a full disk or an unreadable
// blob, stays as it is.
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
