// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"errors"
	"io/fs"
	"maps"
	"math/bits"
	"os"
	"path"
	"strings"
	"time"

	"github.com/erofs/go-erofs"
	"golang.org/x/sys/unix"
)

// buildImage writes the metadata of the plan as an EROFS image, and returns, in the image's
// order, the extra devices that have the bytes of its files.
//
// An archive is one device, and a member is a part of it. A file whose bytes are all of a
// content has the attributes by which overlayfs finds them; in the image its bytes are on
// the device nowhere, which is empty, so that reading the file without the overlay is an
// error instead of wrong bytes.
func buildImage(file string, p *plan, s shift, nowhere *content) (devices []*content, err error) {
	f, err := os.OpenFile(file, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	i := &image{plan: p, shift: s, block: 4096, subdirs: map[string]uint32{}}
	if _, archives := p.contents(); len(archives) > 0 {
		i.block = tarBlock
	}
	// Time 0, so that the image does not depend on when it is built.
	w := erofs.Create(f, erofs.WithBlockSize(i.block), erofs.WithBuildTime(0, 0))
	metadata := i.part()
	sources := map[*content]*imagePart{}
	for _, name := range p.sorted() {
		n := p.nodes[name]
		if n.kind == directory && name != "." {
			i.subdirs[path.Dir(name)]++
		}
		c := n.bytes.content
		if n.kind != regular || c == nil {
			metadata.add(name)
			continue
		}
		if !n.bytes.member {
			c = nowhere
		}
		if sources[c] == nil {
			sources[c] = i.part()
			devices = append(devices, c)
		}
		sources[c].add(name)
	}
	for _, c := range devices {
		fi, err := os.Stat(c.path)
		if err != nil {
			return nil, err
		}
		device := imageDevice{sources[c], uint64(fi.Size()) / uint64(i.block)}
		if err := w.CopyFrom(device, erofs.MetadataOnly()); err != nil {
			return nil, err
		}
	}
	if err := w.CopyFrom(metadata); err != nil {
		return nil, err
	}
	return devices, errors.Join(w.Close(), pad(f))
}

// tooLarge reports whether an EROFS image cannot refer to the member e of an archive.
// go-erofs maps it by a chunk of the least power of two that holds it, and at least 4 KiB.
// Linux 7.3 computes the number of the block after the chunk in 32 bits: if it does not
// fit, every read of the member fails with EIO (erofs_map_chunks in fs/erofs/data.c).
func (e extent) tooLarge() bool {
	return e.size > maxDevice || e.offset+1<<bits.Len64(uint64(max(e.size, 4096)-1)) >= maxDevice
}

// pad extends f to whole pages with a hole. Linux 7.3 reads no metadata from the last page
// of a file that ends within the page: the mount of a shorter image fails ("cannot read
// erofs superblock"), and in a longer one reads of files whose extents are there fail with
// EIO. EROFS ignores the padding, since the superblock says how many blocks there are.
func pad(f *os.File) error {
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	page := int64(os.Getpagesize())
	return f.Truncate((fi.Size() + page - 1) / page * page)
}

// image presents a plan to go-erofs.
type image struct {
	plan    *plan
	shift   shift
	block   int               // its size in bytes
	subdirs map[string]uint32 // the number of directories in each directory
}

func (i *image) part() *imagePart {
	return &imagePart{image: i, dirs: map[string][]fs.DirEntry{".": nil}}
}

// imagePart is some entries of an image, with the directories above them.
type imagePart struct {
	*image
	dirs map[string][]fs.DirEntry
}

var (
	_ fs.ReadDirFS  = &imagePart{}
	_ fs.ReadLinkFS = &imagePart{}
	_ fs.StatFS     = &imagePart{}
)

// add adds the entry name of the plan, and the directories above it.
func (i *imagePart) add(name string) {
	if _, ok := i.dirs[name]; ok {
		return
	}
	dir := path.Dir(name)
	i.add(dir)
	if i.plan.nodes[name].kind == directory {
		i.dirs[name] = nil
	}
	i.dirs[dir] = append(i.dirs[dir], imageEntry{i.image, name, i.plan.nodes[name]})
}

// Open implements fs.FS. It is not called, since the image has metadata only.
func (i *imagePart) Open(name string) (fs.File, error) {
	return nil, &fs.PathError{Op: "open", Path: name, Err: unix.ENOTSUP}
}

// ReadDir implements fs.ReadDirFS.
func (i *imagePart) ReadDir(name string) ([]fs.DirEntry, error) { return i.dirs[name], nil }

// Stat implements fs.StatFS.
func (i *imagePart) Stat(name string) (fs.FileInfo, error) { return i.Lstat(name) }

// Lstat implements fs.ReadLinkFS.
func (i *imagePart) Lstat(name string) (fs.FileInfo, error) {
	n, ok := i.plan.nodes[name]
	if !ok {
		return nil, &fs.PathError{Op: "stat", Path: name, Err: fs.ErrNotExist}
	}
	return imageEntry{i.image, name, n}, nil
}

// ReadLink implements fs.ReadLinkFS.
func (i *imagePart) ReadLink(name string) (string, error) {
	return i.plan.nodes[name].target, nil
}

// imageDevice is an imagePart whose files have their bytes on one device.
type imageDevice struct {
	*imagePart
	blocks uint64
}

// BlockSize returns the block size of image and device.
func (d imageDevice) BlockSize() uint32 { return uint32(d.block) }

// DeviceBlocks returns the size of the device in blocks.
func (d imageDevice) DeviceBlocks() uint64 { return d.blocks }

// imageEntry is a node as fs.DirEntry and fs.FileInfo.
type imageEntry struct {
	of   *image
	path string
	*node
}

var (
	_ fs.DirEntry = imageEntry{}
	_ fs.FileInfo = imageEntry{}
)

// Name implements fs.DirEntry and fs.FileInfo.
func (e imageEntry) Name() string { return path.Base(e.path) }

// IsDir implements fs.DirEntry and fs.FileInfo.
func (e imageEntry) IsDir() bool { return e.kind == directory }

// Type implements fs.DirEntry.
func (e imageEntry) Type() fs.FileMode { return e.Mode().Type() }

// Info implements fs.DirEntry.
func (e imageEntry) Info() (fs.FileInfo, error) { return e, nil }

// Size implements fs.FileInfo.
func (e imageEntry) Size() int64 { return e.bytes.size }

// ModTime implements fs.FileInfo.
func (e imageEntry) ModTime() time.Time { return e.attrs.mtime }

// Mode implements fs.FileInfo.
func (e imageEntry) Mode() fs.FileMode {
	switch e.kind {
	case directory:
		return fs.ModeDir | e.attrs.mode
	case symlink:
		return fs.ModeSymlink | 0o777
	default:
		return e.attrs.mode.Perm() // even if the layer says setuid
	}
}

// Sys implements fs.FileInfo: it returns what else go-erofs stores in an inode.
func (e imageEntry) Sys() any {
	uid, gid := e.of.shift.owner(e.attrs.uid, e.attrs.gid)
	st := &erofs.Stat{
		UID: uid, GID: gid, Nlink: 1,
		Mtime: uint64(e.attrs.mtime.Unix()), MtimeNs: uint32(e.attrs.mtime.Nanosecond()),
		Xattrs: e.xattrs,
	}
	switch {
	case e.kind == directory:
		st.Nlink = int(2 + e.of.subdirs[e.path])
	case e.bytes.content != nil && !e.bytes.member:
		st.Xattrs = metacopy(e.bytes.content.name)
		maps.Copy(st.Xattrs, e.xattrs)
	}
	if e.bytes.size > 0 {
		st.Xattrs = aligned(st.Xattrs)
	}
	return st
}

// DataRange tells go-erofs where the bytes are on the device.
func (e imageEntry) DataRange() []erofs.DataRange {
	if e.bytes.size == 0 {
		return nil
	}
	return []erofs.DataRange{{Offset: e.bytes.offset, Size: e.bytes.size}}
}

// aligned adds a meaningless attribute if the end of xattrs would not be a multiple of
// eight bytes, where the list of the file's extents must begin (fs/erofs/data.c,
// erofs_map_blocks); go-erofs 0.3.1 leaves no gap. Only root sees trusted attributes.
func aligned(xattrs map[string]string) map[string]string {
	if len(xattrs) == 0 {
		return xattrs
	}
	size := 12 // struct erofs_xattr_ibody_header
	for name, value := range xattrs {
		_, suffix, _ := strings.Cut(name, ".")
		size += (4 + len(suffix) + len(value) + 3) / 4 * 4 // struct erofs_xattr_entry
	}
	if size%8 == 0 {
		return xattrs
	}
	padded := maps.Clone(xattrs)
	padded["trusted.artifact"] = "" // twelve bytes
	return padded
}
