// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/measure"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
)

const (
	createRounds = 21
	createFiles  = 200
)

// creator is a node with one sandbox; its containers are measured.
type creator struct {
	*node.Node
	*node.Pod
	before measure.Sample // before: without a volume
	first  measure.Sample // first: the first container with an artifact
	second measure.Sample // second: another container with the same artifact
}

// measureCreate measures CreateContainer with a volume of 200 raw files. It alternates
// between nodes with and without the NRI plugin.
func measureCreate(ctx context.Context, r *report) {
	kinds := []struct {
		runtime, how string
		options      node.Options
	}{
		{"containerd", "stock", node.Options{Stock: true}},
		{"containerd", "with the NRI plugin", node.Options{NRI: true}},
		{"CRI-O", "stock", node.Options{CRIO: true, Stock: true}},
		{"CRI-O", "with the NRI plugin", node.Options{CRIO: true}},
	}
	if _, err := node.FindCRIO(); errors.Is(err, node.ErrNoCRIO) {
		measure.Progress("NOT MEASURED with CRI-O: %v", err)
		kinds = kinds[:2]
	} else {
		r.crio = measure.Must(node.CRIOVersion())
	}
	dir := measure.Must(os.MkdirTemp("", "files-"))
	for i := range createFiles {
		file := filepath.Join(dir, name(i))
		measure.Check(os.MkdirAll(filepath.Dir(file), 0o755))
		measure.Check(os.WriteFile(file, fmt.Appendf(nil, "file %d", i), 0o644))
	}
	var creators []*creator
	for _, kind := range kinds {
		measure.Progress("starting a node with %s, %s", kind.runtime, kind.how)
		n := measure.Must(node.Start(ctx, kind.options))
		defer measure.Tidy(n.Stop)
		creators = append(creators, &creator{Node: n, Pod: measure.Must(n.RunSandbox(node.PodSpec{}))})
	}
	r.version(creators[0].Node)
	for round := range createRounds + 1 {
		// Change one file each round, so that the artifact is new to every node.
		measure.Check(os.WriteFile(filepath.Join(dir, name(0)), fmt.Appendf(nil, "round %d", round), 0o644))
		for _, c := range creators {
			model := measure.Must(pack.Model(dir, pack.Options{}))
			measure.Must(model.Push(ctx, c.Registry, "models/create", fmt.Sprint(round)))
			measure.Must(c.Pull(fmt.Sprintf("%s/models/create:%d", c.Registry, round)))
		}
		r.disk.Sync()
		for turn := range creators {
			c := creators[(turn+round)%len(creators)] // rotate the order
			volumes := []node.Volume{{Image: fmt.Sprintf("%s/models/create:%d", c.Registry, round), Path: "/model"}}
			before, first, second := c.create(nil), c.create(volumes), c.create(volumes)
			if round > 0 { // round 0 is a warm-up
				c.before, c.first, c.second = append(c.before, before), append(c.first, first), append(c.second, second)
			}
		}
	}
	for i := 0; i < len(kinds); i += 2 {
		stock, plugin, runtime := creators[i], creators[i+1], kinds[i].runtime
		bound := 0.0
		if runtime == "CRI-O" {
			bound = 1 // stock containerd mounts an empty directory
		}
		what := fmt.Sprintf("`CreateContainer` in %s, with the NRI plugin against without it, ", runtime)
		r.compare(what+"no volume", plugin.before, stock.before, 0)
		r.compare(what+fmt.Sprintf("%d raw files, first pod", createFiles), plugin.first, stock.first, bound)
		r.compare(what+fmt.Sprintf("%d raw files, second pod", createFiles), plugin.second, stock.second, bound)
	}
}

// create creates a container and removes it. It returns the milliseconds of the creation,
// including the start of crictl.
func (c *creator) create(volumes []node.Volume) float64 {
	start := time.Now()
	id := measure.Must(c.Create(node.Container{Volumes: volumes}))
	took := time.Since(start)
	measure.Must(c.Crictl("rm", "--force", id))
	return measure.Milliseconds(took)
}
