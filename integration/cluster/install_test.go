// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"crypto/sha256"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/process"
)

// files are the files below a directory with their modes and contents.
func files(t *testing.T, dir string) map[string]string {
	t.Helper()
	found := map[string]string{}
	check(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		var what string
		if info.Mode().Type() == fs.ModeSymlink {
			what, err = os.Readlink(path)
		} else {
			var text []byte
			text, err = os.ReadFile(path)
			what = fmt.Sprintf("%x", sha256.Sum256(text))
		}
		found[path] = info.Mode().String() + " " + what
		return err
	}))
	return found
}

// The documented steps leave machines as they were, and no object in the cluster.
func TestUninstallLeavesTheMachinesAsTheyWere(t *testing.T) {
	if installed != nil {
		uninstall(t)
	}
	before := map[string]map[string]string{}
	for _, m := range one.Machines() {
		before[m.Name] = files(t, m.File("/etc"))
	}
	install(t, inPods)
	namespace := newNamespace(t)
	src := writeFiles(t, map[string]string{"weights": "weights"})
	createPod(t, namespace, "model", podSpec(pushModel(t, src, "v1")))
	waitForPod(t, namespace, "model")
	for _, m := range one.Machines() {
		if maps.Equal(files(t, m.File("/etc")), before[m.Name]) {
			t.Errorf("the chart changed nothing on %s: this test looks for something else", m.Name)
		}
	}
	_, err := one.Kubectl("delete", "pod", "--namespace", namespace, "model")
	check(t, err)
	uninstall(t)
	for _, m := range one.Machines() {
		after := files(t, m.File("/etc"))
		for _, path := range slices.Sorted(maps.Keys(after)) {
			if before[m.Name][path] != after[path] {
				t.Errorf("%s: %s was %q and is %q", m.Name, path, before[m.Name][path], after[path])
			}
		}
		if len(after) != len(before[m.Name]) {
			t.Errorf("%s had %d files in /etc and has %d", m.Name, len(before[m.Name]), len(after))
		}
	}
	check(t, process.Await(t.Context(), limit, "the chart's objects to be gone", func() error {
		out, err := one.Kubectl("get", "all,configmaps,runtimeclasses,clusterroles,clusterrolebindings,serviceaccounts", "--all-namespaces",
			"--selector", "app.kubernetes.io/name="+Release, "--output", "name")
		if err == nil && out != "" {
			err = fmt.Errorf("there are still\n%s", out)
		}
		return err
	}))
}
