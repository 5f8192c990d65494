// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"archive/tar"
	"context"
	"errors"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	modelspec "github.com/modelpack/model-spec/specs-go/v1"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
	"github.com/artifact-snapshotter/artifact-snapshotter/blobs"
)

var epoch = time.Unix(0, 0)

// chain is snapshots on top of each other, and the differ that fills them.
type chain struct {
	site
	*Applier
	// fs are the directories of the snapshots' files, the uppermost first.
	fs []string
}

// newChain is a chain of snapshots of our own snapshotter, or of another one.
func newChain(t *testing.T, s site, ours bool) *chain {
	t.Helper()
	c := &chain{site: s, Applier: &Applier{
		Snapshots: t.TempDir(), Options: s.options(Modes{}),
		Scratch: func() (string, func(), error) {
			dir, err := os.MkdirTemp(s.root, "scratch-")
			return dir, func() { os.RemoveAll(dir) }, err
		},
	}}
	if !ours {
		c.Snapshots = "/somewhere/else"
	}
	t.Cleanup(func() {
		if left, err := filepath.Glob(filepath.Join(s.root, "scratch-*")); err != nil || len(left) > 0 {
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

// add unpacks a layer into a new snapshot.
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

// dirs are the directories of the snapshots, the lowest first.
func (c *chain) dirs() (dirs []string) {
	for _, fs := range c.fs {
		dirs = append([]string{filepath.Dir(fs)}, dirs...)
	}
	return dirs
}

// show mounts what the snapshots keep.
func (c *chain) show(t *testing.T) (string, error) {
	t.Helper()
	id := digest.FromString("chain")
	a, err := Chain(id, c.dirs())
	if err != nil {
		t.Fatal(err)
	}
	blobs := blobs.Dir(t.TempDir())
	if err := LinkRetained(blobs, c.dirs()); err != nil {
		t.Fatal(err)
	}
	o := c.options(best)
	o.Blobs = blobs
	tree, err := Build(context.Background(), filepath.Join(t.TempDir(), "tree"), a, o)
	if err != nil {
		return "", err
	}
	return mountTree(t, tree), nil
}

// overlay mounts the files of the snapshots.
func (c *chain) overlay(t *testing.T) string {
	t.Helper()
	target := t.TempDir()
	m := mount.Mount{Type: "overlay", Source: "overlay", Options: []string{"ro", "lowerdir=" + strings.Join(append(c.fs, t.TempDir()), ":")}}
	if err := m.Mount(target); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := mount.UnmountAll(target, 0); err != nil {
			t.Error(err)
		}
	})
	return target
}

// descriptor is the layer as a manifest has it.
func descriptor(l artifact.Layer) ocispec.Descriptor {
	d := l.Descriptor
	d.MediaType = modelspec.MediaTypeModelWeight
	switch {
	case l.Format == artifact.FormatRaw:
		d.MediaType = modelspec.MediaTypeModelWeightRaw
		d.Annotations = map[string]string{
			modelspec.AnnotationFilepath:     l.File.Path,
			modelspec.AnnotationFileMetadata: `{"mode": 416, "uid": 1234, "gid": 5678, "mtime": "` + mtime.Format(time.RFC3339Nano) + `"}`,
		}
	case l.Compression != artifact.CompressionNone:
		d.MediaType += "+" + string(l.Compression)
	}
	return d
}

// manifold are layers of every kind, which are also on top of each other.
func (s site) manifold(t *testing.T) []artifact.Layer {
	described := tar.Header{Name: "dir/", Typeflag: tar.TypeDir, Mode: 0o2751, Uid: 7, Gid: 8}
	return []artifact.Layer{
		s.raw(t, "weights", strings.Repeat("weights", 1000)),
		s.tar(t, artifact.CompressionNone, archive(t, described, noted(file("dir/a", "first"), map[string]string{"user.note": "x"}), file("dir/b", "b"))),
		s.tar(t, artifact.CompressionGzip, archive(t, file("dir/a", "second"), tar.Header{Name: "hard", Typeflag: tar.TypeLink, Linkname: "dir/a", Mode: 0o644})),
		s.tar(t, artifact.CompressionZstd, append(gappy(t), archive(t, tar.Header{Name: "link", Typeflag: tar.TypeSymlink, Linkname: "dir/a"})...)),
		s.raw(t, "other/empty", ""),
		s.raw(t, "other/again", strings.Repeat("weights", 1000)),
	}
}

// filled are the layers that are not empty files, which are refused in the snapshots
// of others.
func filled(layers []artifact.Layer) []artifact.Layer {
	return slices.DeleteFunc(layers, func(l artifact.Layer) bool { return l.Descriptor.Size == 0 })
}

// gappy is a sparse member, to be put before an archive.
func gappy(t *testing.T) []byte {
	b := sparse(t, 1<<20)
	return b[:len(b)-1024]
}

// wantTree compares what is at dir with the Tree of the layers.
func (s site) wantTree(t *testing.T, dir string, layers []artifact.Layer) {
	t.Helper()
	a := numbered(layers...)
	a.Created = epoch
	tree, err := Build(context.Background(), filepath.Join(t.TempDir(), "tree"), a, s.options(best))
	if err != nil {
		t.Fatal(err)
	}
	if diff := listing(t, dir).diff(listing(t, mountTree(t, tree))); diff != "" {
		t.Errorf("it is not what a Tree shows:\n%s", diff)
	}
}

func inode(t *testing.T, path string) uint64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Ino
}

func TestLayersOfOurSnapshotsAreKept(t *testing.T) {
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
			kept := blobs.Dir(RetainedDir(dir)).Path(l.Descriptor.Digest)
			if inode(t, kept) != inode(t, s.content.Path(l.Descriptor.Digest)) {
				t.Errorf("layer %d has been copied", i)
			}
		}
	}
	dir, err := c.show(t)
	if err != nil {
		t.Fatal(err)
	}
	s.wantTree(t, dir, layers)
	// Nothing else is needed.
	if err := errors.Join(os.RemoveAll(string(s.content)), os.RemoveAll(filepath.Join(s.root, "blobs"))); err != nil {
		t.Fatal(err)
	}
	again, err := c.show(t)
	if err != nil {
		t.Fatal(err)
	}
	if diff := listing(t, again).diff(listing(t, dir)); diff != "" {
		t.Errorf("without the runtime's blobs:\n%s", diff)
	}
}

func TestLayersAreFilesInTheSnapshotsOfOthers(t *testing.T) {
	requireModes(t, Overlay)
	s := newSite(t)
	c := newChain(t, s, false)
	layers := filled(s.manifold(t))
	c.mustAdd(t, layers...)
	dir := c.overlay(t)
	got := listing(t, dir)
	// A file system without reflinks has hard links, with the attributes of the blob.
	for _, name := range []string{"weights", "other/again"} {
		if hasReflinks(t) {
			continue
		}
		if inode(t, filepath.Join(dir, name)) != inode(t, s.content.Path(layers[0].Descriptor.Digest)) {
			t.Errorf("%s has been copied", name)
		}
		e := got[name]
		e.mode, e.uid, e.gid = 0o640, 1234, 5678
		e.at(mtime)
		got[name] = e
	}
	a := numbered(layers...)
	a.Created = epoch
	tree, err := Build(context.Background(), filepath.Join(t.TempDir(), "tree"), a, s.options(best))
	if err != nil {
		t.Fatal(err)
	}
	if diff := got.diff(listing(t, mountTree(t, tree))); diff != "" {
		t.Errorf("the files are not what a Tree shows:\n%s", diff)
	}
}

func TestFilesOnAnotherFileSystemAreCopied(t *testing.T) {
	s := newSite(t)
	c := newChain(t, s, false)
	layers := filled(s.manifold(t))
	other := t.TempDir()
	tmpfs(t, other, "size=64m")
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

// hasReflinks tells it of the file system that the tests run on.
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

// xfs mounts a file system that has reflinks.
func xfs(t *testing.T) string {
	t.Helper()
	dir, disk := t.TempDir(), filepath.Join(t.TempDir(), "disk")
	if err := errors.Join(os.WriteFile(disk, nil, 0o600), os.Truncate(disk, 512<<20)); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"mkfs.xfs", "-q", disk}, {"mount", "-o", "loop", disk, dir}} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%q: %v: %s", args, err, out)
		}
	}
	t.Cleanup(func() {
		if err := mount.UnmountAll(dir, 0); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func TestFilesAreReflinksWhereTheFileSystemHasThem(t *testing.T) {
	disk := xfs(t)
	s := site{t: t, content: blobs.Dir(filepath.Join(disk, "content")), root: filepath.Join(disk, "root")}
	c := newChain(t, s, false)
	upper := filepath.Join(disk, "upper")
	for _, dir := range []string{filepath.Join(string(s.content), "blobs/sha256"), s.root, upper} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	l := s.raw(t, "dir/weights", strings.Repeat("weights ", 4<<20))
	counted := map[Retention]int64{}
	c.Options.Counted = func(how Retention, n int64) { counted[how] += n }
	if _, err := c.Apply(context.Background(), descriptor(l), []mount.Mount{{Type: "bind", Source: upper, Options: []string{"rbind", "rw"}}}); err != nil {
		t.Fatal(err)
	}
	if got := read(t, upper, "dir/weights"); int64(len(got)) != l.Descriptor.Size || !strings.HasPrefix(got, "weights weights") {
		t.Errorf("the file has %d bytes", len(got))
	}
	if want := map[Retention]int64{Reflinked: l.Descriptor.Size}; !maps.Equal(counted, want) {
		t.Errorf("counted %v, want %v", counted, want)
	}
	wantAttrs(t, filepath.Join(upper, "dir/weights"), 0o640, 1234, 5678, mtime)
	wantAttrs(t, filepath.Join(upper, "dir"), 0o755, 0, 0, epoch)
	wantAttrs(t, upper, 0o755, 0, 0, epoch)
	var before, after unix.Statfs_t
	unix.Sync()
	if err := unix.Statfs(disk, &before); err != nil {
		t.Fatal(err)
	}
	if inode(t, filepath.Join(upper, "dir/weights")) == inode(t, s.content.Path(l.Descriptor.Digest)) {
		t.Fatal("it is a hard link")
	}
	if err := os.Remove(filepath.Join(upper, "dir/weights")); err != nil {
		t.Fatal(err)
	}
	unix.Sync()
	if err := unix.Statfs(disk, &after); err != nil {
		t.Fatal(err)
	}
	if freed := int64(after.Bfree-before.Bfree) * before.Bsize; freed > l.Descriptor.Size/2 {
		t.Errorf("deleting it has freed %d bytes: it was a copy", freed)
	}
}

func TestALayerCanBeAppliedAgain(t *testing.T) {
	for _, ours := range []bool{true, false} {
		s := newSite(t)
		c := newChain(t, s, ours)
		layers := filled(s.manifold(t))
		for _, l := range layers {
			c.mustAdd(t, l)
			// What a killed one may have left, in a snapshot of ours.
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
			dir, err := c.show(t)
			if err != nil {
				t.Fatal(err)
			}
			s.wantTree(t, dir, layers)
		} else if got := read(t, c.overlay(t), "dir/a"); got != "second" {
			t.Errorf("the file reads %q", got)
		}
	}
}

func TestProgressOfApplyIsOfAllBytes(t *testing.T) {
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

// promisedChain is a chain on top of the snapshot of an artifact of one file.
func promisedChain(t *testing.T, s site) (*chain, digest.Digest) {
	t.Helper()
	config := s.blob(t, []byte(`{}`))
	layer := descriptor(s.raw(t, "weights", "weights"))
	manifest := s.blob(t, []byte(`{"schemaVersion": 2, "mediaType": "`+ocispec.MediaTypeImageManifest+`", "config": {"mediaType": "application/x", "digest": "`+
		config.Digest.String()+`", "size": 2}, "layers": [{"mediaType": "application/x", "digest": "`+layer.Digest.String()+`", "size": 7, "annotations": {"`+
		ocispec.AnnotationTitle+`": "weights"}}]}`))
	c := newChain(t, s, true)
	c.prepare(t)
	if err := Promise(filepath.Dir(c.fs[0]), manifest.Digest); err != nil {
		t.Fatal(err)
	}
	return c, manifest.Digest
}

func TestLayersOnTopOfAnArtifactKeepItsLayers(t *testing.T) {
	s := newSite(t)
	c, manifest := promisedChain(t, s)
	c.mustAdd(t, s.raw(t, "more", "more"))
	dir, err := c.show(t)
	if err != nil {
		t.Fatal(err)
	}
	if read(t, dir, "weights") != "weights" || read(t, dir, "more") != "more" {
		t.Error("not all is shown")
	}
	// Once is enough.
	if err := os.Remove(s.content.Path(manifest)); err != nil {
		t.Fatal(err)
	}
	c.mustAdd(t, s.raw(t, "third", "third"))

	c, manifest = promisedChain(t, newSite(t))
	if err := os.Remove(c.content.Path(manifest)); err != nil {
		t.Fatal(err)
	}
	if _, err := c.add(t, c.raw(t, "more", "more")); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), manifest.String()) {
		t.Errorf("without the artifact: %v", err)
	}
}

// Two images may be unpacked on top of one artifact: each promises, and reads.
func TestAPromiseIsReplacedAtOnce(t *testing.T) {
	dir := t.TempDir()
	before, after := digest.FromString("before"), digest.FromString("after")
	if err := Promise(dir, before); err != nil {
		t.Fatal(err)
	}
	reader, err := os.Open(filepath.Join(dir, promiseFile))
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	if err := Promise(dir, after); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(reader); err != nil || string(got) != before.String() {
		t.Errorf("who reads meanwhile gets %q, %v; want %s", got, err, before)
	}
	if got, err := promised(dir); err != nil || got != after {
		t.Errorf("who reads afterwards gets %q, %v; want %s", got, err, after)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
		t.Errorf("left are %v, %v; want the promise alone", entries, err)
	}
}

func TestOnTopOfOrdinaryLayersThereAreFiles(t *testing.T) {
	s := newSite(t)
	c := newChain(t, s, true)
	c.prepare(t) // keeps nothing
	if err := os.WriteFile(filepath.Join(c.fs[0], "ordinary"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	c.mustAdd(t, s.raw(t, "weights", "weights"))
	if got := read(t, c.fs[0], "weights"); got != "weights" {
		t.Errorf("the file reads %q", got)
	}
	if _, _, err := LoadRetained(filepath.Dir(c.fs[0])); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the layer is kept: %v", err)
	}
}

func TestWhatAnotherVersionKeepsIsNotRead(t *testing.T) {
	s := newSite(t)
	c := newChain(t, s, true)
	c.mustAdd(t, s.raw(t, "f", "x"))
	file := filepath.Join(RetainedDir(filepath.Dir(c.fs[0])), retainedFile)
	if err := os.WriteFile(file, []byte(strings.Replace(read(t, file), `"format":1`, `"format":2`, 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, err := LoadRetained(filepath.Dir(c.fs[0])); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("%v", err)
	}
}
