// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
)

// one is the cluster of all tests.
var one *Cluster

// TestMain starts the cluster and fails the run if the tests leave anything mounted,
// running or lying in their temporary directory.
func TestMain(m *testing.M) {
	flag.Parse()
	if testing.Short() {
		fmt.Println("NOT TESTED with -short: a cluster, which make test-cluster starts")
		return
	}
	code, err := runIn(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "FAIL:", err)
		code = 1
	}
	os.Exit(code)
}

func runIn(m *testing.M) (code int, err error) {
	dir, err := os.MkdirTemp("", "as-") // short, because sockets are below it
	if err != nil {
		return 1, err
	}
	if err := os.Chmod(dir, 0o711); err != nil {
		return 1, err
	}
	if err := os.Setenv("TMPDIR", dir); err != nil {
		return 1, err
	}
	if one, err = Start(context.Background(), 2); err != nil {
		return 1, errors.Join(err, os.Remove(dir))
	}
	code = m.Run()
	if err := one.Stop(); err != nil {
		return 1, err
	}
	mounts, err := node.Mounts(dir)
	if err != nil {
		return 1, err
	}
	processes, err := node.Processes(dir)
	if err != nil {
		return 1, err
	}
	entries, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil {
		return 1, err
	}
	if len(mounts)+len(processes)+len(entries) > 0 {
		return 1, fmt.Errorf("the tests left mounts %q, processes %v and files %q", mounts, processes, entries)
	}
	return code, os.Remove(dir)
}
