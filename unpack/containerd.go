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
	"os"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
)

// whiteoutPrefix begins the names by which a layer of an image deletes files (OCI
// image-spec, layer.md).
const whiteoutPrefix = ".wh."

// asOfAnImage checks that containerd would extract a layer of an image with the content of
// l to the files of the plan, ignoring times; it changes the plan for the root, which
// containerd leaves alone. Snapshots are named by contents alone, and an image that has a
// layer with the same content gets the same snapshot. Our own snapshots are labelled as an
// artifact's; those of other snapshotters cannot be.
func (p *plan) asOfAnImage(ctx context.Context, l artifact.Layer, c *content, cs *contents) error {
	switch l.Format {
	case artifact.FormatEmpty: // not an archive
		return nil
	case artifact.FormatRaw:
		return cs.checkNoArchive(ctx, l)
	default:
	}
	// containerd does not change the root (pkg/archive/tar.go, applyNaive).
	*p.nodes["."] = node{kind: directory, layer: -1, attrs: p.implied, implied: true}
	if c == nil { // no bytes, which are an empty archive for containerd, too
		return nil
	}
	f, err := os.Open(c.path)
	if err != nil {
		return err
	}
	defer f.Close()
	r, err := headers(ctx, f)
	if err != nil {
		return err
	}
	for {
		h, err := r.Next()
		switch {
		case errors.Is(err, io.EOF):
			return p.checkLinks()
		case err != nil:
			return badStream(err)
		}
		if what := p.otherInAnImage(h); what != "" {
			return otherwise(h.Name, what)
		}
	}
}

// checkNoArchive refuses a raw layer whose content can be a layer of an image: an archive
// and, as archive/tar reads it, an empty file and one that begins with zeros.
func (cs *contents) checkNoArchive(ctx context.Context, l artifact.Layer) error {
	if l.Descriptor.Size > 0 {
		f, err := cs.open(ctx, l.Descriptor)
		if err != nil {
			return err
		}
		defer f.Close()
		r, err := headers(ctx, f)
		if err != nil {
			return err
		}
		_, err = r.Next()
		var unreadable *fs.PathError
		switch {
		case err == nil, errors.Is(err, io.EOF):
		case errors.As(err, &unreadable):
			return err
		default:
			return ctx.Err()
		}
	}
	return fmt.Errorf("its file is an archive or empty, as a layer of an image may be, and this snapshotter's snapshot would be used for that layer, too; use the snapshotter of the artifact-snapshotter: %w", errdefs.ErrInvalidArgument)
}

// headers returns a reader of an archive that seeks over the contents of members.
func headers(ctx context.Context, archive *os.File) (*tar.Reader, error) {
	fi, err := archive.Stat()
	if err != nil {
		return nil, err
	}
	return tar.NewReader(seeking{ctx, io.NewSectionReader(archive, 0, fi.Size())}), nil
}

// otherInAnImage names the first feature of h that containerd would extract differently, ""
// if there is none.
func (p *plan) otherInAnImage(h *tar.Header) string {
	for part := range strings.SplitSeq(h.Name, "/") {
		if strings.HasPrefix(part, whiteoutPrefix) {
			return "a whiteout"
		}
	}
	for key := range h.PAXRecords {
		attr, ok := strings.CutPrefix(key, xattrPrefix)
		// Neither containerd nor we set trusted attributes.
		if ok && !strings.HasPrefix(attr, "user.") && !strings.HasPrefix(attr, "trusted.") {
			return fmt.Sprintf("the extended attribute %.255q", attr)
		}
	}
	switch {
	case h.Typeflag == tar.TypeDir && isRoot(h.Name):
		return ""
	case h.Typeflag == typeLabel, h.Typeflag == typeDumpDir:
		return "" // containerd refuses a layer with one (createTarFile)
	case h.Typeflag == tar.TypeReg && strings.HasSuffix(h.Name, "/"):
		return "a directory by its name that is a file by its type"
	}
	name, err := memberPath(h.Name)
	n := p.nodes[name]
	switch {
	case h.Typeflag == tar.TypeXGlobalHeader:
		// containerd removes a file of that name, and creates the directories above it.
		if n != nil || strings.Contains(h.Name, "/") {
			return "a global header with the name of a file"
		}
		return ""
	case err != nil || n == nil: // the plan has refused it already
		return "a name of no file"
	case h.Typeflag == tar.TypeSymlink:
		return ""
	case h.Typeflag != tar.TypeDir && h.FileInfo().Mode()&(fs.ModeSetuid|fs.ModeSetgid|fs.ModeSticky) != 0:
		return "a setuid, setgid or sticky bit"
	case h.Typeflag == tar.TypeDir:
		return n.otherInAnImage(h)
	}
	return ""
}

// otherInAnImage is the same for the header of a directory. An archive may have several
// headers for one directory, and containerd adds the extended attributes of each to those
// of the ones before.
func (n *node) otherInAnImage(h *tar.Header) string {
	xattrs, err := userXattrs(h)
	if err != nil { // the plan has refused it already
		return err.Error()
	}
	for attr, value := range xattrs {
		if got, ok := n.xattrs[attr]; !ok || got != value {
			return fmt.Sprintf("the extended attribute %.255q, which is not in another header of it", attr)
		}
	}
	return ""
}

// relink records the path of a hard link to n whose header has other attributes than n.
// containerd gives them to the file, and so to all its names. A symlink has neither a mode
// nor user.* attributes.
func (p *plan) relink(n *node, name string, a attrs, xattrs map[string]string) {
	other := a.uid != n.attrs.uid || a.gid != n.attrs.gid
	if n.kind != symlink {
		other = other || a.mode != n.attrs.mode
		for attr, value := range xattrs {
			got, ok := n.xattrs[attr]
			other = other || !ok || got != value
		}
	}
	if other {
		p.relinked[n] = name
	}
}

// checkLinks refuses a hard link with attributes of its own, if its file is in the plan.
func (p *plan) checkLinks() error {
	if len(p.relinked) == 0 {
		return nil
	}
	for _, name := range p.sorted() {
		if link, ok := p.relinked[p.nodes[name]]; ok {
			return otherwise(link, "a hard link with a mode, owner or extended attribute of its own")
		}
	}
	return nil
}

// otherwise returns the error for a member with a feature that containerd would extract
// differently.
func otherwise(member, what string) error {
	return fmt.Errorf("member %.255q: %s, which containerd would extract differently from an image's layer with the same content, for which this snapshotter's snapshot would be used, too; use the snapshotter of the artifact-snapshotter: %w", member, what, errdefs.ErrInvalidArgument)
}
