// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/measure"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
)

const (
	// window limits the reads to the beginning of a model: the plain files, the volume, and
	// a second cached copy of the volume must fit into memory together.
	window = measure.GiB

	touches    = 20000 // pages touched in a random read
	warmRounds = 3     // warm rounds per cold round, because they are short
)

// reading is the speed of reads through a volume, and its ratio to the speed of plain files
// with the same bytes on the same disk.
type reading struct {
	Speed measure.Sample // MiB/s
	Ratio measure.Sample // greater than 1: the volume was faster
}

// pattern is a way to read files; read returns the bytes and the seconds.
type pattern struct {
	name string
	read func(root string, files []file) (bytes, seconds float64)
}

var patterns = []pattern{
	{"read(2)", func(root string, files []file) (bytes, seconds float64) {
		seconds = measure.Seconds(func() {
			for _, f := range files {
				measure.Read(filepath.Join(root, f.path), f.size)
				bytes += float64(f.size)
			}
		})
		return bytes, seconds
	}},
	{"mmap", func(root string, files []file) (bytes, seconds float64) {
		seconds = measure.Seconds(func() {
			for _, f := range files {
				mapped(root, []file{f}, func(texts [][]byte) { measure.Touch(texts[0]) })
				bytes += float64(f.size)
			}
		})
		return bytes, seconds
	}},
	{"random mmap", func(root string, files []file) (bytes, seconds float64) {
		var touched byte
		mapped(root, files, func(texts [][]byte) {
			var pages []*byte
			for _, text := range texts {
				for at := 0; at < len(text); at += os.Getpagesize() {
					pages = append(pages, &text[at])
				}
			}
			rand.New(rand.NewPCG(1, 2)).Shuffle(len(pages), func(i, j int) { pages[i], pages[j] = pages[j], pages[i] })
			pages = pages[:min(touches, len(pages))]
			bytes = float64(len(pages) * os.Getpagesize())
			seconds = measure.Seconds(func() {
				for _, page := range pages {
					touched += *page
				}
			})
		})
		runtime.KeepAlive(touched) // keeps the compiler from removing the reads
		return bytes, seconds
	}},
}

// mapped maps files below root and calls use. The files may be only the beginnings of those
// on disk.
func mapped(root string, files []file, use func(texts [][]byte)) {
	var paths []string
	for _, f := range files {
		paths = append(paths, filepath.Join(root, f.path))
	}
	measure.Map(paths, false, func(texts [][]byte) {
		for i, f := range files {
			texts[i] = texts[i][:f.size]
		}
		use(texts)
	})
}

// reads compares a pod's volume with plain files, in turns.
func (b *bench) reads(ctx context.Context, r *row, disk measure.Disk, pod *node.Pod) {
	files := b.data.beginning(window)
	native := filepath.Join(disk.Root(), "native")
	b.data.write(ctx, native, files)
	disk.Sync()
	roots := [2]string{native, inPod(pod, target)}
	r.Reads = map[string]reading{}
	for _, cold := range []bool{true, false} {
		rounds := b.options.reads
		if !cold {
			rounds *= warmRounds
			makeCold(native, files) // all paths below fill the cache in the same way
			for _, root := range roots {
				patterns[0].read(root, files)
			}
		}
		for _, p := range patterns {
			var got reading
			for round := range rounds {
				measure.Check(ctx.Err())
				var took [2]float64
				var bytes float64
				for turn := range roots {
					i := (turn + round) % len(roots) // rotate the order
					if cold {
						makeCold(native, files)
					}
					bytes, took[i] = p.read(roots[i], files)
				}
				got.Speed = append(got.Speed, bytes/took[1]/measure.MiB)
				got.Ratio = append(got.Ratio, took[0]/took[1])
			}
			name := p.name + ", " + map[bool]string{true: "cold", false: "warm"}[cold]
			r.Reads[name] = got
			measure.Progress("%s, %s: %s: %s of the speed of plain files, %.0f MiB/s", r.Form, r.Variant, name, got.Ratio.Format("%.3f", ""), got.Speed.Median())
		}
	}
}

// makeCold empties the page cache and checks it.
func makeCold(root string, files []file) {
	measure.DropCaches()
	largest := files[0]
	for _, f := range files {
		if f.size > largest.size {
			largest = f
		}
	}
	if left := measure.Cached(filepath.Join(root, largest.path)) * measure.GiB; left > 0.01*float64(largest.size) {
		measure.Check(fmt.Errorf("%.0f bytes of %s remain in the page cache", left, largest.path))
	}
}
