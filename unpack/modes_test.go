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

// best are the best modes of the kernel, on the file system of a disk.
var best = Modes{Raw: first(RawModes), Tar: first(TarModes)}

// has reports whether the mode must work where the tests run: every mode, except on the
// kernels that integration/kernels boots, where a variable lists them.
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

// here returns the modes that work where the tests run: the kernel mounts no EROFS from
// files of a tmpfs or an overlay, so tars there are loop devices.
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

// fileSystem returns the magic number of the file system of the tests.
func fileSystem() int64 {
	var st unix.Statfs_t
	if err := unix.Statfs(os.TempDir(), &st); err != nil {
		panic(err)
	}
	return st.Type
}

// everyPair has every pair of modes that prepares artifacts in its own way, as far as the
// kernel has them.
var everyPair = slices.DeleteFunc([]Modes{
	{Overlay, EROFS}, {Overlay, EROFSLoop}, {Overlay, EROFSBuffered}, {Overlay, Extract},
	{Link, EROFS}, {Link, EROFSLoop}, {Link, Extract}, {Copy, EROFS}, {Copy, Extract},
}, func(r Modes) bool { return !has(r.Raw) || !has(r.Tar) })

func (r Modes) String() string { return string(r.Raw) + " and " + string(r.Tar) }
