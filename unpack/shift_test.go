// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"archive/tar"
	"context"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
)

func TestOwnersAreShiftedForAUserNamespace(t *testing.T) {
	owners := IDMap{UID: "0:200000:65536", GID: "0:300000:65536"}
	for _, how := range []string{"from the first tree", "from the artifact", "from the artifact, as an image"} {
		t.Run(how, func(t *testing.T) {
			s := newSite(t)
			inside, outside := s.Raw(t, "inside", "1"), s.Raw(t, "outside", "2")
			outside.File.UID, outside.File.GID = 70000, 70000
			noted := file("tarred", "3")
			noted.Format = tar.FormatPAX
			noted.PAXRecords = map[string]string{"SCHILY.xattr.user.note": "kept"}
			a := numbered(inside, outside, s.Raw(t, "same", "1"), s.Raw(t, "empty", ""), s.Tar(t, artifact.CompressionGzip, archive(t, noted,
				tar.Header{Name: "hard", Typeflag: tar.TypeLink, Linkname: "tarred"},
				tar.Header{Name: "sym", Typeflag: tar.TypeSymlink, Linkname: "tarred", Uid: 1},
				tar.Header{Name: "sticky/", Typeflag: tar.TypeDir, Mode: 0o1750, Gid: 2})))
			o := s.options(Modes{Overlay, Extract})
			var tree *Tree
			var err error
			if how != "from the first tree" {
				o.Owners = owners
				if how == "from the artifact, as an image" {
					o.Modes = here(best)
				}
				tree, err = Build(context.Background(), filepath.Join(s.Root, "tree"), a, o)
			} else {
				var plain *Tree
				if plain, err = Build(context.Background(), filepath.Join(s.Root, "plain"), a, o); err != nil {
					t.Fatal(err)
				}
				o.Owners = owners
				tree, err = plain.Shift(context.Background(), filepath.Join(s.Root, "tree"), o)
				if err := os.RemoveAll(filepath.Join(s.Root, "plain")); err != nil { // not needed any more
					t.Fatal(err)
				}
			}
			if err != nil {
				t.Fatal(err)
			}
			dir := mountTree(t, tree)
			wantAttrs(t, dir, 0o755, 200000, 300000, created)
			wantAttrs(t, filepath.Join(dir, "inside"), 0o640, 201234, 305678, mtime)
			wantAttrs(t, filepath.Join(dir, "outside"), 0o640, overflowID, overflowID, mtime)
			wantAttrs(t, filepath.Join(dir, "tarred"), 0o644, 200000, 300000, mtime)
			wantAttrs(t, filepath.Join(dir, "sym"), 0o777, 200001, 300000, mtime)
			wantAttrs(t, filepath.Join(dir, "sticky"), 0o1750, 200000, 300002, mtime)
			for name, want := range map[string]string{"inside": "1", "outside": "2", "same": "1", "empty": "", "tarred": "3", "hard": "3", "sym": "3"} {
				if got := read(t, dir, name); got != want {
					t.Errorf("%s holds %q, want %q", name, got, want)
				}
			}
			note := make([]byte, 10)
			if n, err := unix.Lgetxattr(filepath.Join(dir, "hard"), "user.note", note); err != nil || string(note[:n]) != "kept" {
				t.Errorf("user.note is %q, %v", note[:max(n, 0)], err)
			}
		})
	}
}

func TestAShiftCopiesNoContent(t *testing.T) {
	s := newSite(t)
	big := make([]byte, 4<<20)
	rand.NewChaCha8([32]byte{}).Read(big)
	layers := []artifact.Layer{
		s.Raw(t, "raw", string(big)), s.Tar(t, artifact.CompressionZstd, archive(t, file("tarred", string(big)))),
	}
	plain, err := s.build(Modes{Overlay, Extract}, layers...)
	if err != nil {
		t.Fatal(err)
	}
	o := s.options(plain.Modes)
	o.Owners = IDMap{UID: "0:1:10", GID: "0:1:10"}
	shifted, err := plain.Shift(context.Background(), filepath.Join(s.Root, "shifted"), o)
	if err != nil {
		t.Fatal(err)
	}
	if shifted.Size > 64<<10 {
		t.Errorf("the shifted tree takes %d bytes", shifted.Size)
	}
	if _, err := s.buildAs("image", best, layers...); err != nil {
		t.Fatal(err)
	}
	again, err := s.buildAs("again", best, layers...)
	if err != nil {
		t.Fatal(err)
	}
	if again.Size > 64<<10 {
		t.Errorf("the second image takes %d bytes", again.Size)
	}
	for _, modes := range []Modes{best, {Link, Extract}} {
		linked, err := s.buildAs(modes.String(), modes, s.Raw(t, "raw", "x"))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := linked.Shift(context.Background(), filepath.Join(s.Root, "no"), o); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("shifting a tree of the modes %s: %v", modes, err)
		}
	}
}

func TestMalformedIDMaps(t *testing.T) {
	for _, m := range []string{"x", "0:1", "0:1:2:3", "0:1:0", "4294967295:0:2", "-1:0:1", ","} {
		if _, err := (IDMap{UID: m}).parse(); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", m, err)
		}
	}
}
