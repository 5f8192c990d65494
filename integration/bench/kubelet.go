// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/measure"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
)

const kubeletRounds = 20

// measureKubelet has kubelet start pods with and without a volume of 2 GiB, in turns and
// one at a time. Nothing reads the model.
//
// If a pod has a volume, kubelet checks that it is mounted, and checks again 300 ms later
// (podAttachAndMountRetryInterval in pkg/kubelet/volumemanager) before it creates the
// sandbox. A pod in a cluster always has the volume of its service account token, so the
// comparison with an emptyDir is the fair one.
func measureKubelet(ctx context.Context, r *report) {
	measure.Progress("starting a node with kubelet, and packing, pushing and pulling a model of 2 GiB")
	n := measure.Must(node.Start(ctx, node.Options{Kubelet: true}))
	defer measure.Tidy(n.Stop)
	dir := filepath.Join(n.Dir, "model")
	measure.Check(os.Mkdir(dir, 0o755))
	measure.Check(os.WriteFile(filepath.Join(dir, weights), nil, 0o644))
	measure.Check(os.Truncate(filepath.Join(dir, weights), 2*measure.GiB))
	model := measure.Must(pack.Model(dir, pack.Options{}))
	measure.Must(model.Push(ctx, n.Registry, "models/kubelet", "latest"))
	ref := n.Registry + "/models/kubelet:latest"
	measure.Must(n.Pull(ref))
	measure.Check(n.StartKubelet(nil))
	kinds := [3]node.PodSpec{
		{},
		{EmptyDir: "/empty"},
		{Volumes: []node.Volume{{Image: ref, Path: "/model", PullPolicy: "IfNotPresent"}}},
	}
	var whole, ofSandbox [len(kinds)]measure.Sample
	for round := range kubeletRounds + 1 {
		for turn := range kinds {
			i := (turn + round) % len(kinds) // rotate the order
			spec := kinds[i]
			spec.Name = fmt.Sprintf("pod-%d-%d", round, i)
			sinceGiven, sinceSandbox := startStatic(ctx, n, spec)
			if round > 0 { // round 0 is a warm-up
				whole[i] = append(whole[i], sinceGiven)
				ofSandbox[i] = append(ofSandbox[i], sinceSandbox)
			}
		}
		r.disk.Sync()
	}
	compare := func(what string, with, without measure.Sample) {
		r.compare("kubelet: start of a container with a raw model of 2 GiB, "+what, with, without, 1.1)
	}
	compare("since the pod's manifest, against a pod with an `emptyDir`", whole[2], whole[1])
	compare("since the pod's manifest, against a pod with no volume", whole[2], whole[0])
	compare("since the sandbox's creation, against a pod with no volume", ofSandbox[2], ofSandbox[0])
}

// startStatic runs a pod and removes it. It returns the milliseconds until the container
// starts, by containerd's clock: since the manifest was written for kubelet, and since the
// sandbox was created.
func startStatic(ctx context.Context, n *node.Node, spec node.PodSpec) (sinceGiven, sinceSandbox float64) {
	given := time.Now()
	measure.Check(n.RunStaticPod(spec))
	var id string
	for deadline := given.Add(time.Minute); id == ""; time.Sleep(50 * time.Millisecond) {
		measure.Check(ctx.Err())
		if time.Now().After(deadline) {
			measure.Check(fmt.Errorf("pod %s does not start: %+v", spec.Name, measure.Must(n.StaticPods())[spec.Name].Status))
		}
		id = measure.Must(n.StaticPods())[spec.Name].Containers["main"]
	}
	inspect := func(command, template, id string) string {
		return strings.TrimSpace(measure.Must(n.Crictl(command, "--output", "go-template", "--template", template, id)))
	}
	started := measure.Must(time.Parse(time.RFC3339Nano, inspect("inspect", "{{.status.startedAt}}", id)))
	sandbox := inspect("inspect", "{{.info.sandboxID}}", id)
	created := measure.Must(time.Parse(time.RFC3339Nano, inspect("inspectp", "{{.status.createdAt}}", sandbox)))
	measure.Check(n.RemoveStaticPod(spec.Name))
	return measure.Milliseconds(started.Sub(given)), measure.Milliseconds(started.Sub(created))
}
