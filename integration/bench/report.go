// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"runtime"
	"strings"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/measure"
)

// report is the table and the machine that it is of.
type report struct {
	disk       measure.Disk
	load       string // average of the minute before the run
	containerd string // version
	rows       []string
}

func (r *report) add(what, measured, bound string, met bool) {
	answer := "yes"
	if !met {
		answer = "**NO**"
	}
	measure.Progress("%s: %s, bound %s: %s", what, measured, bound, answer)
	r.rows = append(r.rows, "| "+strings.Join([]string{what, measured, bound, answer}, " | ")+" |")
}

func (r *report) print() {
	fmt.Printf("%s, containerd %s, %s; load average before the run %s.\n\n", measure.Machine(), r.containerd, runtime.Version(), r.load)
	fmt.Printf("| what | measured | bound | met |\n|---|---|---|---|\n%s\n", strings.Join(r.rows, "\n"))
}
