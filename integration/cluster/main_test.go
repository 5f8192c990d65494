// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"context"
	"flag"
	"fmt"
	"os"
	"testing"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
)

// one is the cluster of all tests.
var one *Cluster

// TestMain starts the cluster and fails the run if anything of it is still mounted or
// running after the tests.
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
	if one, err = Start(context.Background(), 2); err != nil {
		return 1, err
	}
	// So that the keeper of the cluster removes what tests write, too.
	if err := os.Setenv("TMPDIR", one.Dir); err != nil {
		return 1, err
	}
	code = m.Run()
	if code != 0 {
		fmt.Println(one.Logs())
	}
	if err := one.Stop(); err != nil {
		return 1, err
	}
	mounts, err := node.Mounts(one.Dir)
	if err != nil {
		return 1, err
	}
	processes, err := node.Processes(one.Dir)
	if err != nil {
		return 1, err
	}
	if len(mounts)+len(processes) > 0 {
		return 1, fmt.Errorf("the tests left mounts %q and processes %v", mounts, processes)
	}
	return code, nil
}
