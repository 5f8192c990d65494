// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
)

const (
	coldRounds  = 41
	warmRounds  = 151 // they are short
	cacheRounds = 5
	pods        = 3
	weights     = "model.safetensors"
)

// measurePods pulls a model of 1 GiB and reads it through the volumes of pods.
func measurePods(ctx context.Context, r *report) {
	progress("starting a node for pods, and packing, pushing and pulling a model of 1 GiB")
	n := must(node.Start(ctx, node.Options{}))
	defer tidy(n.Stop)
	ref, blob := pullModel(ctx, n)
	var running []*node.Pod
	for range pods {
		running = append(running, must(n.RunPod(node.PodSpec{Volumes: []node.Volume{{Image: ref, Path: "/model"}}})))
	}
	pid := must(n.Crictl("inspect", "--output", "go-template", "--template", "{{.info.pid}}", running[0].Containers["main"]))
	// The file as the container sees it, through all its mounts.
	volume := filepath.Join("/proc", strings.TrimSpace(pid), "root/model", weights)
	r.disk.sync()
	compareReads(ctx, r, "cold", coldRounds, blob, volume)
	compareReads(ctx, r, "warm", warmRounds, blob, volume)
	measureCache(r, running, blob)
}

// pullModel returns the model's reference and the blob of its weights.
func pullModel(ctx context.Context, n *node.Node) (ref, blob string) {
	dir := filepath.Join(n.Dir, "model")
	check(os.Mkdir(dir, 0o755))
	check(os.WriteFile(filepath.Join(dir, "config.json"), []byte("{}"), 0o600))
	f := must(os.Create(filepath.Join(dir, weights)))
	defer f.Close()
	sum := digest.Canonical.Digester()
	must(io.CopyN(io.MultiWriter(f, sum.Hash()), rand.NewChaCha8([32]byte{}), gib))
	model := must(pack.Model(dir, pack.Options{}))
	must(model.Push(ctx, n.Registry, "models/bench", "latest"))
	ref = n.Registry + "/models/bench:latest"
	must(n.Pull(ref))
	return ref, filepath.Join(n.ContentRoot, "blobs", "sha256", sum.Digest().Encoded())
}

// compareReads reads the blob and the volume in turns.
func compareReads(ctx context.Context, r *report, how string, rounds int, blob, volume string) {
	read(blob) // for the warm rounds
	var ratios, speeds sample
	for round := range rounds {
		check(ctx.Err())
		var took [2]time.Duration
		for turn := range 2 {
			i := (turn + round) % 2 // neither is always the first
			if how == "cold" {
				evict(blob)
				// Inodes and directories too, where that is permitted.
				_ = os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0)
			}
			took[i] = read([2]string{blob, volume}[i])
		}
		ratios = append(ratios, took[0].Seconds()/took[1].Seconds())
		speeds = append(speeds, 1/took[1].Seconds())
	}
	r.add("speed of a sequential read through the volume against the blob, "+how,
		fmt.Sprintf("%s; %.1f GiB/s", ratios.format("%.3f", ""), speeds.median()), "≥ 0.97", ratios.median() >= 0.97)
}

// read reads a file from its beginning to its end, with plain read(2).
func read(path string) time.Duration {
	buf := make([]byte, mib)
	start := time.Now()
	f := must(os.Open(path))
	defer f.Close()
	for {
		if _, err := f.Read(buf); errors.Is(err, io.EOF) {
			return time.Since(start)
		} else if err != nil {
			check(err)
		}
	}
}

// evict takes the blob out of the page cache.
func evict(blob string) {
	f := must(os.Open(blob))
	defer f.Close()
	check(unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED))
	if left := cached(blob); left > 0.01 {
		check(fmt.Errorf("%.3f GiB of %s stay in the page cache", left, blob))
	}
}

// cached is how much of a file is in the page cache, in GiB.
func cached(path string) float64 {
	f := must(os.Open(path))
	defer f.Close()
	var st unix.Cachestat_t
	check(os.NewSyscallError("cachestat", unix.Cachestat(uint(f.Fd()), &unix.CachestatRange{}, &st, 0))) // Linux 6.5
	return float64(st.Cache) * float64(os.Getpagesize()) / gib
}

// measureCache lets every pod read the model, and looks how often it is in the
// page cache then. The kernel's number is of the whole machine, hence the rounds.
func measureCache(r *report, running []*node.Pod, blob string) {
	var growth, ofBlob sample
	for range cacheRounds {
		evict(blob)
		before := mebibytes("/proc/meminfo", "Cached")
		for _, pod := range running {
			// The list has the digests of the content.
			if seen := fmt.Sprint(must(pod.Tree("main", "/model"))); !strings.Contains(seen, filepath.Base(blob)) {
				check(fmt.Errorf("a pod does not see the weights: %s", seen))
			}
		}
		growth = append(growth, (mebibytes("/proc/meminfo", "Cached")-before)*mib/gib)
		ofBlob = append(ofBlob, cached(blob))
	}
	r.add(fmt.Sprintf("growth of the page cache when %d pods read 1 GiB", pods),
		fmt.Sprintf("%s; of the blob %.3f GiB", growth.format("%.3f", " GiB"), ofBlob.median()),
		"once: ≤ 1.05 GiB", growth.median() <= 1.05 && ofBlob.median() >= 0.95)
}
