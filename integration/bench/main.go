// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

// Command bench measures on a real node what the snapshotter promises about
// speed and memory, and prints it as a table. docs/benchmarks.md has the method
// and the results. A promise that is not kept is a "NO" in the table and not a
// failure: what fails a change is a test, never the clock.
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

// parts are what is measured, by the names that -run selects.
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
	only := flag.String("run", "", "measure only the parts with these names, separated by commas: prepare, pods, mmap, kubelet, create, many")
	crowd := flag.Int("crowd", 0, "be one of the nodes of many, with so many artifacts")
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
	// All temporary files, those of nodes included, go to the disk.
	measure.Check(os.Setenv("TMPDIR", r.disk.Root()))
	for _, part := range parts {
		if *only == "" || slices.Contains(strings.Split(*only, ","), part.name) {
			part.measure(ctx, r)
		}
	}
	r.print()
}
