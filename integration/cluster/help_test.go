// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/process"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/treelist"
)

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// limit is how long tests wait for what a machine with nothing else to do has in seconds.
const limit = 3 * time.Minute

// imageTag is the tag of the daemon's image.
const imageTag = "v1"

var buildImage = sync.OnceValue(func() error { return one.BuildImage(imageTag) })

// The values of the ways to install the chart.
var (
	byDefault = map[string]string{}
	inPods    = map[string]string{"frontends": snapshotterAlone}
	asService = map[string]string{"frontends": snapshotterAlone, "scope": `"node"`, "daemon": `"systemd"`, "startupTaint.remove": "true"}
)

const snapshotterAlone = `{"csi":false,"nri":false,"snapshotter":true}`

// installed are the values of the chart that is installed; nil if it is not.
var installed map[string]string

// install installs the chart with these values, unless a test before has.
func install(t *testing.T, values map[string]string) {
	t.Helper()
	check(t, buildImage())
	if installed != nil && maps.Equal(installed, values) {
		return
	}
	if installed != nil {
		uninstall(t)
	}
	check(t, one.Upgrade(imageTag, values))
	installed = values
	_, err := one.Rollout()
	check(t, err)
}

func uninstall(t *testing.T) {
	t.Helper()
	check(t, one.Uninstall(imageTag, installed))
	installed = nil
}

// newNamespace is a namespace for one test. It is deleted at the end, and its pods are
// described if the test has failed.
func newNamespace(t *testing.T) (namespace string) {
	t.Helper()
	namespace = strings.ToLower(strings.NewReplacer("/", "-", "_", "-").Replace(t.Name()))
	_, err := one.Kubectl("create", "namespace", namespace)
	check(t, err)
	t.Cleanup(func() {
		if t.Failed() {
			for _, args := range [][]string{
				{"describe", "pods", "--namespace", namespace},
				{"logs", "--namespace", Namespace, "daemonset/" + Release, "--all-pods", "--all-containers", "--tail=30"},
			} {
				out, err := one.Kubectl(args...)
				t.Log(out, err)
			}
		}
		_, err := one.Kubectl("delete", "namespace", namespace, "--wait=false")
		check(t, err)
		check(t, one.await("the test's pods to end", func() error {
			all, err := pods(namespace, "")
			if err == nil && len(all) > 0 {
				err = fmt.Errorf("%d are there", len(all))
			}
			return err
		}))
	})
	// Without its service account the API server refuses pods.
	check(t, one.await("the service account", func() error {
		return one.Get("/api/v1/namespaces/"+namespace+"/serviceaccounts/default", &object{})
	}))
	return namespace
}

// pushModel pushes the directory as a ModelPack artifact of one raw layer per file, and
// returns its reference. Its config is its own, also if another test packs the same bytes.
func pushModel(t *testing.T, dir, tag string) (ref string) {
	t.Helper()
	repository := "models/" + strings.ToLower(t.Name())
	artifact, err := pack.Model(dir, pack.Options{Form: pack.Raw})
	check(t, err)
	artifact.Name = repository
	_, err = one.Push(artifact, repository, tag)
	check(t, err)
	return Registry + "/" + repository + ":" + tag
}

// writeFiles writes a directory that anybody can read.
func writeFiles(t *testing.T, files map[string]string) (dir string) {
	t.Helper()
	dir = t.TempDir()
	for name, text := range files {
		path := filepath.Join(dir, name)
		check(t, os.MkdirAll(filepath.Dir(path), 0o755))
		check(t, os.WriteFile(path, []byte(text), 0o644))
	}
	return dir
}

// podSpec is a pod of the test image with the artifact at /model.
func podSpec(ref string) object {
	return object{
		"runtimeClassName":              "artifact",
		"terminationGracePeriodSeconds": 1,
		"containers": []any{object{
			"name": "main", "image": GuestImage, "imagePullPolicy": "IfNotPresent",
			"volumeMounts": []any{object{"name": "model", "mountPath": "/model", "readOnly": true}},
		}},
		"volumes": []any{object{"name": "model", "image": object{"reference": ref}}},
	}
}

// container is the first container of a pod's spec.
func container(spec object) object { return spec["containers"].([]any)[0].(object) }

// create creates an object whose template or spec is a pod's: spec is that of the object.
func create(t *testing.T, namespace, apiVersion, kind, name string, spec object) {
	t.Helper()
	text, err := json.Marshal(object{
		"apiVersion": apiVersion, "kind": kind,
		"metadata": object{"name": name, "namespace": namespace}, "spec": spec,
	})
	check(t, err)
	check(t, one.Apply(string(text)))
}

func createPod(t *testing.T, namespace, name string, spec object) {
	t.Helper()
	create(t, namespace, "v1", "Pod", name, spec)
}

// template is what Deployments and the like have of a pod.
func template(app string, pod object) object {
	return object{"metadata": object{"labels": object{"app": app}}, "spec": pod}
}

// deployment is the spec of a Deployment or StatefulSet.
func deployment(app string, replicas int, pod object) object {
	return object{
		"replicas": replicas, "selector": object{"matchLabels": object{"app": app}}, "template": template(app, pod),
	}
}

// pods are the pods of a namespace with a label.
func pods(namespace, selector string) ([]object, error) {
	var list object
	err := one.Get("/api/v1/namespaces/"+namespace+"/pods?labelSelector="+selector, &list)
	return list.list("items"), err
}

// waitForPod waits until a pod is ready.
func waitForPod(t *testing.T, namespace, name string) {
	t.Helper()
	_, err := one.Kubectl("wait", "--namespace", namespace, "--for=condition=Ready", "pod/"+name, "--timeout=180s")
	check(t, err)
}

// waitForPods waits until so many pods with the label are ready and no others are there,
// and returns their names.
func waitForPods(t *testing.T, namespace, selector string, count int) (names []string) {
	t.Helper()
	check(t, process.Await(t.Context(), limit, fmt.Sprintf("%d pods with %s", count, selector), func() error {
		all, err := pods(namespace, selector)
		if err != nil {
			return err
		}
		names = nil
		for _, pod := range all {
			if !podIs(pod, "Ready") {
				return fmt.Errorf("the pod %s is not ready", pod.text("metadata", "name"))
			}
			names = append(names, pod.text("metadata", "name"))
		}
		if len(names) != count {
			return fmt.Errorf("there are %d", len(names))
		}
		return nil
	}))
	return names
}

// podIs reports whether the condition of the pod is true.
func podIs(pod object, condition string) bool {
	for _, c := range pod.list("status", "conditions") {
		if c.text("type") == condition {
			return c.text("status") == "True"
		}
	}
	return false
}

// waitForDescription waits until `kubectl describe pod` contains the text.
func waitForDescription(t *testing.T, namespace, name string, want ...string) {
	t.Helper()
	check(t, process.Await(t.Context(), limit, "the description of the pod "+name, func() error {
		out, err := one.Kubectl("describe", "pod", "--namespace", namespace, name)
		if err != nil {
			return err
		}
		for _, text := range want {
			if !strings.Contains(out, text) {
				return fmt.Errorf("%q is not in it:\n%s", text, out)
			}
		}
		return nil
	}))
}

// podTree lists a directory as a pod's container sees it.
func podTree(namespace, pod, dir string) (entries []treelist.Entry, err error) {
	out, err := one.Kubectl("exec", "--namespace", namespace, pod, "--", node.Guest, "tree", dir)
	if err != nil {
		return nil, err
	}
	return entries, json.Unmarshal([]byte(out), &entries)
}

// wantModel fails the test unless the pod sees the source's files at the path.
func wantModel(t *testing.T, namespace, pod, path, src string) {
	t.Helper()
	got, err := podTree(namespace, pod, path)
	check(t, err)
	check(t, sameTree(src, got))
}

// sameTree compares the list with the source's; directories have the artifact's time.
func sameTree(src string, got []treelist.Entry) error {
	want, err := treelist.List(src)
	if err != nil {
		return err
	}
	for i := range want {
		if want[i].Type == "dir" {
			want[i].ModTime = pack.Created.UnixNano()
		}
	}
	if diff := treelist.Diff(want, got); diff != "" {
		return errors.New("the volume differs from the source:\n" + diff)
	}
	return nil
}
