// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/pkg/kernelversion"
	"golang.org/x/sys/unix"
)

// The errors of other kernels and file systems, and the explanations that users get.
func TestAFailureOfAModeIsExplained(t *testing.T) {
	for name, test := range map[string]struct {
		mode   Mode
		err    error
		fs     string
		kernel kernelversion.KernelVersion
		noLoop bool
		coarse bool // the disk does not read 512 bytes
		reason string
		remedy string
	}{
		"overlay on an old kernel":       {Overlay, unix.EINVAL, "ext4", kernelversion.KernelVersion{Kernel: 6, Major: 4}, false, false, "older than Linux 6.5", "Linux 6.5"},
		"overlay on an odd file system":  {Overlay, unix.EINVAL, "vfat", kernelversion.KernelVersion{Kernel: 6, Major: 5}, false, false, "vfat", "move root"},
		"overlay without its attributes": {Overlay, unix.EOPNOTSUPP, "ramfs", kernelversion.KernelVersion{Kernel: 6, Major: 5}, false, false, "extended attributes", "move root"},
		"overlay without the module":     {Overlay, unix.ENODEV, "ext4", kernelversion.KernelVersion{Kernel: 6, Major: 5}, false, false, "no overlay", "modprobe overlay"},
		"overlay without privileges":     {Overlay, unix.EPERM, "ext4", kernelversion.KernelVersion{Kernel: 5, Major: 4}, false, false, "permit", "as root"},
		"no hard links":                  {Link, unix.EPERM, "vfat", kernelversion.KernelVersion{Kernel: 6, Major: 5}, false, false, "vfat, has no hard links", "move root"},
		"no file system but old":         {EROFS, unix.ENOSYS, "ext4", kernelversion.KernelVersion{Kernel: 4, Major: 19}, false, false, "older than Linux 6.13", "Linux 6.13"},
		"erofs without the module":       {EROFS, unix.ENODEV, "ext4", kernelversion.KernelVersion{Kernel: 5, Major: 15}, false, false, "no erofs", "modprobe erofs"},
		"no direct I/O to files yet":     {EROFS, unix.EINVAL, "ext4", kernelversion.KernelVersion{Kernel: 6, Major: 12}, false, false, "older than Linux 6.13", "Linux 6.13"},
		"sectors of 4096 bytes":          {EROFS, unix.EIO, "ext4", kernelversion.KernelVersion{Kernel: 6, Major: 15}, false, true, "512 bytes", "sectors of 512"},
		"loop devices of 4096 bytes":     {EROFSLoop, unix.EINVAL, "xfs", kernelversion.KernelVersion{Kernel: 6, Major: 18}, false, true, "512 bytes", "sectors of 512"},
		"an image that is not mounted":   {EROFS, fmt.Errorf("cannot read erofs superblock: %w", unix.EIO), "ext4", kernelversion.KernelVersion{Kernel: 7, Major: 3}, false, false, "cannot read erofs superblock", ""},
		"no O_DIRECT over files":         {EROFS, fmt.Errorf("%w: %w", errNoDirectIO, unix.EINVAL), "ext4", kernelversion.KernelVersion{Kernel: 6, Major: 12}, false, false, "opens no file of an EROFS over files with O_DIRECT", ""},
		"no O_DIRECT at the end":         {EROFSLoop, fmt.Errorf("%w: %w", errNoDirectIO, unix.EINVAL), "ext4", kernelversion.KernelVersion{Kernel: 6, Major: 12}, false, false, "the end of a file", "Linux 6.18"},
		"no O_DIRECT at all":             {Overlay, fmt.Errorf("%w: %w", errNoDirectIO, unix.EINVAL), "ramfs", kernelversion.KernelVersion{Kernel: 6, Major: 12}, false, false, "ramfs, does not read files with O_DIRECT", "move root"},
		"no mounts of files yet":         {EROFSBuffered, unix.ENOTBLK, "ext4", kernelversion.KernelVersion{Kernel: 6, Major: 11}, false, false, "older than Linux 6.12", "Linux 6.12"},
		"no mounts of files configured":  {EROFSBuffered, unix.ENOTBLK, "xfs", kernelversion.KernelVersion{Kernel: 6, Major: 12}, false, false, "cannot mount an EROFS from files", "CONFIG_EROFS_FS_BACKED_BY_FILE"},
		"no mounts of files of a tmpfs":  {EROFSBuffered, unix.ENOTBLK, "tmpfs", kernelversion.KernelVersion{Kernel: 6, Major: 12}, false, false, "tmpfs", "move root"},
		"loop devices without a module":  {EROFSLoop, errors.New("no /dev/loop-control"), "ext4", kernelversion.KernelVersion{Kernel: 6, Major: 12}, true, false, "/dev/loop-control", "modprobe loop"},
		"a full disk":                    {EROFSLoop, outOfSpace(unix.ENOSPC), "ext4", kernelversion.KernelVersion{Kernel: 5, Major: 4}, false, false, "no space left", "free"},
		"what nobody has thought of":     {EROFSLoop, unix.ELOOP, "ext4", kernelversion.KernelVersion{Kernel: 5, Major: 4}, false, false, unix.ELOOP.Error(), ""},
	} {
		t.Run(name, func(t *testing.T) {
			var sectors error
			if test.coarse {
				sectors = unix.EINVAL
			}
			m := machine{sectors: sectors, fs: test.fs, loop: !test.noLoop, older: func(v kernelversion.KernelVersion) bool {
				return test.kernel.Kernel < v.Kernel || test.kernel.Kernel == v.Kernel && test.kernel.Major < v.Major
			}}
			reason, remedy := m.explain(test.mode, fmt.Errorf("a; b: %w", test.err))
			if !strings.Contains(reason, test.reason) || !strings.Contains(remedy, test.remedy) || (remedy == "") != (test.remedy == "") {
				t.Errorf("reason %q and remedy %q, want %q and %q", reason, remedy, test.reason, test.remedy)
			}
			if errno := unix.Errno(0); errors.As(test.err, &errno) && !strings.Contains(reason, errno.Error()) {
				t.Errorf("%q does not say %q, as the kernel does", reason, errno.Error())
			}
		})
	}
}

func TestEveryBetterModeHasAGain(t *testing.T) {
	for _, all := range [][]Mode{RawModes, TarModes} {
		for i, from := range all {
			for _, to := range all[:i] {
				if Gain(from, to) == "" {
					t.Errorf("%s gives nothing that %s does not", to, from)
				}
			}
			if Gain("", from) == "" {
				t.Errorf("%s gives nothing", from)
			}
		}
	}
}

func TestAMissingDirectoryIsLocatedByItsNearestParent(t *testing.T) {
	dir := t.TempDir()
	got, err := Locate(filepath.Join(dir, "a", "b"))
	if err != nil {
		t.Fatal(err)
	}
	want, err := Locate(dir)
	if err != nil || want.Type == "" || want.Mount == "" {
		t.Fatalf("%+v, %v", want, err)
	}
	want.Path = filepath.Join(dir, "a", "b")
	if got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Locate(filepath.Join(file, "a")); !errors.Is(err, unix.ENOTDIR) {
		t.Errorf("below a file: %v", err)
	}
}
