// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"os"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// report is the table and the machine that it is of.
type report struct {
	disk       disk
	load       string // average of the minute before the run
	containerd string // version
	rows       []string
}

func newReport() *report { return &report{load: field("/proc/loadavg", `^(\S+)`)} }

func (r *report) add(what, measured, bound string, met bool) {
	answer := "yes"
	if !met {
		answer = "**NO**"
	}
	progress("%s: %s, bound %s: %s", what, measured, bound, answer)
	r.rows = append(r.rows, "| "+strings.Join([]string{what, measured, bound, answer}, " | ")+" |")
}

func (r *report) print() {
	var kernel unix.Utsname
	check(unix.Uname(&kernel))
	fmt.Printf("Measured on %s: Linux %s, %s, %d cores, ext4 on a loop device with direct I/O, containerd %s, %s; load average before the run %s.\n\n",
		time.Now().UTC().Format(time.DateOnly), unix.ByteSliceToString(kernel.Release[:]),
		field("/proc/cpuinfo", `(?m)^model name\s*: (.*)$`), runtime.NumCPU(), r.containerd, runtime.Version(), r.load)
	fmt.Printf("| what | measured | bound | met |\n|---|---|---|---|\n%s\n", strings.Join(r.rows, "\n"))
}

// field is what the pattern's group matches in a file, "" if nothing does.
func field(file, pattern string) string {
	found := regexp.MustCompile(pattern).FindSubmatch(must(os.ReadFile(file)))
	if found == nil {
		return ""
	}
	return string(found[1])
}

// mebibytes is the value of a line "name:  123 kB" of a file in /proc.
func mebibytes(file, name string) float64 {
	return must(strconv.ParseFloat(field(file, `(?m)^`+name+`:\s*(\d+) kB$`), 64)) / 1024
}

// sample is what the rounds measured.
type sample []float64

// quantile q is between 0, the least, and 1, the greatest.
func (s sample) quantile(q float64) float64 {
	return slices.Sorted(slices.Values(s))[int(q*float64(len(s)-1)+0.5)]
}

func (s sample) median() float64 { return s.quantile(0.5) }

// format gives the median and the range, each with a verb of package fmt.
func (s sample) format(verb, unit string) string {
	return fmt.Sprintf("**"+verb+"**%s ("+verb+" to "+verb+", %d rounds)", s.median(), unit, s.quantile(0), s.quantile(1), len(s))
}
