// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package cluster

import "testing"

// By NRI, image volumes need no RuntimeClass, and the containers keep the node's snapshotter.
func TestImageVolumesByDefault(t *testing.T) {
	install(t, byDefault)
	wantReplicas(t, "overlayfs")
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
