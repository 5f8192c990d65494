// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

// Package crash kills a program at a chosen file system operation, and lists the
// operations.
//
// The program is the unmodified binary. A seccomp filter, installed before execve(2),
// stops it for its tracer (ptrace(2)) at every system call that changes a file system,
// a mount or a lock; other calls run at full speed. At the stop the call has not begun;
// if the program is killed there, it never does.
//
// It reads amd64 registers and supports no other architecture.
package crash
