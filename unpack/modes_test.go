// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"os"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// best is what the kernel and a disk's file system can do.
var best = Modes{Raw: first(RawModes), Tar: first(TarModes)}

// has reports whether the tests are to find that r works: each mode must, but on the
// kernels that integration/kernels boots, which says by the variable which of them.
func has(r Mode) bool {
	modes, named := os.LookupEnv("ARTIFACT_SNAPSHOTTER_MODES")
	return !named || slices.Contains(strings.Split(modes, ","), string(r))
}

func first(all []Mode) Mode { return all[slices.IndexFunc(all, has)] }

// requireModes skips a test for which this kernel is too old.
func requireModes(t *testing.T, modes ...Mode) {
	t.Helper()
	for _, r := range modes {
		if r != "" && !has(r) {
			t.Skipf("NOT TESTED: this kernel does not have the mode %s", r)
		}
	}
}

// here is r where the tests run: the kernel mounts no EROFS from the files of a tmpfs
// or an overlay, and tars there are loop devices.
func here(r Modes) Modes {
	if (r.Tar == EROFS || r.Tar == EROFSBuffered) && !fileBacked() {
		r.Tar = EROFSLoop
	}
	return r
}

func fileBacked() bool {
	magic := fileSystem()
	return magic != unix.TMPFS_MAGIC && magic != unix.OVERLAYFS_SUPER_MAGIC
}

// fileSystem is the magic number of the file system that the tests run on.
func fileSystem() int64 {
	var st unix.Statfs_t
	if err := unix.Statfs(os.TempDir(), &st); err != nil {
		panic(err)
	}
	return st.Type
}

// everyPair is every pair of modes that lays out artifacts in its own way, of those that
// the kernel has.
var everyPair = slices.DeleteFunc([]Modes{
	{Overlay, EROFS}, {Overlay, EROFSLoop}, {Overlay, EROFSBuffered}, {Overlay, Extract},
	{Link, EROFS}, {Link, EROFSLoop}, {Link, Extract}, {Copy, EROFS}, {Copy, Extract},
}, func(r Modes) bool { return !has(r.Raw) || !has(r.Tar) })

func (r Modes) String() string { return string(r.Raw) + " and " + string(r.Tar) }
