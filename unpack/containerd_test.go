// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	containerdarchive "github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/errdefs"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
	"github.com/artifact-snapshotter/artifact-snapshotter/blobs"
	"github.com/artifact-snapshotter/artifact-snapshotter/unpack/internal/unpacktest"
)

var epoch = time.Unix(0, 0)

// extract extracts a layer, as a manifest lists it, into an empty directory.
func (s site) extract(t *testing.T, l artifact.Layer) (dir string, err error) {
	t.Helper()
	dir = t.TempDir()
	return dir, s.extractInto(t, l, Target{Upper: dir}, s.options(Modes{}))
}

func (s site) extractInto(t *testing.T, l artifact.Layer, into Target, o Options) error {
	t.Helper()
	listed, err := artifact.NewLayer(unpacktest.Descriptor(l))
	if err != nil {
		t.Fatal(err)
	}
	scratch, err := os.MkdirTemp(s.Root, "scratch-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(scratch)
	_, err = ExtractLayer(t.Context(), listed, into, scratch, o)
	return err
}

// In the snapshots of other snapshotters these layers are refused, because containerd would
// extract an image's layer with the same content differently. Ours retain them.
func TestALayerThatAnImageWouldExtractDifferentlyIsRefused(t *testing.T) {
	setuid := file("bin/sudo", "sudo")
	setuid.Mode = 0o4755
	link := tar.Header{Name: "hard", Typeflag: tar.TypeLink, Linkname: "f", Mode: 0o600}
	other := link
	other.Mode, other.Uid = 0o644, 7
	noting := noted(link, map[string]string{"user.note": "x"})
	noting.Mode = 0o644
	global := tar.Header{Typeflag: tar.TypeXGlobalHeader, Name: "f", PAXRecords: map[string]string{"comment": "x"}}
	elsewhere := global
	elsewhere.Name = "a/b"
	dir := tar.Header{Name: "dir/", Typeflag: tar.TypeDir, Mode: 0o755}
	for name, test := range map[string]struct {
		content []byte
		raw     bool
		want    string
	}{
		"an archive as a file":                     {archive(t, file("bin/sh", "sh")), true, "an archive or empty"},
		"one with an extended header":              {archive(t, noted(file("bin/sh", "sh"), map[string]string{"user.note": "x"})), true, "an archive or empty"},
		"the archive of no files":                  {make([]byte, 1024), true, "an archive or empty"},
		"no content":                               {nil, true, "an archive or empty"},
		"a whiteout":                               {archive(t, file("f", "x"), file("etc/.wh.shadow", "")), false, `"etc/.wh.shadow": a whiteout`},
		"an opaque directory":                      {archive(t, file("etc/.wh..wh..opq", "")), false, "a whiteout"},
		"setuid":                                   {archive(t, setuid), false, `"bin/sudo": a setuid`},
		"a capability":                             {archive(t, noted(file("ping", "x"), map[string]string{"security.capability": "x"})), false, `"security.capability"`},
		"a mode of a hard link":                    {archive(t, file("f", "x"), link), false, `"hard": a hard link`},
		"an owner of a hard link":                  {archive(t, file("f", "x"), other), false, `"hard": a hard link`},
		"an attribute of a hard link":              {archive(t, file("f", "x"), noting), false, `"hard": a hard link`},
		"an owner of a hard link that is replaced": {archive(t, file("f", "x"), other, file("hard", "y")), false, `"hard": a hard link`},
		"an owner of a hard link to a symlink":     {archive(t, tar.Header{Name: "f", Typeflag: tar.TypeSymlink, Linkname: "x"}, other, file("hard", "y")), false, `"hard": a hard link`},
		"an attribute taken back":                  {archive(t, noted(dir, map[string]string{"user.note": "x"}), dir), false, `"dir/": the extended attribute "user.note"`},
		"a global header over a file":              {archive(t, file("f", "x"), global), false, `"f": a global header`},
		"a group from above":                       {archive(t, tar.Header{Name: "g/", Typeflag: tar.TypeDir, Mode: 0o2755, Gid: 7}, file("g/dir/f", "x")), false, `"g/dir": no layer describes`},
		"a directory for one":                      {archive(t, file("f", "x"), elsewhere), false, `"a/b": a global header`},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t)
			l := s.Tar(t, artifact.CompressionNone, test.content)
			if test.raw {
				l = s.Raw(t, "etc/ld.so.preload", string(test.content))
			}
			dir, err := s.extract(t, l)
			if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), test.want) || strings.Count(err.Error(), "layer 0 (") != 1 {
				t.Errorf("%v, want one about the layer that says %q", err, test.want)
			}
			if files, err := os.ReadDir(dir); err != nil || len(files) > 0 {
				t.Errorf("it has made %v, %v", files, err)
			}
			if _, err := Retain(t.Context(), blobs.Dir(t.TempDir()), []artifact.Layer{l}, s.options(Modes{})); err != nil {
				t.Errorf("it cannot be retained: %v", err)
			}
		})
	}
}

func TestAnExtractedLayerHasTheFilesOfAnImage(t *testing.T) {
	dir := func(name string, mode int64) tar.Header {
		return tar.Header{Name: name, Typeflag: tar.TypeDir, Mode: mode, Uid: 1, Gid: 2}
	}
	again := file("again", "second")
	again.Mode, again.Uid = 0o600, 9
	text := archive(t,
		dir("./", 0o777), dir("./dir/", 0o3775),
		noted(file("./dir/f", "text"), map[string]string{"user.note": "x", "trusted.overlay.opaque": "y"}),
		tar.Header{Name: "hard", Typeflag: tar.TypeLink, Linkname: "dir/f", Mode: 0o644},
		tar.Header{Name: "link", Typeflag: tar.TypeSymlink, Linkname: "dir/f", Mode: 0o777, Uid: 3},
		file("again", "first"), again, file("empty", ""),
		tar.Header{Typeflag: tar.TypeXGlobalHeader, Name: "pax_global_header", PAXRecords: map[string]string{"comment": "x"}},
		dir("dir/late/", 0o1700),
	)
	s := newSite(t)
	files, err := s.extract(t, s.Tar(t, artifact.CompressionGzip, text))
	if err != nil {
		t.Fatal(err)
	}
	wantAsInAnImage(t, files, text, true)
}

// wantAsInAnImage compares the files in dir with those of an image's layer with the
// content, as containerd extracts it. A layer that containerd refuses cannot be in an
// image.
func wantAsInAnImage(t *testing.T, dir string, layer []byte, unpacked bool) {
	t.Helper()
	image := t.TempDir()
	if _, err := containerdarchive.Apply(context.Background(), image, bytes.NewReader(layer)); err != nil {
		if unpacked {
			t.Fatal(err)
		}
		return
	}
	files := func(dir string) listed {
		got := listing(t, dir)
		delete(got, ".")
		for name, e := range got {
			if e.Kind == "directory" && !unpacked { // it is of now, if no layer describes it
				e.At(epoch)
				got[name] = e
			}
		}
		return got
	}
	if diff := files(dir).Diff(files(image)); diff != "" {
		t.Errorf("the files are not those of an image:\n%s", diff)
	}
}

func TestAnyExtractedTarHasTheFilesOfAnImage(t *testing.T) {
	s := newSite(t)
	names := []string{"a", "a/b", "a/b/c", "d", "./", "./a", "a//b", "d/e", "d/./f", "e", ".wh.a", "a/.wh.b", "x/.wh..wh..opq"}
	types := []byte{tar.TypeReg, tar.TypeReg, tar.TypeDir, tar.TypeDir, tar.TypeSymlink, tar.TypeLink, tar.TypeXGlobalHeader, tar.TypeCont}
	modes := []int64{0o644, 0o755, 0o600, 0o4755, 0o1777, 0o2755, 0}
	xattrs := []string{"user.x", "user.overlay.opaque", "trusted.x", "security.capability"}
	accepted := 0
	for seed := range uint64(600) {
		r := rand.New(rand.NewPCG(seed, 1))
		var members []tar.Header
		for range 1 + r.IntN(5) {
			h := file(names[r.IntN(len(names))], strconv.Itoa(r.IntN(3)))
			h.Typeflag, h.Mode, h.Uid, h.Gid = types[r.IntN(len(types))], modes[r.IntN(len(modes))], r.IntN(3), r.IntN(3)
			if h.Name == "./" {
				h.Typeflag = tar.TypeDir
			}
			switch h.Typeflag {
			case tar.TypeDir, tar.TypeCont:
				h.Linkname = ""
			case tar.TypeSymlink:
				h.Linkname = []string{"a", "/etc", "../..", "d/e"}[r.IntN(4)]
			case tar.TypeLink:
				h.Linkname = names[r.IntN(len(names))]
			case tar.TypeXGlobalHeader:
				h = tar.Header{Typeflag: h.Typeflag, Name: h.Name, PAXRecords: map[string]string{"comment": "x"}}
			}
			if h.Typeflag != tar.TypeXGlobalHeader && r.IntN(6) == 0 {
				h = noted(h, map[string]string{xattrs[r.IntN(len(xattrs))]: "v"})
			}
			members = append(members, h)
		}
		text := archive(t, members...)
		files, err := s.extract(t, s.Tar(t, artifact.CompressionNone, text))
		if err != nil {
			continue
		}
		accepted++
		wantAsInAnImage(t, files, text, false)
		if t.Failed() {
			t.Fatalf("they were of %+v", members)
		}
	}
	if accepted < 50 {
		t.Errorf("only %d have been unpacked", accepted)
	}
}

func TestComparingWithLayersBelowEndsWithTheContext(t *testing.T) {
	p := newPlan(epoch, nil)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	root, err := os.OpenRoot(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	for what, err := range map[string]error{"fit": p.fit(ctx, Target{Upper: root.Name()}), "clear": p.clear(ctx, root)} {
		if !errors.Is(err, context.Canceled) {
			t.Errorf("%s: %v", what, err)
		}
	}
}
