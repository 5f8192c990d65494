// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/process"
)

const csiDriver = "artifact-snapshotter.dev"

// csiPod is a pod with an inline volume of the artifact at /model.
func csiPod(ref, secret string) object {
	spec := podSpec(ref)
	delete(spec, "runtimeClassName")
	volume := object{"driver": csiDriver, "readOnly": true, "volumeAttributes": object{"reference": ref, "pullPolicy": "IfNotPresent"}}
	if secret != "" {
		volume["nodePublishSecretRef"] = object{"name": secret}
	}
	spec["volumes"] = []any{object{"name": "model", "csi": volume}}
	return spec
}

// placed gives the pod a machine.
func placed(m *Machine, spec object) object {
	spec["nodeName"] = m.Name
	return spec
}

// oras is an artifact as `oras push REF notes.txt` makes it, which CRI refuses as an image
// volume: the layer type of an image, and the config {}.
func oras(text string) *pack.Artifact {
	return &pack.Artifact{
		ConfigType: ocispec.MediaTypeEmptyJSON,
		Layers: []pack.Layer{{
			MediaType: ocispec.MediaTypeImageLayer, Data: []byte(text),
			Annotations: map[string]string{ocispec.AnnotationTitle: "notes.txt"},
		}},
	}
}

// wantInPod fails the test unless the pod's volume has exactly this file.
func wantInPod(t *testing.T, namespace, pod, name, text string) {
	t.Helper()
	entries, err := podTree(namespace, pod, "/model")
	check(t, err)
	var files []string
	for _, e := range entries {
		if e.Type == "file" {
			files = append(files, e.Path+" "+e.SHA256)
		}
	}
	if want := name + " " + digest.FromString(text).Encoded(); len(files) != 1 || files[0] != want {
		t.Errorf("the volume of the pod %s has %q, want %q", pod, files, want)
	}
}

// The volumes that an image volume cannot be, on machines whose containerd nobody has
// configured.
func TestCSIMountsAnyArtifact(t *testing.T) {
	install(t, byDefault)
	namespace := newNamespace(t)
	for _, name := range []string{"one", "two"} {
		_, err := one.Push(oras(name), "notes/"+name, "v1")
		check(t, err)
		createPod(t, namespace, name, csiPod(Registry+"/notes/"+name+":v1", ""))
	}
	src := t.TempDir()
	check(t, pack.WriteModel(src))
	ref := pushModel(t, src, "v1")
	create(t, namespace, "apps/v1", "Deployment", "model", deployment("model", 3, csiPod(ref, "")))
	for _, name := range []string{"one", "two"} {
		waitForPod(t, namespace, name)
		wantInPod(t, namespace, name, "notes.txt", name)
	}
	for _, pod := range waitForPods(t, namespace, "app=model", 3) {
		wantModel(t, namespace, pod, "/model", src)
	}
}

// A PersistentVolume has the same attributes.
func TestCSIPersistentVolumes(t *testing.T) {
	install(t, byDefault)
	namespace := newNamespace(t)
	src := writeFiles(t, map[string]string{"weights": "weights", "sub/file": "file"})
	ref := pushModel(t, src, "v1")
	check(t, one.Apply(fmt.Sprintf(`apiVersion: v1
kind: PersistentVolume
metadata: {name: %[1]s}
spec:
  capacity: {storage: 1Gi}
  accessModes: [ReadOnlyMany]
  storageClassName: ""
  persistentVolumeReclaimPolicy: Retain
  claimRef: {namespace: %[1]s, name: model}
  csi: {driver: %[2]s, volumeHandle: %[1]s, readOnly: true, volumeAttributes: {reference: "%[3]s"}}
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: model, namespace: %[1]s}
spec: {accessModes: [ReadOnlyMany], storageClassName: "", resources: {requests: {storage: 1Gi}}, volumeName: %[1]s}
`, namespace, csiDriver, ref)))
	t.Cleanup(func() {
		_, err := one.Kubectl("delete", "pv", namespace, "--wait=false")
		check(t, err)
	})
	spec := csiPod(ref, "")
	spec["volumes"] = []any{object{"name": "model", "persistentVolumeClaim": object{"claimName": "model", "readOnly": true}}}
	container(spec)["volumeMounts"] = []any{
		object{"name": "model", "mountPath": "/model", "readOnly": true},
		object{"name": "model", "mountPath": "/sub", "subPath": "sub", "readOnly": true},
	}
	spec["securityContext"] = object{"runAsUser": 1000, "runAsGroup": 1000, "fsGroup": 2000}
	create(t, namespace, "apps/v1", "Deployment", "model", deployment("model", 2, spec))
	for _, pod := range waitForPods(t, namespace, "app=model", 2) {
		wantModel(t, namespace, pod, "/model", src)
		wantModel(t, namespace, pod, "/sub", src+"/sub")
	}
}

func TestCSINeedsTheSecret(t *testing.T) {
	install(t, byDefault)
	namespace := newNamespace(t)
	src := writeFiles(t, map[string]string{"weights": "weights"})
	ref := strings.Replace(pushModel(t, src, "v1"), Registry, Private, 1)
	for name, password := range map[string]string{"right": node.PrivatePassword, "wrong": "not-" + node.PrivatePassword} {
		_, err := one.Kubectl("create", "secret", "docker-registry", name, "--namespace", namespace,
			"--docker-server="+Private, "--docker-username="+node.PrivateUser, "--docker-password="+password)
		check(t, err)
	}
	first := one.Machines()[0]
	createPod(t, namespace, "right", placed(first, csiPod(ref, "right")))
	waitForPod(t, namespace, "right")
	wantModel(t, namespace, "right", "/model", src)
	createPod(t, namespace, "wrong", placed(first, csiPod(ref, "wrong")))
	createPod(t, namespace, "missing", placed(first, csiPod(ref, "")))
	waitForDescription(t, namespace, "wrong", "FailedMount", "401 Unauthorized")
	waitForDescription(t, namespace, "missing", "FailedMount", "no basic auth credentials")
}

// The daemon is killed while a pod reads, and a volume is removed and another one mounted
// after it.
func TestCSIVolumesOutliveTheDaemon(t *testing.T) {
	install(t, byDefault)
	namespace := newNamespace(t)
	src := writeFiles(t, map[string]string{"weights": "weights"})
	ref := pushModel(t, src, "v1")
	first := one.Machines()[0]
	createPod(t, namespace, "before", placed(first, csiPod(ref, "")))
	waitForPod(t, namespace, "before")
	_, err := one.Kubectl("delete", "pods", "--namespace", Namespace, "--selector", "app.kubernetes.io/name="+Release, "--force", "--grace-period=0")
	check(t, err)
	wantModel(t, namespace, "before", "/model", src)
	_, err = one.Rollout()
	check(t, err)
	createPod(t, namespace, "after", placed(first, csiPod(ref, "")))
	waitForPod(t, namespace, "after")
	for _, pod := range []string{"before", "after"} {
		wantModel(t, namespace, pod, "/model", src)
	}
	_, err = one.Kubectl("delete", "pod", "--namespace", namespace, "before", "after", "--timeout=60s")
	check(t, err)
	check(t, process.Await(t.Context(), time.Minute, "the shared mount to end", func() error {
		mounts, err := first.Run("ls", "/run/artifact-snapshotter/mounts")
		if err == nil && mounts != "" {
			err = fmt.Errorf("mounts are left: %q", mounts)
		}
		return err
	}))
}

// A hostile path, and a tag that is not there: what describe pod says.
func TestCSISaysWhyAVolumeIsRefused(t *testing.T) {
	install(t, byDefault)
	namespace := newNamespace(t)
	artifact := oras("x")
	artifact.Layers[0].MediaType = "application/x-test"
	artifact.Layers[0].Annotations[ocispec.AnnotationTitle] = "../escaped"
	_, err := one.Push(artifact, "notes/escaped", "v1")
	check(t, err)
	createPod(t, namespace, "escaped", csiPod(Registry+"/notes/escaped:v1", ""))
	waitForDescription(t, namespace, "escaped", "FailedMount", `"../escaped"`, `contains ".."`)
	missing := csiPod(Registry+"/notes/nothing:v1", "")
	createPod(t, namespace, "missing", missing)
	waitForDescription(t, namespace, "missing", "FailedMount", "notes/nothing:v1", "not found")
}
