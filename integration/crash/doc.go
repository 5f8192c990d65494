// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

// Package crash kills a program at a chosen operation on a file system, and tells
// which there are.
//
// The program is the real one and knows nothing of it. A seccomp filter, installed
// before it is executed, stops it for its tracer (ptrace(2)) at every system call that
// changes a file system, a mount or a lock; all others run at full speed. Where it is
// stopped the call has not begun, and does not once the program has been killed.
//
// It reads the registers of amd64, and is there on no other architecture.
package crash
