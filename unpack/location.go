// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// Location is where a directory is.
type Location struct {
	// Path is the directory, and Existing the directory itself or the nearest existing one
	// above it.
	Path     string `json:"path"`
	Existing string `json:"existing"`
	// Type, Device and Mount are the file system's type, what it was mounted from, and
	// where.
	Type   string `json:"type"`
	Device string `json:"device"`
	Mount  string `json:"mount"`

	mount      int    // its ID
	superblock string // device number
	dev        uint64 // of the directory; each subvolume of a btrfs has its own
}

// Boundary is what lies between two directories, so that files of one cannot be linked into
// the other.
type Boundary string

// The boundaries of link(2). Only the first is also one for FICLONE.
const (
	FilesystemBoundary Boundary = "filesystem"
	SubvolumeBoundary  Boundary = "subvolume"
	MountBoundary      Boundary = "mount"
)

// between returns the boundary between p and q, "" if there is none.
func (p Location) between(q Location) Boundary {
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

// Locate returns where path is.
func Locate(path string) (Location, error) {
	p := Location{Path: path, Existing: filepath.Clean(path)}
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
		return Location{}, fmt.Errorf("cannot tell on which filesystem %s is: %w", path, err)
	}
	// This process may not see the mount, which is not an error.
	mounts, err := mountinfo.GetMounts(func(i *mountinfo.Info) (skip, stop bool) {
		return i.ID != p.mount, i.ID == p.mount
	})
	if err != nil {
		return Location{}, err
	}
	p.Type, p.superblock = "unknown", fmt.Sprintf("%d:%d", unix.Major(p.dev), unix.Minor(p.dev))
	for _, m := range mounts {
		p.Type, p.Device, p.Mount = m.FSType, m.Source, m.Mountpoint
		p.superblock = fmt.Sprintf("%d:%d", m.Major, m.Minor)
	}
	return p, nil
}

// mountID returns the ID of the mount that path is on. A directory that is mounted
// elsewhere, or over another, has another ID.
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
