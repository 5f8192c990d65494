// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

//go:build amd64

package crash

import (
	"os"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Fault is an error or a delay at an operation; the program continues.
type Fault struct {
	// At is the first affected operation; nil means the next one.
	At *Op
	// Errno is the error that the operation returns without being executed; 0 executes it.
	Errno unix.Errno
	// Lasting also affects later operations until Heal, like a full or dead disk: those in
	// the same directory of Dirs that can fail with Errno.
	Lasting bool
	// Delay slows the operation, or with Lasting all operations, in the directory of
	// Dirs with the base name Slow.
	Delay time.Duration
	Slow  string
	// Hook runs before the operation, while the program is stopped.
	Hook func(*Process)
}

// Inject is Arm with a fault instead of a kill.
func (p *Process) Inject(f Fault) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.begin()
	p.fault = &f
}

// Heal ends the fault. It returns the operations since Inject, and how many failed, were
// slow or called the hook.
func (p *Process) Heal() (ops []Op, hit int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.armed, p.fault = false, nil
	return p.ops, p.hit
}

// Failed reports whether the fault made an operation fail since Inject. After a delay or a
// hook the program must still do everything that is expected of it.
func (p *Process) Failed() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.fault != nil && p.fault.Errno != 0 && p.hit > 0
}

// meet applies the fault to a thread that is about to begin op.
func (p *Process) meet(tid int, regs *unix.PtraceRegs, op Op) verdict {
	f := p.fault
	switch {
	case p.hit > 0 && (!f.Lasting || dirOf(op) != p.failing), p.hit == 0 && f.At != nil && *f.At != op:
		return goOn
	case f.Errno != 0 && !CanFail(op, f.Errno), f.Delay > 0 && dirOf(op) != f.Slow:
		return goOn
	}
	p.failing = dirOf(op)
	p.hit++
	if f.Hook != nil {
		f.Hook(p)
	}
	if f.Errno != 0 && skip(tid, regs, -int64(f.Errno)) != nil {
		return goOn // the thread has been killed
	}
	if f.Delay > 0 {
		return later
	}
	return goOn
}

// skip makes the pending call return without executing it: a call number of -1 is
// skipped (seccomp(2), SECCOMP_RET_TRACE).
func skip(tid int, regs *unix.PtraceRegs, result int64) error {
	regs.Orig_rax, regs.Rax = ^uint64(0), uint64(result)
	return unix.PtraceSetRegs(tid, regs)
}

// dirOf returns the base name of the directory among Dirs that has the operation's path, or
// "" for mounts that are not attached yet.
func dirOf(op Op) string {
	dir, _, _ := strings.Cut(op.Path, "/")
	return dir
}

// creating are the operations that need disk space.
var creating = map[string]bool{
	"openat": true, "write": true, "pwrite": true, "writev": true, "pwritev": true, "sendfile": true, "splice": true,
	"copy_file_range": true, "fsync": true, "fdatasync": true, "fallocate": true, "fsetxattr": true, "setxattr": true,
	"lsetxattr": true, "mkdir": true, "mkdirat": true, "mknodat": true, "symlink": true, "symlinkat": true, "link": true,
	"linkat": true, "rename": true, "renameat": true, "renameat2": true, "ioctl FICLONE": true, "bind": true,
}

// opening are the operations that create a file descriptor.
var opening = map[string]bool{"openat": true, "open": true, "openat2": true, "open_tree": true, "fsopen": true, "fsmount": true}

// diskless are the operations that use no disk.
var diskless = map[string]bool{
	"flock": true, "umount2": true, "fsopen": true, "fsmount": true, "move_mount": true, "mount_setattr": true, "bind": true,
	"inotify_add_watch": true,
}

// CanFail reports whether the kernel can return this error for the operation, according to
// the manual pages and the sources of ext4, XFS and quota.
func CanFail(op Op, errno unix.Errno) bool {
	switch errno {
	case unix.ENOSPC:
		return creating[op.Call] && inDirs(op)
	case unix.EDQUOT:
		return (creating[op.Call] || strings.Contains(op.Call, "chown")) && inDirs(op)
	case unix.EMFILE:
		return opening[op.Call]
	case unix.EIO:
		return !diskless[op.Call] && (op.Call == "fsconfig" || inDirs(op)) && (!strings.HasPrefix(op.Call, "ioctl") || op.Call == "ioctl FICLONE")
	default:
		return false
	}
}

// inDirs reports whether an operation is in one of Dirs, not on /sys or a loop device.
func inDirs(op Op) bool { return op.Path != "" && !strings.HasPrefix(op.Path, "/") }

// reads are the system calls that only read; see calls. openat(2) is separate.
var reads = map[uint64]call{
	unix.SYS_READ:              byFD("read"),
	unix.SYS_PREAD64:           byFD("pread"),
	unix.SYS_GETDENTS64:        byFD("getdents"),
	unix.SYS_FSTAT:             byFD("fstat"),
	unix.SYS_FSTATFS:           byFD("fstatfs"),
	unix.SYS_FGETXATTR:         byFD("fgetxattr"),
	unix.SYS_STATFS:            byPath("statfs", 0),
	unix.SYS_STAT:              byPath("stat", 0),
	unix.SYS_LSTAT:             byPath("lstat", 0),
	unix.SYS_LGETXATTR:         byPath("lgetxattr", 0),
	unix.SYS_LLISTXATTR:        byPath("llistxattr", 0),
	unix.SYS_NEWFSTATAT:        at("fstatat", 0, 1),
	unix.SYS_STATX:             at("statx", 0, 1),
	unix.SYS_READLINKAT:        at("readlinkat", 0, 1),
	unix.SYS_FACCESSAT2:        at("faccessat2", 0, 1),
	unix.SYS_OPENAT2:           at("openat2", 0, 1),
	unix.SYS_OPEN_TREE:         at("open_tree", 0, 1),
	unix.SYS_INOTIFY_ADD_WATCH: byPath("inotify_add_watch", 1),
}

// Skew shifts the program's wall clock, as if somebody set the node's clock. It needs
// Clock. The monotonic clock does not change, as with clock_settime(2).
func (p *Process) Skew(by time.Duration) { p.skew.Store(int64(by)) }

// tell answers a clock_gettime(2) of the wall clock.
func (p *Process) tell(tid int, regs *unix.PtraceRegs) error {
	now, err := unix.TimeToTimespec(time.Now().Add(time.Duration(p.skew.Load())))
	if err != nil {
		return err
	}
	text := unsafe.Slice((*byte)(unsafe.Pointer(&now)), unsafe.Sizeof(now))
	if _, err := unix.PtracePokeData(tid, uintptr(regs.Rsi), text); err != nil {
		return err
	}
	return skip(tid, regs, 0)
}

// withoutVDSO removes the vDSO from a program that is about to start, so that
// clock_gettime(2) is a system call. The kernel puts the vDSO's address into the auxiliary
// vector (getauxval(3)), which follows the arguments and the environment on the stack.
func withoutVDSO(tid int) error {
	const sysinfoEHDR, word = 33, 8
	var regs unix.PtraceRegs
	if err := unix.PtraceGetRegs(tid, &regs); err != nil {
		return os.NewSyscallError("ptrace PTRACE_GETREGS", err)
	}
	at := uintptr(regs.Rsp)
	next := func() (value uint64, err error) {
		_, err = unix.PtracePeekData(tid, at, unsafe.Slice((*byte)(unsafe.Pointer(&value)), word))
		at += word
		return value, err
	}
	for nulls := 0; nulls < 2; {
		value, err := next()
		if err != nil {
			return os.NewSyscallError("ptrace PTRACE_PEEKDATA", err)
		}
		if value == 0 {
			nulls++
		}
	}
	for {
		tag, err := next()
		if err != nil || tag == 0 {
			return os.NewSyscallError("ptrace PTRACE_PEEKDATA", err)
		}
		if tag == sysinfoEHDR {
			_, err := unix.PtracePokeData(tid, at, make([]byte, word))
			return os.NewSyscallError("ptrace PTRACE_POKEDATA", err)
		}
		if _, err := next(); err != nil {
			return os.NewSyscallError("ptrace PTRACE_PEEKDATA", err)
		}
	}
}
