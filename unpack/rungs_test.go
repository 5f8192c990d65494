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
var best = Rungs{Raw: first(RawRungs), Tar: first(TarRungs)}

// has reports whether the tests are to find that r works: each rung must, but on the
// kernels that integration/kernels boots, which says by the variable which of them.
func has(r Rung) bool {
	rungs, named := os.LookupEnv("ARTIFACT_SNAPSHOTTER_RUNGS")
	return !named || slices.Contains(strings.Split(rungs, ","), string(r))
}

func first(all []Rung) Rung { return all[slices.IndexFunc(all, has)] }

// requireRungs skips a test for which this kernel is too old.
func requireRungs(t *testing.T, rungs ...Rung) {
	t.Helper()
	for _, r := range rungs {
		if r != "" && !has(r) {
			t.Skipf("NOT TESTED: this kernel does not have the rung %s", r)
		}
	}
}

// here is r where the tests run: the kernel mounts no EROFS from the files of a tmpfs
// or an overlay, and tars there are loop devices.
func here(r Rungs) Rungs {
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

// ladder is every pair of rungs that lays out artifacts in its own way, of those that
// the kernel has.
var ladder = slices.DeleteFunc([]Rungs{
	{Overlay, EROFS}, {Overlay, EROFSLoop}, {Overlay, EROFSBuffered}, {Overlay, Extract},
	{Link, EROFS}, {Link, EROFSLoop}, {Link, Extract}, {Copy, EROFS}, {Copy, Extract},
}, func(r Rungs) bool { return !has(r.Raw) || !has(r.Tar) })

func (r Rungs) String() string { return string(r.Raw) + " and " + string(r.Tar) }
