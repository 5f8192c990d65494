// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package verify

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer/json"
	"k8s.io/apimachinery/pkg/util/validation/field"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/kubernetes/pkg/api/legacyscheme"
	"k8s.io/kubernetes/pkg/api/pod"
	"k8s.io/kubernetes/pkg/apis/apps"
	_ "k8s.io/kubernetes/pkg/apis/apps/install"
	appsvalidation "k8s.io/kubernetes/pkg/apis/apps/validation"
	"k8s.io/kubernetes/pkg/apis/core"
	_ "k8s.io/kubernetes/pkg/apis/core/install"
	corevalidation "k8s.io/kubernetes/pkg/apis/core/validation"
	"k8s.io/kubernetes/pkg/apis/node"
	_ "k8s.io/kubernetes/pkg/apis/node/install"
	nodevalidation "k8s.io/kubernetes/pkg/apis/node/validation"
	"k8s.io/kubernetes/pkg/apis/rbac"
	_ "k8s.io/kubernetes/pkg/apis/rbac/install"
	rbacvalidation "k8s.io/kubernetes/pkg/apis/rbac/validation"
	"k8s.io/kubernetes/pkg/apis/storage"
	_ "k8s.io/kubernetes/pkg/apis/storage/install"
	storagevalidation "k8s.io/kubernetes/pkg/apis/storage/validation"
	"k8s.io/kubernetes/pkg/capabilities"
)

// decode reads the documents of a manifest as the API server does with
// fieldValidation=Strict: an unknown or repeated field is an error. What comes out has
// the server's defaults.
func decode(manifest []byte) ([]runtime.Object, error) {
	strict := json.NewSerializerWithOptions(json.DefaultMetaFactory, legacyscheme.Scheme, legacyscheme.Scheme,
		json.SerializerOptions{Yaml: true, Strict: true})
	decoder := legacyscheme.Codecs.DecoderToVersion(strict, runtime.InternalGroupVersioner)
	var objects []runtime.Object
	for documents := yaml.NewYAMLReader(bufio.NewReader(bytes.NewReader(manifest))); ; {
		document, err := documents.Read()
		if errors.Is(err, io.EOF) {
			return objects, nil
		}
		if err != nil {
			return nil, err
		}
		if empty(document) {
			continue
		}
		object, err := runtime.Decode(decoder, document)
		if err != nil {
			return nil, fmt.Errorf("%w in:\n%s", err, document)
		}
		objects = append(objects, object)
	}
}

// empty tells whether a document has nothing but comments and separators.
func empty(document []byte) bool {
	for line := range strings.Lines(string(document)) {
		if line = strings.TrimSpace(line); line != "" && line != "---" && !strings.HasPrefix(line, "#") {
			return false
		}
	}
	return true
}

// validate is what the API server would say to the creation of object.
func validate(object runtime.Object) error {
	accessor, err := meta.Accessor(object)
	if err != nil {
		return err
	}
	switch object.(type) {
	case *node.RuntimeClass, *storage.CSIDriver, *core.PersistentVolume, *rbac.ClusterRole, *rbac.ClusterRoleBinding: // of the cluster
	default:
		if accessor.GetNamespace() == "" {
			accessor.SetNamespace("default") // as the server does
		}
	}
	var problems field.ErrorList
	switch object := object.(type) {
	case *apps.DaemonSet:
		problems = appsvalidation.ValidateDaemonSet(object, pod.GetValidationOptionsFromPodTemplate(&object.Spec.Template, nil))
	case *apps.Deployment:
		problems = appsvalidation.ValidateDeployment(object, pod.GetValidationOptionsFromPodTemplate(&object.Spec.Template, nil))
	case *core.Pod:
		problems = corevalidation.ValidatePodCreate(object, pod.GetValidationOptionsFromPodSpecAndMeta(&object.Spec, nil, &object.ObjectMeta, nil))
	case *storage.CSIDriver:
		problems = storagevalidation.ValidateCSIDriver(object)
	case *core.PersistentVolume:
		problems = corevalidation.ValidatePersistentVolume(object, corevalidation.PersistentVolumeSpecValidationOptions{})
	case *core.PersistentVolumeClaim:
		problems = corevalidation.ValidatePersistentVolumeClaim(object, corevalidation.PersistentVolumeClaimSpecValidationOptions{})
	case *core.Service:
		// Only its names: the rest is of what the server allocates.
		problems = corevalidation.ValidateObjectMeta(&object.ObjectMeta, true, corevalidation.ValidateServiceName, field.NewPath("metadata"))
	case *core.ConfigMap:
		problems = corevalidation.ValidateConfigMap(object)
	case *core.ServiceAccount:
		problems = corevalidation.ValidateServiceAccount(object)
	case *rbac.ClusterRole:
		problems = rbacvalidation.ValidateClusterRole(object, rbacvalidation.ClusterRoleValidationOptions{})
	case *rbac.ClusterRoleBinding:
		problems = rbacvalidation.ValidateClusterRoleBinding(object)
	case *node.RuntimeClass:
		problems = nodevalidation.ValidateRuntimeClass(object)
	default:
		return fmt.Errorf("no validation for a %T", object)
	}
	return problems.ToAggregate()
}

func TestMain(m *testing.M) {
	// The clusters for which this is allow privileged containers, as the API server
	// of every distribution does.
	capabilities.Setup(true, 0)
	m.Run()
}

// TestValidation proves that the validation is one: it finds what is wrong.
func TestValidation(t *testing.T) {
	const good = `
apiVersion: v1
kind: Pod
metadata: {name: p}
spec:
  containers:
  - name: c
    image: registry.example.com/i
    securityContext: {privileged: true}
    volumeMounts: [{name: v, mountPath: /v, mountPropagation: Bidirectional}]
  volumes:
  - name: v
    hostPath: {path: /v}
`
	for _, test := range []struct{ name, old, new, want string }{
		{"nothing wrong", "", "", ""},
		{"an unknown field", "name: c", "nam: c", `unknown field "spec.containers[0].nam"`},
		{"a field twice", "name: c", "name: c\n    name: d", `already set in map`},
		{"propagation without privileges", "true", "false", "Bidirectional mount propagation is available only to privileged containers"},
		{"a mount without volume", "name: v, m", "name: w, m", `Not found: "w"`},
		{"a token as a number", "metadata: {name: p}", "metadata: {name: 1}", "cannot unmarshal number"},
	} {
		t.Run(test.name, func(t *testing.T) {
			objects, err := decode([]byte(strings.Replace(good, test.old, test.new, 1)))
			if err == nil {
				err = validate(objects[0])
			}
			if test.want == "" && err != nil || test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)) {
				t.Errorf("got %v, want %q", err, test.want)
			}
		})
	}
}
