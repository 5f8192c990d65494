// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"
	"testing"
)

// The files of a volume are compared with what archive/tar reads in an archive, from its
// begin to its end.

// sequential returns what the archives have, later ones over earlier ones, with implied
// directories as in a plan. For an archive that Build refuses, the result may be anything
// or an error.
func sequential(archives ...io.Reader) (listed, error) {
	implied := shown{Kind: "directory", Mode: 0o755}
	implied.At(created)
	l := listed{".": implied}
	for _, a := range archives {
		r := tar.NewReader(struct{ io.Reader }{a}) // it cannot seek
		files := map[string]shown{}
		for {
			h, err := r.Next()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				return nil, err
			}
			if h.Typeflag == tar.TypeXGlobalHeader {
				continue
			}
			if h.Typeflag == typeLabel {
				continue
			}
			name := cleaned(h.Name)
			e, err := member(r, h, files)
			if err != nil {
				return nil, fmt.Errorf("%q: %w", h.Name, err)
			}
			for dir := path.Dir(name); l[dir].Kind == ""; dir = path.Dir(dir) {
				l[dir] = implied
			}
			if l[name].Kind != "" && name != "." && (l[name].Kind == "directory") != (e.Kind == "directory") {
				return nil, fmt.Errorf("%q is a %s over a %s", name, e.Kind, l[name].Kind)
			}
			l[name] = e
			delete(files, name)
			if e.Kind != "directory" {
				files[name] = e
			}
		}
	}
	return l, nil
}

// cleaned returns the path of a name in the volume.
func cleaned(name string) string { return path.Clean(strings.TrimLeft(name, "/")) }

// member returns the member at which r is. files are the ones before it.
func member(r *tar.Reader, h *tar.Header, files map[string]shown) (shown, error) {
	e := shown{Mode: uint32(h.Mode) & 0o777, UID: uint32(h.Uid), GID: uint32(h.Gid)}
	e.At(h.ModTime)
	xattrs := map[string]string{}
	for key, value := range h.PAXRecords {
		if attr, ok := strings.CutPrefix(key, "SCHILY.xattr."); ok && strings.HasPrefix(attr, "user.") {
			xattrs[attr] = value
		}
	}
	e.Xattrs = fmt.Sprint(xattrs)
	switch h.Typeflag {
	case tar.TypeReg, tar.TypeCont, typeDumpDir:
		if strings.HasSuffix(h.Name, "/") || h.Typeflag == typeDumpDir {
			h.Typeflag = tar.TypeDir
		}
	}
	switch h.Typeflag {
	case tar.TypeDir:
		e.Kind, e.Mode = "directory", uint32(h.Mode)&0o7777
	case tar.TypeSymlink:
		e.Kind, e.Mode, e.Target, e.Xattrs = "symlink", 0o777, h.Linkname, fmt.Sprint(map[string]string{})
	case tar.TypeLink:
		linked, ok := files[cleaned(h.Linkname)]
		if !ok {
			return e, fmt.Errorf("no file %q before it", h.Linkname)
		}
		return linked, nil
	default:
		e.Kind = "file"
		sum := sha256.New()
		var err error
		if e.Size, err = io.Copy(sum, r); err != nil {
			return e, err
		}
		e.Sum = fmt.Sprintf("%x", sum.Sum(nil))
	}
	return e, nil
}

// wantVolume checks that dir has the members of the archives.
func wantVolume(t *testing.T, dir string, archives ...[]byte) {
	t.Helper()
	var readers []io.Reader
	for _, a := range archives {
		readers = append(readers, bytes.NewReader(a))
	}
	want, err := sequential(readers...)
	if err != nil {
		t.Fatal(err)
	}
	if diff := listing(t, dir).Diff(want); diff != "" {
		t.Errorf("the volume differs from the archives:\n%s", diff)
	}
}
