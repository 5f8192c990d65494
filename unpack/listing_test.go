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
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// What a volume shows is compared with what archive/tar, reading an archive from
// its begin to its end, says is in it.

// shown is an entry of a volume, or what one should be.
type shown struct {
	kind     string // "directory", "file" or "symlink"
	mode     uint32 // permissions, of a directory the special bits too
	uid, gid uint32
	sec      int64
	nsec     int
	size     int64  // of a file
	sum      string // SHA-256 of a file's content
	target   string
	xattrs   string // those of user.*, as fmt prints a map
}

// listed is entries by their clean paths, "." for the root.
type listed map[string]shown

func (s *shown) at(t time.Time) { s.sec, s.nsec = t.Unix(), t.Nanosecond() }

// sequential is what the archives hold, later ones over earlier ones. Implied
// directories are as for a plan. An archive that Build would refuse gives
// anything or an error.
func sequential(archives ...io.Reader) (listed, error) {
	implied := shown{kind: "directory", mode: 0o755}
	implied.at(created)
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
			for dir := path.Dir(name); l[dir].kind == ""; dir = path.Dir(dir) {
				l[dir] = implied
			}
			if l[name].kind != "" && name != "." && (l[name].kind == "directory") != (e.kind == "directory") {
				return nil, fmt.Errorf("%q is a %s over a %s", name, e.kind, l[name].kind)
			}
			l[name] = e
			delete(files, name)
			if e.kind != "directory" {
				files[name] = e
			}
		}
	}
	return l, nil
}

// cleaned is the path of a name in the volume.
func cleaned(name string) string { return path.Clean(strings.TrimLeft(name, "/")) }

// member is the member that r is at. files are those before it.
func member(r *tar.Reader, h *tar.Header, files map[string]shown) (shown, error) {
	e := shown{mode: uint32(h.Mode) & 0o777, uid: uint32(h.Uid), gid: uint32(h.Gid)}
	e.at(h.ModTime)
	xattrs := map[string]string{}
	for key, value := range h.PAXRecords {
		if attr, ok := strings.CutPrefix(key, "SCHILY.xattr."); ok && strings.HasPrefix(attr, "user.") {
			xattrs[attr] = value
		}
	}
	e.xattrs = fmt.Sprint(xattrs)
	switch h.Typeflag {
	case tar.TypeReg, tar.TypeCont, typeDumpDir:
		if strings.HasSuffix(h.Name, "/") || h.Typeflag == typeDumpDir {
			h.Typeflag = tar.TypeDir
		}
	}
	switch h.Typeflag {
	case tar.TypeDir:
		e.kind, e.mode = "directory", uint32(h.Mode)&0o7777
	case tar.TypeSymlink:
		e.kind, e.mode, e.target, e.xattrs = "symlink", 0o777, h.Linkname, fmt.Sprint(map[string]string{})
	case tar.TypeLink:
		linked, ok := files[cleaned(h.Linkname)]
		if !ok {
			return e, fmt.Errorf("no file %q before it", h.Linkname)
		}
		return linked, nil
	default:
		e.kind = "file"
		sum := sha256.New()
		var err error
		if e.size, err = io.Copy(sum, r); err != nil {
			return e, err
		}
		e.sum = fmt.Sprintf("%x", sum.Sum(nil))
	}
	return e, nil
}

// listing is what the directory dir shows.
func listing(t *testing.T, dir string) listed {
	t.Helper()
	l := listed{}
	err := filepath.WalkDir(dir, func(p string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(dir, p)
		if err != nil {
			return err
		}
		l[name], err = entryAt(p)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func entryAt(p string) (shown, error) {
	var st unix.Stat_t
	if err := unix.Lstat(p, &st); err != nil {
		return shown{}, err
	}
	e := shown{mode: st.Mode & 0o7777, uid: st.Uid, gid: st.Gid}
	e.at(time.Unix(st.Mtim.Unix()))
	var err error
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		e.kind = "directory"
	case unix.S_IFLNK:
		e.kind = "symlink"
		e.target, err = os.Readlink(p)
	case unix.S_IFREG:
		e.kind = "file"
		e.size, e.sum, err = sumOf(p)
		if err == nil && e.size != st.Size {
			err = fmt.Errorf("%s holds %d bytes and says %d", p, e.size, st.Size)
		}
	}
	if err != nil {
		return e, err
	}
	xattrs := map[string]string{}
	if e.kind != "symlink" {
		attrs, err := listUserXattrs(p)
		if err != nil {
			return e, err
		}
		maps.Copy(xattrs, attrs)
	}
	e.xattrs = fmt.Sprint(xattrs)
	return e, nil
}

func sumOf(p string) (int64, string, error) {
	f, err := os.Open(p)
	if err != nil {
		return 0, "", err
	}
	defer f.Close()
	sum := sha256.New()
	n, err := io.Copy(sum, f)
	return n, fmt.Sprintf("%x", sum.Sum(nil)), err
}

// diff says how l differs from want, by at most ten entries.
func (l listed) diff(want listed) string {
	var out strings.Builder
	lines := 0
	for _, name := range slices.Compact(slices.Sorted(func(yield func(string) bool) {
		for _, names := range []listed{want, l} {
			for name := range names {
				if !yield(name) {
					return
				}
			}
		}
	})) {
		got, ok := l[name]
		if wanted, wantedOK := want[name]; ok != wantedOK || !got.like(wanted) {
			if lines++; lines > 10 {
				return out.String() + "and more\n"
			}
			fmt.Fprintf(&out, "%.60q: %+v, want %+v\n", name, got, wanted)
		}
	}
	return out.String()
}

// like is equality, but that nobody says what an implied directory's attributes
// print as.
func (s shown) like(want shown) bool {
	if want.xattrs == "" {
		want.xattrs = fmt.Sprint(map[string]string{})
	}
	return s == want
}

// wantVolume checks that dir shows the members of the archives.
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
	if diff := listing(t, dir).diff(want); diff != "" {
		t.Errorf("the volume differs from the archives:\n%s", diff)
	}
}

// record is a record of a PAX header.
func record(key, value string) string {
	n := len(key) + len(value) + 3
	for l := len(itoa(n)) + len(key) + len(value) + 3; l != n; l = len(itoa(n)) + len(key) + len(value) + 3 {
		n = l
	}
	return itoa(n) + " " + key + "=" + value + "\n"
}

// member512 is a member that archive/tar does not write: of a type, with a
// header that edit changes, and any content, padded.
func member512(flag byte, name, content string, edit func(header []byte)) []byte {
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	if err := w.WriteHeader(&tar.Header{Name: "n", Size: int64(len(content)), Mode: 0o644, Typeflag: tar.TypeReg, ModTime: created}); err != nil {
		panic(err)
	}
	_, _ = io.WriteString(w, content)
	_ = w.Flush()
	b := buf.Bytes()
	copy(b[:100], name)
	b[156] = flag
	if edit != nil {
		edit(b[:512])
	}
	checksum(b[:512])
	return b
}

// checksum puts that of a header right.
func checksum(header []byte) {
	copy(header[148:156], "        ")
	sum := 0
	for _, c := range header {
		sum += int(c)
	}
	copy(header[148:156], octal6(sum)+"\x00 ")
}

// endMark is the end of an archive.
var endMark = make([]byte, 1024)

// fragment is data between holes.
type fragment struct {
	offset int64
	data   string
}

// sparseForms are the ways of GNU tar to write a sparse file, see its manual,
// "Storing Sparse Files". Each gives a member of size bytes, with holes around
// the fragments.
var sparseForms = map[string]func(name string, size int64, fragments ...fragment) []byte{
	"old GNU": func(name string, size int64, fragments ...fragment) []byte {
		data := ""
		var more [][]byte // headers of 21 fragments behind the first one
		for i, f := range fragments {
			data += f.data
			if i >= 4 && (i-4)%21 == 0 {
				more = append(more, make([]byte, 512))
			}
			if i >= 4 {
				copy(more[len(more)-1][(i-4)%21*24:], fmt.Sprintf("%011o\x00%011o\x00", f.offset, len(f.data)))
			}
		}
		for i := range len(more) - 1 {
			more[i][504] = 1
		}
		b := member512(tar.TypeGNUSparse, name, data, func(h []byte) {
			copy(h[257:], "ustar  \x00")
			clear(h[345:512])
			for i, f := range fragments[:min(4, len(fragments))] {
				copy(h[386+24*i:], fmt.Sprintf("%011o\x00%011o\x00", f.offset, len(f.data)))
			}
			if len(more) > 0 {
				h[482] = 1
			}
			copy(h[483:], fmt.Sprintf("%011o\x00", size))
		})
		return slices.Concat(b[:512], bytes.Join(more, nil), b[512:])
	},
	"PAX 0.0": func(name string, size int64, fragments ...fragment) []byte {
		pax, data := record("GNU.sparse.size", itoa(int(size)))+record("GNU.sparse.numblocks", itoa(len(fragments))), ""
		for _, f := range fragments {
			pax += record("GNU.sparse.offset", itoa(int(f.offset))) + record("GNU.sparse.numbytes", itoa(len(f.data)))
			data += f.data
		}
		return slices.Concat(member512(tar.TypeXHeader, "pax", pax, nil), member512(tar.TypeReg, name, data, nil))
	},
	"PAX 0.1": func(name string, size int64, fragments ...fragment) []byte {
		var places []string
		data := ""
		for _, f := range fragments {
			places = append(places, itoa(int(f.offset)), itoa(len(f.data)))
			data += f.data
		}
		pax := record("GNU.sparse.size", itoa(int(size))) + record("GNU.sparse.numblocks", itoa(len(fragments))) +
			record("GNU.sparse.name", name) + record("GNU.sparse.map", strings.Join(places, ","))
		return slices.Concat(member512(tar.TypeXHeader, "pax", pax, nil), member512(tar.TypeReg, "GNUSparseFile.0/f", data, nil))
	},
	"PAX 1.0": func(name string, size int64, fragments ...fragment) []byte {
		pax := record("GNU.sparse.major", "1") + record("GNU.sparse.minor", "0") +
			record("GNU.sparse.name", name) + record("GNU.sparse.realsize", itoa(int(size)))
		places, data := itoa(len(fragments))+"\n", ""
		for _, f := range fragments {
			places += itoa(int(f.offset)) + "\n" + itoa(len(f.data)) + "\n"
			data += f.data
		}
		places += strings.Repeat("\x00", (512-len(places)%512)%512)
		return slices.Concat(member512(tar.TypeXHeader, "pax", pax, nil), member512(tar.TypeReg, "GNUSparseFile.0/f", places+data, nil))
	},
}
