// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

// Package csi tests the daemon's CSI driver on its sockets, as kubelet uses it.
package csi

import (
	"encoding/json"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

const (
	noController = "the driver has no controller service: the attributes of a volume say all of it"
	readOnly     = "csi-sanity publishes only volumes that a controller has created, and for writing: " +
		"TestADaemonServesKubelet and package csi have read-only ones"
)

// notRun are the tests of csi-sanity that fail without a controller instead of being skipped,
// and skipped those that it skips itself, by a part of their names, with the reason.
var (
	notRun = map[string]string{
		"[Controller Server]":       noController,
		"should remove target path": readOnly,
		"NodeGetVolumeStats should fail when volume does not exist on the specified path": readOnly,
	}
	skipped = map[string]string{
		"single node multi writer capability": "volumes are read-only",
		"NodeStageVolume":                     "nothing is staged: publishing is a bind of the shared mount",
		"NodeUnstageVolume":                   "nothing is staged: publishing is a bind of the shared mount",
		"NodeExpandVolume":                    "a volume has the size of its artifact",
		"NodeGetVolumeHealth":                 "an alpha service, which the driver does not have",
		"NodeGetStorageHealth":                "an alpha service, which the driver does not have",
		"Node Service should work":            noController,
		"Node Service should be idempotent":   noController,
		"GroupController":                     noController,
	}
)

func TestCSISanity(t *testing.T) {
	dir := t.TempDir()
	program := filepath.Join(dir, "csi-sanity")
	if out, err := exec.Command("go", "build", "-C", "sanity", "-o", program, "github.com/kubernetes-csi/csi-test/v5/cmd/csi-sanity").CombinedOutput(); err != nil {
		t.Fatalf("build csi-sanity: %v\n%s", err, out)
	}
	d := start(t, dir)
	var names []string
	for name := range notRun {
		names = append(names, regexp.QuoteMeta(name))
	}
	reasons := maps.Clone(notRun)
	maps.Copy(reasons, skipped)
	report := filepath.Join(dir, "report.json")
	cmd := exec.Command(program, "--csi.endpoint", d.socket(), "--csi.mountdir", filepath.Join(dir, "mounts"),
		"--csi.stagingdir", filepath.Join(dir, "staging"), "--ginkgo.json-report", report, "--ginkgo.no-color",
		"--ginkgo.skip", strings.Join(names, "|"))
	output, runErr := cmd.CombinedOutput()
	text, err := os.ReadFile(report)
	if err != nil {
		t.Fatalf("csi-sanity: %v, %v\n%s", runErr, err, output)
	}
	var suites []struct {
		SpecReports []struct {
			ContainerHierarchyTexts []string
			LeafNodeText, State     string
			Failure                 struct{ Message string }
		}
	}
	if err := json.Unmarshal(text, &suites); err != nil {
		t.Fatal(err)
	}
	var passed []string
	used := map[string]bool{}
	for _, suite := range suites {
		for _, spec := range suite.SpecReports {
			name := strings.Join(append(slices.Clone(spec.ContainerHierarchyTexts), spec.LeafNodeText), " ")
			switch spec.State {
			case "passed":
				passed = append(passed, name)
			case "skipped", "pending":
				reason := ""
				for part := range reasons {
					if strings.Contains(name, part) {
						reason, used[part] = reasons[part], true
					}
				}
				if reason == "" {
					t.Errorf("skipped without a known reason: %s: %s", name, spec.Failure.Message)
				}
			default:
				t.Errorf("%s %s: %s", name, spec.State, spec.Failure.Message)
			}
		}
	}
	for part := range reasons {
		if !used[part] {
			t.Errorf("no test is skipped because of %q", part)
		}
	}
	if runErr != nil || len(passed) < 10 {
		t.Errorf("%d tests of csi-sanity pass, %v\n%s", len(passed), runErr, output)
	}
	t.Logf("passed:\n%s", strings.Join(passed, "\n"))
}
