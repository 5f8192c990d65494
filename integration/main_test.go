// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

// Package integration proves the snapshotter on a real node: containerd, runc,
// crictl and a registry, started by package node in temporary directories.
package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/crash"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
)

// TestMain gives all nodes one temporary directory, and fails if mounts, processes or files
// remain there.
func TestMain(m *testing.M) {
	crash.Main()
	code, err := runIn(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "FAIL:", err)
		code = 1
	}
	os.Exit(code)
}

func runIn(m *testing.M) (int, error) {
	// The path is short because of sockets, and searchable for user namespaces.
	dir, err := os.MkdirTemp("", "as-")
	if err != nil {
		return 1, err
	}
	if err := os.Chmod(dir, 0o711); err != nil {
		return 1, err
	}
	if err := os.Setenv("TMPDIR", dir); err != nil {
		return 1, err
	}
	code := m.Run()
	mounts, err := node.Mounts(dir)
	if err != nil {
		return 1, err
	}
	processes, err := node.Processes(dir)
	if err != nil {
		return 1, err
	}
	if len(mounts) > 0 || len(processes) > 0 {
		return 1, fmt.Errorf("the tests left the mounts %q and the processes %v in %s", mounts, processes, dir)
	}
	entries, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil {
		return 1, err
	}
	if err := os.RemoveAll(dir); err != nil {
		return 1, err
	}
	if len(entries) > 0 {
		return 1, fmt.Errorf("the tests left the files %q", entries)
	}
	return code, nil
}

// older reports whether the node's containerd is older than 2.minor, where something
// differs that the test then expects. The text is a note in the table of docs/support.md;
// one that begins with "no " means that nothing works.
func older(t *testing.T, n *node.Node, minor int, different string) bool {
	t.Helper()
	if n.Minor >= minor {
		return false
	}
	t.Logf("containerd before 2.%d: %s", minor, different)
	return true
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
