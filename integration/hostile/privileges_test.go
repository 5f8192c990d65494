// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package hostile

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/deploy"
	"github.com/artifact-snapshotter/artifact-snapshotter/unpack"
)

// needs has for each capability of the systemd unit an artifact that cannot be mounted, or
// not be removed, without it.
var needs = map[string]layer{
	// mount(2)
	"sys_admin": raw("f", "x"),
	// A file with another owner.
	"chown": tarred(file("f", "x", edit{fUID, "0000007\x00"})),
	// The mode and time of a file with another owner.
	"fowner": tarred(file("f", "x", edit{fUID, "0000007\x00"})),
	// A setgid directory of a group that root is not in.
	"fsetid": tarred(dir("d", edit{fGID, "0000007\x00"}, edit{fMode, "0002755\x00"})),
	// The removal of a directory without permissions.
	"dac_override": tarred(dir("d", edit{fMode, "0000000\x00"}), file("d/f", "x")),
}

func TestTheUnitHasExactlyTheNeededCapabilities(t *testing.T) {
	line := regexp.MustCompile(`(?m)^CapabilityBoundingSet=(.*)$`).FindStringSubmatch(deploy.Unit)
	if line == nil {
		t.Fatal("the unit has no CapabilityBoundingSet")
	}
	var all []string
	for c := range strings.FieldsSeq(line[1]) {
		all = append(all, strings.ToLower(strings.TrimPrefix(c, "CAP_")))
	}
	slices.Sort(all)
	if want := sortedKeys(needs); !slices.Equal(all, want) {
		t.Fatalf("the unit has the capabilities %q, want %q", all, want)
	}
	if problem := servedWith(t, all, sortedKeys(needs)...); problem != "" {
		t.Errorf("with all of them: %s", problem)
	}
	for _, without := range all {
		t.Run("without "+without, func(t *testing.T) {
			some := slices.DeleteFunc(slices.Clone(all), func(c string) bool { return c == without })
			problem := servedWith(t, some, without)
			if problem == "" {
				t.Errorf("everything works without CAP_%s, so the unit need not have it", strings.ToUpper(without))
			}
			t.Log(problem)
		})
	}
}

// A container that mounts for the host must be privileged, so it starts with all
// capabilities and without a seccomp filter. The daemon itself keeps only the unit's
// capabilities, in each thread, and cannot regain others.
func TestTheDaemonConfinesItself(t *testing.T) {
	dir := t.TempDir()
	d, err := start(t, dir, alone(dir, shelf(filepath.Join(dir, "content")), false), unpack.Modes{Raw: unpack.Copy, Tar: unpack.Extract})
	if err != nil {
		t.Fatal(err)
	}
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", d.pid()))
	if err != nil || len(threads) < 2 {
		t.Fatalf("threads %q: %v", threads, err)
	}
	numbers := map[string]int{"chown": unix.CAP_CHOWN, "dac_override": unix.CAP_DAC_OVERRIDE, "fowner": unix.CAP_FOWNER, "fsetid": unix.CAP_FSETID, "sys_admin": unix.CAP_SYS_ADMIN}
	all := uint64(0)
	for name := range needs {
		all |= 1 << numbers[name]
	}
	for _, file := range threads {
		status, err := os.ReadFile(file)
		if err != nil {
			continue // the thread has ended
		}
		for field, want := range map[string]string{
			"CapInh": strings.Repeat("0", 16), "CapAmb": strings.Repeat("0", 16), "NoNewPrivs": "1", "Seccomp": "2",
			"CapPrm": fmt.Sprintf("%016x", all), "CapEff": fmt.Sprintf("%016x", all), "CapBnd": fmt.Sprintf("%016x", all),
		} {
			if !strings.Contains(string(status), "\n"+field+":\t"+want+"\n") {
				t.Errorf("%s: %s is not %s:\n%s", file, field, want, status)
			}
		}
	}
}

// servedWith mounts and removes the artifacts of needs as files, which needs the most
// capabilities, with a daemon that has only these capabilities and no groups. It returns
// the first failure.
func servedWith(t *testing.T, capabilities []string, artifacts ...string) (problem string) {
	t.Helper()
	dir := t.TempDir()
	blobs := shelf(filepath.Join(dir, "content"))
	if err := os.MkdirAll(filepath.Join(string(blobs), "blobs", "sha256"), 0o755); err != nil {
		t.Fatal(err)
	}
	confined := []string{"setpriv", "--clear-groups", "--no-new-privs", "--bounding-set=-all,+" + strings.Join(capabilities, ",+"), "--"}
	d, err := start(t, dir, alone(dir, blobs, false), unpack.Modes{Raw: unpack.Copy, Tar: unpack.Extract}, confined...)
	if err != nil {
		return err.Error()
	}
	for _, name := range artifacts {
		a := pack(needs[name]).done()
		if err := blobs.put(a); err != nil {
			t.Fatal(err)
		}
		path, done, err := treeFrontEnd{d}.Mount(t.Context(), a)
		if err != nil {
			return fmt.Sprintf("%s: %v", name, err)
		}
		l, err := List(path)
		if err != nil {
			t.Fatal(err)
		}
		want := map[string]Verdict{
			"sys_admin":    mounts(Listing{"f": isRaw("x")}),
			"chown":        mounts(Listing{"f": isFile("x").owner(7, 0)}),
			"fowner":       mounts(Listing{"f": isFile("x").owner(7, 0)}),
			"fsetid":       mounts(Listing{"d": isDir().mode(0o2755).owner(0, 7)}),
			"dac_override": mounts(Listing{"d": isDir().mode(0), "d/f": isFile("x")}),
		}[name]
		if diff := want.Diff(Copied, l); diff != "" {
			problem = fmt.Sprintf("%s: %s", name, diff)
		}
		if err := done(); err != nil {
			return fmt.Sprintf("%s: %v", name, err)
		}
		if err := blobs.drop(a); err != nil {
			t.Fatal(err)
		}
	}
	if problem != "" {
		return problem
	}
	// Without a capability the daemon cannot remove them, however long we wait.
	return left(t, d, 20*time.Second)
}
