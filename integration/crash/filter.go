// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

//go:build amd64

package crash

import (
	"fmt"
	"maps"
	"os"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// launching is the environment variable that makes this program the launcher of the traced
// program. Its value lists the calls that stop it.
const launching = "ARTIFACT_SNAPSHOTTER_TEST_LAUNCH"

// Main must be the first call of a program that uses Start or a Wrapper. The program is
// also executed as the launcher, until the filter is installed, and as the wrapper. In
// those processes Main does not return.
func Main() {
	var err error
	switch {
	case os.Getenv(launching) != "":
		err = launch(os.Args[1:])
	case os.Getenv(wrapping) != "":
		err = wrap(os.Getenv(wrapping), os.Args[1:])
	default:
		return
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// Optional stops, in addition to calls that change something.
const (
	stopReads = "reads"
	stopClock = "clock"
)

func (program Program) stops() string {
	stops := "writes"
	if program.Reads {
		stops += " " + stopReads
	}
	if program.Clock {
		stops += " " + stopClock
	}
	return stops
}

// launch installs a filter that stops at the system calls of the table, and executes args.
// Filters survive execve(2).
func launch(args []string) error {
	runtime.LockOSThread() // a filter belongs to a thread
	stops := os.Getenv(launching)
	if err := os.Unsetenv(launching); err != nil {
		return err
	}
	filter := filterOf(strings.Contains(stops, stopReads), strings.Contains(stops, stopClock))
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	if err := unix.Prctl(unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, uintptr(unsafe.Pointer(&program)), 0, 0); err != nil {
		return os.NewSyscallError("prctl PR_SET_SECCOMP", err)
	}
	return os.NewSyscallError("execve", syscall.Exec(args[0], args, os.Environ()))
}

// Offsets in struct seccomp_data.
const (
	dataNumber = 0
	dataArch   = 4
	dataArg0   = 16 // the lower half
	dataArg2   = 16 + 2*8
)

// filterOf builds a filter that stops at the system calls of the table, and at openat(2)
// only if it may change something. With reading it also stops at calls that only read, with
// clock also at reads of the wall clock.
func filterOf(reading, clock bool) []unix.SockFilter {
	statement := func(code uint16, k uint32) unix.SockFilter { return unix.SockFilter{Code: code, K: k} }
	load := func(offset uint32) unix.SockFilter { return statement(unix.BPF_LD|unix.BPF_W|unix.BPF_ABS, offset) }
	allow := statement(unix.BPF_RET|unix.BPF_K, unix.SECCOMP_RET_ALLOW)
	stop := statement(unix.BPF_RET|unix.BPF_K, unix.SECCOMP_RET_TRACE)
	equal := func(k uint32, then, otherwise uint8) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jt: then, Jf: otherwise, K: k}
	}
	filter := []unix.SockFilter{load(dataArch), equal(unix.AUDIT_ARCH_X86_64, 1, 0), allow, load(dataNumber)}
	numbers := slices.Collect(maps.Keys(calls))
	if reading {
		numbers = append(slices.AppendSeq(numbers, maps.Keys(reads)), unix.SYS_OPENAT)
	}
	for _, number := range numbers {
		filter = append(filter, equal(uint32(number), 0, 1), stop)
	}
	if clock {
		filter = append(filter, equal(unix.SYS_CLOCK_GETTIME, 0, 4), load(dataArg0), equal(unix.CLOCK_REALTIME, 0, 1), stop, allow)
	}
	return append(filter,
		equal(unix.SYS_OPENAT, 1, 0),
		allow,
		load(dataArg2),
		unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K, Jt: 1, K: unix.O_CREAT | unix.O_TRUNC},
		allow,
		stop)
}
