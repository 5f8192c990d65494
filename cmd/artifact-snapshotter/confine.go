// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// needed are the capabilities that the daemon needs: to mount, and to give files the
// owners and modes that the artifact says. The systemd unit has the same list.
const needed = 1<<unix.CAP_SYS_ADMIN | 1<<unix.CAP_CHOWN | 1<<unix.CAP_DAC_OVERRIDE | 1<<unix.CAP_FOWNER | 1<<unix.CAP_FSETID

// confine takes all other capabilities from this process, for good, and the way to new
// ones by a program that is setuid. A container must be privileged for its mounts to
// reach the host, and Kubernetes gives a privileged one all there are. It is an error
// in a program with cgo, where not all threads can be reached.
func confine() error {
	for c := uintptr(0); ; c++ {
		if c < 64 && needed&(uint64(1)<<c) != 0 {
			continue
		}
		err := allThreads(unix.SYS_PRCTL, unix.PR_CAPBSET_DROP, c, 0)
		if errors.Is(err, unix.EINVAL) { // there are no more
			break
		}
		if errors.Is(err, unix.EPERM) { // it has been confined by somebody else
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
