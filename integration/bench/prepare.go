// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/pkg/dialer"
	modelspec "github.com/modelpack/model-spec/specs-go/v1"
	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/artifact-snapshotter/artifact-snapshotter/client"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/measure"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
)

const (
	smallRounds = 51 // artifacts with 1 or 10 files
	largeRounds = 11 // with 2,000 files
	scaleRounds = 5  // with 2,000 and with 20,000 files
	artifacts   = 100
)

// preparer prepares image volumes through the daemon's socket, as containerd does when it
// creates a container.
type preparer struct {
	snapshots.Snapshotter
	*node.Node
	client        *client.Client
	conn          *grpc.ClientConn // to the daemon
	made, volumes int
}

func newPreparer(ctx context.Context, n *node.Node) *preparer {
	conn := measure.Must(grpc.NewClient(dialer.DialAddress(filepath.Join(n.Dir, "daemon.sock")),
		grpc.WithTransportCredentials(insecure.NewCredentials())))
	c := measure.Must(client.Connect(ctx, n.Address, "k8s.io", "artifact"))
	return &preparer{client: c, conn: conn, Snapshotter: proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), "artifact"), Node: n}
}

func (p *preparer) close() error { return errors.Join(p.client.Close(), p.conn.Close()) }

const noCollection = `
[plugins.'io.containerd.gc.v1.scheduler']
  startup_delay = "10h"
  schedule_delay = "10h"
`

func measurePrepare(ctx context.Context, r *report) {
	measure.Progress("starting a node for Prepare")
	// The artifacts are written into the blob directory directly, without leases, so
	// containerd would remove them as garbage.
	n := measure.Must(node.Start(ctx, node.Options{ContainerdConfig: noCollection}))
	defer measure.Tidy(n.Stop)
	r.version(n)
	p := newPreparer(ctx, n)
	defer measure.Tidy(p.close)
	for _, target := range p.some(ctx, 3, p.raw(1, measure.MiB)) { // warm-up
		p.prepare(ctx, target)
	}
	p.bytes(ctx, r)
	p.files(ctx, r, 10, smallRounds, 5)
	p.files(ctx, r, 2000, largeRounds, 100)
	p.scale(ctx, r)
	p.memory(ctx, r, "raw artifacts of 1 GiB in 10 files", p.raw(10, measure.GiB/10))
	p.memory(ctx, r, "tar+gzip artifacts of 2.5 MiB in 10 files", gzipped)
}

// bytes compares artifacts that differ only in the size of their file.
func (p *preparer) bytes(ctx context.Context, r *report) {
	targets := [2][]digest.Digest{p.some(ctx, smallRounds, p.raw(1, measure.MiB)), p.some(ctx, smallRounds, p.raw(1, measure.TiB))}
	r.disk.Sync()
	var took [2]measure.Sample
	for round := range smallRounds {
		for turn := range 2 {
			i := (turn + round) % 2 // rotate the order
			took[i] = append(took[i], p.prepare(ctx, targets[i][round]))
		}
	}
	noise := 0.0
	for _, s := range took {
		noise = max(noise, s.Quantile(0.75)-s.Quantile(0.25))
	}
	r.add("`Prepare`, one raw file, 1 TiB against 1 MiB",
		took[1].Format("%.2f", " ms")+" against "+took[0].Format("%.2f", " ms"),
		fmt.Sprintf("± %.2f ms, the larger interquartile range", noise),
		math.Abs(took[1].Median()-took[0].Median()) <= noise)
}

// files prepares artifacts of 1 GiB, each for two pods.
func (p *preparer) files(ctx context.Context, r *report, files, rounds int, limit float64) {
	targets := p.some(ctx, rounds, p.raw(files, measure.GiB/int64(files)))
	before := r.disk.Used()
	var took [2]measure.Sample
	for _, target := range targets {
		for pod := range took {
			took[pod] = append(took[pod], p.prepare(ctx, target))
		}
	}
	added := (r.disk.Used() - before) / float64(rounds)
	for pod, s := range took {
		r.add(fmt.Sprintf("`Prepare`, %d raw files, %s pod", files, [2]string{"first", "second"}[pod]),
			s.Format("%.2f", " ms"), fmt.Sprintf("≤ %.0f ms", limit), s.Median() <= limit)
	}
	r.add(fmt.Sprintf("disk added by a raw artifact of 1 GiB in %d files", files),
		fmt.Sprintf("**%.0f KiB**, %.3f %%", added/1024, 100*added/measure.GiB), "≤ 1 %", added <= measure.GiB/100)
}

// scale compares the time per file between artifacts that differ only in their number of
// files.
func (p *preparer) scale(ctx context.Context, r *report) {
	files := [2]int{2000, 20000}
	var targets [2][]digest.Digest
	for i, n := range files {
		targets[i] = p.some(ctx, scaleRounds, p.rawFiles(n, measure.GiB/int64(n), func(i int, _ int64) map[string]string {
			// With all attributes the manifest would exceed the 4 MiB that the distribution
			// registry accepts.
			return map[string]string{modelspec.AnnotationFilepath: name(i)}
		}))
	}
	r.disk.Sync()
	var each [2]measure.Sample
	for round := range scaleRounds {
		for turn := range files {
			i := (turn + round) % 2 // rotate the order
			each[i] = append(each[i], 1000*p.prepare(ctx, targets[i][round])/float64(files[i]))
		}
	}
	r.add(fmt.Sprintf("`Prepare` per file, %d raw files against %d", files[1], files[0]),
		each[1].Format("%.1f", " µs")+" against "+each[0].Format("%.1f", " µs"), "≤ 1.2 ×", each[1].Median() <= 1.2*each[0].Median())
}

// memory measures the memory of a daemon that was just started.
func (p *preparer) memory(ctx context.Context, r *report, kind string, layer layerMaker) {
	measure.Progress("making %d %s", artifacts, kind)
	measure.Check(p.StopDaemon()) // it would build trees as the blobs arrive
	targets := p.some(ctx, artifacts, layer)
	measure.Check(p.StartDaemon())
	status := fmt.Sprintf("/proc/%d/status", p.DaemonPID())
	start := measure.Mebibytes(status, "VmRSS")
	for _, target := range targets {
		p.prepare(ctx, target)
	}
	end := measure.Mebibytes(status, "VmRSS")
	r.add(fmt.Sprintf("daemon's resident memory after %d %s", artifacts, kind),
		fmt.Sprintf("**%.1f MiB** (%.1f at the start, peak %.1f)", end, start, measure.Mebibytes(status, "VmHWM")), "< 40 MiB", end < 40)
}

// prepare prepares an image volume for one more pod and returns the milliseconds.
func (p *preparer) prepare(ctx context.Context, target digest.Digest) float64 {
	p.volumes++
	// The key is that of containerd's CRI plugin
	// (internal/cri/server/container_image_mount.go), behind the prefix that containerd's
	// metadata store adds.
	key := fmt.Sprintf("k8s.io/%d/%s/io.containerd.grpc.v1.cri/image-volumes/%064x/%s", p.volumes, p.State, p.volumes, target.Encoded())
	start := time.Now()
	_, err := p.Prepare(ctx, key, "")
	took := time.Since(start)
	measure.Check(err)
	return measure.Milliseconds(took)
}

// layerMaker makes the layers of the artifact with this number.
type layerMaker func(artifact int) []pack.Layer

// some writes distinct artifacts into the blob directory and creates their images in
// containerd.
func (p *preparer) some(ctx context.Context, count int, layers layerMaker) (targets []digest.Digest) {
	for range count {
		p.made++
		a := pack.Artifact{ArtifactType: modelspec.ArtifactTypeModelManifest, Layers: layers(p.made)}
		target := measure.Must(a.WriteTo(p.ContentRoot))
		measure.Must(p.client.ImageService().Create(p.client.Context(ctx), images.Image{Name: fmt.Sprintf("registry.example.com/bench:%d", p.made), Target: target}))
		targets = append(targets, target.Digest)
	}
	return targets
}

// raw makes raw layers from sparse files whose digests are invented, since nothing reads
// them.
func (p *preparer) raw(files int, size int64) layerMaker {
	return p.rawFiles(files, size, annotations)
}

func (p *preparer) rawFiles(files int, size int64, annotations func(i int, size int64) map[string]string) layerMaker {
	return func(artifact int) (layers []pack.Layer) {
		dir := filepath.Join(p.ContentRoot, "blobs", "sha256")
		measure.Check(os.MkdirAll(dir, 0o755))
		for i := range files {
			d := digest.FromString(fmt.Sprint(artifact, " ", i))
			blob := filepath.Join(dir, d.Encoded())
			measure.Check(os.WriteFile(blob, nil, 0o444))
			measure.Check(os.Truncate(blob, size))
			layers = append(layers, pack.Layer{
				MediaType: modelspec.MediaTypeModelWeightRaw, Annotations: annotations(i, size), Digest: d, Size: size,
			})
		}
		return layers
	}
}

// gzipped makes ten tars of one random file each.
func gzipped(artifact int) (layers []pack.Layer) {
	random := rand.NewChaCha8([32]byte{byte(artifact), byte(artifact >> 8)})
	for i := range 10 {
		member := pack.Member{Data: make([]byte, measure.MiB/4)}
		member.Name, member.Mode = name(i), 0o644
		measure.Must(random.Read(member.Data))
		tar := measure.Must(pack.TarOf(member))
		layers = append(layers, pack.Layer{
			MediaType: modelspec.MediaTypeModelWeightGzip, Annotations: annotations(i, measure.MiB/4),
			Data: measure.Must(pack.Gzip(tar)), DiffID: digest.FromBytes(tar),
		})
	}
	return layers
}

// name returns a path in a directory of one hundred files; the paths are in lexical order,
// as packers write them.
func name(i int) string { return fmt.Sprintf("shards/%02d/%04d.safetensors", i/100, i) }

// annotations returns the annotations of the ModelPack reference packer, with an owner
// other than root.
func annotations(i int, size int64) map[string]string {
	return map[string]string{
		modelspec.AnnotationFilepath: name(i),
		modelspec.AnnotationFileMetadata: fmt.Sprintf(
			`{"name":"%04d.safetensors","mode":420,"uid":1000,"gid":1000,"size":%d,"mtime":"2024-02-03T04:05:06.789Z","typeflag":0}`, i, size),
	}
}
