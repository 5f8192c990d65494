// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
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

// By default nothing on a machine is changed, and the documented steps leave machines as they
// were in any case, and no object in the cluster.
func TestUninstallLeavesTheMachinesAsTheyWere(t *testing.T) {
	for _, test := range []struct {
		name    string
		values  map[string]string
		changes bool // of files of the machine
		spec    func(ref string) object
	}{
		{"default", byDefault, false, nodeSpec},
		{"pods", inPods, true, podSpec},
		{"service", asService, true, nodeSpec},
	} {
		t.Run(test.name, func(t *testing.T) {
			if installed != nil {
				uninstall(t)
			}
			before := map[string]map[string]string{}
			for _, m := range one.Machines() {
				before[m.Name] = files(t, m.File("/etc"))
			}
			install(t, test.values)
			namespace := newNamespace(t)
			src := writeFiles(t, map[string]string{"weights": "weights"})
			createPod(t, namespace, "model", test.spec(pushModel(t, src, "v1")))
			waitForPod(t, namespace, "model")
			wantModel(t, namespace, "model", "/model", src)
			for _, m := range one.Machines() {
				if changed := !maps.Equal(files(t, m.File("/etc")), before[m.Name]); changed != test.changes {
					t.Errorf("%s: files in /etc changed: %t, want %t", m.Name, changed, test.changes)
				}
			}
			// The nodes wait for the pod.
			if test.changes {
				check(t, one.Upgrade(imageTag, with(test.values, "uninstall", "true")))
				check(t, process.Await(t.Context(), limit, "a node to say for which pod it waits", func() error {
					out, err := one.Kubectl("logs", "--namespace", Namespace, "--selector", "app.kubernetes.io/name="+Release, "--all-containers", "--prefix", "--ignore-errors")
					if err == nil && !strings.Contains(out, "waiting until these are deleted, which use the snapshotter: pod "+namespace+"/model") {
						err = errors.New(out)
					}
					return err
				}))
				wantModel(t, namespace, "model", "/model", src)
			}
			_, err := one.Kubectl("delete", "pod", "--namespace", namespace, "model")
			check(t, err)
			uninstall(t)
			for _, m := range one.Machines() {
				wantFiles(t, m, before[m.Name])
			}
			wantNoObjects(t)
		})
	}
}

// with are the values with one more.
func with(values map[string]string, name, json string) map[string]string {
	values = maps.Clone(values)
	values[name] = json
	return values
}

// wantFiles fails the test unless the machine has these files in /etc.
func wantFiles(t *testing.T, m *Machine, want map[string]string) {
	t.Helper()
	got := files(t, m.File("/etc"))
	for _, path := range slices.Sorted(maps.Keys(got)) {
		if want[path] != got[path] {
			t.Errorf("%s: %s was %q and is %q", m.Name, path, want[path], got[path])
		}
	}
	if len(got) != len(want) {
		t.Errorf("%s had %d files in /etc and has %d", m.Name, len(want), len(got))
	}
}

// wantNoObjects waits until the cluster has nothing of the chart.
func wantNoObjects(t *testing.T) {
	t.Helper()
	check(t, process.Await(t.Context(), limit, "the chart's objects to be gone", func() error {
		out, err := one.Kubectl("get", "all,configmaps,runtimeclasses,csidrivers,clusterroles,clusterrolebindings,serviceaccounts", "--all-namespaces",
			"--selector", "app.kubernetes.io/name="+Release, "--output", "name")
		if err == nil && out != "" {
			err = fmt.Errorf("there are still\n%s", out)
		}
		return err
	}))
}

// A node cannot go from any values to any others: what it cannot do is refused before anything
// changes.
func TestTransitionsOfValues(t *testing.T) {
	type refusal struct {
		values map[string]string
		said   string
	}
	for _, from := range []struct {
		name    string
		values  map[string]string
		refused []refusal
	}{
		{"pods", inPods, []refusal{
			{with(inPods, "daemon", `"systemd"`), "daemon is pod on the nodes and cannot become systemd"},
			{asService, "daemon is pod on the nodes and cannot become systemd"},
			{with(asService, "uninstall", "true"), "daemon is pod on the nodes and cannot become systemd"},
			{with(inPods, "runtimeHandler", `"models"`), "runtimeHandler is artifact on the nodes and cannot become models"},
			{with(inPods, "root", `"/var/lib/models"`), "root is /var/lib/artifact-snapshotter on the nodes and cannot become /var/lib/models"},
			{byDefault, "frontends.snapshotter is true on the nodes and cannot become false"},
		}},
		{"a service", asService, []refusal{
			{inPods, "daemon is systemd on the nodes and cannot become pod"},
			{with(asService, "scope", `"runtime-handler"`), "scope is node on the nodes and cannot become runtime-handler"},
		}},
		{"the default", byDefault, []refusal{
			{map[string]string{"state": `"/run/models"`}, "state is /run/artifact-snapshotter on the nodes and cannot become /run/models: delete the pods"},
		}},
	} {
		t.Run(from.name, func(t *testing.T) {
			install(t, from.values)
			objects := func() string {
				out, err := one.Kubectl("get", "daemonsets,configmaps,runtimeclasses,csidrivers", "--namespace", Namespace, "--output", "yaml",
					"--selector", "app.kubernetes.io/name="+Release)
				check(t, err)
				return out
			}
			before := objects()
			for _, r := range from.refused {
				if err := one.Upgrade(imageTag, r.values); err == nil || !strings.Contains(err.Error(), r.said) {
					t.Errorf("an upgrade to %v: got %v, want %q", r.values, err, r.said)
				}
			}
			if after := objects(); after != before {
				t.Errorf("the cluster had\n%s\nand has\n%s", before, after)
			}
		})
	}
	// What works: more front ends, and other values after an uninstall.
	install(t, byDefault)
	check(t, one.Upgrade(imageTag, inPods))
	installed = inPods
	_, err := one.Rollout()
	check(t, err)
	namespace := newNamespace(t)
	src := writeFiles(t, map[string]string{"weights": "weights"})
	ref := pushModel(t, src, "v1")
	createPod(t, namespace, "in-pods", podSpec(ref))
	waitForPod(t, namespace, "in-pods")
	wantModel(t, namespace, "in-pods", "/model", src)
	_, err = one.Kubectl("delete", "pod", "--namespace", namespace, "in-pods")
	check(t, err)
	check(t, one.Upgrade(imageTag, with(inPods, "uninstall", "true")))
	_, err = one.Rollout()
	check(t, err)
	check(t, one.Upgrade(imageTag, asService))
	installed = asService
	_, err = one.Rollout()
	check(t, err)
	createPod(t, namespace, "service", nodeSpec(ref))
	waitForPod(t, namespace, "service")
	wantModel(t, namespace, "service", "/model", src)
}
