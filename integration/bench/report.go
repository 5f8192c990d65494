// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"runtime"
	"strings"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/measure"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
)

// report is the table, with the versions and the load of the machine.
type report struct {
	disk       measure.Disk
	load       string // the one-minute average before the run
	containerd string // version
	crio       string // version, "" where there is none
	rows       []string
}

// version reads the version of a node's runtime.
func (r *report) version(n *node.Node) {
	_, version, _ := strings.Cut(measure.Must(n.Crictl("version")), "RuntimeVersion:")
	r.containerd = strings.Fields(version)[0]
}

// compare adds a row for two samples in milliseconds. The ratio of their medians may be at
// most bound; 0 means no bound.
func (r *report) compare(what string, measured, against measure.Sample, bound float64) {
	ratio := measured.Median() / against.Median()
	text := fmt.Sprintf("**%.2f**: %s against %s", ratio, measured.Format("%.0f", " ms"), against.Format("%.0f", " ms"))
	if bound == 0 {
		r.add(what, text, "none", true)
		return
	}
	r.add(what, text, fmt.Sprintf("≤ %.1f", bound), ratio <= bound)
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
	versions := "containerd " + r.containerd
	if r.crio != "" {
		versions += ", CRI-O " + r.crio
	}
	fmt.Printf("%s, %s, %s; load average before the run %s.\n\n", measure.Machine(), versions, runtime.Version(), r.load)
	fmt.Printf("| measurement | result | bound | met |\n|---|---|---|---|\n%s\n", strings.Join(r.rows, "\n"))
}
