// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/measure"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
)

// diskSize is the size of the sparse disks, more than any variant needs.
const diskSize = "48G"

// bench measures one data set.
type bench struct {
	options
	data       *dataset
	dir        string // directory of the disks
	into       *datasetResult
	load       string // the one-minute average before the run
	containerd string // version
	mkfs       string // version of mkfs.erofs
}

// measureForm measures all variants for one form of layers. In each round it measures every
// variant once, on a new disk and a new node, and rotates the order.
func (b *bench) measureForm(ctx context.Context, form pack.Form) {
	measure.Progress("%s as %s: making, packing and pushing it", b.data.title, form)
	s := newStore(ctx, b.dir, b.data, form)
	defer s.close()
	_, version, _ := strings.Cut(measure.Must(s.Crictl("version")), "RuntimeVersion:")
	b.containerd = strings.Fields(version)[0]
	mkfs, err := s.Tool("mkfs.erofs", "-V")
	if err != nil {
		mkfs = "unknown version of mkfs.erofs"
	}
	b.mkfs, _, _ = strings.Cut(mkfs, "\n")
	measure.Progress("%d MiB of layers, %d MiB of files", s.compressed/measure.MiB, b.data.bytes()/measure.MiB)

	var chosen []*row
	for _, v := range variants {
		if slices.Contains(v.forms, form) && (v.name == download || wanted(b.variants, v.name)) {
			r := &row{Form: form, Variant: v.name, variant: v, Compressed: s.compressed, Uncompressed: s.uncompressed}
			chosen = append(chosen, r)
			if v.erofs {
				r.fail(s.notErofs)
			}
		}
	}
	rounds := b.rounds
	if rounds == 0 {
		rounds = b.data.rounds
	}
	for round := range rounds {
		for turn := range chosen {
			r := chosen[(turn+round)%len(chosen)]
			if r.Failed != "" {
				continue
			}
			// If another program fails, the failure is a line in the table.
			err := measure.Try(func() { b.round(ctx, s, r, round == rounds-1) })
			measure.Check(ctx.Err())
			r.fail(err)
		}
	}
	b.into.replace(form, chosen)
}

// round pulls a model once and starts a pod with it. The last round also measures the cache
// and the reads.
func (b *bench) round(ctx context.Context, s *store, r *row, last bool) {
	v := r.variant
	disk := measure.NewDisk(ctx, b.dir, diskSize)
	defer measure.Tidy(disk.Remove)
	measure.Check(os.Setenv("TMPDIR", disk.Root()))
	n := measure.Must(node.Start(ctx, v.options))
	defer measure.Tidy(n.Stop)
	if v.erofs {
		defer measure.Tidy(func() error { return releaseMounts(ctx, n) })
	}
	first := b.data.files[0].path

	// All variants start in the same state: nothing is dirty, and the page cache has the
	// registry's files and the programs.
	disk.Sync()
	if !measure.DropCaches() {
		measure.Check(errors.New("the page cache cannot be dropped: /proc/sys/vm/drop_caches must be writable"))
	}
	s.warm()
	measure.Must(n.Ctr("version"))
	if v.tag == titled {
		measure.Must(n.Tool("oras", "version"))
	}
	spec := node.PodSpec{Containers: []node.Container{{}}}
	if v.erofsGuest {
		spec.Containers[0].Image = s.ref(erofsGuest)
		measure.Must(n.Pull(s.ref(erofsGuest)))
	}
	bare := func() { startPod(ctx, n, spec, node.Guest) }
	bare()
	r.Bare = append(r.Bare, measure.Seconds(bare))
	_, err := n.Crictl("rmp", "--force", "--all")
	measure.Check(err)
	before := disk.Used()

	ref := s.ref(v.tag)
	pull := measure.Seconds(func() { measure.Check(v.pull(n, ref)) })
	r.Pull = append(r.Pull, pull)
	var pod *node.Pod
	took := 0.0
	if v.volume != nil {
		spec.Volumes = []node.Volume{v.volume(n, ref)}
		took = measure.Seconds(func() { pod = startPod(ctx, n, spec, filepath.Join(target, first)) })
		r.Pod = append(r.Pod, took)
	}
	r.Disk = append(r.Disk, disk.Used()-before)
	measure.Progress("%s, %s: pull %.2f s, pod %.2f s; a pod without a volume %.2f s; disk %.1f MiB",
		r.Form, v.name, pull, took, r.Bare[len(r.Bare)-1], r.Disk[len(r.Disk)-1]/measure.MiB)
	if last && pod != nil {
		second := startPod(ctx, n, spec, filepath.Join(target, first))
		b.cache(s, r, disk, []*node.Pod{pod, second})
		b.reads(ctx, r, disk, pod)
	}
}

// startPod starts a pod and reads the first byte of a file in it. Like kubelet, it retries
// while the volume is not ready.
func startPod(ctx context.Context, n *node.Node, spec node.PodSpec, file string) *node.Pod {
	pod := measure.Must(n.RunSandbox(spec))
	for {
		err := pod.Start(spec.Containers[0])
		if err == nil {
			break
		}
		if !strings.Contains(err.Error(), "try again") {
			measure.Check(err)
		}
		measure.Check(ctx.Err())
	}
	f := measure.Must(os.Open(inPod(pod, file)))
	defer f.Close()
	measure.Must(f.Read(make([]byte, 1)))
	return pod
}

// releaseMounts makes containerd's mount manager unmount the volumes of removed pods, which
// it does during garbage collection. After an interrupted run the node unmounts them.
func releaseMounts(ctx context.Context, n *node.Node) error {
	if ctx.Err() != nil {
		return nil
	}
	if _, err := n.Crictl("rmp", "--force", "--all"); err != nil {
		return err
	}
	_, err := n.Ctr("content", "prune", "references")
	return err
}

// inPod returns the path of a file as the pod's container sees it, through all its mounts.
func inPod(pod *node.Pod, file string) string {
	return filepath.Join("/proc", measure.Must(pod.PID("main")), "root", file)
}

// cacheRounds is the number of measurements of the page cache, since the kernel's number
// covers the whole machine.
const cacheRounds = 3

// cache makes every pod read and hash the whole model, and measures how much the page cache
// grows.
func (b *bench) cache(s *store, r *row, disk measure.Disk, pods []*node.Pod) {
	disk.Sync()
	for range cacheRounds {
		measure.DropCaches()
		for _, pod := range pods { // load the programs first, which are not part of the model
			measure.Must(pod.Exec("main", node.Guest, "mountinfo"))
		}
		before := measure.Mebibytes("/proc/meminfo", "Cached")
		for _, pod := range pods {
			found := 0
			for _, e := range measure.Must(pod.Tree("main", target)) {
				if e.Type != "file" {
					continue
				}
				if e.SHA256 != s.sums[e.Path] {
					measure.Check(fmt.Errorf("a pod sees another %s than was packed", e.Path))
				}
				found++
			}
			if found != len(s.sums) {
				measure.Check(fmt.Errorf("a pod sees %d files of %d", found, len(s.sums)))
			}
		}
		r.Cache = append(r.Cache, (measure.Mebibytes("/proc/meminfo", "Cached")-before)*measure.MiB)
	}
	measure.Progress("%s, %s: page cache of two pods %s", r.Form, r.Variant, r.Cache.Format("%.0f", " bytes"))
}
