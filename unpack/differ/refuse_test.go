// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package differ

import (
	"archive/tar"
	"context"
	"errors"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	modelspec "github.com/modelpack/model-spec/specs-go/v1"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
	"github.com/artifact-snapshotter/artifact-snapshotter/unpack/internal/unpacktest"
)

func TestALayerThatBreaksARuleLeavesNothing(t *testing.T) {
	symlinked := tar.Header{Name: "link", Typeflag: tar.TypeSymlink, Linkname: "/etc"}
	for name, members := range map[string][]tar.Header{
		"dot dot, absolute": {file("f", "x"), file("/../etc/passwd", "x")},
		"dot dot":           {file("f", "x"), file("a/../../b", "x")},
		"through a symlink": {symlinked, file("link/passwd", "x")},
		"a device":          {file("f", "x"), {Name: "c", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 3}},
		"file as directory": {file("a", "x"), file("a/b", "x")},
	} {
		t.Run(name, func(t *testing.T) {
			for _, ours := range []bool{true, false} {
				s := newSite(t)
				c := newChain(t, s, ours)
				l := s.Tar(t, artifact.CompressionGzip, archive(t, members...))
				_, err := c.add(t, l)
				if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "layer 0 (") || strings.Count(err.Error(), "layer 0 (") != 1 {
					t.Errorf("%v, want one about the layer", err)
				}
				dir := filepath.Dir(c.fs[0])
				if err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
					if err == nil && path != dir && path != c.fs[0] {
						t.Errorf("%s is left", path)
					}
					return err
				}); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

// What is refused between the layers of an artifact is refused between snapshots.
func TestALayerMustFitTheLayersBelow(t *testing.T) {
	symlinked := tar.Header{Name: "link", Typeflag: tar.TypeSymlink, Linkname: "/etc"}
	for name, headers := range map[string][2]tar.Header{
		"through a symlink":   {symlinked, file("link/passwd", "x")},
		"over a symlink":      {symlinked, {Name: "link/", Typeflag: tar.TypeDir, Mode: 0o755}},
		"file as directory":   {file("a", "x"), file("a/b", "x")},
		"directory as a file": {file("a/b", "x"), file("a", "x")},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t)
			lower := s.Tar(t, artifact.CompressionNone, archive(t, headers[0]))
			upper := s.Tar(t, artifact.CompressionNone, archive(t, headers[1]))
			c := newChain(t, s, false)
			c.mustAdd(t, lower)
			if _, err := c.add(t, upper); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "layer 1 (") {
				t.Errorf("in the snapshots of others: %v", err)
			}
			if files, err := os.ReadDir(c.fs[0]); err != nil || len(files) > 0 {
				t.Errorf("it has made %v, %v", files, err)
			}
			c = newChain(t, s, true)
			c.mustAdd(t, lower, upper)
			if _, err := c.mountRetained(t); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "layer 1 (") {
				t.Errorf("in ours: %v", err)
			}
		})
	}
}

func TestEntriesHiddenByOverlayfsDoNotCount(t *testing.T) {
	s := newSite(t)
	c := newChain(t, s, false)
	c.mustAdd(t, s.Tar(t, artifact.CompressionNone, archive(t,
		tar.Header{Name: "a", Typeflag: tar.TypeSymlink, Linkname: "/etc"}, tar.Header{Name: "b", Typeflag: tar.TypeSymlink, Linkname: "/etc"})))
	// Whiteouts, as in a layer of an image.
	c.prepare(t)
	if err := errors.Join(unix.Mknod(filepath.Join(c.fs[0], "a"), unix.S_IFCHR, 0), unix.Mknod(filepath.Join(c.fs[0], "b"), unix.S_IFCHR, 0)); err != nil {
		t.Fatal(err)
	}
	c.prepare(t)
	if err := os.Mkdir(filepath.Join(c.fs[0], "b"), 0o700); err != nil {
		t.Fatal(err)
	}
	c.mustAdd(t, s.Tar(t, artifact.CompressionNone, archive(t, file("a/passwd", "x"), file("b/passwd", "y"))))
	dir := c.overlay(t)
	if a, b := read(t, dir, "a/passwd"), read(t, dir, "b/passwd"); a != "x" || b != "y" {
		t.Errorf("%q and %q", a, b)
	}
	if fi, err := os.Stat(filepath.Join(dir, "b")); err != nil || fi.Mode().Perm() != 0o700 {
		t.Errorf("a directory that no layer describes has changed: %v, %v", fi, err)
	}
}

func TestAnAttributeThatOverlayfsObeysIsRefused(t *testing.T) {
	s := newSite(t)
	c := newChain(t, s, false)
	l := s.Tar(t, artifact.CompressionNone, archive(t, unpacktest.WithXattrs(file("f", "x"), map[string]string{"user.overlay.whiteout": "y"})))
	mounts := c.prepare(t)
	mounts[0] = mount.Mount{Type: "overlay", Options: []string{"upperdir=" + c.fs[0], "userxattr"}}
	if _, err := c.Apply(context.Background(), descriptor(l), mounts); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "user.overlay.whiteout") {
		t.Errorf("%v", err)
	}
}

func TestErrorsOfApply(t *testing.T) {
	s := newSite(t)
	l := s.Raw(t, "f", "bytes")
	good := t.TempDir()
	bind := []mount.Mount{{Type: "bind", Source: good, Options: []string{"rw", "rbind"}}}
	changed := func(change func(*ocispec.Descriptor)) ocispec.Descriptor {
		d := descriptor(l)
		d.Annotations = maps.Clone(d.Annotations)
		change(&d)
		return d
	}
	for name, test := range map[string]struct {
		desc   ocispec.Descriptor
		mounts []mount.Mount
		kind   func(error) bool
		want   string
	}{
		"no mounts":        {descriptor(l), nil, errdefs.IsNotImplemented, "one writable bind or overlay mount"},
		"two mounts":       {descriptor(l), append(bind, bind...), errdefs.IsNotImplemented, "one writable bind or overlay mount"},
		"read-only":        {descriptor(l), []mount.Mount{{Type: "bind", Source: good, Options: []string{"ro"}}}, errdefs.IsNotImplemented, "one writable bind or overlay mount"},
		"another kind":     {descriptor(l), []mount.Mount{{Type: "erofs", Source: good}}, errdefs.IsNotImplemented, "erofs"},
		"a relative path":  {descriptor(l), []mount.Mount{{Type: "bind", Source: "fs"}}, errdefs.IsNotImplemented, "fs"},
		"no upperdir":      {descriptor(l), []mount.Mount{{Type: "overlay", Options: []string{"lowerdir=" + good}}}, errdefs.IsNotImplemented, "overlay"},
		"no blob":          {changed(func(d *ocispec.Descriptor) { d.Digest = digest.FromString("none") }), bind, errdefs.IsNotFound, "pull it again"},
		"another size":     {changed(func(d *ocispec.Descriptor) { d.Size++ }), bind, errdefs.IsFailedPrecondition, "5 bytes"},
		"no digest":        {changed(func(d *ocispec.Descriptor) { d.Digest = "x" }), bind, errdefs.IsInvalidArgument, "digest"},
		"a hostile path":   {changed(func(d *ocispec.Descriptor) { d.Annotations[modelspec.AnnotationFilepath] = "../f" }), bind, errdefs.IsInvalidArgument, `..`},
		"no empty content": {changed(func(d *ocispec.Descriptor) { d.Size = 0 }), bind, errdefs.IsInvalidArgument, "0 bytes"},
	} {
		t.Run(name, func(t *testing.T) {
			ours := newChain(t, s, true)
			for _, c := range []*chain{newChain(t, s, false), ours} {
				mounts := test.mounts
				if c == ours && len(mounts) == 1 && mounts[0].Source == good && mounts[0].Type == "bind" && !mounts[0].ReadOnly() {
					mounts = c.prepare(t)
				}
				if _, err := c.Apply(context.Background(), test.desc, mounts); !test.kind(err) || !strings.Contains(err.Error(), test.want) {
					t.Errorf("%v, want one that says %q", err, test.want)
				}
			}
			if files, err := os.ReadDir(good); err != nil || len(files) > 0 {
				t.Errorf("it has made %v, %v", files, err)
			}
		})
	}
}
