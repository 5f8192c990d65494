// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/erofs/go-erofs"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
	"github.com/artifact-snapshotter/artifact-snapshotter/unpack/internal/unpacktest"
)

// memory returns a file in memory, since the fuzzer makes millions.
func memory(tb testing.TB, data []byte) *os.File {
	tb.Helper()
	fd, err := unix.MemfdCreate("fuzz", unix.MFD_CLOEXEC)
	if err != nil {
		tb.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), fmt.Sprintf("/proc/self/fd/%d", fd))
	tb.Cleanup(func() { f.Close() })
	if _, err := f.Write(data); err != nil {
		tb.Fatal(err)
	}
	return f
}

// wantKind checks that an error blames the artifact, and only once.
func wantKind(t *testing.T, err error) {
	t.Helper()
	if !errdefs.IsInvalidArgument(err) && !errdefs.IsNotImplemented(err) {
		t.Fatalf("error of no kind: %v", err)
	}
}

// errHuge is the error for a sparse member that would take the fuzzer too long.
var errHuge = fmt.Errorf("huge: %w", errdefs.ErrInvalidArgument)

// mended returns data with an end mark and with correct header checksums. Without them the
// reader would refuse every changed byte at once.
func mended(data []byte) []byte {
	data = slices.Concat(data, make([]byte, roundUp(int64(len(data)))-int64(len(data))), endMark)
	for h := range slices.Chunk(data, tarBlock) {
		if string(h[257:262]) == "ustar" {
			checksum(h)
		}
	}
	return data
}

// FuzzIndex plans two archives, the second over the first, with and without correct
// checksums. What it accepts must be what archive/tar reads, member by member, and what the
// EROFS image of the plan has.
func FuzzIndex(f *testing.F) {
	t := &testing.T{} // it is not used unless the seeds cannot be made
	for _, seeds := range []map[string][]byte{forms(t), odd(t)} {
		for _, name := range slices.Sorted(maps.Keys(seeds)) {
			if a := seeds[name]; len(a) < 64<<10 {
				f.Add(a, archive(t), false)
				f.Add(archive(t, file("f", "below"), file("d/f", "below"), file("of 1", "below")), a, true)
			}
		}
	}
	f.Add(slices.Concat(member512('x', "p", record("size", "9223372036854775807"), nil), member512('0', "f", "", nil), endMark), []byte{}, true)
	f.Add(slices.Concat(member512('5', "d", strings.Repeat("x", 512), nil), endMark), archive(t), true)
	f.Add(slices.Concat(member512('1', "h", "content of a link", nil), endMark), archive(t), true)
	f.Add(slices.Concat(member512(tar.TypeGNUSparse, "more data than its size", "x", func(h []byte) {
		copy(h[257:], "ustar  \x00")
		clear(h[345:])
	}), member512('0', "f", "", nil)), archive(t), true)
	f.Add(bytes.Repeat(member512('0', "../f", "x", nil), 2), bytes.Repeat(endMark, 3), true)

	f.Fuzz(func(t *testing.T, first, second []byte, mend bool) {
		if mend {
			first, second = mended(first), mended(second)
		}
		p := newPlan(created, nil)
		dir := t.TempDir()
		cs := newContents(dir, nil, Options{Budget: NewBudget(DefaultLimits)})
		whole := map[*content]*os.File{}
		sparse := func(r io.Reader, key memberKey, size int64) (*content, error) {
			if size > 4<<20 {
				return nil, errHuge
			}
			c, err := cs.sparse(context.Background(), r, key, size)
			if err != nil {
				return nil, err
			}
			if whole[c], err = os.Open(c.path); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { whole[c].Close() })
			return c, nil
		}
		files := map[*content]*os.File{}
		for i, data := range [][]byte{first, second} {
			a := memory(t, data)
			c := &content{name: "archive", path: a.Name()}
			files[c] = a
			if err := p.addArchive(t.Context(), c, i, sparse); err != nil {
				wantKind(t, err)
				return
			}
		}
		maps.Copy(files, whole)
		want, err := sequential(bytes.NewReader(first), bytes.NewReader(second))
		if err != nil {
			t.Fatalf("it is accepted, and archive/tar says: %v", err)
		}
		wantPlan(t, p, files, want)
		wantImage(t, filepath.Join(dir, "image"), p, files, whole, want)
	})
}

// wantPlan compares the plan, whose contents are in files, with want.
func wantPlan(t *testing.T, p *plan, files map[*content]*os.File, want listed) {
	t.Helper()
	got := listed{}
	for name, n := range p.nodes {
		if clean, err := artifact.CleanPath(name); name != "." && (err != nil || clean != name) {
			t.Errorf("name %q: %v", name, err)
		}
		if dir := p.nodes[path.Dir(name)]; dir == nil || dir.kind != directory {
			t.Errorf("%q is not in a directory", name)
		}
		e := shown{Kind: map[kind]string{directory: "directory", regular: "file", symlink: "symlink"}[n.kind], Mode: unixMode(n.attrs.mode), UID: n.attrs.uid, GID: n.attrs.gid,
			Target: n.target, Xattrs: fmt.Sprint(n.xattrs)}
		e.At(n.attrs.mtime)
		switch n.kind {
		case symlink:
			e.Mode = 0o777
		case regular:
			e.Mode &= 0o777
			e.Size = n.bytes.size
			sum := sha256.New()
			if c := n.bytes.content; c != nil {
				r := io.NewSectionReader(files[c], n.bytes.offset, n.bytes.size)
				if copied, err := io.Copy(sum, r); err != nil || copied != e.Size {
					t.Errorf("%q has %d of %d bytes: %v", name, copied, e.Size, err)
				}
			} else if e.Size > 0 {
				t.Errorf("%q has %d bytes of nothing", name, e.Size)
			}
			e.Sum = fmt.Sprintf("%x", sum.Sum(nil))
		case directory:
		}
		got[name] = e
	}
	if diff := got.Diff(want); diff != "" {
		t.Errorf("the plan differs from the archives:\n%s", diff)
	}
}

// wantImage builds the EROFS image of the plan as file, and compares it, read by go-erofs,
// with want.
func wantImage(t *testing.T, file string, p *plan, files, whole map[*content]*os.File, want listed) {
	t.Helper()
	nothing := memory(t, nil)
	empty := &content{path: nothing.Name()}
	devices, err := buildImage(file, p, shift{}, empty)
	if err != nil {
		t.Fatal(err)
	}
	var extra []io.ReaderAt
	for _, c := range devices {
		if c == empty {
			extra = append(extra, nothing)
		} else {
			extra = append(extra, files[c])
		}
	}
	img, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	fsys, err := erofs.Open(img, erofs.WithExtraDevices(extra...))
	if err != nil {
		t.Fatal(err)
	}
	byName := map[string]*os.File{}
	for c, f := range whole {
		byName["/"+c.name] = f
	}
	got := listed{}
	if err := fs.WalkDir(fsys, ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		got[name], err = inImage(fsys, name, d, byName)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	for name, e := range want { // the reader of go-erofs 0.3.1 does not tell special bits
		e.Mode &= 0o777
		want[name] = e
	}
	if diff := got.Diff(want); diff != "" {
		t.Errorf("the image differs from the archives:\n%s", diff)
	}
}

// inImage returns an entry of an image. redirects are the files that overlayfs would find.
func inImage(fsys fs.FS, name string, d fs.DirEntry, redirects map[string]*os.File) (shown, error) {
	fi, err := d.Info()
	if err != nil {
		return shown{}, err
	}
	st, ok := fi.Sys().(*erofs.Stat)
	if !ok {
		return shown{}, errors.New("no entry of an image")
	}
	e := shown{Mode: unixMode(fi.Mode()) & 0o777, UID: st.UID, GID: st.GID}
	e.At(time.Unix(int64(st.Mtime), int64(st.MtimeNs)))
	xattrs := map[string]string{}
	for attr, value := range st.Xattrs {
		if strings.HasPrefix(attr, "user.") {
			xattrs[attr] = value
		}
	}
	e.Xattrs = fmt.Sprint(xattrs)
	switch {
	case fi.IsDir():
		e.Kind = "directory"
	case fi.Mode()&fs.ModeSymlink != 0:
		e.Kind = "symlink"
		e.Target, err = fs.ReadLink(fsys, name)
	default:
		e.Kind, e.Size = "file", fi.Size()
		var r io.Reader
		if target, ok := st.Xattrs[xattrRedirect]; ok {
			if _, ok := st.Xattrs[xattrMetacopy]; !ok {
				return e, errors.New("a redirect without metacopy")
			}
			r = io.NewSectionReader(redirects[target], 0, e.Size)
		} else {
			f, err := fsys.Open(name)
			if err != nil {
				return e, err
			}
			defer f.Close()
			r = f
		}
		sum := sha256.New()
		n, cerr := io.Copy(sum, r)
		if cerr == nil && n != e.Size {
			cerr = fmt.Errorf("%q has %d bytes and says %d", name, n, e.Size)
		}
		err, e.Sum = cerr, fmt.Sprintf("%x", sum.Sum(nil))
	}
	return e, err
}

// FuzzInflate decompresses arbitrary bytes within tight limits. A layer may also be a file.
func FuzzInflate(f *testing.F) {
	s := unpacktest.NewSite(f)
	for _, a := range [][]byte{nil, archive(f), archive(f, file("f", noise(3000))), make([]byte, alwaysAllowed+1)} {
		for _, c := range compressed {
			b, err := os.ReadFile(s.Content.Path(s.Tar(f, c, a).Descriptor.Digest))
			if err != nil {
				f.Fatal(err)
			}
			f.Add(b, c == artifact.CompressionZstd)
			if len(a) > alwaysAllowed {
				continue
			}
			for _, b := range [][]byte{slices.Concat(b, b), b[:len(b)/2], append(slices.Clone(b), "garbage"...)} {
				f.Add(b, c == artifact.CompressionZstd)
			}
		}
	}
	empty := "\x1f\x8b\b\x00\x00\x00\x00\x00\x00\xff\x03\x00\x00\x00\x00\x00\x00\x00\x00\x00"
	for cut := range 15 { // the header of a second stream, with a name
		f.Add([]byte(empty+"\x1f\x8b\b\x18\x00\x00\x00\x00\x00\xffname\x00"[:cut]), false)
	}
	f.Add([]byte("\x28\xb5\x2f\xfd\x00\x88\x00\x00"), true) // a window of 128 MiB
	f.Add([]byte("\x28\xb5\x2f\xfd\x00\x90\x00\x00"), true) // and one of 256 MiB
	f.Add([]byte("\x50\x2a\x4d\x18\x04\x00\x00\x00skip"), true)

	f.Add([]byte(empty+"garbage"), false)
	f.Add([]byte(empty+"\x00\x00"), false)
	f.Add([]byte("\x28\xb5\x2f\xfd\x20\x00\x01\x00\x00garbage"), true)
	f.Add([]byte("\x28\xb5\x2f\xfd\xa0\x00\x00\x00\x10\x01\x00\x00"), true) // one segment of 256 MiB

	f.Fuzz(func(t *testing.T, data []byte, zst bool) {
		if len(data) == 0 {
			return // no bytes are an empty archive, and are not decompressed
		}
		l := artifact.Layer{Format: artifact.FormatTar, Compression: artifact.CompressionGzip}
		if zst {
			l.Compression = artifact.CompressionZstd
		}
		s := newSite(t)
		l.Descriptor = s.Blob(t, data)
		o := s.options(best)
		o.Budget = NewBudget(Limits{Memory: 1 << 20, Expansion: 2, Reserve: 1})
		cs := newContents(t.TempDir(), []artifact.Layer{l}, o)
		c := cs.files[keyOf(l)]
		c.compression = l.Compression
		either := artifact.Layer{Descriptor: l.Descriptor, Format: artifact.FormatTarOrRaw}
		if format, is, err := detect(context.Background(), either, bytes.NewReader(data), o.Budget); err != nil || format == artifact.FormatRaw && is != artifact.CompressionNone {
			t.Errorf("found to be %s, %q, %v", format, is, err)
		}
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		err := guard(func() error { return cs.inflate(context.Background(), c) })
		runtime.ReadMemStats(&after)
		// Everything that was allocated, garbage included.
		if most := 2 * decompressors[l.Compression].memory; after.TotalAlloc-before.TotalAlloc > uint64(most) {
			t.Errorf("it has taken %d bytes of memory", after.TotalAlloc-before.TotalAlloc)
		}
		if fi, err := os.Stat(c.path); err == nil && fi.Size() > alwaysAllowed+2*int64(len(data)) {
			t.Errorf("%d bytes have become %d", len(data), fi.Size())
		}
		if err != nil {
			wantKind(t, err)
			return
		}
		out, err := os.ReadFile(c.path)
		if err != nil {
			t.Fatal(err)
		}
		if sum := c.digest.Algorithm().FromBytes(out); sum != c.digest {
			t.Errorf("the digest is %s, said to be %s", sum, c.digest)
		}
		if zst {
			return
		}
		r, err := gzip.NewReader(bytes.NewReader(data))
		if err != nil {
			t.Fatalf("it is accepted, and compress/gzip says: %v", err)
		}
		if want, err := io.ReadAll(r); err != nil || !bytes.Equal(out, want) {
			t.Errorf("it holds %d bytes, by compress/gzip %d other ones (%v)", len(out), len(want), err)
		}
	})
}
