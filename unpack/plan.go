// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"fmt"
	"io/fs"
	"maps"
	"math"
	"path"
	"slices"
	"time"

	"github.com/containerd/errdefs"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
)

const (
	// maxEntries and maxNames, in bytes, bound the inodes, the memory and the
	// time that one artifact can claim: a kilobyte of gzip can hold a thousand
	// tar headers. A header that plans nothing counts as an entry, and so does every
	// entryBytes of a file, whose place in the image takes as much memory
	// (go-erofs, one chunk for 65,535 blocks). Targets of symlinks and extended
	// attributes count as names.
	maxEntries = 1 << 20
	maxNames   = 64 << 20
	entryBytes = 65535 * tarBlock
	// smallPlan is how many entries any number of plans may have at one time.
	smallPlan = 1 << 14
)

// kind is what an entry of the Tree is, as far as the rules of precedence care.
type kind uint8

const (
	directory kind = iota + 1
	regular
	symlink
)

// node is an entry of a Tree. The names of a hard link share one.
type node struct {
	kind  kind
	layer int // the last layer that said something about it; -1 for none
	attrs attrs
	// implied tells that no layer describes the directory.
	implied bool
	// xattrs are extended attributes of the user namespace.
	xattrs map[string]string
	target string // of a symlink
	bytes  extent // of a regular file
}

// attrs are what a layer says about an entry.
type attrs struct {
	mode     fs.FileMode // permission bits; of directories the special bits too
	uid, gid uint32
	mtime    time.Time
}

// extent is where the bytes of a regular file are.
type extent struct {
	content *content // nil if there are none
	size    int64
	// member tells that they begin at offset of an archive. Otherwise they are
	// all of the content.
	member bool
	offset int64
}

// plan is what a Tree is to show: every entry by its clean path, "." for the
// root. It is where the layers of an artifact meet, before anything of them
// becomes a file.
type plan struct {
	layers []artifact.Layer
	nodes  map[string]*node
	// raw are the raw layers by the paths of their files.
	raw map[string]artifact.Layer
	// entries and names count what the limits are for.
	entries int64
	names   int
	// grow, if it is not nil, is called once, before the plan is large.
	grow func() error
	// implied are the attributes of a directory that no layer describes.
	implied attrs
	// relinked are the files of which a hard link says other attributes, with its path.
	relinked map[*node]string
	// tooLarge is set if an image cannot show all of an archive.
	tooLarge bool
}

func newPlan(created time.Time, layers []artifact.Layer) *plan {
	p := &plan{layers: layers, raw: map[string]artifact.Layer{}, implied: attrs{mode: 0o755, mtime: created}, relinked: map[*node]string{}}
	p.nodes = map[string]*node{".": {kind: directory, layer: -1, attrs: p.implied, implied: true}}
	return p
}

// sorted is the names of all entries, a directory before what is in it.
func (p *plan) sorted() []string { return slices.Sorted(maps.Keys(p.nodes)) }

// mkdir plans the directory name and those above it, for layer. It refuses to
// go through anything that is not a directory: a symlink in a path of a
// hostile archive is how files end up elsewhere.
func (p *plan) mkdir(name string, layer int) (*node, error) {
	if n, ok := p.nodes[name]; ok {
		switch n.kind {
		case directory:
			return n, nil
		case symlink:
			return nil, fmt.Errorf("%q passes through a symlink of layer %d: %w", name, n.layer, errdefs.ErrInvalidArgument)
		default:
			return nil, fmt.Errorf("%q must be a directory but is a file of layer %d: %w", name, n.layer, errdefs.ErrInvalidArgument)
		}
	}
	if _, err := p.mkdir(path.Dir(name), layer); err != nil {
		return nil, err
	}
	n := &node{kind: directory, layer: layer, attrs: p.implied, implied: true}
	return n, p.add(name, n)
}

// place plans anything but a directory at name. A later layer wins over an
// earlier one, file over file.
func (p *plan) place(name string, n *node) error {
	old, ok := p.nodes[name]
	switch {
	case !ok:
		if _, err := p.mkdir(path.Dir(name), n.layer); err != nil {
			return err
		}
	case old.kind == directory && old.layer < 0:
		return fmt.Errorf("a file would replace the root of the volume: %w", errdefs.ErrInvalidArgument)
	case old.kind == directory:
		return fmt.Errorf("file %q is a directory for layer %d: %w", name, old.layer, errdefs.ErrInvalidArgument)
	}
	return p.add(name, n)
}

// placeRaw places the file of a raw layer. Another raw layer of the same path and other
// bytes is refused, as `oras pull` does: whoever packed them has lost one of the two.
func (p *plan) placeRaw(l artifact.Layer, n *node) error {
	other, ok := p.raw[l.File.Path]
	if ok && other.Descriptor.Digest != l.Descriptor.Digest {
		return fmt.Errorf("layer %d (%s, %s) has other bytes under the same path: pack each file under a path of its own: %w",
			other.Index, other.Descriptor.MediaType, other.Descriptor.Digest, errdefs.ErrInvalidArgument)
	}
	p.raw[l.File.Path] = l
	return p.place(l.File.Path, n)
}

// add adds an entry, or one in the place of another.
func (p *plan) add(name string, n *node) error {
	if n.attrs.uid == math.MaxUint32 || n.attrs.gid == math.MaxUint32 {
		return fmt.Errorf("%q: owner %d:%d is not a user: %w", name, n.attrs.uid, n.attrs.gid, errdefs.ErrInvalidArgument)
	}
	p.names += len(name) + len(n.target)
	if err := p.countXattrs(n.xattrs); err != nil {
		return err
	}
	if err := p.count(1 + n.bytes.size/entryBytes); err != nil {
		return err
	}
	p.nodes[name] = n
	return nil
}

func (p *plan) countXattrs(xattrs map[string]string) error {
	for attr, value := range xattrs {
		p.names += len(attr) + len(value)
	}
	return p.count(0)
}

// count counts entries.
func (p *plan) count(entries int64) error {
	p.entries += entries
	if p.entries > maxEntries || p.names > maxNames {
		return fmt.Errorf("more than %d files and directories (every %d MiB of a file counts as one), or %d MiB of names, targets of symlinks and extended attributes: %w",
			maxEntries, entryBytes>>20+1, maxNames>>20, errdefs.ErrInvalidArgument)
	}
	if grow := p.grow; grow != nil && p.entries > smallPlan {
		p.grow = nil
		return grow()
	}
	return nil
}

// wrap says of which layer the entry is that err is about.
func (p *plan) wrap(name string, err error) error {
	for _, l := range p.layers {
		if l.Index == p.nodes[name].layer {
			return l.Wrap(fmt.Errorf("%.255q: %w", name, err))
		}
	}
	return fmt.Errorf("%.255q: %w", name, err)
}

// contents is what the regular files of the plan need of data/: whole contents
// and archives.
func (p *plan) contents() (whole, archives map[*content]bool) {
	whole, archives = map[*content]bool{}, map[*content]bool{}
	for _, n := range p.nodes {
		switch c := n.bytes.content; {
		case c == nil:
		case n.bytes.member:
			archives[c] = true
		default:
			whole[c] = true
		}
	}
	return whole, archives
}
