// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"path/filepath"
	"unsafe"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/measure"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
)

const (
	mapRounds     = 51
	coldMapRounds = 21

	// mapSize is not a multiple of 2 MiB, like the sizes of real models. The kernel places
	// a mapping below the previous one, so with a multiple the address could be aligned by
	// chance.
	mapSize = measure.GiB + 12345
)

// The states of the page cache when a program opens a model.
const (
	asPulled = "as pulled"
	readBack = "warm, from the disk"
	notRead  = "cold"
)

// measureMmap maps a model of 1 GiB through a pod's volume, once at the address that the
// kernel chooses and once at a multiple of 2 MiB, and compares both with a mapping of the
// blob.
func measureMmap(ctx context.Context, r *report) {
	measure.Progress("starting a node for a pod, and packing, pushing and pulling a model of 1 GiB")
	n := measure.Must(node.Start(ctx, node.Options{}))
	defer measure.Tidy(n.Stop)
	r.version(n)
	ref, blob := pullModel(ctx, n, mapSize)
	pod := measure.Must(n.RunPod(node.PodSpec{Volumes: []node.Volume{{Image: ref, Path: "/model"}}}))
	volume := filepath.Join("/proc", measure.Must(pod.PID("main")), "root/model", weights)
	r.disk.Sync()
	if cached := measure.Cached(blob); cached < 0.99 {
		measure.Check(fmt.Errorf("after the pull the page cache has only %.2f GiB of the blob", cached))
	}
	touch, copied := mapUse{"read of one byte per page", measure.Touch}, mapUse{"copy of every byte", measure.Copy}
	compareMaps(ctx, r, asPulled, blob, volume, touch, copied)
	measure.Evict(blob)
	measure.Read(blob, 0)
	compareMaps(ctx, r, readBack, blob, volume, touch, copied)
	compareMaps(ctx, r, notRead, blob, volume, touch)
}

// mapUse is a way to use a mapping.
type mapUse struct {
	name string
	read func(text []byte)
}

// compareMaps reads one mapping of the blob and two of the volume in turns.
func compareMaps(ctx context.Context, r *report, state, blob, volume string, uses ...mapUse) {
	maps := []struct {
		path    string
		aligned bool
	}{{blob, false}, {volume, false}, {volume, true}}
	rounds := mapRounds
	if state == notRead {
		rounds = coldMapRounds
	}
	for _, use := range uses {
		var took, faults [3]measure.Sample
		var aligned [3]int
		for round := range rounds {
			measure.Check(ctx.Err())
			for turn := range maps {
				i := (turn + round) % len(maps) // rotate the order
				if state == notRead {
					measure.Evict(blob)
					_ = measure.DropCaches() // inodes and directories too, where that is permitted
				}
				faults[i] = append(faults[i], measure.Faults(func() {
					took[i] = append(took[i], measure.Seconds(func() {
						measure.Map([]string{maps[i].path}, maps[i].aligned, func(texts [][]byte) {
							if uintptr(unsafe.Pointer(&texts[0][0]))%measure.HugePage == 0 {
								aligned[i]++
							}
							use.read(texts[0])
						})
					}))
				}))
			}
		}
		what := use.name + " through an `mmap`, volume against blob, " + state
		for i := 1; i < len(maps); i++ {
			var ratios measure.Sample
			for round := range rounds {
				ratios = append(ratios, took[0][round]/took[i][round])
			}
			measured := fmt.Sprintf("%s; %.1f against %.1f ms, %.0f against %.0f page faults, aligned %d against %d times", ratios.Format("%.2f", ""),
				took[i].Median()*1000, took[0].Median()*1000, faults[i].Median(), faults[0].Median(), aligned[i], aligned[0])
			if maps[i].aligned {
				r.add(what+", at a multiple of 2 MiB", measured, "≥ 0.97", ratios.Median() >= 0.97)
			} else {
				r.add(what, measured, "none", true)
			}
		}
	}
}
