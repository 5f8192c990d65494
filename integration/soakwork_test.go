// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/artifact-snapshotter/artifact-snapshotter/client"
	"github.com/artifact-snapshotter/artifact-snapshotter/images"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/treelist"
)

// windows are periods of an operation that others may notice.
type windows struct {
	mu     sync.Mutex
	open   int // open now
	opened int // opened so far
	closed chan struct{}
}

// begin opens a window. The returned function closes it.
func (w *windows) begin() (end func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.open == 0 {
		w.closed = make(chan struct{})
	}
	w.open++
	w.opened++
	return func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		if w.open--; w.open == 0 {
			close(w.closed)
		}
	}
}

// watch returns a function that reports whether a window has been open since the call.
func (w *windows) watch() (noticed func() bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	open, opened := w.open, w.opened
	return func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		return open > 0 || w.opened > opened
	}
}

// wait waits until no window is open.
func (w *windows) wait(ctx context.Context) {
	w.mu.Lock()
	closed := w.closed
	w.mu.Unlock()
	if closed == nil {
		return
	}
	select {
	case <-closed:
	case <-ctx.Done():
	}
}

// The errors of requests during a restart of the daemon, after another worker has removed
// the image, or while a build is in progress. kubelet retries after each of them.
var (
	interrupted = regexp.MustCompile(`code = Unavailable|connection error|connection refused|error reading from server|transport is closing|ttrpc: closed|` +
		`server is not initialized yet|does not answer|cannot reach the daemon|shutting down|context canceled|code = Canceled|\bEOF\b|unavailable|connect: no such file`)
	vanished = regexp.MustCompile(`(?i)not found|no (such )?image|does not have|has (just )?gone|no such file`)
	waiting  = regexp.MustCompile(`is still being unpacked`)
)

const sameConfig = "has the same config"

// soakPod is a pod of a worker.
type soakPod struct {
	*node.Pod
	spec    node.PodSpec
	volumes []*soaked
}

// want returns the expected content of the ith volume.
func (p *soakPod) want(i int) []treelist.Entry {
	want := p.volumes[i].below(p.spec.Volumes[i].SubPath)
	if p.spec.UserNamespace {
		want = mapped(want)
	}
	return want
}

// compare compares all volumes.
func (p *soakPod) compare() error {
	for i, v := range p.spec.Volumes {
		got, err := p.Tree("reader", v.Path)
		if err != nil {
			return err
		}
		if diff := treelist.Diff(p.want(i), got); diff != "" {
			return fmt.Errorf("%s of %s in pod %s differs from the source:\n%s", v.SubPath, v.Image, p.ID, diff)
		}
	}
	return nil
}

// worker does operations in the order of its random numbers.
type worker struct {
	*soak
	own    comesAndGoes
	random *rand.Rand
	pods   []*soakPod
}

// operations are the operations, with their frequency in percent.
var operations = []struct {
	name  string
	often int
	do    func(*worker, context.Context) error
}{
	{"pull", 10, (*worker).pull},
	{"run a pod", 20, (*worker).run},
	{"read in a pod", 10, (*worker).read},
	{"remove a pod", 8, (*worker).remove},
	{"be refused", 8, (*worker).beRefused},
	{"delete an image", 8, (*worker).deleteImage},
	{"pull, unpack, mount, delete, unmount", 8, (*worker).comeAndGo},
	{"mount", 8, (*worker).mount},
	{"prune", 3, (*worker).prune},
	{"cancel a pull", 7, (*worker).cancelPull},
	{"cancel a pod", 5, (*worker).cancelPod},
	{"cancel a mount", 5, (*worker).cancelMount},
}

// round does count operations.
func (w *worker) round(ctx context.Context, count int) error {
	for range count {
		at := w.random.IntN(100)
		for _, op := range operations {
			if at -= op.often; at >= 0 {
				continue
			}
			if err := op.do(w, ctx); err != nil {
				return fmt.Errorf("%s: %w", op.name, err)
			}
			w.count(op.name)
			break
		}
		w.step()
	}
	return nil
}

// try retries as long as the error is not a fault of the daemon: during a restart of the
// daemon or containerd, or after the removal of an image.
func (w *worker) try(ctx context.Context, artifacts []*soaked, do func() error) error {
	for {
		restarted := w.restarts.watch()
		var removed []func() bool
		for _, a := range artifacts {
			removed = append(removed, a.removals.watch())
		}
		err := do()
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return errors.Join(ctx.Err(), err)
		}
		w.failures.Add(1)
		text := err.Error()
		switch {
		case restarted() && (interrupted.MatchString(text) || vanished.MatchString(text)):
			w.excuse("interrupted by a restart", text)
			w.restarts.wait(ctx)
		case vanished.MatchString(text) && slices.ContainsFunc(removed, func(noticed func() bool) bool { return noticed() }):
			w.excuse("removed by another worker", text)
		case waiting.MatchString(text):
			w.excuse("waited for a build", text)
		default:
			return err
		}
	}
}

// any returns a random artifact or image that can be mounted.
func (w *worker) any() *soaked { return w.mountable[w.random.IntN(len(w.mountable))] }

// anyRef returns one of its names.
func (w *worker) anyRef(a *soaked) string { refs := a.refs(); return refs[w.random.IntN(len(refs))] }

func (w *worker) pull(ctx context.Context) error {
	a := w.any()
	if w.random.IntN(4) == 0 {
		a = w.bad[w.random.IntN(len(w.bad))]
	}
	ref, byCRI := w.anyRef(a), w.random.IntN(2) == 0
	return w.try(ctx, []*soaked{a}, func() error {
		if byCRI || a.manifest == "" || a.refused != "" { // the client pulls neither images nor artifacts that would be refused
			_, err := w.n.Pull(ref)
			return err
		}
		_, err := w.c.Pull(ctx, ref, client.Registry{PlainHTTP: true}, nil)
		return err
	})
}

// newPod returns a pod with some volumes, which does not run yet.
func (w *worker) newPod() *soakPod {
	p := &soakPod{}
	for i := range 1 + w.random.IntN(3) {
		a := w.any()
		v := node.Volume{Image: w.anyRef(a), Path: fmt.Sprintf("/model-%d", i)}
		if dirs := a.subPaths(); i > 0 && w.subPaths && len(dirs) > 0 && w.random.IntN(2) == 0 {
			v.SubPath = dirs[w.random.IntN(len(dirs))]
		}
		p.volumes, p.spec.Volumes = append(p.volumes, a), append(p.spec.Volumes, v)
	}
	if w.subPaths && w.random.IntN(3) == 0 {
		p.spec.OwnNetwork, p.spec.UserNamespace = true, true
		p.spec.HostID = []uint32{node.UserNamespaceBase, otherBase}[w.random.IntN(2)]
	}
	p.spec.Containers = []node.Container{{Name: "reader", Args: []string{"loop", "/model-0/" + p.volumes[0].small()}}}
	if w.random.IntN(3) == 0 {
		p.spec.Containers = append(p.spec.Containers, node.Container{})
	}
	return p
}

func (p *soakPod) pull(n *node.Node) error {
	for _, v := range p.spec.Volumes {
		if _, err := n.Pull(v.Image); err != nil {
			return err
		}
	}
	return nil
}

// maxPods is the number of pods that a worker has at once.
const maxPods = 2

func (w *worker) run(ctx context.Context) error {
	if len(w.pods) == maxPods {
		if err := w.remove(ctx); err != nil {
			return err
		}
	}
	p := w.newPod()
	conflict := slices.ContainsFunc(p.volumes, func(a *soaked) bool { return a.mayConflict })
	return w.try(ctx, p.volumes, func() error {
		if err := p.pull(w.n); err != nil {
			return err
		}
		pod, err := w.n.RunPod(p.spec)
		if err != nil && conflict && strings.Contains(err.Error(), sameConfig) {
			w.failures.Add(1)
			w.count("refused")
			return nil
		}
		if err != nil {
			return err
		}
		p.Pod = pod
		w.pods = append(w.pods, p)
		return nil
	})
}

// read compares the volumes of one of the worker's pods.
func (w *worker) read(ctx context.Context) error {
	if len(w.pods) == 0 {
		return nil
	}
	return w.try(ctx, nil, w.pods[w.random.IntN(len(w.pods))].compare)
}

func (w *worker) remove(ctx context.Context) error {
	if len(w.pods) == 0 {
		return nil
	}
	at := w.random.IntN(len(w.pods))
	p := w.pods[at]
	w.pods = slices.Delete(w.pods, at, at+1)
	return w.try(ctx, nil, p.Remove)
}

// beRefused starts a container with a volume that is refused, among others.
func (w *worker) beRefused(ctx context.Context) error {
	bad := w.bad[w.random.IntN(len(w.bad))]
	p := w.newPod()
	at := w.random.IntN(len(p.volumes))
	p.volumes[at], p.spec.Volumes[at] = bad, node.Volume{Image: bad.ref, Path: "/bad"}
	return w.try(ctx, p.volumes, func() error {
		if err := p.pull(w.n); err != nil {
			return err
		}
		_, err := w.n.RunPod(p.spec)
		switch {
		case err == nil:
			return fmt.Errorf("a container started with %s", bad.ref)
		case strings.Contains(err.Error(), bad.refused), strings.Contains(err.Error(), sameConfig):
			w.failures.Add(1)
			w.count("refused")
			return nil
		}
		return err
	})
}

// deleteImage deletes an image, even if it is in use.
func (w *worker) deleteImage(ctx context.Context) error {
	a, byCRI := w.any(), w.random.IntN(2) == 0
	defer a.removals.begin()()
	return w.try(ctx, []*soaked{a}, func() (err error) {
		if byCRI || a.manifest == "" { // the client deletes only artifacts
			_, err = w.n.Crictl("rmi", a.ref)
		} else {
			err = deleteImage(ctx, w.c, a.ref)
		}
		if err != nil && vanished.MatchString(err.Error()) {
			err = nil // it did not exist
		}
		return err
	})
}

func (w *worker) comeAndGo(ctx context.Context) error {
	return w.try(ctx, nil, func() error {
		if err := w.unmount(ctx); err != nil { // left by an interrupted round
			return err
		}
		return w.own.round(ctx)
	})
}

// unmount unmounts the worker's mount.
func (w *worker) unmount(ctx context.Context) error {
	_, err := w.c.Unmount(ctx, w.own.target)
	if errdefs.IsNotFound(err) {
		err = nil
	}
	return err
}

// artifact returns a random artifact that can be mounted, not an image.
func (w *worker) artifact() *soaked {
	for {
		if a := w.any(); a.manifest != "" {
			return a
		}
	}
}

func (w *worker) mount(ctx context.Context) error {
	a := w.artifact()
	ref := w.anyRef(a)
	return w.try(ctx, []*soaked{a}, func() error {
		if err := w.unmount(ctx); err != nil {
			return err
		}
		image, err := w.c.Pull(ctx, ref, client.Registry{PlainHTTP: true}, nil)
		if err != nil {
			return err
		}
		if err := w.mountOnly(ctx, image); err != nil {
			return err
		}
		got, err := treelist.List(w.own.target)
		if err != nil {
			return err
		}
		if diff := treelist.Diff(a.want, got); diff != "" {
			return fmt.Errorf("%s differs from the source:\n%s", ref, diff)
		}
		return w.unmount(ctx)
	})
}

// mountOnly mounts the image. If it fails, nothing may be mounted.
func (w *worker) mountOnly(ctx context.Context, image images.Image) error {
	_, err := w.c.Mount(ctx, image, w.own.target)
	if err == nil {
		return nil
	}
	mounts, odd := node.Mounts(w.own.target)
	if odd != nil || len(mounts) > 0 {
		return fmt.Errorf("the mount failed (%q) but exists: %q, %w", err, mounts, odd)
	}
	return err
}

// prune removes unused artifacts, except for those that belong to a single worker.
func (w *worker) prune(ctx context.Context) error {
	for _, a := range slices.Concat(w.mountable, w.bad) {
		defer a.removals.begin()()
	}
	return w.try(ctx, w.mountable, func() error {
		unused, err := w.c.Unused(ctx, nil)
		if err != nil {
			return err
		}
		unused = slices.DeleteFunc(unused, func(u client.Unused) bool {
			return slices.ContainsFunc(u.Images, func(i images.Image) bool { return strings.Contains(i.Name, "/own/") })
		})
		_, _, err = w.c.Remove(ctx, unused)
		return err
	})
}

// soon returns a context that ends at a random time.
func (w *worker) soon(ctx context.Context, within time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctx, time.Duration(w.random.Int64N(int64(within))))
}

// cancelPull disconnects the client during a pull.
func (w *worker) cancelPull(ctx context.Context) error {
	a := w.any()
	soon, cancel := w.soon(ctx, 200*time.Millisecond)
	defer cancel()
	if a.manifest == "" || w.random.IntN(2) == 0 {
		_, _ = w.n.CrictlContext(soon, "pull", a.ref)
	} else {
		_, _ = w.c.Pull(soon, a.ref, client.Registry{PlainHTTP: true}, nil)
	}
	return nil
}

// cancelPod disconnects the client during the creation of a container.
func (w *worker) cancelPod(ctx context.Context) error {
	p := w.newPod()
	var pod *node.Pod
	if err := w.try(ctx, p.volumes, func() (err error) {
		if err := p.pull(w.n); err != nil {
			return err
		}
		pod, err = w.n.RunSandbox(p.spec)
		return err
	}); err != nil {
		return err
	}
	soon, cancel := w.soon(ctx, 300*time.Millisecond)
	defer cancel()
	_, _ = pod.CreateContext(soon, p.spec.Containers[0])
	return w.try(ctx, nil, pod.Remove)
}

// cancelMount cancels a mount while it unpacks.
func (w *worker) cancelMount(ctx context.Context) error {
	a := w.artifact()
	var image images.Image
	if err := w.try(ctx, []*soaked{a}, func() (err error) {
		if err := w.unmount(ctx); err != nil {
			return err
		}
		image, err = w.c.Pull(ctx, a.ref, client.Registry{PlainHTTP: true}, nil)
		return err
	}); err != nil {
		return err
	}
	soon, cancel := w.soon(ctx, 100*time.Millisecond)
	defer cancel()
	if err := w.mountOnly(soon, image); err != nil && strings.Contains(err.Error(), "but exists") {
		return err
	}
	return w.try(ctx, nil, func() error { return w.unmount(ctx) })
}

// tally counts events by name.
type tally struct {
	mu     sync.Mutex
	counts map[string]int
}

func (c *tally) count(what string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.counts == nil {
		c.counts = map[string]int{}
	}
	c.counts[what]++
}
