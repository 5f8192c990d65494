// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

//go:build amd64

package crash

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Op is an operation that changes a file system, a mount or a lock: a point where a program
// can be killed. It is identified by the call, the path and how often both have occurred;
// random parts of names are ignored.
type Op struct {
	Call string
	// Path is the path of the operation; for a rename or link it is the new name.
	Path string
	// Nth counts from 1 since Arm.
	Nth int
}

func (o Op) String() string { return fmt.Sprintf("%s %s, number %d", o.Call, o.Path, o.Nth) }

// call describes a system call: its name, and which arguments are a file descriptor or a
// path, with the directory of relative paths.
type call struct {
	name string
	fd   int // -1: none
	path int // -1: none
	dir  int // -1: the working directory
}

func byFD(name string) call              { return call{name, 0, -1, -1} }
func byPath(name string, path int) call  { return call{name, -1, path, -1} }
func at(name string, dir, path int) call { return call{name, -1, path, dir} }
func noPath(name string) call            { return call{name, -1, -1, -1} }

// calls are the system calls whose effect outlives the process. Reads and changes in memory
// leave no trace after a crash. openat(2) is separate: see filterOf.
var calls = map[uint64]call{
	unix.SYS_WRITE:           byFD("write"),
	unix.SYS_PWRITE64:        byFD("pwrite"),
	unix.SYS_WRITEV:          byFD("writev"),
	unix.SYS_PWRITEV:         byFD("pwritev"),
	unix.SYS_SENDFILE:        byFD("sendfile"),
	unix.SYS_SPLICE:          {"splice", 2, -1, -1},
	unix.SYS_COPY_FILE_RANGE: {"copy_file_range", 2, -1, -1},
	unix.SYS_FSYNC:           byFD("fsync"),
	unix.SYS_FDATASYNC:       byFD("fdatasync"),
	unix.SYS_FTRUNCATE:       byFD("ftruncate"),
	unix.SYS_FALLOCATE:       byFD("fallocate"),
	unix.SYS_FCHMOD:          byFD("fchmod"),
	unix.SYS_FCHOWN:          byFD("fchown"),
	unix.SYS_FSETXATTR:       byFD("fsetxattr"),
	unix.SYS_FLOCK:           byFD("flock"),
	unix.SYS_IOCTL:           byFD("ioctl"),
	unix.SYS_TRUNCATE:        byPath("truncate", 0),
	unix.SYS_CHMOD:           byPath("chmod", 0),
	unix.SYS_CHOWN:           byPath("chown", 0),
	unix.SYS_LCHOWN:          byPath("lchown", 0),
	unix.SYS_SETXATTR:        byPath("setxattr", 0),
	unix.SYS_LSETXATTR:       byPath("lsetxattr", 0),
	unix.SYS_MKDIR:           byPath("mkdir", 0),
	unix.SYS_RMDIR:           byPath("rmdir", 0),
	unix.SYS_UNLINK:          byPath("unlink", 0),
	unix.SYS_RENAME:          byPath("rename", 1),
	unix.SYS_LINK:            byPath("link", 1),
	unix.SYS_SYMLINK:         byPath("symlink", 1),
	unix.SYS_MKDIRAT:         at("mkdirat", 0, 1),
	unix.SYS_MKNODAT:         at("mknodat", 0, 1),
	unix.SYS_UNLINKAT:        at("unlinkat", 0, 1),
	unix.SYS_RENAMEAT:        at("renameat", 2, 3),
	unix.SYS_RENAMEAT2:       at("renameat2", 2, 3),
	unix.SYS_LINKAT:          at("linkat", 2, 3),
	unix.SYS_SYMLINKAT:       at("symlinkat", 1, 2),
	unix.SYS_FCHMODAT:        at("fchmodat", 0, 1),
	unix.SYS_FCHOWNAT:        at("fchownat", 0, 1),
	unix.SYS_UTIMENSAT:       at("utimensat", 0, 1),
	unix.SYS_MOUNT:           byPath("mount", 1),
	unix.SYS_UMOUNT2:         byPath("umount2", 0),
	unix.SYS_MOVE_MOUNT:      at("move_mount", 2, 3),
	unix.SYS_MOUNT_SETATTR:   at("mount_setattr", 0, 1),
	unix.SYS_FSOPEN:          noPath("fsopen"),
	unix.SYS_FSCONFIG:        noPath("fsconfig"),
	unix.SYS_FSMOUNT:         noPath("fsmount"),
	unix.SYS_BIND:            noPath("bind"),
}

// read returns the operation of a call, or false if it does not count.
func (p *Process) read(tid int, r *unix.PtraceRegs) (op Op, ok bool) {
	args := [6]uint64{r.Rdi, r.Rsi, r.Rdx, r.R10, r.R8, r.R9}
	how, known := calls[r.Orig_rax]
	if !known {
		how, known = reads[r.Orig_rax]
	}
	if r.Orig_rax == unix.SYS_OPENAT {
		how, known = at("openat", 0, 1), true
		if r.Rdx&(unix.O_CREAT|unix.O_TRUNC) == 0 {
			how.name = "open" // only an openat that creates or truncates changes something
		}
	}
	if !known {
		return op, false
	}
	op.Call = how.name
	fd := func(n int) string {
		path, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", p.pid, int32(args[n])))
		if err != nil {
			return ""
		}
		return path
	}
	switch {
	case how.fd >= 0:
		op.Path = fd(how.fd)
	case how.path >= 0:
		op.Path = text(tid, args[how.path])
		if filepath.IsAbs(op.Path) {
			break
		}
		if how.dir < 0 || int32(args[how.dir]) == unix.AT_FDCWD {
			wd, err := os.Readlink(fmt.Sprintf("/proc/%d/cwd", tid))
			if err != nil {
				return op, false
			}
			op.Path = filepath.Join(wd, op.Path)
		} else {
			op.Path = filepath.Join(fd(how.dir), op.Path)
		}
	}
	switch op.Call {
	case "fsopen":
		op.Path = text(tid, args[0])
		return op, true
	case "fsconfig":
		op.Path = fmt.Sprintf("%d %s", args[1], text(tid, args[2]))
		return op, true
	case "fsmount":
		return op, true
	case "bind": // sun_path follows the two bytes of sun_family
		op.Path = text(tid, args[1]+2)
	case "ioctl":
		op.Call = fmt.Sprintf("ioctl %#x", args[1])
		if args[1] == unix.FICLONE {
			op.Call = "ioctl FICLONE"
		}
	}
	op.Path, ok = p.about(op.Path)
	return op, ok
}

// about normalizes a path by removing random parts. It returns false if the path does not
// count.
func (p *Process) about(path string) (string, bool) {
	for _, system := range []string{"/sys/", "/dev/loop"} {
		if strings.HasPrefix(path, system) {
			return system + random.ReplaceAllString(filepath.Base(path), "N"), true
		}
	}
	for _, dir := range p.dirs {
		if rel, err := filepath.Rel(dir, path); err == nil && filepath.IsLocal(rel) {
			return filepath.Join(filepath.Base(dir), random.ReplaceAllString(rel, "$1*")), true
		}
	}
	return "", false
}

// random matches random names: temporary directories, trash, probes, temporary directories
// of the overlayfs snapshotter, and loop device numbers.
var random = regexp.MustCompile(`\b(new-|probe-|fuse-overlayfs-)[0-9a-z]+\b|\b(loop)[0-9]+\b|erofs-[0-9]+`)

// text reads a string from a stopped process.
func text(tid int, address uint64) string {
	buf := make([]byte, 4096)
	n := len(buf) - int(address%4096) // the next page may not be mapped
	got, err := unix.ProcessVMReadv(tid, []unix.Iovec{{Base: &buf[0], Len: uint64(n)}}, []unix.RemoteIovec{{Base: uintptr(address), Len: n}}, 0)
	if err != nil {
		return ""
	}
	if end := bytes.IndexByte(buf[:got], 0); end >= 0 {
		return string(buf[:end])
	}
	rest := ""
	if got == n && n < len(buf) {
		rest = text(tid, address+uint64(n))
	}
	return string(buf[:got]) + rest
}

// Key identifies the operation in a run.
func (o Op) Key() string { return o.Call + " " + o.Path + " " + strconv.Itoa(o.Nth) }
