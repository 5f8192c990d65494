// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"testing"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
)

// By NRI, image volumes need no RuntimeClass, and the containers keep the node's snapshotter.
func TestImageVolumesByDefault(t *testing.T) {
	install(t, byDefault)
	namespace := newNamespace(t)
	src := t.TempDir()
	check(t, pack.WriteModel(src))
	create(t, namespace, "apps/v1", "Deployment", "model", deployment("model", 3, nodeSpec(pushModel(t, src, "v1"))))
	for _, pod := range waitForPods(t, namespace, "app=model", 3) {
		wantModel(t, namespace, pod, "/model", src)
		if got := snapshotters(t, namespace, pod); got[0] != "overlayfs" {
			t.Errorf("the pod %s has the snapshotter %q", pod, got)
		}
	}
}

// As TestPodsComeBackWithoutTheRegistry: kubelet waits for the driver.
func TestPodsWithCSIComeBack(t *testing.T) {
	install(t, byDefault)
	comeBack(t, func(ref string) object { return csiPod(ref, "") })
}

func TestAnUpgradeFailsNoPodWithCSI(t *testing.T) {
	install(t, byDefault)
	upgraded(t, func(ref string) object { return csiPod(ref, "") })
}
