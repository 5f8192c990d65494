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

// asOfAnImage checks that containerd would extract a layer of an image with the content
// of l to the files of the plan, ignoring times; for the root it changes the plan.
// Snapshots are named by contents alone, and an image whose layer has a snapshot already
// gets that one. Our own snapshots say that they are an artifact's; others cannot.
func (p *plan) asOfAnImage(ctx context.Context, l artifact.Layer, c *content, cs *contents) error {
	switch l.Format {
	case artifact.FormatEmpty: // it is no archive
		return nil
	case artifact.FormatRaw:
		return cs.checkNoArchive(ctx, l)
	default:
	}
	// The root is left alone (containerd, pkg/archive/tar.go, applyNaive).
	*p.nodes["."] = node{kind: directory, layer: -1, attrs: p.implied, implied: true}
	if c == nil { // no bytes, which are an empty archive to containerd, too
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

// checkNoArchive refuses a raw layer whose content an image can have as a layer. So
// has an archive, and for archive/tar also nothing and what begins with zeros.
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
	return fmt.Errorf("its file is an archive or empty, as the layer of an image can be; a snapshot of this snapshotter would be taken for that layer: %w", errdefs.ErrInvalidArgument)
}

// headers reads an archive, and of its members' contents next to nothing.
func headers(ctx context.Context, archive *os.File) (*tar.Reader, error) {
	fi, err := archive.Stat()
	if err != nil {
		return nil, err
	}
	return tar.NewReader(seeking{ctx, io.NewSectionReader(archive, 0, fi.Size())}), nil
}

// otherInAnImage names the first feature of h that containerd would extract in another
// way than the plan has it; "" if there is none.
func (p *plan) otherInAnImage(h *tar.Header) string {
	for part := range strings.SplitSeq(h.Name, "/") {
		if strings.HasPrefix(part, whiteoutPrefix) {
			return "a whiteout"
		}
	}
	for key := range h.PAXRecords {
		attr, ok := strings.CutPrefix(key, xattrPrefix)
		// Those of trusted are set by nobody.
		if ok && !strings.HasPrefix(attr, "user.") && !strings.HasPrefix(attr, "trusted.") {
			return fmt.Sprintf("the extended attribute %.255q", attr)
		}
	}
	switch {
	case h.Typeflag == tar.TypeDir && isRoot(h.Name):
		return ""
	case h.Typeflag == typeLabel, h.Typeflag == typeDumpDir:
		return "" // containerd does not unpack a layer with one (createTarFile)
	case h.Typeflag == tar.TypeReg && strings.HasSuffix(h.Name, "/"):
		return "a directory by its name that is a file by its type"
	}
	name, err := memberPath(h.Name)
	n := p.nodes[name]
	switch {
	case h.Typeflag == tar.TypeXGlobalHeader:
		// containerd makes way for it.
		if n != nil || strings.Contains(h.Name, "/") {
			return "a global header with the name of a file"
		}
		return ""
	case err != nil || n == nil: // refused before
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

// otherInAnImage is the same for the header of a directory. An archive may have several of
// one directory, and containerd adds the extended attributes of each to those there are.
func (n *node) otherInAnImage(h *tar.Header) string {
	xattrs, err := userXattrs(h)
	if err != nil { // refused before
		return err.Error()
	}
	for attr, value := range xattrs {
		if got, ok := n.xattrs[attr]; !ok || got != value {
			return fmt.Sprintf("the extended attribute %.255q, which is not in another header of it", attr)
		}
	}
	return ""
}

// relink notes the path of a hard link to n that has other attributes than n. containerd
// gives them to the file, and so to all names of it; a symlink has no mode and no extended
// attributes of users.
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

// checkLinks refuses a hard link that has attributes of its own, if its file is still
// there.
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

// otherwise is the error for a member with a feature that containerd would extract in
// another way.
func otherwise(member, what string) error {
	return fmt.Errorf("member %.255q: %s, which the layer of an image can have and an artifact's cannot; a snapshot of this snapshotter would be taken for that layer: %w", member, what, errdefs.ErrInvalidArgument)
}
