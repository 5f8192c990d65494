// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"testing"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
)

// nodeSpec is podSpec for `scope: node`, where no pod needs a RuntimeClass.
func nodeSpec(ref string) object {
	spec := podSpec(ref)
	delete(spec, "runtimeClassName")
	return spec
}

func TestAServiceServesEveryPod(t *testing.T) {
	install(t, asService)
	namespace := newNamespace(t)
	src := t.TempDir()
	check(t, pack.WriteModel(src))
	create(t, namespace, "apps/v1", "Deployment", "model", deployment("model", 3, nodeSpec(pushModel(t, src, "v1"))))
	for _, pod := range waitForPods(t, namespace, "app=model", 3) {
		wantModel(t, namespace, pod, "/model", src)
		if got := snapshotters(t, namespace, pod); got[0] != "artifact" {
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
