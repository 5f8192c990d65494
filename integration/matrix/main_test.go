// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"slices"
	"strings"
	"testing"
)

// printed is the output of a run with -test.v.
const printed = `=== RUN   TestGood
--- PASS: TestGood (0.10s)
=== RUN   TestDifferent
=== RUN   TestDifferent/a
    a_test.go:1: containerd before 2.2: a is otherwise
=== RUN   TestDifferent/b
    a_test.go:2: containerd before 2.3: b is otherwise
    a_test.go:1: containerd before 2.2: a is otherwise
--- PASS: TestDifferent (0.20s)
    --- PASS: TestDifferent/a (0.10s)
    --- PASS: TestDifferent/b (0.10s)
=== RUN   TestAbsent
=== NAME  TestAbsent
    c_test.go:3: containerd before 2.3: no c
--- PASS: TestAbsent (0.10s)
=== RUN   TestBad
=== RUN   TestBad/sub
    d_test.go:4: wrong
--- FAIL: TestBad (0.10s)
    --- FAIL: TestBad/sub (0.10s)
`

func TestTheTableSaysWhatTheTestsSay(t *testing.T) {
	r := result{passed: map[string]bool{}, differs: map[string][]string{}}
	if err := r.read(strings.NewReader(printed)); err != nil {
		t.Fatal(err)
	}
	if len(r.passed) != 4 || r.count() != 3 {
		t.Errorf("%d of %d tests passed, want 3 of 4: %v", r.count(), len(r.passed), r.passed)
	}
	var notes []string
	for _, test := range []struct {
		tests []string
		want  string
	}{
		{[]string{"TestGood"}, "yes"},
		{[]string{"TestGood", "TestDifferent"}, "partly (1, 2)"},
		{[]string{"TestAbsent", "TestDifferent"}, "no (3, 1, 2)"},
		{[]string{"TestGood", "TestBad"}, "**no**"},
		{[]string{"TestGood", "TestThatIsNotThere"}, "not run"},
	} {
		if got := r.cell(test.tests, &notes); got != test.want {
			t.Errorf("%q: %q, want %q", test.tests, got, test.want)
		}
	}
	if want := []string{"before 2.2: a is otherwise", "before 2.3: b is otherwise", "before 2.3: no c"}; !slices.Equal(notes, want) {
		t.Errorf("the notes are %q, want %q", notes, want)
	}
}
