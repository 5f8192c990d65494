// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/treelist"
	layout "github.com/artifact-snapshotter/artifact-snapshotter/unpack"
)

// everyMode starts the daemon with each mode. Either pods see the same files, or the daemon
// does not start and says why.
func (p pair) everyMode(t *testing.T, n *node.Node) {
	t.Helper()
	config := filepath.Join(n.Dir, "daemon.toml")
	before, err := os.ReadFile(config)
	check(t, err)
	layers, want := mixture(t)
	for _, of := range []struct {
		format string
		modes  []layout.Mode
	}{{"raw", layout.RawModes}, {"tar", layout.TarModes}} {
		for _, mode := range of.modes {
			t.Run(of.format+" in mode "+string(mode), func(t *testing.T) {
				check(t, n.StopDaemon())
				forced := fmt.Appendf(nil, "%s_mode = %q\n%s", of.format, mode, before)
				check(t, os.WriteFile(config, forced, 0o600))
				if p.tar == layout.EROFSLoop && (mode == layout.EROFS || mode == layout.EROFSBuffered) {
					err := n.StartDaemon()
					if want := fmt.Sprintf("mode %q does not work in %s", mode, n.DaemonRoot); err == nil || !strings.Contains(strings.ReplaceAll(err.Error()+daemonLog(t, n), `\`, ""), want) {
						t.Errorf("start of the daemon: %v, want the message %q", err, want)
					}
					check(t, os.WriteFile(config, before, 0o600))
					p.restart(t, n)
					return
				}
				p.restart(t, n)
				ref := push(t, n, "mixture", layers...)
				pod, err := n.RunPod(node.PodSpec{Volumes: []node.Volume{{Image: ref, Path: "/model"}}})
				check(t, err)
				got, err := pod.Tree("main", "/model")
				check(t, err)
				want := slices.Clone(want)
				if mode == layout.Link { // files of raw layers have the blob's attributes
					for _, entries := range [][]treelist.Entry{want, got} {
						for i := range entries {
							entries[i].Mode, entries[i].UID, entries[i].GID, entries[i].ModTime = 0, 0, 0, 0
						}
					}
				}
				if diff := treelist.Diff(want, got); diff != "" {
					t.Errorf("the volume differs from the packed files:\n%s", diff)
				}
				check(t, pod.Remove())
				_, err = n.Crictl("rmi", ref)
				check(t, err)
				check(t, os.WriteFile(config, before, 0o600))
			})
		}
	}
	check(t, n.StopDaemon())
	p.restart(t, n)
}

// suites are the packages whose own tests run on each file system.
var suites = []string{"unpack", "unpack/differ", "snapshot", "store"}

// withoutUpper matches tests that fail on an overlay: it cannot be the upper layer of an
// overlayfs, and it cannot store whiteouts.
const withoutUpper = `^(TestContainerdsOwnSuite|TestEntriesHiddenByOverlayfsDoNotCount)$`

var result = regexp.MustCompile(`(?m)^ *--- (PASS|FAIL|SKIP): (\S+)`)

// runSuites runs the tests of the packages, which include containerd's suite for
// snapshotters, with their temporary directories on each file system of pairs. It returns
// the cells of the table. No test may be skipped.
func runSuites(t *testing.T) map[string]string {
	t.Helper()
	bin, cells := t.TempDir(), map[string]string{}
	for _, pkg := range suites {
		if out, err := exec.Command("go", "test", "-c", "-o", filepath.Join(bin, strings.ReplaceAll(pkg, "/", "-")), "../"+pkg).CombinedOutput(); err != nil {
			t.Fatalf("go test -c ../%s: %v\n%s", pkg, err, out)
		}
	}
	for _, p := range pairs {
		if cells[p.root.name] != "" {
			continue
		}
		cells[p.root.name] = "no"
		t.Run("suites on "+p.root.name, func(t *testing.T) {
			dir := p.root.mounted(t)
			passed := 0
			for _, pkg := range suites {
				cmd := exec.CommandContext(t.Context(), filepath.Join(bin, strings.ReplaceAll(pkg, "/", "-")), "-test.v", "-test.timeout=60m")
				if p.byNRI() {
					cmd.Args = append(cmd.Args, "-test.skip="+withoutUpper)
				}
				cmd.Dir = "../" + pkg
				cmd.Env = append(os.Environ(), "TMPDIR="+dir)
				var out bytes.Buffer
				cmd.Stdout, cmd.Stderr = &out, &out
				err := cmd.Run()
				for _, m := range result.FindAllStringSubmatch(out.String(), -1) {
					if m[1] == "PASS" {
						passed++
					} else {
						t.Errorf("%s: %s %s", pkg, m[1], m[2])
					}
				}
				if err != nil {
					text := out.String()
					t.Errorf("%s: %v\n%s", pkg, err, text[max(0, len(text)-8<<10):])
				}
			}
			if !t.Failed() {
				cells[p.root.name] = fmt.Sprintf("%d tests", passed)
				if p.byNRI() {
					cells[p.root.name] += ", without containerd's own"
				}
			}
		})
	}
	return cells
}

// table returns the table of docs/support.md.
func table(rows []outcome, suites map[string]string) string {
	var out strings.Builder
	out.WriteString("| root | content | raw | tar | blobs in root | disk for 64 MiB, raw and tar | image volumes | user namespaces | tests of `unpack`, `unpack/differ`, `snapshot`, `store` |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- |\n")
	for _, o := range rows {
		root, content := o.cells()
		volumes := "by the snapshotter"
		if o.byNRI() {
			volumes = "by NRI only"
		}
		mib := func(format string) string { return fmt.Sprintf("%.1f MiB", float64(o.grown[format])/(1<<20)) }
		userns := "yes"
		if !o.userns() {
			userns = "no"
		}
		suite := suites[o.root.name]
		if suite == "" {
			suite = "not run"
		}
		fmt.Fprintf(&out, "| %s | %s | `%s` | `%s` | %s | %s, %s | %s | %s | %s |\n", root, content, o.raw, o.tar, o.by, mib("raw"), mib("tar"), volumes, userns, suite)
	}
	return out.String()
}
