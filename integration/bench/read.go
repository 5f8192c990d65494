// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"

	"github.com/opencontainers/go-digest"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/measure"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
)

const (
	coldRounds  = 41
	warmRounds  = 151 // a round is short
	cacheRounds = 5
	pods        = 3
	weights     = "model.safetensors"
)

// measurePods pulls a model of 1 GiB and reads it through the volumes of pods.
func measurePods(ctx context.Context, r *report) {
	measure.Progress("starting a node for pods, and packing, pushing and pulling a model of 1 GiB")
	n := measure.Must(node.Start(ctx, node.Options{}))
	defer measure.Tidy(n.Stop)
	ref, blob := pullModel(ctx, n, measure.GiB)
	var running []*node.Pod
	for range pods {
		running = append(running, measure.Must(n.RunPod(node.PodSpec{Volumes: []node.Volume{{Image: ref, Path: "/model"}}})))
	}
	pid := measure.Must(running[0].PID("main"))
	// The file as the container sees it, through all its mounts.
	volume := filepath.Join("/proc", pid, "root/model", weights)
	r.disk.Sync()
	compareReads(ctx, r, "cold", coldRounds, blob, volume)
	compareReads(ctx, r, "warm", warmRounds, blob, volume)
	measureCache(r, running, blob)
}

// pullModel pulls a model with weights of this size, and returns its reference and the path
// of the weights' blob.
func pullModel(ctx context.Context, n *node.Node, size int64) (ref, blob string) {
	dir := filepath.Join(n.Dir, "model")
	measure.Check(os.Mkdir(dir, 0o755))
	measure.Check(os.WriteFile(filepath.Join(dir, "config.json"), []byte("{}"), 0o600))
	f := measure.Must(os.Create(filepath.Join(dir, weights)))
	defer f.Close()
	sum := digest.Canonical.Digester()
	measure.Must(io.CopyN(io.MultiWriter(f, sum.Hash()), rand.NewChaCha8([32]byte{}), size))
	model := measure.Must(pack.Model(dir, pack.Options{}))
	measure.Must(model.Push(ctx, n.Registry, "models/bench", "latest"))
	ref = n.Registry + "/models/bench:latest"
	measure.Must(n.Pull(ref))
	return ref, filepath.Join(n.ContentRoot, "blobs", "sha256", sum.Digest().Encoded())
}

// compareReads reads the blob and the volume in turns.
func compareReads(ctx context.Context, r *report, how string, rounds int, blob, volume string) {
	measure.Read(blob, 0) // for the warm rounds
	var ratios, speeds measure.Sample
	for round := range rounds {
		measure.Check(ctx.Err())
		var took [2]float64
		for turn := range 2 {
			i := (turn + round) % 2 // rotate the order
			if how == "cold" {
				measure.Evict(blob)
				// Also drop inodes and directories, where that is permitted.
				_ = measure.DropCaches()
			}
			took[i] = measure.Seconds(func() { measure.Read([2]string{blob, volume}[i], 0) })
		}
		ratios = append(ratios, took[0]/took[1])
		speeds = append(speeds, 1/took[1])
	}
	r.add("speed of a sequential read through the volume against the blob, "+how,
		fmt.Sprintf("%s; %.1f GiB/s", ratios.Format("%.3f", ""), speeds.Median()), "≥ 0.97", ratios.Median() >= 0.97)
}

// measureCache lets every pod read the model, and measures how much the page cache grows.
// The kernel's number covers the whole machine, hence several rounds.
func measureCache(r *report, running []*node.Pod, blob string) {
	var growth, ofBlob measure.Sample
	for range cacheRounds {
		measure.Evict(blob)
		before := measure.Mebibytes("/proc/meminfo", "Cached")
		for _, pod := range running {
			// The listing has the SHA-256 of each file, so the pod has read it.
			if seen := fmt.Sprint(measure.Must(pod.Tree("main", "/model"))); !strings.Contains(seen, filepath.Base(blob)) {
				measure.Check(fmt.Errorf("the pod does not see the weights: %s", seen))
			}
		}
		growth = append(growth, (measure.Mebibytes("/proc/meminfo", "Cached")-before)*measure.MiB/measure.GiB)
		ofBlob = append(ofBlob, measure.Cached(blob))
	}
	r.add(fmt.Sprintf("growth of the page cache when %d pods read 1 GiB", pods),
		fmt.Sprintf("%s; of the blob %.3f GiB", growth.Format("%.3f", " GiB"), ofBlob.Median()),
		"once: ≤ 1.05 GiB", growth.Median() <= 1.05 && ofBlob.Median() >= 0.95)
}
