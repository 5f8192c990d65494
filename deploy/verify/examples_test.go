// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package verify

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/kubernetes/pkg/apis/apps"
	"k8s.io/kubernetes/pkg/apis/core"
	"k8s.io/kubernetes/pkg/apis/node"
)

const (
	examples = "../examples"
	driver   = "artifact-snapshotter.dev"
)

// TestExamples: each is accepted by the API server, and mounts a model that its server
// is told to read.
func TestExamples(t *testing.T) {
	files, err := filepath.Glob(filepath.Join(examples, "*", "*.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	if len(files) != 11 {
		t.Errorf("got %d examples, want 11: %v", len(files), files)
	}
	for _, file := range files {
		t.Run(strings.TrimPrefix(file, examples+"/"), func(t *testing.T) {
			for _, object := range decodeFile(t, file) {
				if err := validate(object); err != nil {
					t.Errorf("the API server would refuse it: %v", err)
				}
				if spec := podSpec(object); spec != nil {
					checkModel(t, spec, filepath.Base(filepath.Dir(file)))
				}
			}
		})
	}
}

func podSpec(object runtime.Object) *core.PodSpec {
	switch object := object.(type) {
	case *core.Pod:
		return &object.Spec
	case *apps.Deployment:
		return &object.Spec.Template.Spec
	}
	return nil
}

func checkModel(t *testing.T, spec *core.PodSpec, scope string) {
	t.Helper()
	class := "<none>"
	if spec.RuntimeClassName != nil {
		class = *spec.RuntimeClassName
	}
	if want := map[string]string{"csi": "<none>", "node": "<none>", "runtime-handler": "artifact"}[scope]; class != want {
		t.Errorf("runtimeClassName is %s, want %s in scope %s", class, want, scope)
	}
	server := spec.Containers[0]
	models := 0
	for _, volume := range spec.Volumes {
		var reference string
		switch {
		case scope == "csi" && volume.CSI != nil && volume.CSI.Driver == driver:
			reference = volume.CSI.VolumeAttributes["reference"]
		case scope != "csi" && volume.Image != nil:
			reference = volume.Image.Reference
		default:
			continue
		}
		models++
		i := slices.IndexFunc(server.VolumeMounts, func(m core.VolumeMount) bool { return m.Name == volume.Name })
		if i < 0 || !server.VolumeMounts[i].ReadOnly {
			t.Errorf("%s is not mounted read-only", volume.Name)
			continue
		}
		path := server.VolumeMounts[i].MountPath
		if !slices.ContainsFunc(slices.Concat(server.Command, server.Args), func(arg string) bool {
			_, value, found := strings.Cut(arg, "=")
			if !found {
				value = arg
			}
			return strings.HasPrefix(value+"/", path+"/") || strings.HasPrefix(value, "/") && strings.HasPrefix(path, value+"/")
		}) {
			t.Errorf("the server is told nothing of %s: %q %q", path, server.Command, server.Args)
		}
		if !strings.HasPrefix(reference, "registry.example.com/") {
			t.Errorf("the registry of %s is somebody's", reference)
		}
	}
	if models == 0 {
		t.Error("no volume of a model")
	}
}

// TestExamplesOfBothScopes: they differ in the line of the RuntimeClass alone.
func TestExamplesOfBothScopes(t *testing.T) {
	files, err := filepath.Glob(filepath.Join(examples, "node", "*.yaml"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no examples: %v", err)
	}
	for _, file := range files {
		var without strings.Builder
		for line := range strings.Lines(read(t, filepath.Join(examples, "runtime-handler", filepath.Base(file)))) {
			if strings.TrimSpace(line) != "runtimeClassName: artifact" {
				without.WriteString(line)
			}
		}
		if without.String() != read(t, file) {
			t.Errorf("%s is not the one of runtime-handler without its runtimeClassName", file)
		}
	}
}

// TestExampleOfAClaim: the claim is bound to the volume, which is one of the driver.
func TestExampleOfAClaim(t *testing.T) {
	objects := decodeFile(t, filepath.Join(examples, "csi", "kserve.yaml"))
	volume, claim := one[*core.PersistentVolume](t, objects), one[*core.PersistentVolumeClaim](t, objects)
	if csi := volume.Spec.CSI; csi == nil || csi.Driver != driver || !csi.ReadOnly || csi.VolumeAttributes["reference"] == "" {
		t.Errorf("the volume is %+v", volume.Spec)
	}
	if claim.Spec.VolumeName != volume.Name || volume.Spec.ClaimRef.Name != claim.Name {
		t.Errorf("the claim %s is for the volume %s, which is for the claim %s", claim.Name, claim.Spec.VolumeName, volume.Spec.ClaimRef.Name)
	}
}

// TestRuntimeClass: the example is the object that the chart makes.
func TestRuntimeClass(t *testing.T) {
	example := one[*node.RuntimeClass](t, decodeFile(t, filepath.Join(examples, "runtime-handler", "runtimeclass.yaml")))
	chart := one[*node.RuntimeClass](t, mustRender(t, snapshotter))
	if example.Name != chart.Name || example.Handler != chart.Handler {
		t.Errorf("%s with handler %s, the chart has %s with %s", example.Name, example.Handler, chart.Name, chart.Handler)
	}
}

func decodeFile(t *testing.T, path string) []runtime.Object {
	t.Helper()
	objects, err := decode([]byte(read(t, path)))
	if err != nil {
		t.Fatal(err)
	}
	return objects
}

func read(t *testing.T, path string) string {
	t.Helper()
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(content)
}

// one returns the only object of type T.
func one[T runtime.Object](t *testing.T, objects []runtime.Object) T {
	t.Helper()
	var found []T
	for _, object := range objects {
		if object, ok := object.(T); ok {
			found = append(found, object)
		}
	}
	if len(found) != 1 {
		t.Fatalf("got %d objects of type %T, want 1", len(found), *new(T))
	}
	return found[0]
}
