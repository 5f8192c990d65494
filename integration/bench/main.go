// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

// Command bench measures on a real node whether the snapshotter keeps its bounds for speed
// and memory, and prints a table. docs/benchmarks.md describes the method and the results.
// A missed bound is a "NO" in the table, not a failure: no test depends on the clock.
package main

import (
	"context"
	"flag"
	"os"
	"slices"
	"strings"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/measure"
)

func main() { measure.Main("bench", run) }

// parts are the measurements, by the names for -run.
var parts = []struct {
	name    string
	measure func(context.Context, *report)
}{
	{"prepare", measurePrepare},
	{"pods", measurePods},
	{"mmap", measureMmap},
	{"kubelet", measureKubelet},
	{"create", measureCreate},
	{"many", measureMany},
}

func run(ctx context.Context) {
	only := flag.String("run", "", "measure only these parts, separated by commas: prepare, pods, mmap, kubelet, create, many")
	crowd := flag.Int("crowd", 0, "internal: serve as a node of the part many with this number of artifacts")
	flag.Parse()
	if *crowd > 0 {
		serveCrowd(ctx, *crowd)
		return
	}
	r := &report{load: measure.Load()}
	measure.Progress("making an ext4 on a loop device in %s", os.TempDir())
	// Nothing large is ever deleted on it before the end.
	r.disk = measure.NewDisk(ctx, "", "32G")
	defer measure.Tidy(r.disk.Remove)
	// Files on it are deleted only at the end, because ext4 is slow where many inodes were
	// just deleted (see measure.Disk).
	measure.Check(os.Setenv("TMPDIR", r.disk.Root()))
	for _, part := range parts {
		if *only == "" || slices.Contains(strings.Split(*only, ","), part.name) {
			part.measure(ctx, r)
		}
	}
	r.print()
}
