// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"slices"
	"strings"
)

// result is the outcome of the tests on one kernel.
type result struct {
	kernel
	release string
	refused string                    // why no pod had a user namespace, or ""
	chosen  map[string]string         // mode by format
	found   []string                  // modes that work
	absent  []string                  // modes that do not, each with the reason
	volumes map[bool][]string         // pairs of modes that pods read through, by whether they had a user namespace
	tests   map[string]map[string]int // number of tests and subtests by suite and outcome
	exits   map[string]string         // by suite
	reasons []string                  // why tests were skipped
	failed  []string                  // tests
}

var (
	begins  = regexp.MustCompile(`^suite (\S+) begins`)
	ends    = regexp.MustCompile(`^suite (\S+) ends (\d+)`)
	outcome = regexp.MustCompile(`^ *--- (PASS|FAIL|SKIP): (\S+)`)
	fact    = regexp.MustCompile(`_test\.go:\d+: kernel: (.*)$`)
	skipped = regexp.MustCompile(`_test\.go:\d+: NOT TESTED: (.*)$`)
	chosen  = regexp.MustCompile(`^chosen (\w+)=(\S*)$`)
	volume  = regexp.MustCompile(`^volumes raw=(\S+) tar=(\S+) user-namespace=(\w+)$`)
)

// read parses the output of the machine and returns an error for everything that is wrong
// in it.
func (r *result) read(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	r.chosen, r.volumes = map[string]string{}, map[bool][]string{}
	r.tests, r.exits = map[string]map[string]int{}, map[string]string{}
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 16<<20)
	suite, ended := "", false
	for lines.Scan() {
		line := strings.TrimRight(lines.Text(), "\r")
		switch {
		case begins.MatchString(line):
			suite = begins.FindStringSubmatch(line)[1]
			r.tests[suite] = map[string]int{}
		case ends.MatchString(line):
			m := ends.FindStringSubmatch(line)
			r.exits[m[1]] = m[2]
		case outcome.MatchString(line):
			m := outcome.FindStringSubmatch(line)
			if r.tests[suite] != nil {
				r.tests[suite][m[1]]++
			}
			if m[1] == "FAIL" {
				r.failed = append(r.failed, suite+": "+m[2])
			}
		case fact.MatchString(line):
			r.learn(fact.FindStringSubmatch(line)[1])
		case skipped.MatchString(line):
			if reason := skipped.FindStringSubmatch(line)[1]; !slices.Contains(r.reasons, reason) {
				r.reasons = append(r.reasons, reason)
			}
		case line == "all suites have ended":
			ended = true
		}
	}
	return errors.Join(lines.Err(), r.check(ended))
}

// learn parses one line of TestEveryModeOfTheKernel.
func (r *result) learn(said string) {
	if m := chosen.FindStringSubmatch(said); m != nil {
		r.chosen[m[1]] = m[2]
	}
	if m := volume.FindStringSubmatch(said); m != nil {
		r.volumes[m[3] == "true"] = append(r.volumes[m[3] == "true"], m[1]+" and "+m[2])
	}
	if release, ok := strings.CutPrefix(said, "release="); ok {
		r.release = release
	}
	if why, ok := strings.CutPrefix(said, "no user namespaces: "); ok {
		r.refused = why
	}
	if mode, ok := strings.CutPrefix(said, "mode "); ok {
		r.found = append(r.found, mode)
	}
	if mode, ok := strings.CutPrefix(said, "no mode "); ok {
		r.absent = append(r.absent, mode)
	}
}

// check compares the result with the expectations for this kernel.
func (r *result) check(ended bool) error {
	var errs []error
	if !ended {
		errs = append(errs, errors.New("the tests did not run to the end"))
	}
	for _, s := range suites {
		if r.exits[s.pkg] != "0" || r.tests[s.pkg]["PASS"] == 0 {
			errs = append(errs, fmt.Errorf("%s: exit status %q, %d tests passed", s.pkg, r.exits[s.pkg], r.tests[s.pkg]["PASS"]))
		}
	}
	for _, f := range r.failed {
		errs = append(errs, fmt.Errorf("failed: %s", f))
	}
	if !strings.HasPrefix(r.release, r.series+".") {
		errs = append(errs, fmt.Errorf("the release of the kernel is %q", r.release))
	}
	if want := slices.Concat(r.raws, r.tars); !slices.Equal(slices.Sorted(slices.Values(r.found)), slices.Sorted(slices.Values(want))) {
		errs = append(errs, fmt.Errorf("the modes that work are %q, want %q", r.found, want))
	}
	if r.chosen["raw"] != r.raws[0] || r.chosen["tar"] != r.tars[0] {
		errs = append(errs, fmt.Errorf("%s and %s are chosen, want %s and %s", r.chosen["raw"], r.chosen["tar"], r.raws[0], r.tars[0]))
	}
	if r.refused != r.noUserNamespaces {
		errs = append(errs, fmt.Errorf("user namespaces: %q, want %q", r.refused, r.noUserNamespaces))
	}
	for _, mapped := range []bool{false, true} {
		if mapped && r.noUserNamespaces != "" {
			continue
		}
		for _, mode := range append(slices.Concat(r.raws, r.tars), "auto") {
			if !slices.ContainsFunc(r.volumes[mapped], func(pair string) bool { return slices.Contains(strings.Fields(pair), mode) }) {
				errs = append(errs, fmt.Errorf("no pod read a volume through the mode %s (user namespace: %t)", mode, mapped))
			}
		}
	}
	return errors.Join(errs...)
}

// counts summarises the tests of each suite.
func (r *result) counts() string {
	var all []string
	for _, s := range suites {
		n := r.tests[s.pkg]
		all = append(all, fmt.Sprintf("%s %d passed, %d failed, %d impossible", s.pkg, n["PASS"], n["FAIL"], n["SKIP"]+len(s.impossible(r.kernel))))
	}
	return strings.Join(all, "; ")
}

// write prints the table, and below it what was impossible and why.
func write(w io.Writer, results []result) {
	row := func(name string, cell func(r result) string) {
		fmt.Fprintf(w, "| %s |", name)
		for _, r := range results {
			fmt.Fprintf(w, " %s |", cell(r))
		}
		fmt.Fprintln(w)
	}
	yes := func(ok bool) string {
		if ok {
			return "yes"
		}
		return "**no**"
	}
	row("Linux", func(r result) string { return r.release })
	row("---", func(result) string { return "---" })
	for _, format := range []string{"raw", "tar"} {
		row(format+" layers, chosen", func(r result) string { return "`" + r.chosen[format] + "`" })
	}
	row("modes that work", func(r result) string { return "`" + strings.Join(r.found, "`, `") + "`" })
	volumes := func(mapped bool) func(result) string {
		return func(r result) string { return yes(len(r.volumes[mapped]) == len(r.raws)+len(r.tars)) }
	}
	row("image volumes in each mode, with containerd", volumes(false))
	row("in a user namespace", func(r result) string {
		if r.refused != "" {
			return "no"
		}
		return volumes(true)(r)
	})
	for _, s := range suites {
		row("tests of "+s.pkg, func(r result) string {
			n := r.tests[s.pkg]
			impossible := n["SKIP"] + len(s.impossible(r.kernel))
			cell := fmt.Sprintf("%d of %d", n["PASS"], n["PASS"]+n["FAIL"]+impossible)
			if impossible > 0 {
				cell += fmt.Sprintf(", %d impossible", impossible)
			}
			return cell
		})
	}
	for _, r := range results {
		if r.refused != "" {
			fmt.Fprintf(w, "\n%s: no user namespaces: %s", r.release, r.refused)
		}
		for _, a := range r.absent {
			fmt.Fprintf(w, "\n%s: no mode %s", r.release, a)
		}
		for _, reason := range r.reasons {
			fmt.Fprintf(w, "\n%s: not tested: %s", r.release, reason)
		}
	}
	fmt.Fprintln(w)
}
