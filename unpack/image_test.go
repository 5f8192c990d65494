// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
)

// noise returns n bytes that differ from those of any other place.
func noise(n int) string {
	b := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{byte(n), byte(n >> 8), byte(n >> 16)}).Read(b)
	return string(b)
}

func timed(h tar.Header, t time.Time) tar.Header {
	h.ModTime, h.Format = t, tar.FormatPAX
	return h
}

// gnu returns the file with a header of GNU tar, without an extended header.
func gnu(h tar.Header) tar.Header {
	h.Format, h.ModTime = tar.FormatGNU, mtime.Truncate(time.Second)
	return h
}

// sizes are around the boundaries of blocks and pages.
var sizes = []int{0, 1, 511, 512, 513, 1023, 1024, 1025, 4095, 4096, 4097, 8191, 8192, 8193, 1<<20 - 513, 1<<20 - 1, 1 << 20, 1<<20 + 1, 1<<20 + 4095}

// forms returns archives with every kind of member.
func forms(t *testing.T) map[string][]byte {
	var bySize, byXattr, byMode, owners []tar.Header
	for _, n := range sizes {
		bySize = append(bySize, file("of "+itoa(n), noise(n)))
	}
	for n := range 41 {
		value := strings.Repeat("v", n)
		byXattr = append(byXattr,
			noted(file("value "+itoa(n), noise(5000+n)), map[string]string{"user.a": value}),
			noted(file("name "+itoa(n), noise(n)), map[string]string{"user.a" + strings.Repeat("n", n): "x"}),
			noted(file("several "+itoa(n), noise(600+n)), map[string]string{"user.a": value, "user.bc": value + "1", "user.def": "", "user.g": "\x00\xff"}),
			noted(tar.Header{Name: "directory " + itoa(n) + "/", Typeflag: tar.TypeDir, Mode: 0o755}, map[string]string{"user.a": value}),
		)
	}
	for _, mode := range []int64{0, 0o1, 0o400, 0o644, 0o777, 0o1777, 0o2755, 0o4755, 0o7777} {
		byMode = append(byMode, tar.Header{Name: fmt.Sprintf("d%o/", mode), Typeflag: tar.TypeDir, Mode: mode}, tar.Header{Name: fmt.Sprintf("f%o", mode), Linkname: "x", Mode: mode})
	}
	for _, id := range []int{1, 65535, 65536, 70000, 1 << 31, 1<<32 - 2} {
		owners = append(owners, tar.Header{Name: "uid " + itoa(id), Linkname: "x", Uid: id}, tar.Header{Name: "gid " + itoa(id), Linkname: "x", Gid: id},
			tar.Header{Name: "link " + itoa(id), Typeflag: tar.TypeSymlink, Linkname: "x", Uid: id, Gid: id},
			tar.Header{Name: "dir " + itoa(id) + "/", Typeflag: tar.TypeDir, Mode: 0o700, Uid: id, Gid: id})
	}
	long := strings.Repeat("n", 255)
	deep := strings.Repeat("d/", 128) + "f"
	last := file("the last member", noise(700))
	all := map[string][]byte{
		"nothing":                   archive(t),
		"sizes":                     archive(t, bySize...),
		"extended attributes":       archive(t, byXattr...),
		"modes":                     archive(t, byMode...),
		"owners":                    archive(t, owners...),
		"a long PAX name":           archive(t, file(long+"/"+long+"/"+long, "x"), file("ü/"+strings.Repeat("語", 85), "x")),
		"a long GNU name":           archive(t, gnu(file(long+"/"+long+"/"+long, "x"))),
		"128 directories":           archive(t, file(deep, "x")),
		"a directory said later":    archive(t, file("d/e/f", "x"), tar.Header{Name: "d/", Typeflag: tar.TypeDir, Mode: 0o2700, Uid: 5}),
		"a directory said twice":    archive(t, tar.Header{Name: "d/", Typeflag: tar.TypeDir, Mode: 0o700}, file("d/f", "x"), tar.Header{Name: "./d", Typeflag: tar.TypeDir, Mode: 0o750}),
		"the root":                  archive(t, noted(tar.Header{Name: "./", Typeflag: tar.TypeDir, Mode: 0o1750, Uid: 7}, map[string]string{"user.root": "yes"}), file("./f", "x")),
		"an empty directory":        archive(t, tar.Header{Name: "d/", Typeflag: tar.TypeDir, Mode: 0o755}),
		"odd names":                 archive(t, file(" ", "1"), file("!", "2"), file("a\\b", "3"), file("a:b,c", "4"), file(".wh.a", "5"), file(".wh..wh..opq", "6"), file("...", "7"), file("\x01\n", "8"), file("-", "9")),
		"names that are not UTF-8":  append(append(member512(tar.TypeReg, "nUme", "x", func(h []byte) { h[1] = 0xff }), member512(tar.TypeReg, "nVme", "y", func(h []byte) { h[1] = 0xc0 })...), endMark...),
		"hard links":                archive(t, noted(file("a", noise(3000)), map[string]string{"user.note": "x"}), tar.Header{Name: "d/b", Typeflag: tar.TypeLink, Linkname: "a"}, tar.Header{Name: "c", Typeflag: tar.TypeLink, Linkname: "./d/b"}, file("empty", ""), tar.Header{Name: "empty too", Typeflag: tar.TypeLink, Linkname: "empty"}),
		"a hard link, replaced":     archive(t, file("a", "1"), tar.Header{Name: "b", Typeflag: tar.TypeLink, Linkname: "a"}, file("a", "2"), tar.Header{Name: "c", Typeflag: tar.TypeLink, Linkname: "a"}),
		"symlinks":                  archive(t, tar.Header{Name: "short", Typeflag: tar.TypeSymlink, Linkname: "x"}, tar.Header{Name: "510", Typeflag: tar.TypeSymlink, Linkname: strings.Repeat("x/", 255)}),
		"the longest symlink":       archive(t, longestSymlink),
		"a symlink over a file":     archive(t, file("f", "x"), tar.Header{Name: "f", Typeflag: tar.TypeSymlink, Linkname: "g"}, file("g", "y")),
		"types of regular files":    slices.Concat(member512(0, "old", "1", nil), member512(tar.TypeReg, "new", "2", nil), member512(tar.TypeCont, "contiguous", "3", nil), endMark),
		"a directory of old times":  slices.Concat(member512(0, "d/", "", nil), member512(0, "d/f", "1", nil), endMark),
		"a global header":           slices.Concat(member512(tar.TypeXGlobalHeader, "pax_global_header", record("comment", "0123456789"), nil), member512(tar.TypeReg, "f", "1", nil), endMark),
		"the epoch":                 archive(t, timed(file("epoch", "x"), time.Unix(0, 0)), timed(file("and a bit", "x"), time.Unix(0, 1)), timed(tar.Header{Name: "d/", Typeflag: tar.TypeDir, Mode: 0o755}, time.Unix(0, 0))),
		"a member before the mark":  archive(t, file("f", "x"), last),
		"one block as the mark":     archive(t, last)[:len(archive(t, last))-512],
		"a mark and some more":      append(archive(t, last), make([]byte, 700)...),
		"a record of 10 KiB":        append(archive(t, last), make([]byte, 10240-len(archive(t, last))%10240)...),
		"a size in a PAX header":    slices.Concat(member512(tar.TypeXHeader, "pax", record("size", "1000"), nil), member512(tar.TypeReg, "f", noise(1000), func(h []byte) { copy(h[124:], "00000000000\x00") }), endMark),
		"a size in base 256":        slices.Concat(member512(tar.TypeReg, "f", noise(1000), func(h []byte) { copy(h[124:], "\x80\x00\x00\x00\x00\x00\x00\x00\x00\x00\x03\xe8") }), endMark),
		"other extended attributes": archive(t, noted(file("f", noise(900)), map[string]string{"trusted.overlay.redirect": "/0", "trusted.overlay.metacopy": "", "security.capability": "x", "user.overlay.redirect": "/0", "user.kept": "y"})),
	}
	for name, f := range tarForms(t) {
		all[name] = f.archive
	}
	hole := strings.Repeat("\x00", 5000)
	for form, sparse := range sparseForms {
		var many []fragment
		for i := range 60 {
			many = append(many, fragmentAt(int64(i)*9000+100, noise(512+i)))
		}
		all["sparse, "+form] = slices.Concat(
			// GNU tar ends with a fragment of no bytes. A file of the formats 0.0 and 0.1
			// without any fragment is refused, because archive/tar reads it as an empty
			// file.
			sparse("all hole", 1<<20, fragmentAt(1<<20, "")),
			sparse("none", 0, fragmentAt(0, "")),
			sparse("begins with data", 100000, fragmentAt(0, noise(10)), fragmentAt(99990, noise(10)), fragmentAt(100000, "")),
			sparse("ends with a hole", 100000, fragmentAt(777, noise(1000)), fragmentAt(100000, "")),
			sparse("many", 600000, append(many, fragmentAt(600000, ""))...),
			sparse("no hole", 3000, fragmentAt(0, noise(3000))),
			sparse("data that is zeros", 20000, fragmentAt(1, hole), fragmentAt(10000, hole)),
			member512(tar.TypeReg, "between", noise(1234), nil),
			sparse("d/the last one", 70001, fragmentAt(70000, "x")),
			endMark)
	}
	return all
}

// odd returns archives that ext4 cannot store as files: its times end in 2446, and an inode
// has room for few attributes.
func odd(t *testing.T) map[string][]byte {
	var times []tar.Header
	for name, when := range map[string]time.Time{
		"1901": time.Date(1901, 1, 1, 0, 0, 0, 1, time.UTC), "1969": time.Unix(-1, 999999999), "2038": time.Unix(1<<31, 0), "2107": time.Unix(1<<32, 5),
		"9999": time.Date(9999, 12, 31, 23, 59, 59, 999999999, time.UTC), "year 0": time.Unix(-62167219200, 0), "far": time.Unix(1<<61, 0),
	} {
		times = append(times, timed(file(name, "x"), when), timed(tar.Header{Name: name + " link", Typeflag: tar.TypeSymlink, Linkname: "x"}, when),
			timed(tar.Header{Name: name + " dir/", Typeflag: tar.TypeDir, Mode: 0o755}, when))
	}
	many := map[string]string{}
	for i := range 300 {
		many["user."+strings.Repeat("n", i%100)+itoa(i)] = strings.Repeat("v", 700)
	}
	return map[string][]byte{
		"times":                     archive(t, times...),
		"large extended attributes": archive(t, noted(file("value", noise(5000)), map[string]string{"user.v": strings.Repeat("v", 65535)}), noted(file("name", noise(5001)), map[string]string{"user." + strings.Repeat("n", 250): "v"}), noted(file("many", noise(5002)), many), file("next", noise(5003))),
	}
}

func TestEveryKindOfMemberIsMountedAsInTheArchive(t *testing.T) {
	all, strange := forms(t), odd(t)
	// The other modes treat tars like one of these.
	for _, mode := range []Modes{best, {Overlay, EROFSLoop}, {Overlay, EROFSBuffered}, {Overlay, Extract}, {Link, EROFS}} {
		for _, archives := range []map[string][]byte{all, strange} {
			for name, a := range archives {
				if _, is := strange[name]; is && (mode.Tar == Extract || mode.Raw != Overlay) {
					continue
				}
				t.Run(mode.String()+"/"+name, func(t *testing.T) {
					t.Parallel()
					s := newSite(t)
					if name == "the longest symlink" && mode.Tar == Extract && !holds(t, longestSymlink.Linkname) {
						wantNoSymlink(t, s)
						return
					}
					wantVolume(t, s.mounted(t, mode, s.Tar(t, artifact.CompressionNone, a)), a)
				})
			}
		}
	}
}

// longestSymlink has the longest target that Linux allows.
var longestSymlink = tar.Header{Name: "longest", Typeflag: tar.TypeSymlink, Linkname: strings.Repeat("x/", 2047) + "y"}

// holds reports whether the file system of the tests can store a symlink with that target.
func holds(t *testing.T, target string) bool {
	t.Helper()
	err := os.Symlink(target, filepath.Join(t.TempDir(), "symlink"))
	if err != nil && !errors.Is(err, unix.ENAMETOOLONG) {
		t.Fatal(err)
	}
	return err == nil
}

func TestASymlinkThatTheFileSystemCannotHoldIsExplained(t *testing.T) {
	s := newSite(t)
	s.Root = xfs(t)
	wantNoSymlink(t, s)
}

func wantNoSymlink(t *testing.T, s site) {
	t.Helper()
	_, err := s.build(Modes{Overlay, Extract}, s.Tar(t, artifact.CompressionNone, archive(t, longestSymlink)))
	if want := "the target of the symlink longest has 4095 bytes, more than the file system of the snapshotter's root can store"; !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), want) {
		t.Errorf("%v, want that %s", err, want)
	}
}

func TestTenThousandNamesInADirectoryAreMounted(t *testing.T) {
	var crowd []tar.Header
	for i := range 10000 {
		crowd = append(crowd, gnu(file("crowd/"+strings.Repeat("x", i%90)+itoa(i), itoa(i))))
	}
	a := archive(t, crowd...)
	s := newSite(t)
	wantVolume(t, s.mounted(t, best, s.Tar(t, artifact.CompressionZstd, a)), a)
}

func TestCompressionChangesNothing(t *testing.T) {
	for name, a := range forms(t) {
		for _, c := range []artifact.Compression{artifact.CompressionGzip, artifact.CompressionZstd} {
			t.Run(name+"/"+string(c), func(t *testing.T) {
				t.Parallel()
				s := newSite(t)
				wantVolume(t, s.mounted(t, best, s.Tar(t, c, a)), a)
			})
		}
	}
}

func TestAllArchivesTogetherAreOneImage(t *testing.T) {
	s := newSite(t)
	all := forms(t)
	var layers []artifact.Layer
	var archives [][]byte
	compressions := []artifact.Compression{artifact.CompressionNone, artifact.CompressionGzip, artifact.CompressionZstd}
	for i, name := range slices.Sorted(func(yield func(string) bool) {
		for name := range all {
			// Archives with a file or symlink where others have something else.
			if !slices.Contains([]string{"sizes", "a symlink over a file", "128 directories"}, name) && !yield(name) {
				return
			}
		}
	}) {
		layers, archives = append(layers, s.Tar(t, compressions[i%3], all[name])), append(archives, all[name])
	}
	wantVolume(t, s.mounted(t, best, layers...), archives...)
}

// find and other programs conclude from it how many directories to look into.
func TestTheLinkCountOfADirectoryCountsItsDirectories(t *testing.T) {
	var members []tar.Header
	for i := range 7 {
		members = append(members, file("d/"+itoa(i)+"/f", "x"), file("d/file "+itoa(i), "x"))
	}
	s := newSite(t)
	dir := s.mounted(t, best, s.Tar(t, artifact.CompressionNone, archive(t, members...)), s.Tar(t, artifact.CompressionGzip, archive(t, file("d/8/f", "x"))))
	for name, want := range map[string]uint64{".": 3, "d": 10, "d/0": 2, "d/0/f": 1} {
		if got := linkCount(t, filepath.Join(dir, name)); got != want {
			t.Errorf("%s has %d links, want %d", name, got, want)
		}
	}
}

func linkCount(t *testing.T, path string) uint64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		t.Fatal(err)
	}
	return uint64(st.Nlink) //nolint:unconvert // it is 32 bits wide on arm64
}

// Files of a whole blob have the attributes of overlayfs besides their own.
func TestSparseMembersKeepTheirAttributes(t *testing.T) {
	var a []byte
	for n := range 41 {
		pax := record("SCHILY.xattr.user.a", strings.Repeat("v", n)) + record("GNU.sparse.size", "9000") + record("GNU.sparse.numblocks", "1") +
			record("GNU.sparse.name", "f"+itoa(n)) + record("GNU.sparse.map", "100,600")
		a = slices.Concat(a, member512(tar.TypeXHeader, "pax", pax, nil), member512(tar.TypeReg, "GNUSparseFile.0/f", noise(600), nil))
	}
	a = append(a, endMark...)
	for _, mode := range everyPair {
		t.Run(mode.String(), func(t *testing.T) {
			s := newSite(t)
			wantVolume(t, s.mounted(t, mode, s.Tar(t, artifact.CompressionNone, a)), a)
		})
	}
}

// Linux 7.3 reads no metadata from the last page of a file that ends within it.
func TestImagesAreWholePagesAtNoCost(t *testing.T) {
	page := int64(os.Getpagesize())
	for _, files := range []int{0, 1, 25, 50, 75} {
		var members []tar.Header
		for i := range files {
			members = append(members, file("f"+itoa(i), noise(300+i)))
		}
		s := newSite(t)
		tree, err := s.build(Modes{Overlay, EROFSBuffered}, s.Tar(t, artifact.CompressionNone, archive(t, members...)))
		if err != nil {
			t.Fatal(err)
		}
		var st unix.Stat_t
		if err := unix.Stat(filepath.Join(s.Root, "tree", imageFile), &st); err != nil {
			t.Fatal(err)
		}
		if st.Size == 0 || st.Size%page != 0 || st.Blocks*512 > st.Size || tree.Size != st.Blocks*512 {
			t.Errorf("the image of %d files has %d bytes, takes %d, and %d are counted; want whole pages", files, st.Size, st.Blocks*512, tree.Size)
		}
		dir := mountTree(t, tree)
		for i := range files {
			if read(t, dir, "f"+itoa(i)) != noise(300+i) {
				t.Errorf("f%d of %d files has other bytes", i, files)
			}
		}
	}
}

func TestHundredsOfLayersAreOneMount(t *testing.T) {
	for _, c := range []struct {
		mode         Modes
		tars, raws   int
		compressions []artifact.Compression
	}{
		{best, 600, 500, []artifact.Compression{artifact.CompressionNone, artifact.CompressionGzip, artifact.CompressionZstd}},
		{Modes{Overlay, EROFSBuffered}, 100, 100, []artifact.Compression{artifact.CompressionNone}},
		{Modes{Overlay, EROFSLoop}, 20, 20, []artifact.Compression{artifact.CompressionNone}},
		{Modes{Overlay, Extract}, 100, 100, []artifact.Compression{artifact.CompressionZstd}},
	} {
		t.Run(fmt.Sprint(c.mode, "/", c.tars, " tars, ", c.raws, " files"), func(t *testing.T) {
			s := newSite(t)
			var layers []artifact.Layer
			want := map[string]string{}
			for i := range c.tars {
				name, content := "t"+itoa(i%7)+"/"+itoa(i), noise(100+37*i)
				want[name], want["last"] = content, itoa(i)
				layers = append(layers, s.Tar(t, c.compressions[i%len(c.compressions)], archive(t, file(name, content), file("last", itoa(i)))))
			}
			for i := range c.raws {
				name, content := "r"+itoa(i%7)+"/"+itoa(i), noise(100+41*i)
				want[name] = content
				layers = append(layers, s.Raw(t, name, content))
			}
			dir := s.mounted(t, c.mode, layers...)
			for name, content := range want {
				if got := read(t, dir, name); got != content {
					t.Errorf("%s holds %d other bytes", name, len(got))
				}
			}
		})
	}
}

func TestTwentyThousandRawFilesAreMounted(t *testing.T) {
	s := newSite(t)
	var blobs []artifact.Layer
	for i := range 1000 {
		blobs = append(blobs, s.Raw(t, "", "blob "+itoa(i)))
	}
	var layers []artifact.Layer
	for i := range 20000 {
		l := blobs[i%len(blobs)]
		l.File.Path = "shard " + itoa(i%100) + "/" + itoa(i)
		layers = append(layers, l)
	}
	dir := s.mounted(t, best, layers...)
	for i := range 20000 {
		if got, want := read(t, dir, "shard "+itoa(i%100), itoa(i)), "blob "+itoa(i%len(blobs)); got != want {
			t.Fatalf("file %d holds %q, want %q", i, got, want)
		}
	}
	for shard := range 100 {
		if names, err := os.ReadDir(filepath.Join(dir, "shard "+itoa(shard))); len(names) != 200 || err != nil {
			t.Errorf("shard %d has %d files (%v)", shard, len(names), err)
		}
	}
}

// waitLimit is how long tests wait for an event that must come.
const waitLimit = 10 * time.Second

// loops returns the loop devices of files below dir.
func loops(t *testing.T, dir string) (found []string) {
	t.Helper()
	all, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range all {
		if b, err := os.ReadFile(f); err == nil && strings.HasPrefix(string(b), dir+"/") {
			found = append(found, f)
		}
	}
	return found
}

// waitForNoLoops waits until the kernel has cleared the devices.
func waitForNoLoops(t *testing.T, dir string) {
	t.Helper()
	for deadline := time.Now().Add(waitLimit); len(loops(t, dir)) > 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("these loop devices stay: %q", loops(t, dir))
		}
	}
}

func TestLoopDevicesGoWithTheMount(t *testing.T) {
	s := newSite(t)
	tree, err := s.build(Modes{Overlay, EROFSLoop}, s.Raw(t, "raw", "x"), s.Tar(t, artifact.CompressionNone, archive(t, file("f", "x"))),
		s.Tar(t, artifact.CompressionGzip, archive(t, file("g", "x"))))
	if err != nil {
		t.Fatal(err)
	}
	target := t.TempDir()
	for range 3 {
		if err := tree.Mount(context.Background(), target); err != nil {
			t.Fatal(err)
		}
		if got := loops(t, s.Root); len(got) != 4 { // the image, two tars, and the device of nothing
			t.Errorf("there are the loop devices %q", got)
		}
		if got := read(t, target, "g"); got != "x" {
			t.Errorf("g holds %q", got)
		}
		if err := mount.UnmountAll(target, 0); err != nil {
			t.Fatal(err)
		}
		waitForNoLoops(t, s.Root)
	}
}

func TestAFailedMountLeavesNothing(t *testing.T) {
	requireModes(t, Overlay, EROFS) // it harms an image
	for _, mode := range []Modes{best, {Overlay, EROFSLoop}, {Overlay, EROFSBuffered}} {
		for what, harm := range map[string]func(*testing.T, *Tree) (target string){
			"no target": func(t *testing.T, _ *Tree) string { return filepath.Join(t.TempDir(), "none") },
			"no image": func(t *testing.T, tree *Tree) string {
				if err := os.WriteFile(filepath.Join(tree.dir, imageFile), make([]byte, 4096), 0o600); err != nil {
					t.Fatal(err)
				}
				return t.TempDir()
			},
			"no device": func(t *testing.T, tree *Tree) string {
				if err := os.Remove(filepath.Join(tree.dir, tree.Devices[len(tree.Devices)-1])); err != nil {
					t.Fatal(err)
				}
				return t.TempDir()
			},
		} {
			t.Run(mode.String()+"/"+what, func(t *testing.T) {
				s := newSite(t)
				tree, err := s.build(mode, s.Raw(t, "raw", "x"), s.Tar(t, artifact.CompressionNone, archive(t, file("f", "x"))))
				if err != nil {
					t.Fatal(err)
				}
				target := harm(t, tree)
				if err := tree.Mount(context.Background(), target); err == nil {
					t.Error("it was mounted")
				}
				waitForNoLoops(t, s.Root)
				mounts, err := os.ReadFile("/proc/self/mountinfo")
				if err != nil {
					t.Fatal(err)
				}
				for _, dir := range []string{s.Root, target} {
					if strings.Contains(string(mounts), dir) {
						t.Errorf("something is mounted at %s", dir)
					}
				}
			})
		}
	}
}
