// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// printed is the output of a machine whose kernel has only the modes link, copy and
// extract.
const printed = "suite integration begins\r\n" + `    kernel_test.go:1: kernel: release=5.10.0-46-amd64
    kernel_test.go:2: kernel: chosen raw=link
    kernel_test.go:3: kernel: no mode overlay: the kernel is older than Linux 6.5: invalid argument
    kernel_test.go:4: kernel: mode link
    kernel_test.go:4: kernel: mode copy
    kernel_test.go:2: kernel: chosen tar=extract
    kernel_test.go:4: kernel: mode extract
    kernel_test.go:5: kernel: volumes raw=auto tar=auto user-namespace=false
    kernel_test.go:5: kernel: volumes raw=auto tar=auto user-namespace=true
    kernel_test.go:5: kernel: volumes raw=copy tar=extract user-namespace=false
    kernel_test.go:5: kernel: volumes raw=copy tar=extract user-namespace=true
    kernel_test.go:5: kernel: volumes raw=link tar=extract user-namespace=false
    kernel_test.go:5: kernel: volumes raw=link tar=extract user-namespace=true
--- PASS: TestEveryModeOfTheKernel (1.00s)
PASS
suite integration ends 0
suite unpack begins
    unpack_test.go:1: NOT TESTED: this kernel does not have the mode overlay
--- SKIP: TestOverlay (0.00s)
--- PASS: TestLink (0.00s)
suite unpack ends 0
suite unpack/differ begins
--- PASS: TestApply (0.00s)
suite unpack/differ ends 0
suite store begins
--- PASS: TestView (0.00s)
suite store ends 0
suite snapshot begins
--- PASS: TestSnapshot (0.00s)
suite snapshot ends 0
all suites have ended
`

func readPrinted(t *testing.T, text string) (result, error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "results")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	r := result{kernel: kernel{series: "5.10", raws: []string{"link", "copy"}, tars: []string{"extract"}}}
	err := r.read(path)
	return r, err
}

func TestTheTableSaysWhatTheMachineSays(t *testing.T) {
	r, err := readPrinted(t, printed)
	if err != nil {
		t.Fatal(err)
	}
	var table strings.Builder
	write(&table, []result{r})
	for _, want := range []string{
		"| Linux | 5.10.0-46-amd64 |", "| raw layers, chosen | `link` |", "| in a user namespace | yes |", "| tests of unpack | 1 of 2, 1 impossible |",
		"no mode overlay: the kernel is older than Linux 6.5", "not tested: this kernel does not have the mode overlay",
	} {
		if !strings.Contains(table.String(), want) {
			t.Errorf("%q is missing in the table:\n%s", want, table.String())
		}
	}
}

// Each case changes one thing in the output of a good run.
func TestABadRunFails(t *testing.T) {
	for what, change := range map[string][2]string{
		"it does not end":          {"all suites have ended\n", ""},
		"another kernel":           {"release=5.10.0", "release=6.1.0"},
		"a test fails":             {"--- PASS: TestView", "--- FAIL: TestView"},
		"a package fails":          {"suite store ends 0", "suite store ends 2"},
		"no test runs":             {"--- PASS: TestSnapshot (0.00s)\n", ""},
		"a suite does not begin":   {"suite snapshot begins\n--- PASS: TestSnapshot (0.00s)\nsuite snapshot ends 0\n", ""},
		"a mode is lost":           {"mode copy", "no mode copy: why"},
		"a mode too many":          {"no mode overlay: the", "mode overlay"},
		"another mode is chosen":   {"chosen raw=link", "chosen raw=copy"},
		"no volume by a mode":      {"volumes raw=copy tar=extract user-namespace=false", ""},
		"none in a user namespace": {"volumes raw=copy tar=extract user-namespace=true", ""},
		"none in the chosen modes": {"volumes raw=auto tar=auto user-namespace=false", ""},
	} {
		if !strings.Contains(printed, change[0]) {
			t.Fatalf("%s: %q is not in the output of the good run", what, change[0])
		}
		if _, err := readPrinted(t, strings.Replace(printed, change[0], change[1], 1)); err == nil {
			t.Errorf("%s: no error", what)
		}
	}
}

func TestModulesAreLoadedAfterWhatTheyNeed(t *testing.T) {
	needs, err := dependencies(strings.NewReader("kernel/fs/ext4/ext4.ko.xz: kernel/lib/crc16.ko.xz kernel/fs/jbd2/jbd2.ko.xz\nkernel/lib/crc16.ko.xz:\n"))
	if err != nil {
		t.Fatal(err)
	}
	want := map[string][]string{
		"ext4":  {"kernel/fs/jbd2/jbd2.ko.xz", "kernel/lib/crc16.ko.xz", "kernel/fs/ext4/ext4.ko.xz"},
		"crc16": {"kernel/lib/crc16.ko.xz"},
	}
	if !maps.EqualFunc(needs, want, slices.Equal) {
		t.Errorf("%q, want %q", needs, want)
	}
}

func TestTroubleOfTheKernelIsSeen(t *testing.T) {
	for line, want := range map[string]bool{
		"[    1.0] Kernel panic - not syncing: Attempted to kill init!": true,
		"[    1.0] BUG: unable to handle page fault":                    true,
		"[    1.0] INFO: task x:1 blocked for more than 120 seconds.":   true,
		"[    1.0] EXT4-fs (vda): mounted filesystem":                   false,
	} {
		if trouble.MatchString("before\n"+line+"\nafter") != want {
			t.Errorf("%q is reported as trouble: %t", line, !want)
		}
	}
}
