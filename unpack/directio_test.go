// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
	"github.com/artifact-snapshotter/artifact-snapshotter/unpack/internal/unpacktest"
)

// disk mounts a new file system on a disk whose sectors have that many bytes.
func disk(t *testing.T, sector uint32, mkfs ...string) string {
	t.Helper()
	dir := t.TempDir()
	file, err := os.Create(filepath.Join(t.TempDir(), "disk"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer control.Close()
	var loop *os.File
	for err = unix.EBUSY; errors.Is(err, unix.EBUSY); { // somebody else was quicker
		var n int
		if n, err = unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE); err != nil {
			break
		}
		if loop, err = os.OpenFile("/dev/loop"+itoa(n), os.O_RDWR, 0); err != nil {
			break
		}
		defer loop.Close() // what is mounted keeps it
		config := unix.LoopConfig{Fd: uint32(file.Fd()), Size: sector, Info: unix.LoopInfo64{Flags: unix.LO_FLAGS_AUTOCLEAR}}
		err = errors.Join(file.Truncate(512<<20), unix.IoctlLoopConfigure(int(loop.Fd()), &config))
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{append(mkfs, loop.Name()), {"mount", loop.Name(), dir}} {
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

// Members begin at multiples of 512 bytes, the smallest sectors of disks.
func TestFilesAreReadWithODirect(t *testing.T) {
	members := map[string]string{}
	var headers []string
	for _, n := range sizes {
		members["of "+itoa(n)] = noise(n)
		headers = append(headers, "of "+itoa(n))
	}
	for _, test := range []struct {
		modes   Modes
		members bool // can be opened so
	}{
		{Modes{Overlay, EROFS}, false},
		{Modes{Overlay, EROFSLoop}, true},
		{Modes{Overlay, EROFSBuffered}, false},
		{Modes{Overlay, Extract}, true},
		{Modes{Link, EROFSLoop}, true},
		{Modes{Link, Extract}, true},
		{Modes{Copy, Extract}, true},
	} {
		for _, mixed := range []bool{false, true} {
			name := test.modes.String()
			if mixed {
				name += ", with a raw layer"
			}
			t.Run(name, func(t *testing.T) {
				s := newSite(t)
				if !hasDirectIO(t, s.Root) {
					t.Skip("NOT TESTED: the file system of the tests has no direct I/O")
				}
				var a []byte
				for _, name := range headers {
					a = append(a, member512('0', name, members[name], nil)...)
				}
				layers := []artifact.Layer{s.Tar(t, artifact.CompressionNone, append(a, endMark...))}
				if mixed {
					layers = append(layers, s.Raw(t, "raw", noise(5000)))
				}
				dir := s.mounted(t, test.modes, layers...)
				works := test.members || here(test.modes).Tar == EROFSLoop
				image := !mixed || test.modes.Raw == Overlay // else the tar is extracted
				for name, content := range members {
					err := readDirect(filepath.Join(dir, name), content)
					if image && test.modes.Tar == EROFSLoop && len(content)%tarBlock > 0 && !endsAreRead() {
						if !errors.Is(err, unix.EINVAL) {
							t.Errorf("%s: %v; want that its end cannot be read", name, err)
						}
						continue
					}
					if works && err != nil || !works && !errors.Is(err, unix.EINVAL) {
						t.Errorf("%s: %v; want that it can be read with O_DIRECT: %t", name, err, works)
					}
				}
				if works && endsAreRead() {
					wantBlocks(t, filepath.Join(dir, "of 8193"), members["of 8193"])
				}
				if !mixed {
					return
				}
				if err := readDirect(filepath.Join(dir, "raw"), noise(5000)); err != nil {
					t.Error(err)
				}
			})
		}
	}
}

func endsAreRead() bool { return !olderThan(readsEnds) }

func hasDirectIO(t *testing.T, dir string) bool {
	t.Helper()
	return Try(context.Background(), dir, Copy, true) == nil
}

// wantBlocks reads each block of 512 bytes of a file separately.
func wantBlocks(t *testing.T, path, want string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	buffer, err := alignedBuffer(tarBlock)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Munmap(buffer) }()
	for at := 0; at < len(want); at += tarBlock {
		n, _ := f.ReadAt(buffer[:tarBlock], int64(at))
		if got := string(buffer[:n]); got != want[at:min(at+tarBlock, len(want))] {
			t.Errorf("at %d of %s there are %d other bytes", at, path, n)
		}
	}
}

func TestModesWithoutODirectAreExcludedIfItIsRequired(t *testing.T) {
	dir := t.TempDir()
	if !hasDirectIO(t, dir) {
		t.Skip("NOT TESTED: the file system of the tests has no direct I/O")
	}
	want := Modes{Raw: best.Raw, Tar: Extract}
	if has(EROFSLoop) && endsAreRead() {
		want.Tar = EROFSLoop
	}
	if r, why := Probe(t.Context(), dir, Modes{}, true); r != want {
		t.Errorf("%v, %v; want %v", r, why, want)
	}
	for _, r := range []Mode{EROFS, EROFSBuffered} {
		if here(Modes{Tar: r}).Tar != r || !has(r) {
			continue
		}
		if got, err := Probe(t.Context(), dir, Modes{Tar: r}, true); got != (Modes{}) || err == nil || !strings.Contains(err.Error(), `mode "`+string(r)+`" does not work`) || !strings.Contains(err.Error(), "O_DIRECT") {
			t.Errorf("%s by name: %v, %v", r, got, err)
		}
	}
}

func TestNoModeHasODirectIfTheFileSystemHasNot(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("ramfs", dir, "ramfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	}()
	if r, why := Probe(t.Context(), dir, Modes{}, true); r != (Modes{}) || why == nil || !strings.Contains(why.Error(), "cannot be read with O_DIRECT") {
		t.Errorf("%v, %v", r, why)
	}
	if r, why := Probe(t.Context(), dir, Modes{}, false); r == (Modes{}) {
		t.Errorf("without O_DIRECT there is no mode either: %v", why)
	}
}

// There, direct I/O cannot read archives at the offsets of their members.
func TestADiskWithLargeSectors(t *testing.T) {
	dir := disk(t, 4096, "mkfs.ext4", "-q")
	for _, direct := range []bool{false, true} {
		r, why := Probe(t.Context(), dir, Modes{}, direct)
		// Before Linux 6.15 a loop device on such a disk works without direct I/O.
		if want := []Mode{EROFSLoop, EROFSBuffered, Extract}; !slices.Contains(want, r.Tar) || direct && r.Tar == EROFSBuffered {
			t.Errorf("%v, %v; want one of %v", r, why, want)
		}
		s := site{unpacktest.SiteIn(t, filepath.Join(dir, itoa(len(r.Tar)))), t}
		content := noise(8193)
		got := s.mounted(t, r, s.Tar(t, artifact.CompressionNone, archive(t, file("f", content))))
		if read(t, got, "f") != content {
			t.Errorf("%v shows other bytes", r)
		}
		if direct {
			if err := readDirect(filepath.Join(got, "f"), content); err != nil {
				t.Error(err)
			}
		}
	}
	root, err := Locate(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, trial := range DiagnoseModes(t.Context(), root, "", false, TarModes).Trials {
		if has(trial.Mode) && !trial.Works && (!strings.Contains(trial.Reason, "512 bytes") || !strings.Contains(trial.Remedy, "sectors of 512")) {
			t.Errorf("%+v does not blame the sectors", trial)
		}
	}
}

// The diagnosis agrees with what the page cache has after reading a tar.
func TestTheDiagnosisSaysWhyTheCacheHasBytesTwice(t *testing.T) {
	for _, test := range []struct {
		name   string
		mkfs   []string
		verity bool
		once   bool // for sure; else the kernel decides
	}{
		{"ext4", []string{"mkfs.ext4", "-q"}, false, true},
		{"xfs", []string{"mkfs.xfs", "-q"}, false, true},
		{"btrfs", []string{"mkfs.btrfs", "-q"}, false, false},
		{"ext4 with fs-verity", []string{"mkfs.ext4", "-q", "-O", "verity"}, true, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			requireModes(t, EROFS, EROFSLoop)
			if _, err := exec.LookPath(test.mkfs[0]); err != nil {
				t.Skipf("NOT TESTED: there is no %s", test.mkfs[0])
			}
			dir := disk(t, 512, test.mkfs...)
			for _, mode := range []Mode{EROFS, EROFSLoop} {
				s := site{unpacktest.SiteIn(t, filepath.Join(dir, string(mode))), t}
				content := noise(1 << 20)
				l := s.Tar(t, artifact.CompressionNone, archive(t, file("f", content)))
				blob := s.Content.Path(l.Descriptor.Digest)
				if err := enableVerity(blob); test.verity && err != nil {
					t.Skipf("NOT TESTED: this kernel has no fs-verity: %v", err)
				}
				root, err := Locate(s.Root)
				if err != nil {
					t.Fatal(err)
				}
				compared := DiagnoseModes(t.Context(), root, mode, false, TarModes)
				if compared.Taken != mode {
					t.Fatalf("%+v", everyPair)
				}
				shown := s.mounted(t, Modes{Overlay, mode}, l)
				twice := cachedAfter(t, blob, func() {
					if read(t, shown, "f") != content {
						t.Errorf("%s shows other bytes", mode)
					}
				})
				if twice != (compared.Twice != "") || twice != (compared.Remedy != "") || test.once && twice || test.verity && !strings.Contains(compared.Twice, "fs-verity") {
					t.Errorf("with %s the page cache holds the tar twice: %t; doctor says %q and %q", mode, twice, compared.Twice, compared.Remedy)
				}
			}
		})
	}
}

// cachedAfter removes a file from the page cache, calls f, and reports whether the cache
// has some of the file then.
func cachedAfter(t *testing.T, path string, f func()) bool {
	t.Helper()
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if err := errors.Join(file.Sync(), unix.Fadvise(int(file.Fd()), 0, 0, unix.FADV_DONTNEED)); err != nil {
		t.Fatal(err)
	}
	if n, err := cachedPages(file); n > 0 || err != nil {
		t.Fatalf("%s has %d cached pages before it is read (%v)", path, n, err)
	}
	f()
	n, err := cachedPages(file)
	if err != nil {
		t.Fatal(err)
	}
	return n > 0
}

// If something is lacking temporarily, Probe must not choose a fallback, which would stay
// until the next start.
func TestATemporaryErrorExcludesNoMode(t *testing.T) {
	overlay := modes[Overlay]
	defer func() { modes[Overlay] = overlay }()
	modes[Overlay] = traits{probe: func(context.Context, string, bool) error { return fmt.Errorf("%w: %w", errNoDirectIO, unix.ENOMEM) }}
	if r, err := probe(t.Context(), t.TempDir(), "", true, RawModes); r != "" || !errors.Is(err, unix.ENOMEM) {
		t.Errorf("%q, %v; want none, and why", r, err)
	}
	modes[Overlay] = traits{probe: func(context.Context, string, bool) error { return errNoDirectIO }}
	if r, err := probe(t.Context(), t.TempDir(), "", true, []Mode{Overlay, Copy}); r != Copy || err != nil {
		t.Errorf("%q, %v; want the next one", r, err)
	}
}
