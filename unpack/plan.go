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

// kind is the kind of an entry, as far as the rules of precedence distinguish it.
type kind uint8

const (
	directory kind = iota + 1
	regular
	symlink
)

// node is an entry of a tree. All names of a hard link share one node.
type node struct {
	kind  kind
	layer int // the last layer that describes it; -1 if none does
	attrs attrs
	// implied says that no layer describes the directory.
	implied bool
	// xattrs are the extended attributes user.*.
	xattrs map[string]string
	target string // of a symlink
	bytes  extent // of a regular file
}

// attrs are the attributes of an entry that a layer sets.
type attrs struct {
	mode     fs.FileMode // permissions; of directories also setuid, setgid and sticky
	uid, gid uint32
	mtime    time.Time
}

// extent is where the bytes of a regular file are.
type extent struct {
	content *content // nil if the file is empty
	size    int64
	// member says that they are the part of an archive that begins at offset. Otherwise
	// they are all of the content.
	member bool
	offset int64
}

// plan has every entry that a tree will have, by its clean path, with "." for the root. The
// layers of an artifact are merged here, before anything becomes a file.
type plan struct {
	layers []artifact.Layer
	nodes  map[string]*node
	// raw are the raw layers by the path of the file.
	raw map[string]artifact.Layer
	// entries and names are compared with maxEntries and maxNames.
	entries int64
	names   int
	// grow, if it is not nil, is called once, before the plan becomes large.
	grow func() error
	// implied are the attributes of directories that no layer describes.
	implied attrs
	// relinked has the files for which a hard link states other attributes, with the link's
	// path; see relink.
	relinked map[*node]string
	// tooLarge says that an EROFS image cannot refer to all of an archive.
	tooLarge bool
}

func newPlan(created time.Time, layers []artifact.Layer) *plan {
	p := &plan{layers: layers, raw: map[string]artifact.Layer{}, implied: attrs{mode: 0o755, mtime: created}, relinked: map[*node]string{}}
	p.nodes = map[string]*node{".": {kind: directory, layer: -1, attrs: p.implied, implied: true}}
	return p
}

// sorted returns the names of all entries, directories before what they contain.
func (p *plan) sorted() []string { return slices.Sorted(maps.Keys(p.nodes)) }

// mkdir adds the directory name, and those above it, for layer. It refuses a path through
// anything that is not a directory: a symlink in the path of a hostile archive would put
// files elsewhere.
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

// place adds an entry that is not a directory. A file of a later layer replaces the file of
// an earlier one.
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
		return fmt.Errorf("file %q is a directory of layer %d: %w", name, old.layer, errdefs.ErrInvalidArgument)
	}
	return p.add(name, n)
}

// placeRaw adds the file of a raw layer.
func (p *plan) placeRaw(l artifact.Layer, n *node) error {
	if err := p.claimRaw(l); err != nil {
		return err
	}
	return p.place(l.File.Path, n)
}

// claimRaw refuses two raw layers with the same path and different bytes, as `oras pull` does:
// the packer has lost one of the two files.
func (p *plan) claimRaw(l artifact.Layer) error {
	other, ok := p.raw[l.File.Path]
	if ok && other.Descriptor.Digest != l.Descriptor.Digest {
		return fmt.Errorf("layer %d (%s, %s) has the same path and other bytes; pack each file under its own path: %w",
			other.Index, other.Descriptor.MediaType, other.Descriptor.Digest, errdefs.ErrInvalidArgument)
	}
	p.raw[l.File.Path] = l
	return nil
}

// add adds or replaces an entry.
func (p *plan) add(name string, n *node) error {
	if n.attrs.uid == math.MaxUint32 || n.attrs.gid == math.MaxUint32 {
		return fmt.Errorf("%q: owner %d:%d is not a valid user and group: %w", name, n.attrs.uid, n.attrs.gid, errdefs.ErrInvalidArgument)
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

// count counts entries, and checks the limits of entries and names.
func (p *plan) count(entries int64) error {
	p.entries += entries
	if p.entries > maxEntries || p.names > maxNames {
		return fmt.Errorf("the artifact has more than %d files and directories (every %d MiB of a file counts as one), or more than %d MiB of names, symlink targets and extended attributes: %w",
			maxEntries, entryBytes>>20+1, maxNames>>20, errdefs.ErrInvalidArgument)
	}
	if grow := p.grow; grow != nil && p.entries > smallPlan {
		p.grow = nil
		return grow()
	}
	return nil
}

// wrap adds to err the name of an entry and the layer that describes it.
func (p *plan) wrap(name string, err error) error {
	for _, l := range p.layers {
		if l.Index == p.nodes[name].layer {
			return l.Wrap(fmt.Errorf("%.255q: %w", name, err))
		}
	}
	return fmt.Errorf("%.255q: %w", name, err)
}

// contents returns what the regular files of the plan need of data/: whole contents and
// archives.
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
