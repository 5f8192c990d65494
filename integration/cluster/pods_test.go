// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"testing"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
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
