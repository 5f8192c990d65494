// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

// Package confine takes from this process what the daemon never needs: capabilities and
// system calls, in all threads and for good.
package confine

import (
	"errors"
	"fmt"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// needed are the capabilities that the daemon needs: to mount, and to give files the
// owners and modes of the artifact. The systemd unit has the same list.
const needed = 1<<unix.CAP_SYS_ADMIN | 1<<unix.CAP_CHOWN | 1<<unix.CAP_DAC_OVERRIDE | 1<<unix.CAP_FOWNER | 1<<unix.CAP_FSETID

// Capabilities drops all capabilities but those that the daemon needs, and keeps the process
// from gaining others by a setuid program. A container must be privileged so that its
// mounts reach the host, and Kubernetes gives a privileged one all capabilities. In a
// program with cgo it is an error: not all threads can be reached.
//
// github.com/moby/sys/capability changes the calling thread alone.
func Capabilities() error {
	for c := uintptr(0); ; c++ {
		if c < 64 && needed&(uint64(1)<<c) != 0 {
			continue
		}
		err := allThreads(unix.SYS_PRCTL, unix.PR_CAPBSET_DROP, c, 0)
		if errors.Is(err, unix.EINVAL) { // there are no more capabilities
			break
		}
		if errors.Is(err, unix.EPERM) { // somebody else has dropped CAP_SETPCAP
			break
		}
		if err != nil {
			return fmt.Errorf("drop capability %d: %w", c, err)
		}
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var has [2]unix.CapUserData
	if err := unix.Capget(&header, &has[0]); err != nil {
		return fmt.Errorf("read capabilities: %w", err)
	}
	for i := range has {
		has[i].Permitted &= uint32(uint64(needed) >> (32 * i))
		has[i].Effective, has[i].Inheritable = has[i].Permitted, 0
	}
	//nolint:gosec // capset(2) takes two pointers
	if err := allThreads(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&header)), uintptr(unsafe.Pointer(&has[0])), 0); err != nil {
		return fmt.Errorf("set capabilities: %w", err)
	}
	return allThreads(unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0)
}

func allThreads(call, a, b, c uintptr) error {
	if _, _, errno := syscall.AllThreadsSyscall6(call, a, b, c, 0, 0, 0); errno != 0 {
		return errno
	}
	return nil
}
