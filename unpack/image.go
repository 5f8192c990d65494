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

// buildImage writes the metadata of the plan as an EROFS image, and returns the
// extra devices that the bytes of its files are in, in order.
//
// A member of an archive is where it is in the archive, which is one device. A
// file whose bytes are all of a content carries the attributes by which overlayfs
// finds them; its own bytes are on a device that has none, so that whoever reads
// it without the overlay gets an error and no wrong bytes.
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
	// Time 0, so that nothing in the image depends on when it was made.
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

// maxDevice is what the size of a device of an image with blocks of tarBlock must be below:
// EROFS counts them in 32 bits.
const maxDevice = tarBlock << 32

// tooLarge reports whether an image cannot show the member e of an archive. go-erofs maps
// it by a chunk of the least power of two that holds it, and no less than 4 KiB. Linux 7.3
// computes the number of the block behind that in 32 bits: if it is larger, every read of
// the member fails with EIO (erofs_map_chunks in fs/erofs/data.c).
func (e extent) tooLarge() bool {
	return e.size > maxDevice || e.offset+1<<bits.Len64(uint64(max(e.size, 4096)-1)) >= maxDevice
}

// pad extends f to whole pages by a hole. Linux 7.3 reads no metadata from the last page
// of a file that ends within it: the mount of a shorter image fails ("cannot read erofs
// superblock"), and so do reads of files whose extents a longer one has there, with EIO.
// EROFS does not look at what is added: the superblock says how many blocks there are.
func pad(f *os.File) error {
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	page := int64(os.Getpagesize())
	return f.Truncate((fi.Size() + page - 1) / page * page)
}

// image is a plan as go-erofs reads it.
type image struct {
	plan    *plan
	shift   shift
	block   int               // size
	subdirs map[string]uint32 // how many directories are in one
}

func (i *image) part() *imagePart {
	return &imagePart{image: i, dirs: map[string][]fs.DirEntry{".": nil}}
}

// imagePart is some entries of an image and the directories above them.
type imagePart struct {
	*image
	dirs map[string][]fs.DirEntry
}

var (
	_ fs.ReadDirFS  = &imagePart{}
	_ fs.ReadLinkFS = &imagePart{}
	_ fs.StatFS     = &imagePart{}
)

// add adds the entry name of the plan.
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

// Open implements fs.FS. Nothing is read: the image is of metadata.
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

// imageDevice is an imagePart whose files have their bytes on a device.
type imageDevice struct {
	*imagePart
	blocks uint64
}

// BlockSize is that of the image and of the device.
func (d imageDevice) BlockSize() uint32 { return uint32(d.block) }

// DeviceBlocks is the size of the device.
func (d imageDevice) DeviceBlocks() uint64 { return d.blocks }

// imageEntry is a node as a directory entry and as a file's information.
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
		return e.attrs.mode.Perm() // whatever the layer says
	}
}

// Sys implements fs.FileInfo: what else go-erofs puts into an inode.
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

// DataRange says where the bytes are on the device, for go-erofs.
func (e imageEntry) DataRange() []erofs.DataRange {
	if e.bytes.size == 0 {
		return nil
	}
	return []erofs.DataRange{{Offset: e.bytes.offset, Size: e.bytes.size}}
}

// aligned adds an attribute of no meaning if those there are would not end at a
// multiple of eight bytes. What follows them, the list of a file's extents, must
// begin at one (fs/erofs/data.c, erofs_map_blocks), and go-erofs 0.3.1 leaves no
// gap for that. Only root sees attributes that are trusted.
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
