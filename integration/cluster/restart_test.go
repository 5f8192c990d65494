// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/process"
)

// Pods read their models again after a reboot and after a power cut, without the registry.
func TestPodsComeBackWithoutTheRegistry(t *testing.T) {
	install(t, inPods)
	comeBack(t, podSpec)
}

// comeBack reboots a machine whose pods have a model, with the registry down, and cuts its
// power.
func comeBack(t *testing.T, spec func(ref string) object) {
	namespace := newNamespace(t)
	m := one.Machines()[0]
	src := writeFiles(t, map[string]string{"weights": strings.Repeat("weights", 1<<18)})
	ref := pushModel(t, src, "v1")
	create(t, namespace, "apps/v1", "Deployment", "model", deployment("model", 3, on(m, spec(ref))))
	before := waitForPods(t, namespace, "app=model", 3)
	check(t, one.StopRegistries())
	t.Cleanup(func() { check(t, one.StartRegistries()) })
	for _, off := range []struct {
		how     string
		restart func() error
	}{{"reboot", m.Reboot}, {"power cut", m.PowerCut}} {
		t.Run(off.how, func(t *testing.T) {
			restarts := restartCounts(t, namespace)
			check(t, off.restart())
			ready := time.Now()
			check(t, process.Await(t.Context(), limit, "the pods to start again", func() error {
				for pod, count := range restartCounts(t, namespace) {
					if count <= restarts[pod] {
						return fmt.Errorf("%s has not", pod)
					}
				}
				return nil
			}))
			after := waitForPods(t, namespace, "app=model", 3)
			t.Logf("pods were ready %.1f s after the node", time.Since(ready).Seconds())
			if !slices.Equal(after, before) {
				t.Errorf("the pods were %q and are %q", before, after)
			}
			for _, pod := range after {
				wantModel(t, namespace, pod, "/model", src)
			}
		})
	}
}

// restartCounts are the restarts of all containers in the namespace, by pod.
func restartCounts(t *testing.T, namespace string) map[string]float64 {
	t.Helper()
	all, err := pods(namespace, "")
	check(t, err)
	counts := map[string]float64{}
	for _, pod := range all {
		for _, status := range pod.list("status", "containerStatuses") {
			count, _ := status["restartCount"].(float64)
			counts[pod.text("metadata", "name")] += count
		}
	}
	return counts
}

// While the daemon is upgraded, pods that run read on, and all pods that start get their
// model.
func TestAnUpgradeOfTheDaemonFailsNoPod(t *testing.T) {
	install(t, inPods)
	upgraded(t, podSpec)
}

// upgraded upgrades the chart to another tag of the image while pods start.
func upgraded(t *testing.T, spec func(ref string) object) {
	t.Helper()
	check(t, one.BuildImage("v2"))
	t.Cleanup(func() { // what other tests expect
		check(t, one.Upgrade(imageTag, installed))
		_, err := one.Rollout()
		check(t, err)
	})
	probed(t, spec, func() error {
		if err := one.Upgrade("v2", installed); err != nil {
			return err
		}
		_, err := one.Rollout()
		return err
	})
}

// probed starts a pod with a model twice a second on each machine during the change and
// for some seconds before and after, and fails the test unless all of them print the
// model, and a reader that started before reads on.
func probed(t *testing.T, spec func(ref string) object, change func() error) {
	t.Helper()
	namespace := newNamespace(t)
	src := writeFiles(t, map[string]string{"weights": "weights"})
	ref := pushModel(t, src, "v1")
	reader := spec(ref)
	reader["restartPolicy"] = "Never"
	container(reader)["args"] = []string{"loop", "/model/weights"}
	for i, m := range one.Machines() {
		createPod(t, namespace, fmt.Sprintf("reader-%d", i), on(m, reader))
		waitForPod(t, namespace, fmt.Sprintf("reader-%d", i))
	}

	const before, after = 10, 10 // pods
	changed := make(chan error, 1)
	tick := time.NewTicker(500 * time.Millisecond)
	defer tick.Stop()
	count, changing, rest := 0, false, after
	for rest > 0 {
		<-tick.C
		if count == before {
			changing = true
			go func() { changed <- change() }()
		}
		if changing {
			select {
			case err := <-changed:
				check(t, err)
				changing = false
			default:
			}
		}
		if count > before && !changing {
			rest--
		}
		probe := on(one.Machines()[count%len(one.Machines())], spec(ref))
		probe["restartPolicy"] = "Never"
		container(probe)["args"] = []string{"tree", "/model"}
		check(t, one.Create("/api/v1/namespaces/"+namespace+"/pods", object{
			"apiVersion": "v1", "kind": "Pod",
			"metadata": object{"name": fmt.Sprintf("probe-%03d", count), "labels": object{"app": "probe"}}, "spec": probe,
		}))
		count++
	}
	var all []object
	check(t, process.Await(t.Context(), limit, "all pods to end", func() (err error) {
		if all, err = pods(namespace, "app=probe"); err != nil {
			return err
		}
		for _, pod := range all {
			if phase := pod.text("status", "phase"); phase != "Succeeded" && phase != "Failed" {
				return fmt.Errorf("%s is %s", pod.text("metadata", "name"), phase)
			}
		}
		return nil
	}))
	took := map[float64]int{}
	for _, pod := range all {
		name := pod.text("metadata", "name")
		if phase := pod.text("status", "phase"); phase != "Succeeded" {
			t.Errorf("the pod %s has %s", name, phase)
			continue
		}
		check(t, printedTree(namespace, name, src))
		seconds, err := startedAfter(pod)
		check(t, err)
		took[seconds]++
	}
	if len(all) != count {
		t.Errorf("there are %d pods of %d", len(all), count)
	}
	t.Logf("%d pods, by seconds from creation to start: %v", count, took)
	for i := range one.Machines() {
		name := fmt.Sprintf("reader-%d", i)
		waitForPod(t, namespace, name)
		if out, err := one.Kubectl("exec", "--namespace", namespace, name, "--", node.Guest, "ls", "/model"); err != nil {
			t.Errorf("the pod that read all the time: %v\n%s", err, out)
		}
	}
}

// startedAfter is the time in seconds from a pod's creation to the start of its container.
func startedAfter(pod object) (float64, error) {
	created, err := time.Parse(time.RFC3339, pod.text("metadata", "creationTimestamp"))
	if err != nil {
		return 0, err
	}
	for _, status := range pod.list("status", "containerStatuses") {
		started, err := time.Parse(time.RFC3339, status.text("state", "terminated", "startedAt"))
		return started.Sub(created).Seconds(), err
	}
	return 0, errors.New("no container of the pod has started")
}
