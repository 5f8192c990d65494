// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"archive/tar"
	"context"
	"errors"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
	"github.com/artifact-snapshotter/artifact-snapshotter/blobs"
	"github.com/artifact-snapshotter/artifact-snapshotter/unpack/internal/unpacktest"
)

// Helpers that the tests of unpack/differ also use.
var (
	created, mtime                 = unpacktest.Created, unpacktest.ModTime
	archive, file, noted           = unpacktest.Archive, unpacktest.File, unpacktest.WithXattrs
	record, member512, endMark     = unpacktest.Record, unpacktest.Member, unpacktest.EndMark
	sparseForms, checksum          = unpacktest.SparseForms, unpacktest.Checksum
	numbered, listing, read, inode = unpacktest.Numbered, unpacktest.List, unpacktest.Read, unpacktest.Inode
)

type (
	shown    = unpacktest.Entry
	listed   = unpacktest.Listing
	fragment = unpacktest.Fragment
)

func fragmentAt(offset int64, data string) fragment { return fragment{Offset: offset, Data: data} }

// site is a directory of blobs and one for trees, of the test t.
type site struct {
	unpacktest.Site
	t *testing.T
}

func newSite(t *testing.T) site {
	t.Helper()
	return site{unpacktest.NewSite(t), t}
}

func (s site) options(r Modes) Options {
	s.t.Helper()
	r = here(r)
	requireModes(s.t, r.Raw, r.Tar)
	return Options{Modes: r, Blobs: s.Content, Shared: blobs.Dir(s.Root), Budget: NewBudget(DefaultLimits)}
}

func (s site) build(r Modes, layers ...artifact.Layer) (*Tree, error) {
	return s.buildAs("tree", r, layers...)
}

func (s site) buildAs(name string, r Modes, layers ...artifact.Layer) (*Tree, error) {
	return Build(context.Background(), filepath.Join(s.Root, name), numbered(layers...), s.options(r))
}

// mounted builds and mounts a tree, and returns where.
func (s site) mounted(t *testing.T, r Modes, layers ...artifact.Layer) string {
	t.Helper()
	tree, err := s.build(r, layers...)
	if err != nil {
		t.Fatal(err)
	}
	return mountTree(t, tree)
}

func mountTree(t *testing.T, tree *Tree) string {
	t.Helper()
	target := t.TempDir()
	if err := tree.Mount(context.Background(), target); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := mount.UnmountAll(target, 0); err != nil {
			t.Error(err)
		}
	})
	return target
}

func wantAttrs(t *testing.T, path string, mode uint32, uid, gid uint32, mod time.Time) {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		t.Fatal(err)
	}
	if st.Mode&0o7777 != mode || st.Uid != uid || st.Gid != gid || !time.Unix(st.Mtim.Unix()).Equal(mod) {
		t.Errorf("%s: %04o %d:%d %v, want %04o %d:%d %v", path, st.Mode&0o7777, st.Uid, st.Gid,
			time.Unix(st.Mtim.Unix()).UTC(), mode, uid, gid, mod)
	}
}

func TestRawLayersAreMountedWithoutACopy(t *testing.T) {
	big := strings.Repeat("weights", 1<<17)
	for _, mode := range everyPair {
		t.Run(mode.String(), func(t *testing.T) {
			s := newSite(t)
			dir := s.mounted(t, mode,
				s.Raw(t, "a/b/weights with space é.bin", big),
				s.Raw(t, "again", big),
				s.Raw(t, "empty", ""),
			)
			if got := read(t, dir, "a/b/weights with space é.bin"); got != big {
				t.Error("wrong content")
			}
			if got := read(t, dir, "again"); got != big {
				t.Error("wrong content of the second layer with the same digest")
			}
			if got := read(t, dir, "empty"); got != "" {
				t.Errorf("the empty file holds %q", got)
			}
			wantAttrs(t, filepath.Join(dir, "a/b"), 0o755, 0, 0, created)
			wantAttrs(t, dir, 0o755, 0, 0, created)
			wantAttrs(t, filepath.Join(dir, "empty"), 0o640, 1234, 5678, mtime)
			if mode.Raw != Link {
				wantAttrs(t, filepath.Join(dir, "again"), 0o640, 1234, 5678, mtime)
			}
			if err := os.WriteFile(filepath.Join(dir, "again"), nil, 0o600); !errors.Is(err, unix.EROFS) {
				t.Errorf("writing gives %v, want %v", err, unix.EROFS)
			}
			tree, err := Load(filepath.Join(s.Root, "tree"))
			if err != nil {
				t.Fatal(err)
			}
			if mode.Raw != Copy && tree.Size > 64<<10 {
				t.Errorf("the tree takes %d bytes of disk: something was copied", tree.Size)
			}
		})
	}
}

func TestMountsAreReadOnlyNosuidNodev(t *testing.T) {
	for _, mode := range everyPair {
		for _, layer := range []func(site) artifact.Layer{
			func(s site) artifact.Layer { return s.Raw(t, "f", "x") },
			func(s site) artifact.Layer { return s.Tar(t, artifact.CompressionNone, archive(t, file("f", "x"))) },
		} {
			s := newSite(t)
			l := layer(s)
			shared, pod := s.mounted(t, mode, l), t.TempDir()
			unpacktest.Mount(t, Bind(shared), pod)
			for _, dir := range []string{shared, pod} {
				var st unix.Statfs_t
				if err := unix.Statfs(dir, &st); err != nil {
					t.Fatal(err)
				}
				if want := int64(unix.ST_RDONLY | unix.ST_NOSUID | unix.ST_NODEV); st.Flags&want != want {
					t.Errorf("%s, %s: the flags %#x of the mount at %s lack some of %#x", mode, l.Format, st.Flags, dir, want)
				}
			}
		}
	}
}

func TestTarsAreExtracted(t *testing.T) {
	members := []tar.Header{
		{Name: "./", Typeflag: tar.TypeDir, Mode: 0o750, Uid: 7},
		{Name: "d/", Typeflag: tar.TypeDir, Mode: 0o1711, Uid: 1, Gid: 2},
		{Name: "d/f", Linkname: "hello", Mode: 0o4755, Uid: 3, Gid: 4},
		{Name: "implied/parent/g", Linkname: "g", Mode: 0o600},
		{Name: "link", Typeflag: tar.TypeSymlink, Linkname: "../../etc/passwd", Uid: 5, Gid: 6},
		{Name: "hard", Typeflag: tar.TypeLink, Linkname: "d/f"},
	}
	for _, c := range []artifact.Compression{artifact.CompressionNone, artifact.CompressionGzip, artifact.CompressionZstd} {
		t.Run("compression "+string(c), func(t *testing.T) {
			s := newSite(t)
			dir := s.mounted(t, best, s.Tar(t, c, archive(t, members...)))
			if got := read(t, dir, "d/f"); got != "hello" {
				t.Errorf("d/f holds %q", got)
			}
			if got := read(t, dir, "hard"); got != "hello" {
				t.Errorf("the hard link holds %q", got)
			}
			wantAttrs(t, dir, 0o750, 7, 0, mtime)
			wantAttrs(t, filepath.Join(dir, "d"), 0o1711, 1, 2, mtime)
			wantAttrs(t, filepath.Join(dir, "d/f"), 0o755, 3, 4, mtime) // setuid is cleared
			wantAttrs(t, filepath.Join(dir, "implied/parent"), 0o755, 0, 0, created)
			wantAttrs(t, filepath.Join(dir, "link"), 0o777, 5, 6, mtime)
			if got, err := os.Readlink(filepath.Join(dir, "link")); err != nil || got != "../../etc/passwd" {
				t.Errorf("the symlink points to %q (%v)", got, err)
			}
		})
	}
}

func TestProgressCountsAllBytes(t *testing.T) {
	s := newSite(t)
	zstd := s.Tar(t, artifact.CompressionZstd, archive(t, file("g", "tar")))
	a := numbered(s.Raw(t, "f", "raw"), zstd, s.Tar(t, artifact.CompressionNone, archive(t, file("h", "tar"))), zstd)
	var done atomic.Int64
	var total int64
	for _, l := range a.Layers {
		total += l.Descriptor.Size
	}
	o := s.options(best)
	o.Progress = func(n int64) { done.Add(n) }
	if _, err := Build(context.Background(), filepath.Join(s.Root, "tree"), a, o); err != nil {
		t.Fatal(err)
	}
	if done.Load() != total {
		t.Errorf("%d bytes done of %d", done.Load(), total)
	}
}

func TestOnlyUserXattrsAreSet(t *testing.T) {
	s := newSite(t)
	h := file("f", "x")
	h.Format = tar.FormatPAX
	h.PAXRecords = map[string]string{
		"SCHILY.xattr.user.note":                "kept",
		"SCHILY.xattr.trusted.overlay.redirect": "/etc/shadow",
		"SCHILY.xattr.security.capability":      "\x01\x00\x00\x02\xff\xff\xff\xff",
	}
	dir := s.mounted(t, best, s.Tar(t, artifact.CompressionNone, archive(t, h)))
	buf := make([]byte, 4096)
	n, err := unix.Listxattr(filepath.Join(dir, "f"), buf)
	if err != nil {
		t.Fatal(err)
	}
	if got := string(buf[:n]); got != "user.note\x00" {
		t.Errorf("extended attributes %q, want user.note alone", got)
	}
}

func TestLaterLayersWin(t *testing.T) {
	s := newSite(t)
	dir := s.mounted(t, best,
		s.Raw(t, "raw then tar", "1"),
		s.Tar(t, artifact.CompressionNone, archive(t, file("raw then tar", "2"), file("tar then raw", "1"),
			file("twice in one tar", "1"), file("twice in one tar", "2"),
			tar.Header{Name: "symlink then file", Typeflag: tar.TypeSymlink, Linkname: "raw then tar"})),
		s.Raw(t, "tar then raw", "2"),
		s.Raw(t, "symlink then file", "2"),
	)
	for _, name := range []string{"raw then tar", "tar then raw", "twice in one tar", "symlink then file"} {
		if got := read(t, dir, name); got != "2" {
			t.Errorf("%s: the earlier layer won", name)
		}
	}
}

func TestSparseMembersStaySparse(t *testing.T) {
	s := newSite(t)
	tree, err := s.build(best, s.Tar(t, artifact.CompressionNone, sparse(t, 64<<20)))
	if err != nil {
		t.Fatal(err)
	}
	if got := read(t, mountTree(t, tree), "sparse"); got != strings.Repeat("\x00", 64<<20) {
		t.Errorf("%d bytes of the sparse file, want 64 MiB of zeros", len(got))
	}
	if tree.Size > 1<<20 {
		t.Errorf("it takes %d bytes of the disk", tree.Size)
	}
}

func TestContentIsTheSameAroundHoles(t *testing.T) {
	s := newSite(t)
	zeros := strings.Repeat("\x00", 256<<10)
	want := zeros + "a" + zeros + zeros + zeros[1:] + "b" + zeros
	dir := s.mounted(t, best, s.Tar(t, artifact.CompressionZstd, archive(t, file("f", want))))
	if got := read(t, dir, "f"); got != want {
		t.Errorf("%d bytes differ from the %d of the member", len(got), len(want))
	}
}

func TestATypeInAModeDoesNotMakeAFileSetuid(t *testing.T) {
	s := newSite(t)
	h := file("su", "x")
	h.Mode = 0o4755 | unix.S_IFDIR
	dir := s.mounted(t, best, s.Tar(t, artifact.CompressionNone, archive(t, h)))
	wantAttrs(t, filepath.Join(dir, "su"), 0o755, 0, 0, mtime)
}

func TestARootWithAnyCharacterIsMounted(t *testing.T) {
	s := newSite(t)
	s.Root = filepath.Join(s.Root, `a:b,c\d e`)
	if err := os.MkdirAll(filepath.Join(s.Root, "copies"), 0o755); err != nil {
		t.Fatal(err)
	}
	if dir := s.mounted(t, best, s.Raw(t, "f", "x")); read(t, dir, "f") != "x" {
		t.Error("wrong content")
	}
}

// tmpfs mounts a tmpfs.
func tmpfs(t *testing.T, dir, options string) {
	t.Helper()
	unpacktest.Mount(t, mount.Mount{Type: "tmpfs", Source: "tmpfs", Options: strings.Split(options, ",")}, dir)
}

func TestBlobsOfAnotherFileSystemAreCopiedOnce(t *testing.T) {
	for _, mode := range []Modes{best, {Overlay, Extract}, {Link, EROFS}} {
		t.Run(mode.String(), func(t *testing.T) {
			s := newSite(t)
			tmpfs(t, string(s.Content), "size=64m")
			if err := os.MkdirAll(filepath.Join(string(s.Content), "blobs/sha256"), 0o755); err != nil {
				t.Fatal(err)
			}
			data := strings.Repeat("bytes", 1<<20)
			a := []artifact.Layer{ // the first one is not seen, and retained all the same
				s.Raw(t, "g", "hidden"), s.Raw(t, "f", data), s.Tar(t, artifact.CompressionNone, archive(t, file("g", data))),
			}
			tree, err := s.build(mode, a...)
			if err != nil {
				t.Fatal(err)
			}
			if dir := mountTree(t, tree); read(t, dir, "f") != data || read(t, dir, "g") != data {
				t.Error("wrong content")
			}
			another, err := s.buildAs("second", mode, a...)
			if err != nil {
				t.Fatal(err)
			}
			// What the first tree has copied counts there, and not again.
			if want := diskUsage(t, tree); tree.Size != want {
				t.Errorf("the tree takes %d bytes of the disk, want %d", tree.Size, want)
			}
			wantMore := int64(2 * len(data))
			if !tree.Image { // each has its own g
				wantMore = int64(len(data))
			}
			if more := tree.Size - another.Size; more < wantMore {
				t.Errorf("the first tree takes %d bytes more than the second, want at least the %d of its copies", more, wantMore)
			}
			var first, second unix.Stat_t
			for dir, st := range map[string]*unix.Stat_t{"tree": &first, "second": &second} {
				if err := unix.Stat(filepath.Join(s.Root, dir, dataDir, "0"), st); err != nil {
					t.Fatal(err)
				}
			}
			if first.Ino != second.Ino {
				t.Error("the blob was copied twice")
			}
		})
	}
}

// diskUsage returns what du counts of a tree's files, without its own directories.
func diskUsage(t *testing.T, tree *Tree) (size int64) {
	t.Helper()
	notCounted := []string{tree.dir, filepath.Join(tree.dir, dataDir), filepath.Join(tree.dir, metaFile)}
	if tree.Image {
		notCounted = append(notCounted, filepath.Join(tree.dir, fsDir))
	}
	seen := map[uint64]bool{}
	err := filepath.WalkDir(tree.dir, func(path string, _ fs.DirEntry, err error) error {
		var st unix.Stat_t
		if err := errors.Join(err, unix.Lstat(path, &st)); err != nil {
			return err
		}
		if !seen[st.Ino] && !slices.Contains(notCounted, path) {
			size += st.Blocks * 512
		}
		seen[st.Ino] = true
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return size
}

func TestACorruptBlobIsNotCopied(t *testing.T) {
	s := newSite(t)
	tmpfs(t, string(s.Content), "size=1m") // or it might be a reflink, of which no byte passes by
	if err := os.MkdirAll(filepath.Join(string(s.Content), "blobs/sha256"), 0o755); err != nil {
		t.Fatal(err)
	}
	l := s.Raw(t, "f", "bytes")
	p := s.Content.Path(l.Descriptor.Digest)
	os.Remove(p)
	if err := os.WriteFile(p, []byte("bitez"), 0o444); err != nil {
		t.Fatal(err)
	}
	if _, err := s.build(Modes{Copy, EROFS}, l); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("%v, want a failed precondition", err)
	}
}

func TestAFullDiskIsExplainedAndLeavesNothing(t *testing.T) {
	s := newSite(t)
	tmpfs(t, s.Root, "size=2m")
	if err := os.Mkdir(filepath.Join(s.Root, "copies"), 0o755); err != nil {
		t.Fatal(err)
	}
	data := make([]byte, 900<<10) // each is too small to be refused beforehand
	rand.NewChaCha8([32]byte{}).Read(data)
	var members []tar.Header
	for _, name := range []string{"a", "b", "c"} {
		members = append(members, file(name, string(data)))
	}
	_, err := s.build(best, s.Tar(t, artifact.CompressionGzip, archive(t, members...)))
	if !errdefs.IsResourceExhausted(err) || !strings.Contains(err.Error(), "free space") {
		t.Errorf("%v does not say that the disk is full", err)
	}
	if left, _ := os.ReadDir(s.Root); len(left) != 1 {
		t.Errorf("left behind: %v", left)
	}
}

func TestEntriesAndTheirNamesAreLimited(t *testing.T) {
	for _, p := range []plan{{entries: maxEntries}, {names: maxNames}} {
		p.nodes = map[string]*node{}
		if err := p.add("one more", &node{kind: regular}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%d entries with %d bytes of names and one more: %v", p.entries, p.names, err)
		}
	}
}

func TestABuildEndsWithItsContext(t *testing.T) {
	s := newSite(t)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	_, err := Build(ctx, filepath.Join(s.Root, "tree"), numbered(s.Tar(t, artifact.CompressionGzip, archive(t, file("f", "x")))),
		s.options(best))
	if !errors.Is(err, context.Canceled) {
		t.Errorf("%v, want %v", err, context.Canceled)
	}
	if errdefs.IsInvalidArgument(err) {
		t.Errorf("%v blames the artifact", err)
	}
}

func TestProbeTakesTheBestModeThatWorks(t *testing.T) {
	ctx := context.Background()
	if r, why := Probe(ctx, t.TempDir(), Modes{}, false); r != here(best) || (why == nil) != (r == Modes{Overlay, EROFS}) {
		t.Errorf("Probe: %v, %v; this kernel and file system can do %v", r, why, here(best))
	}
	for _, r := range slices.Concat(RawModes, TarModes) {
		dir := t.TempDir()
		if err := Try(ctx, dir, r, false); (err == nil) != (has(r) && here(Modes{Tar: r}).Tar == r) {
			t.Errorf("%s: %v", r, err)
		}
		if left, err := os.ReadDir(dir); len(left) != 0 || err != nil {
			t.Errorf("%s leaves %v (%v)", r, left, err)
		}
	}
	// overlayfs needs a lower layer without case folding and with extended attributes;
	// procfs does not have them, and is always there.
	if _, err := Probe(ctx, "/proc/self", Modes{}, false); err == nil {
		t.Error("a directory that nothing can be written to has a mode")
	}
	if err := Try(ctx, t.TempDir(), "none such", false); !errdefs.IsInvalidArgument(err) {
		t.Errorf("an unknown mode: %v", err)
	}
	for _, forced := range []Modes{{Raw: EROFS}, {Tar: Overlay}} {
		if r, err := Probe(ctx, t.TempDir(), forced, false); r != (Modes{}) || !errdefs.IsInvalidArgument(err) {
			t.Errorf("%v: %v, %v, want a refusal", forced, r, err)
		}
	}
}

func itoa(n int) string { return strconv.Itoa(n) }

// Contents without visible files are removed when all layers are retained, since a much
// later layer may have the same blob.
func TestABlobIsATarAndALaterOverriddenFile(t *testing.T) {
	requireModes(t, Overlay)
	s := newSite(t)
	empty := archive(t)
	layers := []artifact.Layer{s.Tar(t, artifact.CompressionNone, empty)}
	for i := range 3000 {
		layers = append(layers, s.Raw(t, itoa(i), itoa(i)))
	}
	layers = append(layers, s.Raw(t, "same", string(empty)), s.Tar(t, artifact.CompressionNone, archive(t, file("same", "another"))))
	dir := s.mounted(t, best, layers...)
	for name, want := range map[string]string{"0": "0", "2999": "2999", "same": "another"} {
		if got := read(t, dir, name); got != want {
			t.Errorf("%s is %q, want %q", name, got, want)
		}
	}
}
