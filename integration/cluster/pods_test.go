// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	modelspec "github.com/modelpack/model-spec/specs-go/v1"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/process"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/treelist"
)

func TestReplicasMountOneModel(t *testing.T) {
	install(t, inPods)
	namespace := newNamespace(t)
	src := t.TempDir()
	check(t, pack.WriteModel(src))
	ref := pushModel(t, src, "v1")
	create(t, namespace, "apps/v1", "Deployment", "model", deployment("model", 3, podSpec(ref)))
	for _, pod := range waitForPods(t, namespace, "app=model", 3) {
		wantModel(t, namespace, pod, "/model", src)
	}
}

// snapshotters are the snapshotters of a pod's containers, by its machine's containerd.
func snapshotters(t *testing.T, namespace, name string) (all []string) {
	t.Helper()
	var pod object
	check(t, one.Get("/api/v1/namespaces/"+namespace+"/pods/"+name, &pod))
	for _, status := range pod.list("status", "containerStatuses") {
		out, err := machine(t, pod.text("spec", "nodeName")).Ctr("containers", "info", strings.TrimPrefix(status.text("containerID"), "containerd://"))
		check(t, err)
		var info struct{ Snapshotter string }
		check(t, json.Unmarshal([]byte(out), &info))
		all = append(all, info.Snapshotter)
	}
	return all
}

func machine(t *testing.T, name string) *Machine {
	t.Helper()
	for _, m := range one.Machines() {
		if m.Name == name {
			return m
		}
	}
	t.Fatalf("there is no machine %q", name)
	return nil
}

// Only pods that ask for the snapshotter get it.
func TestTheRuntimeClassChoosesTheSnapshotter(t *testing.T) {
	install(t, inPods)
	namespace := newNamespace(t)
	ref := pushModel(t, writeFiles(t, map[string]string{"a": "a"}), "v1")
	createPod(t, namespace, "with", podSpec(ref))
	without := podSpec(ref)
	delete(without, "runtimeClassName")
	delete(without, "volumes")
	delete(container(without), "volumeMounts")
	createPod(t, namespace, "without", without)
	for name, want := range map[string]string{"with": "artifact", "without": "overlayfs"} {
		waitForPod(t, namespace, name)
		if got := snapshotters(t, namespace, name); len(got) != 1 || got[0] != want {
			t.Errorf("the pod %s has the snapshotter %q, want %s", name, got, want)
		}
	}
}

// A pod whose secrets do not allow the pull does not get what another pod has pulled.
func TestAnArtifactNeedsThePullSecret(t *testing.T) {
	install(t, inPods)
	namespace := newNamespace(t)
	src := writeFiles(t, map[string]string{"weights": "weights"})
	ref := strings.Replace(pushModel(t, src, "v1"), Registry, Private, 1)
	pod := func(secret string) object {
		spec := podSpec(ref)
		spec["nodeName"] = one.Machines()[0].Name
		if secret != "" {
			spec["imagePullSecrets"] = []any{object{"name": secret}}
		}
		return spec
	}
	for name, password := range map[string]string{"right": node.PrivatePassword, "wrong": "not-" + node.PrivatePassword} {
		_, err := one.Kubectl("create", "secret", "docker-registry", name, "--namespace", namespace,
			"--docker-server="+Private, "--docker-username="+node.PrivateUser, "--docker-password="+password)
		check(t, err)
	}
	refused := func(t *testing.T) {
		createPod(t, namespace, "missing", pod(""))
		createPod(t, namespace, "wrong", pod("wrong"))
		waitForDescription(t, namespace, "missing", "Failed to pull image", ref, "no basic auth credentials")
		waitForDescription(t, namespace, "wrong", "Failed to pull image", ref, "401 Unauthorized")
		_, err := one.Kubectl("delete", "pod", "--namespace", namespace, "missing", "wrong")
		check(t, err)
	}
	t.Run("before anybody has pulled it", refused)
	createPod(t, namespace, "right", pod("right"))
	waitForPod(t, namespace, "right")
	wantModel(t, namespace, "right", "/model", src)
	t.Run("after it has been pulled", refused)
}

// The reason why an artifact is refused is where people look for it.
func TestDescribePodSaysWhyAnArtifactIsRefused(t *testing.T) {
	install(t, inPods)
	namespace := newNamespace(t)
	artifact := &pack.Artifact{Layers: []pack.Layer{{
		MediaType:   modelspec.MediaTypeModelWeightRaw,
		Data:        []byte("root:x:0:0"),
		Annotations: map[string]string{modelspec.AnnotationFilepath: "../../etc/passwd"},
	}}}
	_, err := one.Push(artifact, "models/escaped", "v1")
	check(t, err)
	createPod(t, namespace, "escaped", podSpec(Registry+"/models/escaped:v1"))
	waitForDescription(t, namespace, "escaped", `path "../../etc/passwd"`, `contains ".."`)
}

// Pods keep what they have mounted when its tag moves; a rollout mounts the new artifact.
func TestATagMovesAndARolloutFollows(t *testing.T) {
	install(t, inPods)
	namespace := newNamespace(t)
	first, second := writeFiles(t, map[string]string{"version": "1"}), writeFiles(t, map[string]string{"version": "2"})
	ref := pushModel(t, first, "prod")
	spec := podSpec(ref)
	spec["volumes"] = []any{object{"name": "model", "image": object{"reference": ref, "pullPolicy": "Always"}}}
	create(t, namespace, "apps/v1", "Deployment", "model", deployment("model", 2, spec))
	before := waitForPods(t, namespace, "app=model", 2)
	pushModel(t, second, "prod")
	for _, pod := range before {
		wantModel(t, namespace, pod, "/model", first)
	}
	_, err := one.Kubectl("rollout", "restart", "--namespace", namespace, "deployment/model")
	check(t, err)
	_, err = one.Kubectl("rollout", "status", "--namespace", namespace, "deployment/model", "--timeout=180s")
	check(t, err)
	for _, pod := range waitForPods(t, namespace, "app=model", 2) {
		wantModel(t, namespace, pod, "/model", second)
	}
}

// What a cluster with policies requires of pods.
func TestARestrictedPodReadsAModel(t *testing.T) {
	install(t, inPods)
	namespace := newNamespace(t)
	_, err := one.Kubectl("label", "namespace", namespace, "pod-security.kubernetes.io/enforce=restricted")
	check(t, err)
	src := writeFiles(t, map[string]string{"models/a/weights": "weights", "models/config.json": "{}", "other": "other"})
	spec := podSpec(pushModel(t, src, "v1"))
	spec["securityContext"] = object{
		"runAsNonRoot": true, "runAsUser": 1000, "runAsGroup": 1000, "fsGroup": 2000,
		"seccompProfile": object{"type": "RuntimeDefault"},
	}
	c := container(spec)
	c["securityContext"] = object{
		"allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true, "capabilities": object{"drop": []string{"ALL"}},
	}
	c["volumeMounts"] = []any{
		object{"name": "model", "mountPath": "/model", "readOnly": true},
		object{"name": "model", "mountPath": "/mnt/models", "subPath": "models", "readOnly": true},
	}
	spec["initContainers"] = []any{object{
		"name": "init", "image": GuestImage, "imagePullPolicy": "IfNotPresent", "args": []string{"tree", "/mnt/models"},
		"securityContext": c["securityContext"],
		"volumeMounts":    []any{object{"name": "model", "mountPath": "/mnt/models", "subPath": "models", "readOnly": true}},
	}}
	createPod(t, namespace, "restricted", spec)
	waitForPod(t, namespace, "restricted")
	wantModel(t, namespace, "restricted", "/model", src)
	wantModel(t, namespace, "restricted", "/mnt/models", src+"/models")
	out, err := one.Kubectl("logs", "--namespace", namespace, "restricted", "--container", "init")
	check(t, err)
	var entries []treelist.Entry
	check(t, json.Unmarshal([]byte(out), &entries))
	check(t, sameTree(src+"/models", entries))
	out, err = one.Kubectl("exec", "--namespace", namespace, "restricted", "--", node.Guest, "write", "/model/other")
	check(t, err)
	if got := strings.TrimSpace(out); got != "EROFS" && got != "EACCES" {
		t.Errorf("a write to the model: %s", got)
	}
}

func TestJobsAndStatefulSetsReadModels(t *testing.T) {
	install(t, inPods)
	namespace := newNamespace(t)
	src := writeFiles(t, map[string]string{"weights": "weights"})
	ref := pushModel(t, src, "v1")
	job := podSpec(ref)
	job["restartPolicy"] = "Never"
	container(job)["args"] = []string{"tree", "/model"}
	create(t, namespace, "batch/v1", "Job", "job", object{"completions": 3, "parallelism": 2, "template": template("job", job)})
	set := deployment("set", 2, podSpec(ref))
	set["serviceName"] = "set"
	create(t, namespace, "apps/v1", "StatefulSet", "set", set)
	for _, pod := range waitForPods(t, namespace, "app=set", 2) {
		wantModel(t, namespace, pod, "/model", src)
	}
	_, err := one.Kubectl("wait", "--namespace", namespace, "--for=condition=Complete", "job/job", "--timeout=180s")
	check(t, err)
	all, err := pods(namespace, "app=job")
	check(t, err)
	for _, pod := range all {
		check(t, printedTree(namespace, pod.text("metadata", "name"), src))
	}
	if len(all) != 3 {
		t.Errorf("the job has %d pods, want 3", len(all))
	}
}

// printedTree compares the source with what a pod with the arguments "tree DIR" printed.
func printedTree(namespace, pod, src string) error {
	out, err := one.Kubectl("logs", "--namespace", namespace, pod)
	if err != nil {
		return err
	}
	var entries []treelist.Entry
	if err := json.Unmarshal([]byte(out), &entries); err != nil {
		return fmt.Errorf("the pod %s printed %q: %w", pod, out, err)
	}
	return sameTree(src, entries)
}

// on gives the pods of a spec a node.
func on(m *Machine, spec object) object {
	spec["nodeSelector"] = object{"kubernetes.io/hostname": m.Name}
	return spec
}

// Pods leave a drained machine and one with a taint, and the daemon stays.
func TestPodsMoveAndTheDaemonStays(t *testing.T) {
	install(t, inPods)
	m := one.Machines()[0]
	for name, away := range map[string]struct{ out, back []string }{
		"drained": {
			[]string{"drain", m.Name, "--ignore-daemonsets", "--timeout=180s"},
			[]string{"uncordon", m.Name},
		},
		"tainted": {
			[]string{"taint", "node", m.Name, "test=yes:NoExecute"},
			[]string{"taint", "node", m.Name, "test-"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			namespace := newNamespace(t)
			src := writeFiles(t, map[string]string{"weights": name})
			create(t, namespace, "apps/v1", "Deployment", "model", deployment("model", 4, podSpec(pushModel(t, src, "v1"))))
			waitForPods(t, namespace, "app=model", 4)
			daemon := daemonOn(t, m)
			_, err := one.Kubectl(away.out...)
			t.Cleanup(func() {
				_, err := one.Kubectl(away.back...)
				check(t, err)
			})
			check(t, err)
			check(t, process.Await(t.Context(), limit, "the pods to move", func() error {
				all, err := pods(namespace, "app=model")
				for _, pod := range all {
					if pod.text("spec", "nodeName") == m.Name {
						return fmt.Errorf("%s is still on %s", pod.text("metadata", "name"), m.Name)
					}
				}
				return err
			}))
			for _, pod := range waitForPods(t, namespace, "app=model", 4) {
				wantModel(t, namespace, pod, "/model", src)
			}
			if now := daemonOn(t, m); now != daemon {
				t.Errorf("the daemon's pod was %s and is %s", daemon, now)
			}
		})
	}
}

// daemonOn is the UID of the ready pod of the chart's DaemonSet on a machine.
func daemonOn(t *testing.T, m *Machine) (uid string) {
	t.Helper()
	check(t, process.Await(t.Context(), limit, "the daemon on "+m.Name, func() error {
		all, err := pods(Namespace, "app.kubernetes.io/name="+Release)
		for _, pod := range all {
			if pod.text("spec", "nodeName") == m.Name && podIs(pod, "Ready") {
				uid = pod.text("metadata", "uid")
				return nil
			}
		}
		if err == nil {
			err = fmt.Errorf("none of %d pods", len(all))
		}
		return err
	}))
	return uid
}
