// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	modelspec "github.com/modelpack/model-spec/specs-go/v1"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/artifact-snapshotter/artifact-snapshotter/blobs"
	"github.com/artifact-snapshotter/artifact-snapshotter/client"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/measure"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
)

const (
	manyArtifacts = 1000
	manyRounds    = 31
)

// The measurements that a crowd makes on request.
const (
	askPrepare = "Prepare" // milliseconds, like the next three
	askMount   = "mount"
	askUnmount = "unmount"
	askLs      = "ls"
	askMinute  = "minute" // the daemon's CPU time in one minute, in milliseconds
	askMemory  = "memory" // the daemon's resident memory, in MiB
)

// measureMany compares a node that has 1,000 mounted artifacts with a node that has one.
func measureMany(ctx context.Context, r *report) {
	var crowds []*crowd
	for _, artifacts := range []int{1, manyArtifacts} {
		measure.Progress("starting a node; number of small, mounted artifacts: %d", artifacts)
		c := startCrowd(ctx, artifacts)
		defer measure.Tidy(c.stop)
		crowds = append(crowds, c)
	}
	questions := []string{askPrepare, askMount, askUnmount}
	took := map[string][2]measure.Sample{}
	for round := range manyRounds + 1 {
		for turn := range crowds {
			i := (turn + round) % len(crowds) // rotate the order
			for _, question := range questions {
				ms := crowds[i].ask(question)
				if round > 0 { // round 0 is a warm-up
					samples := took[question]
					samples[i] = append(samples[i], ms)
					took[question] = samples
				}
			}
		}
	}
	for _, question := range questions {
		r.compare(fmt.Sprintf("`%s`, %d artifacts and mounts against one", question, manyArtifacts), took[question][1], took[question][0], 1.2)
	}
	var ls measure.Sample
	for range 5 {
		ls = append(ls, crowds[1].ask(askLs))
	}
	r.add(fmt.Sprintf("`ls` of %d artifacts", manyArtifacts), ls.Format("%.0f", " ms"), "≤ 1 s", ls.Median() <= 1000)
	idle := crowds[1].ask(askMinute)
	r.add(fmt.Sprintf("daemon's CPU time in an idle minute, %d artifacts and mounts", manyArtifacts),
		fmt.Sprintf("**%.0f** ms", idle), "≤ 50 ms", idle <= 50)
	r.add(fmt.Sprintf("daemon's resident memory, %d artifacts and mounts against one", manyArtifacts),
		fmt.Sprintf("**%.1f** against %.1f MiB", crowds[1].ask(askMemory), crowds[0].ask(askMemory)), "none", true)
}

// crowd is a node in a process of its own; see serveCrowd.
type crowd struct {
	cmd     *exec.Cmd
	in      io.WriteCloser
	answers *bufio.Scanner
}

// startCrowd starts a node with this number of artifacts in its own mount namespace, so
// that the nodes do not see each other's mounts.
func startCrowd(ctx context.Context, artifacts int) *crowd {
	measure.Progress("starting a node with %d mounted artifacts", artifacts)
	cmd := exec.CommandContext(ctx, "/proc/self/exe", "-crowd", strconv.Itoa(artifacts))
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Setpgid: true}
	cmd.Stderr = os.Stderr
	c := &crowd{cmd: cmd, in: measure.Must(cmd.StdinPipe())}
	c.answers = bufio.NewScanner(measure.Must(cmd.StdoutPipe()))
	measure.Check(cmd.Start())
	return c
}

func (c *crowd) ask(question string) float64 {
	measure.Must(fmt.Fprintln(c.in, question))
	if !c.answers.Scan() {
		measure.Check(fmt.Errorf("the node did not answer %q: %w", question, io.ErrUnexpectedEOF))
	}
	return measure.Must(strconv.ParseFloat(c.answers.Text(), 64))
}

func (c *crowd) stop() error {
	_ = c.in.Close()
	return c.cmd.Wait()
}

// rareStats stops CRI from reading the usage of every snapshot every ten seconds, which
// would add load that this benchmark does not measure.
const rareStats = `
[plugins.'io.containerd.cri.v1.images']
  stats_collect_period = 36000
`

// serveCrowd starts the node and answers the requests on standard input.
func serveCrowd(ctx context.Context, artifacts int) {
	n := measure.Must(node.Start(ctx, node.Options{ContainerdConfig: rareStats}))
	defer measure.Tidy(n.Stop)
	p := newPreparer(ctx, n)
	defer measure.Tidy(p.close)
	c := p.client
	at := func(i int) string { return filepath.Join(n.Dir, fmt.Sprint("mount-", i)) }
	for i := range artifacts {
		measure.Check(ctx.Err())
		measure.Must(c.Mount(ctx, measure.Must(c.Image(ctx, tiny(ctx, c, i))), at(i)))
	}
	defer func() {
		for i := range artifacts {
			measure.Must(c.Unmount(context.WithoutCancel(ctx), at(i)))
		}
	}()
	next, target := artifacts, filepath.Join(n.Dir, "mount")
	tool := func(args ...string) float64 {
		cmd := measure.Must(n.ArtifactCommand(args...))
		start := time.Now()
		out, err := cmd.CombinedOutput()
		took := time.Since(start)
		if err != nil {
			measure.Check(fmt.Errorf("%s: %w: %s", cmd, err, out))
		}
		return measure.Milliseconds(took)
	}
	var ref string
	for questions := bufio.NewScanner(os.Stdin); questions.Scan() && ctx.Err() == nil; {
		var answer float64
		switch questions.Text() {
		case askPrepare:
			ref = tiny(ctx, c, next)
			next++
			answer = p.prepare(ctx, measure.Must(c.Image(ctx, ref)).Target.Digest)
		case askMount:
			answer = tool("mount", ref, target)
		case askUnmount:
			answer = tool("unmount", target)
		case askLs:
			answer = tool("ls", "--config", n.ConfigFile())
		case askMinute:
			before := processorTime(n.DaemonPID())
			measure.Check(pause(ctx, time.Minute))
			answer = processorTime(n.DaemonPID()) - before
		case askMemory:
			answer = measure.Mebibytes(fmt.Sprintf("/proc/%d/status", n.DaemonPID()), "VmRSS")
		}
		fmt.Println(answer)
	}
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// processorTime returns the CPU time of a process in milliseconds.
func processorTime(pid int) float64 {
	var total float64
	for _, thread := range measure.Must(filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))) {
		total += measure.Must(strconv.ParseFloat(measure.Field(thread, `^(\d+)`), 64)) / 1e6
	}
	return total
}

// tiny adds an artifact of one small file to containerd, as a pull does.
func tiny(ctx context.Context, c *client.Client, i int) (ref string) {
	ctx, done, err := c.WithLease(c.Context(ctx))
	measure.Check(err)
	defer func() { measure.Check(done(ctx)) }()
	dir := measure.Must(os.MkdirTemp("", "tiny-"))
	defer os.RemoveAll(dir)
	target := measure.Must((&pack.Artifact{Name: fmt.Sprint("tiny ", i), Layers: []pack.Layer{{
		MediaType: modelspec.MediaTypeModelWeightRaw, Data: fmt.Appendf(nil, "artifact %d", i), Annotations: annotations(0, 10),
	}}}).WriteTo(dir))
	write := func(dgst digest.Digest, labels map[string]string) {
		data := measure.Must(os.ReadFile(blobs.Dir(dir).Path(dgst)))
		measure.Check(content.WriteBlob(ctx, c.ContentStore(), dgst.String(), bytes.NewReader(data),
			ocispec.Descriptor{Digest: dgst, Size: int64(len(data))}, content.WithLabels(labels)))
	}
	labels := map[string]string{}
	for n, blob := range measure.Must(os.ReadDir(filepath.Dir(blobs.Dir(dir).Path(target.Digest)))) {
		if dgst := digest.NewDigestFromEncoded(digest.SHA256, blob.Name()); dgst != target.Digest {
			write(dgst, nil)
			labels[fmt.Sprint("containerd.io/gc.ref.content.", n)] = dgst.String()
		}
	}
	write(target.Digest, labels)
	ref = fmt.Sprintf("registry.example.com/tiny:%d", i)
	measure.Must(c.ImageService().Create(ctx, images.Image{Name: ref, Target: target}))
	return ref
}
