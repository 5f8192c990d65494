// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package confine

import (
	"fmt"
	"runtime"
	"unsafe"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// never are the system calls that the daemon never makes, but an attacker in it would:
// those that its capabilities allow, or that need none. A privileged container cannot have
// the stricter filter of the systemd unit. Calls that need other capabilities are not
// listed.
var never = []uint32{
	// To run another program.
	unix.SYS_EXECVE, unix.SYS_EXECVEAT,
	// To read other processes, and take their open files.
	unix.SYS_PTRACE, unix.SYS_PROCESS_VM_READV, unix.SYS_PROCESS_VM_WRITEV, unix.SYS_PIDFD_GETFD,
	// To enter other namespaces.
	unix.SYS_SETNS, unix.SYS_UNSHARE, unix.SYS_PIVOT_ROOT,
	// The parts of the kernel with most of its vulnerabilities.
	unix.SYS_BPF, unix.SYS_PERF_EVENT_OPEN, unix.SYS_USERFAULTFD, unix.SYS_IO_URING_SETUP,
	unix.SYS_KEYCTL, unix.SYS_ADD_KEY, unix.SYS_REQUEST_KEY,
	// Other things that CAP_SYS_ADMIN allows.
	unix.SYS_FANOTIFY_INIT, unix.SYS_QUOTACTL, unix.SYS_QUOTACTL_FD, unix.SYS_SWAPON, unix.SYS_SWAPOFF,
	unix.SYS_SETHOSTNAME, unix.SYS_SETDOMAINNAME, unix.SYS_SYSLOG,
}

// newNamespaces are the flags of clone(2) that make namespaces.
const newNamespaces = unix.CLONE_NEWNS | unix.CLONE_NEWCGROUP | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC |
	unix.CLONE_NEWUSER | unix.CLONE_NEWPID | unix.CLONE_NEWNET

// Offsets in `struct seccomp_data`: the number of the system call, its ABI, and the lower
// half of the first argument on a little-endian machine.
const (
	callNumber = 0
	callABI    = 4
	callFirst  = 16
)

// abis are AUDIT_ARCH_* of linux/audit.h.
var abis = map[string]uint32{
	"amd64": unix.AUDIT_ARCH_X86_64,
	"arm64": unix.AUDIT_ARCH_AARCH64,
}

// SystemCalls has the kernel refuse with EPERM, in all threads and for good: the calls that
// the daemon never makes; all calls by the ABI of another architecture, whose numbers mean
// other calls; and all sockets but Unix sockets and, with network, those of IPv4 and IPv6.
func SystemCalls(network bool) error {
	abi, ok := abis[runtime.GOARCH]
	if !ok {
		return fmt.Errorf("no filter of system calls for %s", runtime.GOARCH)
	}
	refuse := func(errno unix.Errno) bpf.Instruction {
		return bpf.RetConstant{Val: unix.SECCOMP_RET_ERRNO | uint32(errno)}
	}
	filter := []bpf.Instruction{
		bpf.LoadAbsolute{Off: callABI, Size: 4},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: abi, SkipTrue: 1},
		refuse(unix.EPERM),
		bpf.LoadAbsolute{Off: callNumber, Size: 4},
		// The x32 ABI is that of amd64 with this bit.
		bpf.JumpIf{Cond: bpf.JumpLessThan, Val: 1 << 30, SkipTrue: 1},
		refuse(unix.EPERM),
		// Its flags are in memory, which a filter cannot read. Callers that get ENOSYS use
		// clone(2).
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: unix.SYS_CLONE3, SkipTrue: 1},
		refuse(unix.ENOSYS),
	}
	for _, call := range never {
		filter = append(filter, bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: call, SkipTrue: 1}, refuse(unix.EPERM))
	}
	allow := bpf.RetConstant{Val: unix.SECCOMP_RET_ALLOW}
	filter = append(filter,
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: unix.SYS_CLONE, SkipTrue: 4},
		bpf.LoadAbsolute{Off: callFirst, Size: 4},
		bpf.JumpIf{Cond: bpf.JumpBitsNotSet, Val: newNamespaces, SkipTrue: 1},
		refuse(unix.EPERM),
		allow,
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.SYS_SOCKET, SkipTrue: 2},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.SYS_SOCKETPAIR, SkipTrue: 1},
		allow,
		bpf.LoadAbsolute{Off: callFirst, Size: 4},
	)
	families := []uint32{unix.AF_UNIX}
	if network {
		families = append(families, unix.AF_INET, unix.AF_INET6)
	}
	for _, family := range families {
		filter = append(filter, bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: family, SkipTrue: 1}, allow)
	}
	raw, err := bpf.Assemble(append(filter, refuse(unix.EPERM)))
	if err != nil {
		return fmt.Errorf("assemble the filter of system calls: %w", err)
	}
	//nolint:gosec // seccomp(2) takes a pointer to sock_filters, which RawInstruction has the layout of
	program := unix.SockFprog{Len: uint16(len(raw)), Filter: (*unix.SockFilter)(unsafe.Pointer(&raw[0]))}
	//nolint:gosec // seccomp(2) takes a pointer
	thread, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&program)))
	if errno != 0 {
		return fmt.Errorf("install the filter of system calls: %w", errno)
	}
	if thread != 0 { // seccomp(2), SECCOMP_FILTER_FLAG_TSYNC: nothing is installed
		return fmt.Errorf("install the filter of system calls: thread %d has another one", thread)
	}
	return nil
}
