// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"archive/tar"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
)

func TestRefusals(t *testing.T) {
	plain := func(members ...tar.Header) func(*testing.T, site) []artifact.Layer {
		return func(t *testing.T, s site) []artifact.Layer {
			return []artifact.Layer{s.Tar(t, artifact.CompressionNone, archive(t, members...))}
		}
	}
	// cut returns a layer of a tar, compressed after change has changed its bytes.
	cut := func(c artifact.Compression, change func([]byte) []byte) func(*testing.T, site) []artifact.Layer {
		return func(t *testing.T, s site) []artifact.Layer {
			l := s.Tar(t, c, change(archive(t, file("f", strings.Repeat("x", 3000)))))
			return []artifact.Layer{l}
		}
	}
	symlinked := tar.Header{Name: "link", Typeflag: tar.TypeSymlink, Linkname: "/etc"}
	linked := tar.Header{Name: "h", Typeflag: tar.TypeLink, Linkname: "link"}
	cases := map[string]struct {
		layers func(*testing.T, site) []artifact.Layer
		want   string
	}{
		"dot dot":                        {plain(file("a/../../b", "")), `..`},
		"dot dot behind the root":        {plain(file("/../b", "")), `..`},
		"name over 255 bytes":            {plain(file(strings.Repeat("n", 256), "")), "255"},
		"through a symlink":              {plain(symlinked, file("link/passwd", "x")), "symlink"},
		"through a link to a symlink":    {plain(symlinked, linked, file("h/passwd", "x")), `"h" passes through a symlink`},
		"a directory over such a link":   {plain(symlinked, linked, tar.Header{Name: "h/", Typeflag: tar.TypeDir}), `"h" passes through a symlink`},
		"a link through a symlink":       {plain(symlinked, tar.Header{Name: "h", Typeflag: tar.TypeLink, Linkname: "link/passwd"}), "neither a regular file nor a symlink"},
		"directory through a symlink":    {plain(symlinked, tar.Header{Name: "link/d/", Typeflag: tar.TypeDir}), "symlink"},
		"directory over a symlink":       {plain(symlinked, tar.Header{Name: "link/", Typeflag: tar.TypeDir}), "symlink"},
		"hard link outside":              {plain(tar.Header{Name: "h", Typeflag: tar.TypeLink, Linkname: "/etc/passwd"}), "/etc/passwd"},
		"hard link to dot dot":           {plain(tar.Header{Name: "h", Typeflag: tar.TypeLink, Linkname: "/../etc/passwd"}), `contains ".."`},
		"hard link to nothing":           {plain(tar.Header{Name: "h", Typeflag: tar.TypeLink, Linkname: "f"}), "neither a regular file nor a symlink"},
		"hard link to a directory":       {plain(file("d/f", ""), tar.Header{Name: "h", Typeflag: tar.TypeLink, Linkname: "d"}), "neither a regular file nor a symlink"},
		"character device":               {plain(tar.Header{Name: "c", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 3}), "character device"},
		"block device":                   {plain(tar.Header{Name: "b", Typeflag: tar.TypeBlock}), "block device"},
		"FIFO":                           {plain(tar.Header{Name: "p", Typeflag: tar.TypeFifo}), "FIFO"},
		"a socket, by a type of its own": {plain(tar.Header{Name: "s", Typeflag: 's'}), "type 's'"},
		"owner -1":                       {plain(tar.Header{Name: "f", Uid: 1<<32 - 1}), "owner"},
		"file as directory":              {plain(file("a", ""), file("a/b", "")), "must be a directory"},
		"directory as file":              {plain(file("a/b", ""), file("a", "")), "is a directory"},
		"sparse giant": {func(t *testing.T, s site) []artifact.Layer {
			return []artifact.Layer{s.Tar(t, artifact.CompressionNone, sparse(t, 1<<60))}
		}, "no space"},
		"more holes than disk": {func(t *testing.T, s site) []artifact.Layer {
			tmpfs(t, s.Root, "size=64m")
			one := sparse(t, 30<<20)
			one = one[:len(one)-1024] // without the mark
			return []artifact.Layer{s.Tar(t, artifact.CompressionNone, slices.Concat(one, one, one, make([]byte, 1024)))}
		}, "no space"},
		"truncated in a file":           {cut(artifact.CompressionNone, func(b []byte) []byte { return b[:2000] }), "truncated"},
		"truncated in the padding":      {cut(artifact.CompressionNone, func(b []byte) []byte { return b[:len(b)-1025] }), "truncated"},
		"truncated in a header":         {cut(artifact.CompressionNone, func(b []byte) []byte { return append(b[:len(b)-1024], b[:511]...) }), "truncated"},
		"truncated in a block of zeros": {cut(artifact.CompressionNone, func(b []byte) []byte { return b[:len(b)-1023] }), "truncated"},
		"trailing garbage":              {cut(artifact.CompressionNone, func(b []byte) []byte { return append(b, "garbage behind the end"...) }), "garbage"},
		"truncated gzip":                {broken(artifact.CompressionGzip, func(b []byte) []byte { return b[:len(b)-9] }), "truncated"},
		"garbage behind gzip":           {broken(artifact.CompressionGzip, func(b []byte) []byte { return append(b, "garbage behind the end"...) }), "bytes follow the end of the gzip stream"},
		"seven bytes behind gzip":       {broken(artifact.CompressionGzip, func(b []byte) []byte { return append(b, "garbage"...) }), "bytes follow the end of the gzip stream that are not gzip"},
		"seven bytes that are no gzip":  {broken(artifact.CompressionGzip, func([]byte) []byte { return []byte("garbage") }), "says that it is gzip, and its bytes are not compressed"},
		"a zstd window of 256 MiB":      {broken(artifact.CompressionZstd, func([]byte) []byte { return []byte("\x28\xb5\x2f\xfd\x00\x90\x01\x00\x00") }), "at most 128 MiB; compress the archive with zstd --long=27"},
		"truncated zstd":                {broken(artifact.CompressionZstd, func(b []byte) []byte { return b[:len(b)-9] }), "truncated"},
		"garbage behind zstd":           {broken(artifact.CompressionZstd, func(b []byte) []byte { return append(b, "garbage behind the end"...) }), "bytes follow the end of the zstd stream"},
		"not gzip":                      {broken(artifact.CompressionGzip, func([]byte) []byte { return []byte("plain text, no gzip") }), "says that it is gzip, and its bytes are not compressed"},
		"not zstd":                      {broken(artifact.CompressionZstd, func([]byte) []byte { return []byte("plain text, no zstd") }), "says that it is zstd, and its bytes are not compressed"},
		"wrong DiffID": {func(t *testing.T, s site) []artifact.Layer {
			l := s.Tar(t, artifact.CompressionGzip, archive(t, file("f", "x")))
			l.DiffID = digest.FromString("another")
			return []artifact.Layer{l}
		}, "DiffID"},
		"raw file where a tar has a directory": {func(t *testing.T, s site) []artifact.Layer {
			return []artifact.Layer{s.Tar(t, artifact.CompressionNone, archive(t, file("d/f", ""))), s.Raw(t, "d", "x")}
		}, "is a directory"},
		"raw file below a file": {func(t *testing.T, s site) []artifact.Layer {
			return []artifact.Layer{s.Raw(t, "f", "x"), s.Raw(t, "f/g", "x")}
		}, "must be a directory"},
		"blob of another size": {func(t *testing.T, s site) []artifact.Layer {
			l := s.Raw(t, "f", "short")
			l.Descriptor.Size = 1 << 30
			return []artifact.Layer{l}
		}, "descriptor says"},
		"blob said to be empty": {func(t *testing.T, s site) []artifact.Layer {
			l := s.Raw(t, "f", "not empty")
			l.Descriptor.Size = 0
			return []artifact.Layer{l}
		}, "0 bytes"},
		"blob of another layer said to be empty": {func(t *testing.T, s site) []artifact.Layer {
			a, b := s.Raw(t, "a", "0123456789"), s.Raw(t, "b", "0123456789")
			b.Descriptor.Size = 0
			return []artifact.Layer{a, b}
		}, "0 bytes, but its digest"},
		"another size for the same digest": {func(t *testing.T, s site) []artifact.Layer {
			a, b := s.Raw(t, "a", "0123456789"), s.Raw(t, "b", "0123456789")
			b.Descriptor.Size = 1 << 40
			return []artifact.Layer{a, b}
		}, "descriptor says"},
		"truncated behind an extended header": {cutAfterPAX, "truncated"},
		"padding without end": {func(t *testing.T, s site) []artifact.Layer {
			return []artifact.Layer{s.Tar(t, artifact.CompressionZstd, make([]byte, 2*alwaysAllowed))}
		}, "max_expansion"},
		"garbage behind long padding":          {cut(artifact.CompressionZstd, func(b []byte) []byte { return append(append(b, make([]byte, 3<<20)...), 'x') }), "garbage"},
		"a directory by its name with content": {archived(slices.Concat(member512(tar.TypeReg, "d/", "x", nil), endMark)), "ends in a slash"},
		"a sparse directory by its name":       {archived(slices.Concat(sparseForms["PAX 1.0"]("d/", 100, fragmentAt(0, "x")), endMark)), "ends in a slash"},
		"a sparse label":                       {archived(slices.Concat(retyped(sparseForms["PAX 1.0"]("l", 100, fragmentAt(0, "x")), typeLabel), endMark)), "label of a volume cannot be sparse"},
		"an extended header of Solaris":        {archived(slices.Concat(member512(typeSolaris, "p", record("path", "g"), nil), member512(tar.TypeReg, "f", "x", nil), endMark)), "Solaris"},
		"no bytes of another DiffID": {func(t *testing.T, s site) []artifact.Layer {
			l := s.Tar(t, artifact.CompressionNone, nil)
			l.Compression, l.DiffID = artifact.CompressionGzip, digest.FromString("another")
			return []artifact.Layer{l}
		}, "DiffID"},
		"compressed nothing of another DiffID": {func(t *testing.T, s site) []artifact.Layer {
			l := s.Tar(t, artifact.CompressionZstd, nil)
			l.DiffID = digest.FromString("another")
			return []artifact.Layer{l}
		}, "DiffID"},
		"an archive said to be empty": {func(t *testing.T, s site) []artifact.Layer {
			l := s.Tar(t, artifact.CompressionGzip, archive(t, file("f", "x")))
			l.Descriptor.Size = 0
			return []artifact.Layer{l}
		}, "0 bytes"},
		"deeper than anything needs": {plain(file(strings.Repeat("d/", 129)+"f", "")), "128"},
		"attribute that does not fit": {func(t *testing.T, s site) []artifact.Layer {
			h := file("f", "x")
			h.Format = tar.FormatPAX
			h.PAXRecords = map[string]string{"SCHILY.xattr.user.big": strings.Repeat("x", 1<<17)}
			return []artifact.Layer{s.Tar(t, artifact.CompressionNone, archive(t, h))}
		}, "user.big"},
		"symlink to too long a path": {plain(tar.Header{Name: "l", Typeflag: tar.TypeSymlink, Linkname: strings.Repeat("x", 4096)}), "4096 bytes"},
		"missing blob": {func(t *testing.T, s site) []artifact.Layer {
			l := s.Raw(t, "f", "gone")
			os.Remove(s.Content.Path(l.Descriptor.Digest))
			return []artifact.Layer{l}
		}, "pull"},
	}
	for name, c := range cases {
		for _, mode := range everyPair {
			t.Run(name+"/"+mode.String(), func(t *testing.T) {
				s := newSite(t)
				good := s.Tar(t, artifact.CompressionNone, archive(t, file("good", "x")))
				_, err := s.build(mode, append([]artifact.Layer{good}, c.layers(t, s)...)...)
				if err == nil {
					t.Fatal("it was built")
				}
				if !errdefs.IsInvalidArgument(err) && !errdefs.IsNotFound(err) && !errdefs.IsFailedPrecondition(err) && !errdefs.IsResourceExhausted(err) {
					t.Errorf("%v is of no kind", err)
				}
				for _, want := range []string{c.want, "layer ", "application/test"} {
					if !strings.Contains(err.Error(), want) {
						t.Errorf("%q does not say %q", err, want)
					}
				}
				if _, err := os.Stat(filepath.Join(s.Root, "tree")); !errors.Is(err, fs.ErrNotExist) {
					t.Errorf("something is left behind: %v", err)
				}
			})
		}
	}
}

// archived returns the layer of an archive.
func archived(archive []byte) func(*testing.T, site) []artifact.Layer {
	return func(t *testing.T, s site) []artifact.Layer {
		return []artifact.Layer{s.Tar(t, artifact.CompressionNone, archive)}
	}
}

// retyped changes the type of a member that follows an extended header.
func retyped(member []byte, flag byte) []byte {
	header := member[2*tarBlock : 3*tarBlock]
	header[156] = flag
	checksum(header)
	return member
}

// cutAfterPAX returns an archive, without a DiffID that would reveal it, that ends after an
// extended header.
func cutAfterPAX(t *testing.T, s site) []artifact.Layer {
	h := file("f", "x")
	h.Format = tar.FormatPAX
	h.PAXRecords = map[string]string{"SCHILY.xattr.user.note": "x"}
	l := s.Tar(t, artifact.CompressionGzip, archive(t, h)[:1024])
	l.DiffID = ""
	return []artifact.Layer{l}
}

// broken returns a layer of a tar whose compressed bytes change has changed.
func broken(c artifact.Compression, change func([]byte) []byte) func(*testing.T, site) []artifact.Layer {
	return func(t *testing.T, s site) []artifact.Layer {
		l := s.Tar(t, c, archive(t, file("f", strings.Repeat("x", 3000))))
		b, err := os.ReadFile(s.Content.Path(l.Descriptor.Digest))
		if err != nil {
			t.Fatal(err)
		}
		l.Descriptor = s.Blob(t, change(b))
		return []artifact.Layer{l}
	}
}

// sparse returns an archive of one sparse file that is all hole.
func sparse(_ *testing.T, size int64) []byte {
	return slices.Concat(sparseForms["PAX 1.0"]("sparse", size), endMark)
}
