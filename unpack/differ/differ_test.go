// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package differ

import (
	"archive/tar"
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
	"github.com/artifact-snapshotter/artifact-snapshotter/blobs"
	"github.com/artifact-snapshotter/artifact-snapshotter/unpack"
	"github.com/artifact-snapshotter/artifact-snapshotter/unpack/internal/unpacktest"
)

var (
	epoch         = time.Unix(0, 0)
	archive, file = unpacktest.Archive, unpacktest.File
	listing, read = unpacktest.List, unpacktest.Read
	descriptor    = unpacktest.Descriptor
)

// site is a directory of blobs and one for trees.
type site struct{ unpacktest.Site }

func newSite(t *testing.T) site {
	t.Helper()
	return site{unpacktest.NewSite(t)}
}

func (s site) options(modes unpack.Modes) unpack.Options {
	return unpack.Options{Modes: modes, Blobs: s.Content, Shared: blobs.Dir(s.Root), Budget: unpack.NewBudget(unpack.DefaultLimits)}
}

// mountTree builds the tree of a, whose blobs are in from, and mounts it.
func (s site) mountTree(t *testing.T, a *artifact.Artifact, from blobs.Source) (string, error) {
	t.Helper()
	modes, err := unpack.Probe(t.Context(), s.Root, unpack.Modes{}, false)
	if modes == (unpack.Modes{}) {
		t.Fatal(err)
	}
	o := s.options(modes)
	o.Blobs = from
	tree, err := unpack.Build(t.Context(), filepath.Join(t.TempDir(), "tree"), a, o)
	if err != nil {
		return "", err
	}
	target := t.TempDir()
	if err := tree.Mount(t.Context(), target); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := mount.UnmountAll(target, 0); err != nil {
			t.Error(err)
		}
	})
	return target, nil
}

// chain is a chain of snapshots with the differ that fills them.
type chain struct {
	site
	*Applier
	// fs are the directories of the snapshots' files, the uppermost first.
	fs []string
}

// newChain returns a chain of snapshots of our own snapshotter, or of another one.
func newChain(t *testing.T, s site, ours bool) *chain {
	t.Helper()
	c := &chain{site: s, Applier: &Applier{
		Snapshots: t.TempDir(), Options: s.options(unpack.Modes{}),
		Scratch: func() (string, func(), error) {
			dir, err := os.MkdirTemp(s.Root, "scratch-")
			return dir, func() { os.RemoveAll(dir) }, err
		},
	}}
	if !ours {
		c.Snapshots = "/somewhere/else"
	}
	t.Cleanup(func() {
		if left, err := filepath.Glob(filepath.Join(s.Root, "scratch-*")); err != nil || len(left) > 0 {
			t.Errorf("left behind: %v, %v", left, err)
		}
	})
	return c
}

// prepare adds a snapshot and returns its mounts, as overlayfs does.
func (c *chain) prepare(t *testing.T) []mount.Mount {
	t.Helper()
	root := c.Snapshots
	if root == "/somewhere/else" {
		root = t.TempDir()
	}
	dir := filepath.Join(root, strconv.Itoa(len(c.fs)), "fs")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	c.fs = append([]string{dir}, c.fs...)
	return c.mounts()
}

func (c *chain) mounts() []mount.Mount {
	if len(c.fs) == 1 {
		return []mount.Mount{{Type: "bind", Source: c.fs[0], Options: []string{"rw", "rbind"}}}
	}
	return []mount.Mount{{Type: "overlay", Source: "overlay", Options: []string{
		"index=off", "workdir=" + filepath.Join(filepath.Dir(c.fs[0]), "work"), "upperdir=" + c.fs[0], "lowerdir=" + strings.Join(c.fs[1:], ":"),
	}}}
}

// add applies a layer to a new snapshot.
func (c *chain) add(t *testing.T, l artifact.Layer) (ocispec.Descriptor, error) {
	t.Helper()
	return c.Apply(context.Background(), descriptor(l), c.prepare(t))
}

func (c *chain) mustAdd(t *testing.T, layers ...artifact.Layer) {
	t.Helper()
	for _, l := range layers {
		got, err := c.add(t, l)
		if err != nil {
			t.Fatal(err)
		}
		want := l.DiffID
		if l.Format == artifact.FormatRaw {
			want = l.Descriptor.Digest
		}
		if got.Digest != want || got.MediaType != ocispec.MediaTypeImageLayer || l.Compression == artifact.CompressionNone && got.Size != l.Descriptor.Size {
			t.Errorf("the content of %s is %+v, want the digest %s", l.Descriptor.Digest, got, want)
		}
	}
}

// dirs returns the directories of the snapshots, the lowest first.
func (c *chain) dirs() (dirs []string) {
	for _, fs := range c.fs {
		dirs = append([]string{filepath.Dir(fs)}, dirs...)
	}
	return dirs
}

// mountRetained mounts the layers that the snapshots retain.
func (c *chain) mountRetained(t *testing.T) (string, error) {
	t.Helper()
	a, err := Chain(digest.FromString("chain"), c.dirs())
	if err != nil {
		t.Fatal(err)
	}
	return c.mountTree(t, a, Contents(c.dirs()))
}

// overlay mounts the files of the snapshots.
func (c *chain) overlay(t *testing.T) string {
	t.Helper()
	target := t.TempDir()
	unpacktest.Mount(t, mount.Mount{Type: "overlay", Source: "overlay", Options: []string{"ro", "lowerdir=" + strings.Join(append(c.fs, t.TempDir()), ":")}}, target)
	return target
}

// manifold returns layers of every kind, some of which replace files of others.
func (s site) manifold(t *testing.T) []artifact.Layer {
	described := tar.Header{Name: "dir/", Typeflag: tar.TypeDir, Mode: 0o2751, Uid: 7, Gid: 8}
	return []artifact.Layer{
		s.Raw(t, "weights", strings.Repeat("weights", 1000)),
		s.Tar(t, artifact.CompressionNone, archive(t, described, unpacktest.WithXattrs(file("dir/a", "first"), map[string]string{"user.note": "x"}), file("dir/b", "b"))),
		s.Tar(t, artifact.CompressionGzip, archive(t, file("dir/a", "second"), tar.Header{Name: "hard", Typeflag: tar.TypeLink, Linkname: "dir/a", Mode: 0o644})),
		s.Tar(t, artifact.CompressionZstd, slices.Concat(unpacktest.SparseForms["PAX 1.0"]("sparse", 1<<20), archive(t, tar.Header{Name: "link", Typeflag: tar.TypeSymlink, Linkname: "dir/a"}))),
		s.Raw(t, "other/empty", ""),
		s.Raw(t, "other/again", strings.Repeat("weights", 1000)),
	}
}

// filled returns the layers without empty files, which are refused in the snapshots of
// others.
func filled(layers []artifact.Layer) []artifact.Layer {
	return slices.DeleteFunc(layers, func(l artifact.Layer) bool { return l.Descriptor.Size == 0 })
}

// treeOf mounts the tree of the layers.
func (s site) treeOf(t *testing.T, layers []artifact.Layer) string {
	t.Helper()
	a := unpacktest.Numbered(layers...)
	a.Created = epoch
	dir, err := s.mountTree(t, a, s.Content)
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// wantTree compares what is at dir with the tree of the layers.
func (s site) wantTree(t *testing.T, dir string, layers []artifact.Layer) {
	t.Helper()
	if diff := listing(t, dir).Diff(listing(t, s.treeOf(t, layers))); diff != "" {
		t.Errorf("it differs from the tree:\n%s", diff)
	}
}

func TestOurSnapshotsRetainLayers(t *testing.T) {
	s := newSite(t)
	c := newChain(t, s, true)
	layers := s.manifold(t)
	c.mustAdd(t, layers...)
	for i, l := range layers {
		dir := c.dirs()[i]
		if files, err := os.ReadDir(filepath.Join(dir, "fs")); err != nil || len(files) > 0 {
			t.Errorf("layer %d has made %v, %v", i, files, err)
		}
		if entries, err := os.ReadDir(dir); err != nil || len(entries) != 2 {
			t.Errorf("layer %d has left %v, %v", i, entries, err)
		}
		if l.Compression == artifact.CompressionNone && l.Descriptor.Size > 0 {
			retained := blobs.Dir(RetainedDir(dir)).Path(l.Descriptor.Digest)
			if unpacktest.Inode(t, retained) != unpacktest.Inode(t, s.Content.Path(l.Descriptor.Digest)) {
				t.Errorf("layer %d has been copied", i)
			}
		}
	}
	dir, err := c.mountRetained(t)
	if err != nil {
		t.Fatal(err)
	}
	s.wantTree(t, dir, layers)
	// They need nothing else.
	if err := errors.Join(os.RemoveAll(string(s.Content)), os.RemoveAll(filepath.Join(s.Root, "blobs"))); err != nil {
		t.Fatal(err)
	}
	again, err := c.mountRetained(t)
	if err != nil {
		t.Fatal(err)
	}
	if diff := listing(t, again).Diff(listing(t, dir)); diff != "" {
		t.Errorf("without the runtime's blobs:\n%s", diff)
	}
}

func TestSnapshotsOfOthersGetFiles(t *testing.T) {
	s := newSite(t)
	if err := unpack.Try(t.Context(), s.Root, unpack.Overlay, false); err != nil {
		t.Skipf("NOT TESTED: trees have the packed attributes in the mode overlay alone: %v", err)
	}
	c := newChain(t, s, false)
	layers := filled(s.manifold(t))
	c.mustAdd(t, layers...)
	dir := c.overlay(t)
	got := listing(t, dir)
	// On a file system without reflinks they are hard links, with the attributes of the
	// blob.
	for _, name := range []string{"weights", "other/again"} {
		if hasReflinks(t) {
			continue
		}
		if unpacktest.Inode(t, filepath.Join(dir, name)) != unpacktest.Inode(t, s.Content.Path(layers[0].Descriptor.Digest)) {
			t.Errorf("%s has been copied", name)
		}
		e := got[name]
		e.Mode, e.UID, e.GID = 0o640, 1234, 5678
		e.At(unpacktest.ModTime)
		got[name] = e
	}
	if diff := got.Diff(listing(t, s.treeOf(t, layers))); diff != "" {
		t.Errorf("the files differ from the tree:\n%s", diff)
	}
}

func TestFilesOnAnotherFileSystemAreCopied(t *testing.T) {
	s := newSite(t)
	c := newChain(t, s, false)
	layers := filled(s.manifold(t))
	other := t.TempDir()
	unpacktest.Mount(t, mount.Mount{Type: "tmpfs", Source: "tmpfs", Options: []string{"size=64m"}}, other)
	if err := unix.Setxattr(other, "user.note", nil, 0); errors.Is(err, unix.EOPNOTSUPP) {
		t.Skip("NOT TESTED: this kernel's tmpfs does not have the attributes of users, of Linux 6.6")
	}
	for i, l := range layers {
		dir := filepath.Join(other, strconv.Itoa(i), "fs")
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		c.fs = append([]string{dir}, c.fs...)
		if _, err := c.Apply(context.Background(), descriptor(l), c.mounts(), diff.WithSyncFs(true)); err != nil {
			t.Fatal(err)
		}
	}
	s.wantTree(t, c.overlay(t), layers)
}

// hasReflinks reports whether the file system of the tests has reflinks.
func hasReflinks(t *testing.T) bool {
	t.Helper()
	dir := t.TempDir()
	var files [2]*os.File
	for i, name := range []string{"from", "to"} {
		var err error
		if files[i], err = os.Create(filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
		defer files[i].Close()
	}
	return unix.IoctlFileClone(int(files[1].Fd()), int(files[0].Fd())) == nil
}

func TestALayerCanBeAppliedAgain(t *testing.T) {
	for _, ours := range []bool{true, false} {
		s := newSite(t)
		c := newChain(t, s, ours)
		layers := filled(s.manifold(t))
		for _, l := range layers {
			c.mustAdd(t, l)
			// This is what a killed process may have left in a snapshot of ours.
			left := filepath.Join(filepath.Dir(c.fs[0]), newRetainedDir)
			if err := os.MkdirAll(filepath.Join(left, "data", "0"), 0o700); err != nil {
				t.Fatal(err)
			}
			if _, err := c.Apply(context.Background(), descriptor(l), c.mounts()); err != nil {
				t.Errorf("again, ours %v: %v", ours, err)
			}
			if _, err := os.Lstat(left); ours && !errors.Is(err, os.ErrNotExist) {
				t.Errorf("what the killed one has left is there: %v", err)
			}
		}
		if ours {
			dir, err := c.mountRetained(t)
			if err != nil {
				t.Fatal(err)
			}
			s.wantTree(t, dir, layers)
		} else if got := read(t, c.overlay(t), "dir/a"); got != "second" {
			t.Errorf("the file reads %q", got)
		}
	}
}

func TestProgressCountsAllBytes(t *testing.T) {
	s := newSite(t)
	for _, l := range filled(s.manifold(t)) {
		for _, ours := range []bool{true, false} {
			var last int64
			c := newChain(t, s, ours)
			progress := diff.WithProgress(func(_ ocispec.Descriptor, n int64) { last = n })
			if _, err := c.Apply(context.Background(), descriptor(l), c.prepare(t), progress); err != nil {
				t.Fatal(err)
			}
			if last != l.Descriptor.Size {
				t.Errorf("layer of %d bytes, ours %v: %d are done", l.Descriptor.Size, ours, last)
			}
		}
	}
}

func TestOnOrdinaryLayersThereAreFiles(t *testing.T) {
	s := newSite(t)
	c := newChain(t, s, true)
	c.prepare(t) // keeps nothing
	if err := os.WriteFile(filepath.Join(c.fs[0], "ordinary"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	c.mustAdd(t, s.Raw(t, "weights", "weights"))
	if got := read(t, c.fs[0], "weights"); got != "weights" {
		t.Errorf("the file reads %q", got)
	}
	if _, _, err := LoadRetained(filepath.Dir(c.fs[0])); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the layer is retained: %v", err)
	}
}

func TestLayersRetainedByAnotherVersionAreNotRead(t *testing.T) {
	s := newSite(t)
	c := newChain(t, s, true)
	c.mustAdd(t, s.Raw(t, "f", "x"))
	file := filepath.Join(RetainedDir(filepath.Dir(c.fs[0])), retainedFile)
	if err := os.WriteFile(file, []byte(strings.Replace(read(t, file), `"format":1`, `"format":2`, 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, err := LoadRetained(filepath.Dir(c.fs[0])); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("%v", err)
	}
}
