// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"testing"
	"time"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
	"github.com/artifact-snapshotter/artifact-snapshotter/internal/startuptaint"
)

// nodeSpec is podSpec for `scope: node`, where no pod needs a RuntimeClass.
func nodeSpec(ref string) object {
	spec := podSpec(ref)
	delete(spec, "runtimeClassName")
	return spec
}

func TestAServiceServesEveryPod(t *testing.T) {
	install(t, asService)
	wantReplicas(t, "artifact")
}

// wantReplicas fails the test unless pods without a RuntimeClass have their model and this
// snapshotter.
func wantReplicas(t *testing.T, snapshotter string) {
	t.Helper()
	namespace := newNamespace(t)
	src := t.TempDir()
	check(t, pack.WriteModel(src))
	create(t, namespace, "apps/v1", "Deployment", "model", deployment("model", 3, nodeSpec(pushModel(t, src, "v1"))))
	for _, pod := range waitForPods(t, namespace, "app=model", 3) {
		wantModel(t, namespace, pod, "/model", src)
		if got := snapshotters(t, namespace, pod); got[0] != snapshotter {
			t.Errorf("the pod %s has the snapshotter %q", pod, got)
		}
	}
}

// As TestPodsComeBackWithoutTheRegistry: the service starts before containerd.
func TestPodsComeBackWithTheService(t *testing.T) {
	install(t, asService)
	comeBack(t, nodeSpec)
}

func TestAnUpgradeOfTheServiceFailsNoPod(t *testing.T) {
	install(t, asService)
	upgraded(t, nodeSpec)
}

// Pods that waited for a node start on it when the daemon is ready, and not before. kubelet
// registers the node with the taint.
func TestPodsThatWaitForANodeStartAfterTheDaemon(t *testing.T) {
	install(t, asService)
	namespace := newNamespace(t)
	src := writeFiles(t, map[string]string{"weights": "weights"})
	ref := pushModel(t, src, "v1")
	name := machineName(len(one.Machines()))
	for _, pod := range []string{"first", "second"} {
		spec := nodeSpec(ref)
		spec["nodeSelector"] = object{"kubernetes.io/hostname": name}
		createPod(t, namespace, pod, spec)
	}
	_, err := one.Join(map[string]any{"registerWithTaints": []any{
		object{"key": startuptaint.Key, "value": "true", "effect": "NoExecute"},
	}})
	check(t, err)
	var installed time.Time
	for _, pod := range []string{"first", "second"} {
		waitForPod(t, namespace, pod)
		wantModel(t, namespace, pod, "/model", src)
		if got := snapshotters(t, namespace, pod); got[0] != "artifact" {
			t.Errorf("the pod %s has the snapshotter %q", pod, got)
		}
		if installed.IsZero() {
			installed = installedOn(t, name)
		}
		var o object
		check(t, one.Get("/api/v1/namespaces/"+namespace+"/pods/"+pod, &o))
		for _, condition := range o.list("status", "conditions") {
			if condition.text("type") != "PodScheduled" {
				continue
			}
			if at := parseTime(t, condition.text("lastTransitionTime")); at.Before(installed) {
				t.Errorf("the pod %s came to the node at %v, but install was done at %v", pod, at, installed)
			}
		}
	}
	var n object
	check(t, one.Get("/api/v1/nodes/"+name, &n))
	for _, taint := range n.list("spec", "taints") {
		if taint.text("key") == startuptaint.Key {
			t.Errorf("the node still has the taint %v", taint)
		}
	}
}

// installedOn is when the DaemonSet's pod on a machine had installed the service.
func installedOn(t *testing.T, machine string) time.Time {
	t.Helper()
	all, err := pods(Namespace, "app.kubernetes.io/name="+Release)
	check(t, err)
	for _, pod := range all {
		if pod.text("spec", "nodeName") == machine {
			status := pod.list("status", "initContainerStatuses")
			return parseTime(t, status[0].text("state", "terminated", "finishedAt"))
		}
	}
	t.Fatalf("no pod of the DaemonSet is on %s", machine)
	return time.Time{}
}

func parseTime(t *testing.T, text string) time.Time {
	t.Helper()
	at, err := time.Parse(time.RFC3339, text)
	check(t, err)
	return at
}
