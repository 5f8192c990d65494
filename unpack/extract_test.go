// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"errors"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/unpack/internal/unpacktest"
)

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
	s := site{unpacktest.SiteIn(t, disk), t}
	upper := filepath.Join(disk, "upper")
	if err := os.Mkdir(upper, 0o755); err != nil {
		t.Fatal(err)
	}
	l := s.Raw(t, "dir/weights", strings.Repeat("weights ", 4<<20))
	counted := map[Retention]int64{}
	o := s.options(Modes{})
	o.Counted = func(how Retention, n int64) { counted[how] += n }
	if err := s.extractInto(t, l, Target{Upper: upper}, o); err != nil {
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
	if inode(t, filepath.Join(upper, "dir/weights")) == inode(t, s.Content.Path(l.Descriptor.Digest)) {
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
