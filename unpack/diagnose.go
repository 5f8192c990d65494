// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/pkg/kernelversion"
	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/blobs"
)

// Comparison is how the modes of one format do in a directory.
type Comparison struct {
	// Taken is the mode that Probe chooses, "" if there is none, and Error why
	// there is none.
	Taken Mode   `json:"taken,omitempty"`
	Error string `json:"error,omitempty"`
	// Trials are of all modes, the best first.
	Trials []Trial `json:"modes"`
	// Twice says why Taken, which does direct I/O, still has every byte that is read in the
	// page cache twice. Remedy says what would help.
	Twice  string `json:"cached_twice,omitempty"`
	Remedy string `json:"remedy,omitempty"`
}

// Trial is how a mode did when it was tried.
type Trial struct {
	Mode Mode `json:"mode"`
	// Tried says what was tried.
	Tried string `json:"tried"`
	Works bool   `json:"works"`
	// DirectIO tells that files can be read with O_DIRECT.
	DirectIO bool `json:"direct_io"`
	// Reason says why the mode does not work, and Remedy what would help, if
	// that can be told from Error.
	Reason string `json:"reason,omitempty"`
	Remedy string `json:"remedy,omitempty"`
	Error  string `json:"error,omitempty"`
}

// CompareModes tries all modes of a format (RawModes or TarModes) in root, those
// that Probe need not try as well. forced and direct are as for Probe.
func CompareModes(ctx context.Context, root Place, forced Mode, direct bool, all []Mode) Comparison {
	_, err := os.Stat(loopControl)
	m := machine{fs: root.Type, loop: err == nil, older: olderThan, sectors: sectors(root.Existing)}
	var l Comparison
	// Probe's own word on what is taken; what it passes over is tried once more
	// below, for the errors one by one.
	if l.Taken, err = probe(ctx, root.Existing, forced, direct, all); l.Taken == "" {
		l.Error = oneLine(err)
	}
	for _, r := range all {
		err := Try(ctx, root.Existing, r, true)
		t := Trial{Mode: r, Tried: means[r], DirectIO: err == nil}
		if err != nil && !direct {
			err = Try(ctx, root.Existing, r, false)
		}
		if t.Works = err == nil || r == l.Taken; !t.Works {
			err = errors.Unwrap(err) // without mode and root
			t.Reason, t.Remedy = m.explain(r, err)
			t.Error = oneLine(err)
		}
		l.Trials = append(l.Trials, t)
	}
	if l.Taken == EROFS || l.Taken == EROFSLoop {
		// What cannot be told is no reason.
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

// means says what Try does.
var means = map[Mode]string{
	Overlay:       "overlayfs over a data-only lower layer",
	Link:          "a hard link",
	Copy:          "nothing but writing",
	EROFS:         "an EROFS image over files, with direct I/O",
	EROFSLoop:     "an EROFS image over loop devices, with direct I/O",
	EROFSBuffered: "an EROFS image over files",
	Extract:       "nothing but writing",
}

// Gain is what a user gains by moving from one mode to a better one. From "", no mode at
// all, every mode is better.
func Gain(from, to Mode) string {
	if from == "" {
		return "layers can be laid out"
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

// minKernel is the first Linux with all that a mode needs.
var minKernel = map[Mode]kernelversion.KernelVersion{
	Overlay:       {Kernel: 6, Major: 5},
	EROFS:         {Kernel: 6, Major: 13},
	EROFSLoop:     {Kernel: 6, Major: 4},
	EROFSBuffered: {Kernel: 6, Major: 12},
}

// readsEnds is the first Linux known to read the end of a file in an EROFS by direct I/O if
// it ends within a block; 6.12 does not.
var readsEnds = kernelversion.KernelVersion{Kernel: 6, Major: 18}

const loopControl = "/dev/loop-control"

// machine is what of the node a mode can fail for.
type machine struct {
	// fs is the type of root's file system.
	fs string
	// loop says whether there is loopControl.
	loop bool
	// older reports whether the kernel is older than that.
	older func(kernelversion.KernelVersion) bool
	// sectors is why no 512 bytes can be read by direct I/O; nil if they can.
	sectors error
}

func olderThan(v kernelversion.KernelVersion) bool {
	ok, err := kernelversion.GreaterEqualThan(v)
	return err == nil && !ok
}

// moveRoot is the remedy for a file system that cannot do what a mode needs.
const moveRoot = "move root to ext4, xfs or btrfs"

// explain says in plain words why r does not work and what would help. The error
// is all it says if it knows no better.
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
	first := minKernel[r]
	switch {
	case errors.Is(err, errdefs.ErrResourceExhausted), is(unix.EMFILE, unix.ENFILE, unix.ENOMEM):
		return oneLine(err), "free what is used up, and run this again"
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
	// Such a disk gives EROFS over files EIO, and loop devices a block size that EROFS
	// refuses (drivers/block/loop.c, loop_default_blocksize). Others may say the same of
	// other things.
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

// Place is where a directory is.
type Place struct {
	// Path is the directory, and Existing the same or the nearest directory
	// above it that is there.
	Path     string `json:"path"`
	Existing string `json:"existing"`
	// Type, Device and Mount are of the file system: its type, what it was
	// mounted from and where.
	Type   string `json:"type"`
	Device string `json:"device"`
	Mount  string `json:"mount"`

	mount      int    // its ID
	superblock string // device number
	dev        uint64 // of the directory; each subvolume of a btrfs has its own
}

// Boundary is what lies between two directories, so that no file of the one can
// be linked into the other.
type Boundary string

// The boundaries of link(2), and of FICLONE only the first.
const (
	FilesystemBoundary Boundary = "filesystem"
	SubvolumeBoundary  Boundary = "subvolume"
	MountBoundary      Boundary = "mount"
)

// between returns the boundary between p and q, "" if there is none.
func (p Place) between(q Place) Boundary {
	switch {
	case p.superblock != q.superblock:
		return FilesystemBoundary
	case p.dev != q.dev:
		return SubvolumeBoundary
	case p.mount != q.mount:
		return MountBoundary
	default:
		return ""
	}
}

// Locate says where path is.
func Locate(path string) (Place, error) {
	p := Place{Path: path, Existing: filepath.Clean(path)}
	var st unix.Stat_t
	err := unix.Stat(p.Existing, &st)
	for errors.Is(err, os.ErrNotExist) && p.Existing != filepath.Dir(p.Existing) {
		p.Existing = filepath.Dir(p.Existing)
		err = unix.Stat(p.Existing, &st)
	}
	if err == nil {
		p.dev = st.Dev
		p.mount, err = mountID(p.Existing)
	}
	if err != nil {
		return Place{}, fmt.Errorf("cannot tell on which filesystem %s is: %w", path, err)
	}
	// It may be a mount that this process cannot see, which is no error.
	mounts, err := mountinfo.GetMounts(func(i *mountinfo.Info) (skip, stop bool) {
		return i.ID != p.mount, i.ID == p.mount
	})
	if err != nil {
		return Place{}, err
	}
	p.Type, p.superblock = "unknown", fmt.Sprintf("%d:%d", unix.Major(p.dev), unix.Minor(p.dev))
	for _, m := range mounts {
		p.Type, p.Device, p.Mount = m.FSType, m.Source, m.Mountpoint
		p.superblock = fmt.Sprintf("%d:%d", m.Major, m.Minor)
	}
	return p, nil
}

// mountID is the ID of the mount that path is on. One that is mounted elsewhere
// or over another has an ID of its own.
func mountID(path string) (id int, err error) {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, os.NewSyscallError("open", err)
	}
	defer func() { _ = unix.Close(fd) }()
	info, err := os.Open(fmt.Sprintf("/proc/self/fdinfo/%d", fd))
	if err != nil {
		return 0, err
	}
	defer info.Close()
	for lines := bufio.NewScanner(info); lines.Scan(); {
		if _, err := fmt.Sscanf(lines.Text(), "mnt_id: %d", &id); err == nil {
			return id, nil
		}
	}
	return 0, fmt.Errorf("%s has no mnt_id: %w", info.Name(), errdefs.ErrUnavailable)
}

// Retention is how a Tree comes by the contents that it retains.
type Retention string

// The ways to retain a blob; a Tree takes the first that works. Members that are
// extracted from a tar are copied, too.
const (
	Linked    Retention = "link"
	Reflinked Retention = "reflink"
	Copied    Retention = "copy"
)

// Decompressed is how a Tree comes by the flat tar in a compressed blob. What counts
// is what comes out.
const Decompressed Retention = "decompress"

// Retentions are all of them.
var Retentions = []Retention{Linked, Reflinked, Copied, Decompressed}

// Sharing is what root and the directory of blobs have in common.
type Sharing struct {
	Root  Place `json:"root"`
	Blobs Place `json:"blobs"`
	// Apart is what lies between them.
	Apart Boundary `json:"apart,omitempty"`
	// Blob is what Retention was tried with. If there is none, it is "", and so
	// is Retention.
	Blob      string    `json:"blob,omitempty"`
	Retention Retention `json:"retention,omitempty"`
	// Error is why Blob could not be linked; without a Retention, why it could
	// not be retained.
	Error string `json:"error,omitempty"`
}

// DiagnoseSharing tries how a blob of content can be retained in root, with the
// first one there is.
func DiagnoseSharing(root Place, content blobs.Dir) (Sharing, error) {
	dir, err := Locate(filepath.Join(string(content), "blobs", "sha256"))
	if err != nil {
		return Sharing{}, err
	}
	s := Sharing{Root: root, Blobs: dir, Apart: root.between(dir)}
	blobs, err := os.ReadDir(dir.Existing)
	if err != nil {
		return Sharing{}, err
	}
	probe, err := os.MkdirTemp(root.Existing, ProbeDirs)
	if err != nil {
		return Sharing{}, err
	}
	defer os.RemoveAll(probe)
	for _, b := range blobs {
		desc, err := content.Find(b.Name())
		if err != nil {
			continue // what is no blob, or one no more
		}
		err = s.retain(content.Path(desc.Digest), filepath.Join(probe, "blob"))
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.EMLINK) {
			continue
		}
		s.Blob = desc.Digest.String()
		if link := (*os.LinkError)(nil); errors.As(err, &link) {
			err = os.NewSyscallError("link", link.Err) // without the names
		}
		if err != nil {
			s.Error = err.Error()
		}
		break
	}
	return s, nil
}

// retain does what contents.retain does, but for copying. The error is of the
// link.
func (s *Sharing) retain(blob, target string) error {
	err := os.Link(blob, target)
	switch {
	case err == nil:
		s.Retention = Linked
		return nil
	case !errors.Is(err, unix.EXDEV) && !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.EOPNOTSUPP):
		return err
	}
	src, oerr := os.Open(blob)
	if oerr != nil {
		return oerr
	}
	defer src.Close()
	dst, oerr := os.Create(target)
	if oerr != nil {
		return oerr
	}
	defer dst.Close()
	s.Retention = Copied
	if unix.IoctlFileClone(int(dst.Fd()), int(src.Fd())) == nil {
		s.Retention = Reflinked
	}
	return err
}
