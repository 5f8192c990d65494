// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	containerdarchive "github.com/containerd/containerd/v2/pkg/archive"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
)

// form is an archive that tools have read in different ways.
type form struct {
	archive []byte
	// not are the tools that refuse it or extract something else.
	not []string
}

// tarForms returns archives whose meaning POSIX does not define, or defines differently.
// They describe every directory.
func tarForms(t *testing.T) map[string]form {
	last := archive(t, file("last", noise(700)))
	noEnd := last[:len(last)-len(endMark)]
	link := func(name, target string) tar.Header {
		return tar.Header{Name: name, Typeflag: tar.TypeLink, Linkname: target}
	}
	symlink := tar.Header{Name: "s", Typeflag: tar.TypeSymlink, Linkname: "x", Mode: 0o777, Uid: 7, Gid: 8, ModTime: created, Format: tar.FormatPAX}
	absolute := symlink
	absolute.Linkname = "/etc/x"
	// own has the attributes of the symlink, as tools write it.
	own := func(h tar.Header) tar.Header {
		h.Uid, h.Gid, h.ModTime, h.Format = 7, 8, created, tar.FormatPAX
		return h
	}
	dir := func(name string) tar.Header { return tar.Header{Name: name, Typeflag: tar.TypeDir, Mode: 0o755} }
	gnuMember := func(flag byte, name, content string) []byte {
		return member512(flag, name, content, func(h []byte) { copy(h[257:], "ustar  \x00") })
	}
	return map[string]form{
		"a hard link to a symlink":                     {archive: archive(t, symlink, own(link("h", "s")))},
		"a chain of hard links to a symlink":           {archive: archive(t, absolute, own(link("h", "s")), own(link("i", "./h")), own(link("j", "i")))},
		"a hard link to a symlink that is replaced":    {archive: archive(t, symlink, own(link("h", "s")), file("s", "x"))},
		"a hard link to what has become a symlink":     {archive: archive(t, file("s", "x"), symlink, own(link("h", "s")))},
		"a hard link to a symlink with another owner":  {archive: archive(t, symlink, link("h", "s")), not: []string{"containerd"}},
		"a file whose name ends in a slash":            {archive: slices.Concat(member512(tar.TypeReg, "d/", "", nil), noEnd), not: []string{"containerd"}},
		"a file whose name ends in slashes":            {archive: slices.Concat(member512(tar.TypeReg, "d//", "", nil), noEnd), not: []string{"containerd"}},
		"a contiguous file whose name ends in a slash": {archive: slices.Concat(member512(tar.TypeCont, "d/", "", nil), noEnd), not: []string{"containerd"}},
		"a file of old times whose name ends in one":   {archive: slices.Concat(member512(0, "d/", "", nil), noEnd)},
		"a PAX name that ends in a slash":              {archive: slices.Concat(member512(tar.TypeXHeader, "p", record("path", "e/"), nil), member512(tar.TypeReg, "d", "", nil), noEnd), not: []string{"containerd"}},
		"no mark":                                      {archive: noEnd},
		"no bytes":                                     {archive: nil, not: []string{"tar"}}, // "This does not look like a tar archive"
		"one block of zeros and nothing else":          {archive: endMark[:tarBlock]},
		"4 MiB of zeros behind":                        {archive: append(slices.Clone(last), make([]byte, 4<<20)...)},
		"a volume label":                               {archive: slices.Concat(gnuMember(typeLabel, "label", ""), last), not: []string{"containerd"}},
		"a volume label that is no path":               {archive: slices.Concat(gnuMember(typeLabel, "../label", ""), last), not: []string{"containerd", "tar"}}, // which refuses the name
		"a volume label between members":               {archive: slices.Concat(noEnd, gnuMember(typeLabel, "last", ""), archive(t, file("f", "x"))), not: []string{"containerd"}},
		"a volume label alone":                         {archive: slices.Concat(gnuMember(typeLabel, "label", ""), endMark), not: []string{"containerd"}},
		"a volume label with content":                  {archive: slices.Concat(gnuMember(typeLabel, "label", noise(513)), last), not: []string{"containerd", "bsdtar"}}, // "Damaged tar archive", says libarchive 3.6
		"a listed directory":                           {archive: slices.Concat(gnuMember(typeDumpDir, "d/", "Yf\x00Yg\x00\x00"), archive(t, file("d/f", "x"))), not: []string{"containerd"}},
		"a listed directory with a long list":          {archive: slices.Concat(gnuMember(typeDumpDir, "d", strings.Repeat("Yf\x00", 1000)+"\x00"), archive(t, file("d/f", "x"))), not: []string{"containerd"}},
		"absolute names":                               {archive: archive(t, dir("/d/"), file("/d/f", "x"), link("/d/h", "/d/f"), tar.Header{Name: "/s", Typeflag: tar.TypeSymlink, Linkname: "/d/f", Mode: 0o777}), not: []string{"containerd"}}, // a mode of the link
		"absolute names of many slashes":               {archive: archive(t, file("//f", "x"), file("/./g", "y"), file("///.//h", "z"))},
		"an absolute name that another member has":     {archive: archive(t, file("f", "x"), file("/f", "y"))},
		"the root of the node, which is the volume's":  {archive: archive(t, dir("/"), file("/f", "x"))},
		"a hard link to an absolute name, and back":    {archive: archive(t, file("f", "x"), tar.Header{Name: "h", Typeflag: tar.TypeLink, Linkname: "/f", Mode: 0o644}, tar.Header{Name: "/i", Typeflag: tar.TypeLink, Linkname: "h", Mode: 0o644})},
		"a symlink to an absolute name, with a slash":  {archive: archive(t, tar.Header{Name: "/s/", Typeflag: tar.TypeSymlink, Linkname: "//etc//x/", Mode: 0o777})},
	}
}

// tarsOf returns the tools, which extract an archive as root.
func tarsOf(t *testing.T) map[string]func(archive []byte, dir string) error {
	t.Helper()
	run := func(name string) func([]byte, string) error {
		return func(archive []byte, dir string) error {
			cmd := exec.Command(name, "-xpf", "-", "--numeric-owner", "-C", dir)
			cmd.Stdin = bytes.NewReader(archive)
			return cmd.Run()
		}
	}
	all := map[string]func([]byte, string) error{
		"tar": run("tar"),
		"containerd": func(archive []byte, dir string) error {
			_, err := containerdarchive.Apply(context.Background(), dir, bytes.NewReader(archive))
			return err
		},
	}
	if _, err := exec.LookPath("bsdtar"); err != nil {
		t.Log("NOT TESTED: bsdtar, of Debian's libarchive-tools")
	} else {
		all["bsdtar"] = run("bsdtar")
	}
	return all
}

// A volume has the files that GNU tar, bsdtar and containerd extract.
// TestEveryKindOfMemberIsMountedAsInTheArchive mounts the same archives.
func TestTarsAgree(t *testing.T) {
	tars := tarsOf(t)
	for name, f := range tarForms(t) {
		want, err := sequential(bytes.NewReader(f.archive))
		if err != nil {
			t.Fatal(name, err)
		}
		delete(want, ".")
		for by, extract := range tars {
			dir := t.TempDir()
			err := extract(f.archive, dir)
			got := listing(t, dir)
			delete(got, ".")
			diff := got.Diff(want)
			agrees, not := err == nil && diff == "", slices.Contains(f.not, by)
			// A later version of the other two tools may agree.
			if !agrees && !not || agrees && not && by == "containerd" {
				t.Errorf("%s, %s: %v\n%s", name, by, err, diff)
			}
		}
	}
}

// ExtractLayer refuses what containerd would extract differently, and extracts the rest as
// containerd does.
func TestUnusualTarsAreExtractedAsAnImageOrRefused(t *testing.T) {
	s := newSite(t)
	for name, f := range tarForms(t) {
		dir, err := s.extract(t, s.Tar(t, artifact.CompressionGzip, f.archive))
		image := t.TempDir()
		if _, ierr := containerdarchive.Apply(context.Background(), image, bytes.NewReader(f.archive)); ierr != nil {
			if err != nil {
				t.Errorf("%s: there can be no image with it (%v), and it is refused: %v", name, ierr, err)
			}
			continue
		}
		if refused := err != nil; refused != slices.Contains(f.not, "containerd") || refused && !strings.Contains(err.Error(), "snapshot would be used") {
			t.Errorf("%s: %v", name, err)
		} else if !refused {
			wantAsInAnImage(t, dir, f.archive, true)
		}
	}
}

// A layer without bytes is an archive without members, with any compression, and needs no
// blob.
func TestALayerWithoutBytesIsAnEmptyArchive(t *testing.T) {
	for _, mode := range everyPair {
		for c, compression := range map[string]artifact.Compression{"plain": artifact.CompressionNone, "gzip": artifact.CompressionGzip, "zstd": artifact.CompressionZstd} {
			t.Run(mode.String()+"/"+c, func(t *testing.T) {
				s := newSite(t)
				none := s.Tar(t, artifact.CompressionNone, nil)
				none.Compression = compression
				if err := os.Remove(s.Content.Path(none.Descriptor.Digest)); err != nil {
					t.Fatal(err)
				}
				ofNothing := s.Tar(t, compression, nil)
				dir := s.mounted(t, mode, none, ofNothing, s.Raw(t, "f", "x"))
				if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 || read(t, dir, "f") != "x" {
					t.Errorf("the volume has %v (%v)", entries, err)
				}
				only, err := s.buildAs("only", mode, none, ofNothing)
				if err != nil {
					t.Fatal(err)
				}
				if entries, err := os.ReadDir(mountTree(t, only)); err != nil || len(entries) > 0 {
					t.Errorf("the volume of nothing else has %v (%v)", entries, err)
				}
				if compression == artifact.CompressionNone {
					return // it is the blob's digest
				}
				if id, err := DiffID(context.Background(), none, bytes.NewReader(nil), NewBudget(DefaultLimits)); id != none.DiffID || err != nil {
					t.Errorf("its DiffID is %s (%v), want %s", id, err, none.DiffID)
				}
			})
		}
	}
}

// Padding is read but not kept in memory, since it can be as large as a layer.
func TestPaddingTakesNoMemory(t *testing.T) {
	for end, says := range map[string]string{"": "", "x": "garbage follows the end"} {
		blob := filepath.Join(t.TempDir(), "blob")
		if err := os.WriteFile(blob, archive(t, file("f", "x")), 0o600); err != nil {
			t.Fatal(err)
		}
		f, err := os.OpenFile(blob, os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		const size = 256 << 20
		if err := errors.Join(f.Truncate(size), writeAt(f, end, size), f.Close()); err != nil {
			t.Fatal(err)
		}
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		err = newPlan(created, nil).addArchive(t.Context(), &content{path: blob}, 0, nil)
		runtime.ReadMemStats(&after)
		if says == "" && err != nil || says != "" && (err == nil || !strings.Contains(err.Error(), says)) {
			t.Errorf("%v, want %q", err, says)
		}
		if took := after.TotalAlloc - before.TotalAlloc; took > 2<<20 {
			t.Errorf("it has taken %d bytes of memory", took)
		}
	}
}

func TestReadingPaddingEndsWithTheContext(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	zeros := bytes.NewReader(make([]byte, 1<<20))
	if err := checkEnd(ctx, io.NewSectionReader(zeros, 0, zeros.Size()), 0); !errors.Is(err, context.Canceled) {
		t.Errorf("%v, want that it was given up", err)
	}
}
