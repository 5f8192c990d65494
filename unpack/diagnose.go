// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/containerd/containerd/v2/pkg/kernelversion"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// ModeDiagnosis is how the modes of one format work in a directory.
type ModeDiagnosis struct {
	// Taken is the mode that Probe chooses, "" if none works, and Error why.
	Taken Mode   `json:"taken,omitempty"`
	Error string `json:"error,omitempty"`
	// Trials are the trials of all modes, the best first.
	Trials []ModeTrial `json:"modes"`
	// Twice says why the page cache has every byte that is read twice although Taken does
	// direct I/O, and Remedy what would help.
	Twice  string `json:"cached_twice,omitempty"`
	Remedy string `json:"remedy,omitempty"`
}

// ModeTrial is how a mode worked when it was tried.
type ModeTrial struct {
	Mode Mode `json:"mode"`
	// Tried says what was tried.
	Tried string `json:"tried"`
	Works bool   `json:"works"`
	// DirectIO says that files can be read with O_DIRECT.
	DirectIO bool `json:"direct_io"`
	// Reason says why the mode does not work, and Remedy what would help, as far as Error
	// tells.
	Reason string `json:"reason,omitempty"`
	Remedy string `json:"remedy,omitempty"`
	Error  string `json:"error,omitempty"`
}

// DiagnoseModes tries all modes of a format (RawModes or TarModes) in root, also those that
// Probe need not try. forced and direct are as for Probe.
func DiagnoseModes(ctx context.Context, root Location, forced Mode, direct bool, all []Mode) ModeDiagnosis {
	_, err := os.Stat(loopControl)
	m := machine{fs: root.Type, loop: err == nil, older: olderThan, sectors: sectors(root.Existing)}
	var l ModeDiagnosis
	// Probe decides what is taken. The modes that it passes over are tried again below, to
	// have the error of each.
	if l.Taken, err = probe(ctx, root.Existing, forced, direct, all); l.Taken == "" {
		l.Error = oneLine(err)
	}
	for _, r := range all {
		err := Try(ctx, root.Existing, r, true)
		t := ModeTrial{Mode: r, Tried: modes[r].tried, DirectIO: err == nil}
		if err != nil && !direct {
			err = Try(ctx, root.Existing, r, false)
		}
		if t.Works = err == nil || r == l.Taken; !t.Works {
			err = errors.Unwrap(err) // without the names of mode and root
			t.Reason, t.Remedy = m.explain(r, err)
			t.Error = oneLine(err)
		}
		l.Trials = append(l.Trials, t)
	}
	if l.Taken == EROFS || l.Taken == EROFSLoop {
		// An error means that it cannot be found out.
		if cached, verity, err := throughCache(root.Existing); err == nil && cached {
			l.Twice, l.Remedy = m.twice(verity)
		}
	}
	return l
}

// twice says why the file system does direct I/O through the page cache, and what would
// help.
func (m machine) twice(verity bool) (reason, remedy string) {
	switch {
	case verity:
		return fmt.Sprintf("root's filesystem, %s, reads files with fs-verity through the page cache, and containerd enables it for its blobs", m.fs),
			"put root and containerd's content on a filesystem without fs-verity (mkfs.ext4 -O ^verity)"
	case m.fs == "btrfs": // fs/btrfs/direct-io.c
		return "root's filesystem, btrfs, reads files with checksums through the page cache", "put root and containerd's content on ext4 or xfs"
	default:
		return fmt.Sprintf("root's filesystem, %s, does direct I/O through the page cache", m.fs), "put root and containerd's content on ext4 or xfs"
	}
}

// Gain says what a user gains by moving from one mode to a better one. From "", no mode at
// all, every mode is better.
func Gain(from, to Mode) string {
	if from == "" {
		return "artifacts with such layers can be mounted"
	}
	return gains[[2]Mode{from, to}]
}

var gains = map[[2]Mode]string{
	{Link, Overlay}:            "files of raw layers have the modes, owners and times that were packed",
	{Copy, Overlay}:            "raw layers are not copied",
	{Copy, Link}:               "raw layers are not copied, but have the blobs' modes, owners and times",
	{EROFSLoop, EROFS}:         "tars take no loop devices",
	{EROFSBuffered, EROFS}:     "the page cache holds tar layers once, not twice",
	{EROFSBuffered, EROFSLoop}: "the page cache holds tar layers once, not twice",
	{Extract, EROFS}:           "tar layers are not copied",
	{Extract, EROFSLoop}:       "tar layers are not copied, but take a loop device each",
	{Extract, EROFSBuffered}:   "tar layers are not copied, but the page cache holds them twice",
}

// readsEnds is the first Linux known to read the end of an EROFS file by direct I/O if the
// file ends within a block; 6.12 does not.
var readsEnds = kernelversion.KernelVersion{Kernel: 6, Major: 18}

const loopControl = "/dev/loop-control"

// machine has the properties of the node on which a mode can fail.
type machine struct {
	// fs is the type of root's file system.
	fs string
	// loop says that loopControl exists.
	loop bool
	// older reports whether the kernel is older than a version.
	older func(kernelversion.KernelVersion) bool
	// sectors is why 512 bytes cannot be read by direct I/O, nil if they can.
	sectors error
}

func olderThan(v kernelversion.KernelVersion) bool {
	ok, err := kernelversion.GreaterEqualThan(v)
	return err == nil && !ok
}

// moveRoot is the remedy for a file system without what a mode needs.
const moveRoot = "move root to ext4, xfs or btrfs"

// explain says in plain words why the mode does not work and what would help. If it does
// not know, the reason is the text of err.
func (m machine) explain(r Mode, err error) (reason, remedy string) {
	is := func(errnos ...unix.Errno) bool {
		for _, e := range errnos {
			if errors.Is(err, e) {
				return true
			}
		}
		return false
	}
	module := "erofs"
	if r == Overlay {
		module = "overlay"
	}
	first := modes[r].kernel
	switch {
	case errors.Is(err, errdefs.ErrResourceExhausted), is(unix.EMFILE, unix.ENFILE, unix.ENOMEM):
		return oneLine(err), "free the exhausted resource and run this again"
	case errors.Is(err, errNoDirectIO) && (r == EROFS || r == EROFSBuffered):
		// fs/erofs/fileio.c, erofs_fileio_aops: no direct_IO.
		reason = "the kernel opens no file of an EROFS over files with O_DIRECT, which is required"
	case errors.Is(err, errNoDirectIO) && r == EROFSLoop && m.older(readsEnds):
		reason = "the kernel does not read the end of a file in an EROFS with O_DIRECT, which is required"
		remedy = fmt.Sprintf("run Linux %s or a later one", &readsEnds)
	case errors.Is(err, errNoDirectIO):
		reason, remedy = fmt.Sprintf("root's filesystem, %s, does not read files with O_DIRECT, which is required", m.fs), moveRoot
	case r == Link && is(unix.EPERM, unix.EOPNOTSUPP, unix.ENOSYS):
		reason, remedy = fmt.Sprintf("root's filesystem, %s, has no hard links", m.fs), moveRoot
	case is(unix.EPERM, unix.EACCES):
		reason = "the kernel does not permit it"
		remedy = "run as root with all capabilities, and not in a user namespace"
	case r == EROFSLoop && !m.loop:
		return "there is no " + loopControl, "load the module of loop devices (modprobe loop)"
	case is(unix.ENODEV):
		reason = fmt.Sprintf("the kernel has no %s", module)
		remedy = fmt.Sprintf("load its module (modprobe %s), or run a kernel that has it", module)
	case is(unix.ENOSYS, unix.EINVAL, unix.ENOTBLK) && m.older(first):
		reason, remedy = fmt.Sprintf("the kernel is older than Linux %s", &first), fmt.Sprintf("run Linux %s or a later one", &first)
	case r == Overlay && is(unix.EOPNOTSUPP):
		reason, remedy = fmt.Sprintf("root's filesystem, %s, has no trusted extended attributes", m.fs), moveRoot
	case r == Overlay && is(unix.EINVAL):
		reason, remedy = fmt.Sprintf("overlayfs does not take root's filesystem, %s, as a lower layer", m.fs), moveRoot
	case is(unix.ENOTBLK) && (m.fs == "ext4" || m.fs == "xfs" || m.fs == "btrfs"):
		reason, remedy = "the kernel cannot mount an EROFS from files", "run a kernel with CONFIG_EROFS_FS_BACKED_BY_FILE"
	case is(unix.ENOTBLK):
		reason, remedy = fmt.Sprintf("the kernel cannot mount an EROFS from files of root's filesystem, %s", m.fs), moveRoot
	// On such a disk EROFS over files gets EIO, and loop devices have a block size that
	// EROFS refuses (drivers/block/loop.c, loop_default_blocksize). Other causes may give
	// the same errors.
	case (r == EROFS && is(unix.EIO) || r == EROFSLoop && is(unix.EINVAL)) && m.sectors != nil:
		reason = "root's disk cannot do direct I/O in units of 512 bytes"
		remedy = "move root to a disk with sectors of 512 bytes"
	default:
		return oneLine(err), ""
	}
	if errno, ok := errors.AsType[unix.Errno](err); ok {
		reason += fmt.Sprintf(" (%v)", errno)
	}
	return reason, remedy
}

func oneLine(err error) string { return strings.ReplaceAll(err.Error(), "\n", "; ") }
