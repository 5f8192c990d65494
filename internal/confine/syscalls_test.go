// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package confine

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// forbidden is the environment variable that makes this test binary try the forbidden
// calls, "network" with a network.
const forbidden = "TEST_FORBIDDEN"

func TestMain(m *testing.M) {
	if network, ok := os.LookupEnv(forbidden); ok {
		if err := tryTheForbidden(network == "network"); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// A process cannot remove its filter, so the test starts another process to install it.
func TestForbiddenSystemCallsAreRefused(t *testing.T) {
	for _, network := range []string{"", "network"} {
		cmd := exec.CommandContext(t.Context(), "/proc/self/exe")
		cmd.Env = append(os.Environ(), forbidden+"="+network)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("with network %q: %v\n%s", network, err, out)
		}
	}
}

// tryTheForbidden confines this process and returns what is not refused as it should be.
func tryTheForbidden(network bool) error {
	// The filter must reach a thread that exists before it.
	try, answer := make(chan func() unix.Errno), make(chan unix.Errno)
	ready := make(chan struct{})
	go func() {
		runtime.LockOSThread()
		close(ready)
		for f := range try {
			answer <- f()
		}
	}()
	<-ready
	var problems []error
	want := func(what string, call func() unix.Errno, allowed ...unix.Errno) {
		got := []unix.Errno{call()}
		try <- call
		for _, errno := range append(got, <-answer) {
			if !slices.Contains(allowed, errno) {
				problems = append(problems, fmt.Errorf("%s: %q, want one of %q", what, errno, allowed))
			}
		}
	}
	raw := func(number uint32, first uintptr) func() unix.Errno {
		return func() unix.Errno {
			_, _, errno := unix.RawSyscall(uintptr(number), first, 0, 0)
			return errno
		}
	}
	socket := func(family, kind int) func() unix.Errno {
		return func() unix.Errno {
			fd, err := unix.Socket(family, kind, 0)
			if err == nil {
				err = unix.Close(fd)
			}
			var errno unix.Errno
			errors.As(err, &errno)
			return errno
		}
	}

	// Otherwise something else would refuse.
	want("a socket of IPv4 before", socket(unix.AF_INET, unix.SOCK_STREAM), 0)
	want("execve before", raw(unix.SYS_EXECVE, 0), unix.EFAULT)
	if err := SystemCalls(network); err != nil {
		return err
	}
	for _, number := range never {
		want(fmt.Sprintf("system call %d", number), raw(number, 0), unix.EPERM)
	}
	want("clone3", raw(unix.SYS_CLONE3, 0), unix.ENOSYS)
	// The kernel refuses this combination of flags, so nothing is cloned if the filter fails.
	want("clone", raw(unix.SYS_CLONE, unix.CLONE_THREAD), unix.EINVAL)
	want("clone with a new user namespace", raw(unix.SYS_CLONE, unix.CLONE_THREAD|unix.CLONE_NEWUSER), unix.EPERM)
	if runtime.GOARCH == "amd64" {
		want("getpid of x32", raw(unix.SYS_GETPID|1<<30, 0), unix.EPERM)
	}
	inet := unix.EPERM
	if network {
		inet = 0
	}
	want("a Unix socket", socket(unix.AF_UNIX, unix.SOCK_STREAM), 0)
	want("a socket of IPv4", socket(unix.AF_INET, unix.SOCK_STREAM), inet)
	want("a socket of IPv6", socket(unix.AF_INET6, unix.SOCK_DGRAM), inet, unix.EAFNOSUPPORT)
	want("a socket of packets", socket(unix.AF_PACKET, unix.SOCK_RAW), unix.EPERM)
	want("a pair of sockets of TIPC", raw(unix.SYS_SOCKETPAIR, unix.AF_TIPC), unix.EPERM)
	want("a socket of netlink", socket(unix.AF_NETLINK, unix.SOCK_RAW), unix.EPERM)
	if err := exec.Command("/proc/self/exe").Run(); !errors.Is(err, unix.EPERM) {
		problems = append(problems, fmt.Errorf("a program could be run: %v", err))
	}
	status, err := os.ReadFile("/proc/self/status")
	if err != nil || !strings.Contains(string(status), "\nSeccomp:\t2\n") {
		problems = append(problems, fmt.Errorf("no filter in /proc/self/status, %v:\n%s", err, status))
	}
	return errors.Join(problems...)
}
