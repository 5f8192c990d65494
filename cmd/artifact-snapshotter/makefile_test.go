// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

var (
	// selected is a selection of tests in the Makefile, with the directory of their package.
	selected = regexp.MustCompile(`-run '?([^' ]+)'?(?: .*?)? (\./\S+)`)
	declared = regexp.MustCompile(`(?m)^func (Test\w+)\(`)
)

// go test succeeds if a selection matches no test, as after a test was renamed.
func TestTheMakefileSelectsTestsThatExist(t *testing.T) {
	selections := selected.FindAllStringSubmatch(strings.ReplaceAll(document(t, "Makefile"), "$$", "$"), -1)
	if len(selections) == 0 {
		t.Fatal("the Makefile selects no tests: this test looks for something else")
	}
	for _, m := range selections {
		if strings.Contains(m[2], "$") || m[1] == "^$" { // of a loop: the fuzz tests
			continue
		}
		files, err := filepath.Glob(filepath.Join(repository, m[2], "*_test.go"))
		if err != nil {
			t.Fatal(err)
		}
		var names []string
		for _, file := range files {
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			for _, f := range declared.FindAllStringSubmatch(string(text), -1) {
				names = append(names, f[1])
			}
		}
		// Each alternative has to match, not only the whole.
		prefix, alternatives, suffix := "", m[1], ""
		if before, rest, ok := strings.Cut(m[1], "("); ok {
			prefix = before
			alternatives, suffix, _ = strings.Cut(rest, ")")
		}
		for alternative := range strings.SplitSeq(alternatives, "|") {
			pattern := regexp.MustCompile(prefix + alternative + suffix)
			if !slices.ContainsFunc(names, pattern.MatchString) {
				t.Errorf("-run %q matches no test in %s", pattern, m[2])
			}
		}
	}
}
