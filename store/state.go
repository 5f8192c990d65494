// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package store

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
	"github.com/artifact-snapshotter/artifact-snapshotter/blobs"
	"github.com/artifact-snapshotter/artifact-snapshotter/unpack"
)

// state is how far a tree is. docs/design.md ("The states of a tree") has a diagram. Only
// entry.enter changes it.
type state int

const (
	// unknown means that nothing is under way. The disk says whether there is a tree, and
	// the kernel whether it is mounted.
	unknown state = iota
	// pulling is a build that began when the manifest arrived. It waits for the blobs that
	// the runtime still receives.
	pulling
	// building is a build that waits for nothing: what is not there yet is missing.
	building
	// built is a tree that is not mounted.
	built
	// mounted is a tree that this process has found or made mounted. The kernel is asked
	// whether it still is.
	mounted
	// failed means that the last work failed for a request. The next request begins another
	// try; if it cannot wait for that, it is told of this failure.
	failed
)

// entry is what is known of one tree. Store.mu guards it.
type entry struct {
	id    ID
	state state
	// held is how many claims there are: those of requests whose References do not list the
	// ID yet, and that of the work.
	held int
	work *work // nil if none is under way
	// progress is how far the build is; nil if none runs.
	progress *progress
	pull     *pull        // set if the state is pulling
	modes    unpack.Modes // set if the state is mounted
	failure  *failure     // the last failure of which no request has been told, if any
	// source has the Manifest and the Source of the tree, once garbage collection has read
	// them.
	source *unpack.Tree
}

// work brings a tree to where those who ask need it. It runs once for all of them, in the
// store's context, and outlives them.
type work struct {
	mount bool // whether anybody needs the tree mounted, not only built; Store.mu guards it
	done  chan struct{}
	// What follows is set when done is closed. built is the build that was part of the work,
	// if any.
	modes unpack.Modes
	built *Build
	err   error
}

// progress is how many bytes of an artifact's blobs a build has done.
type progress struct {
	done  atomic.Int64
	total int64
}

// failure is why work failed.
type failure struct {
	err  error
	at   time.Time
	told bool
}

// source is what a tree is built from. Only one goroutine uses it at a time.
type source struct {
	read     func(context.Context) (*artifact.Artifact, error)
	artifact *artifact.Artifact // once it is read
	blobs    blobs.Source       // nil if they are the runtime's
}

// get reads the artifact if nobody has.
func (f *source) get(ctx context.Context) (_ *artifact.Artifact, err error) {
	if f.artifact == nil {
		f.artifact, err = f.read(ctx)
	}
	return f.artifact, err
}

// entry returns what is known of the tree. The caller holds s.mu.
func (s *Store) entry(id ID) *entry {
	e := s.entries[id.name()]
	if e == nil {
		e = &entry{id: id}
		s.entries[id.name()] = e
	}
	return e
}

// enter is the only place that changes the state of a tree. The caller holds s.mu.
func (e *entry) enter(next state) {
	e.state = next
	if next != pulling {
		e.pull = nil
	}
	if next != mounted {
		e.modes = unpack.Modes{}
	}
	if next == built || next == mounted {
		e.failure = nil
	}
}

// forgetFailure is called when somebody has been told of the failure, or it is of no interest
// any more. The caller holds s.mu.
func (e *entry) forgetFailure() {
	e.failure = nil
	if e.state == failed {
		e.enter(unknown)
	}
}

// enter is entry.enter with s.mu.
func (s *Store) enter(e *entry, next state) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e.enter(next)
}

// begin joins the work on a tree, or begins it. mount says whether the tree is to be
// mounted, p is not nil if the runtime pulls the artifact. The caller holds s.mu.
func (s *Store) begin(ctx context.Context, e *entry, from *source, mount bool, p *pull) (*work, error) {
	if e.work != nil {
		e.work.mount = e.work.mount || mount
		s.expedite(e) // a pod asks: the pull is complete, or has failed
		return e.work, nil
	}
	if s.closing.Err() != nil {
		return nil, fmt.Errorf("the snapshotter is shutting down: %w", errdefs.ErrUnavailable)
	}
	w := &work{mount: mount, done: make(chan struct{})}
	e.work = w
	if p != nil {
		e.enter(pulling)
		e.pull = p
	}
	s.claim(e) // also when all who have asked give up
	s.running.Add(1)
	go func() {
		defer s.running.Done()
		for !s.finish(ctx, e, w, s.advance(ctx, e, w, from, p)) {
		}
	}()
	return w, nil
}

// advance takes a tree from whatever state it is in to built, or, if a request waits for w,
// to mounted. It loads tree.json once, or not at all if it builds the tree.
func (s *Store) advance(ctx context.Context, e *entry, w *work, from *source, p *pull) error {
	t, isMounted, err := s.inspect(e.id)
	if err != nil {
		return err
	}
	if t == nil && !isMounted {
		if p != nil {
			if worth, err := s.isWorthIt(ctx, w, from, p); !worth || err != nil {
				return err
			}
		} else {
			s.enter(e, building)
		}
		if t, w.built, err = s.build(ctx, e, from, p); err != nil {
			return err
		}
	}
	if t != nil {
		w.modes = t.Modes
	}
	s.mu.Lock()
	if !isMounted {
		e.enter(built)
	}
	mount := w.mount && !isMounted
	s.mu.Unlock()
	if mount {
		if err := s.mount(ctx, e.id, t); err != nil {
			return err
		}
	}
	if mount || isMounted {
		s.mu.Lock()
		e.enter(mounted)
		e.modes = w.modes
		s.mu.Unlock()
	}
	return nil
}

// finish ends the work, and tells all who wait for it. It returns false if somebody has
// joined meanwhile who needs more than was done.
func (s *Store) finish(ctx context.Context, e *entry, w *work, err error) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case err == nil && w.mount && e.state != mounted:
		return false
	case err != nil && s.closing.Err() == nil && w.mount:
		e.enter(failed)
		e.failure = &failure{err: err, at: s.now()}
	case err != nil || e.state < built:
		e.enter(unknown)
	}
	if err != nil {
		// Whoever asks, or asks again, is told, and logs it at a level that is read.
		log.G(ctx).WithError(err).WithField("artifact", e.id.Manifest).Debug("cannot build or mount the tree of an artifact")
	}
	w.err, e.work = err, nil
	close(w.done)
	s.unclaim(e, false)
	return true
}

// inspect returns the tree of id, nil if there is none, and whether one is mounted. If there is
// none and one is mounted, another version of this program built it, and it stays until its
// last pod ends.
func (s *Store) inspect(id ID) (t *unpack.Tree, isMounted bool, err error) {
	t, lerr := unpack.Load(s.path(id))
	isMounted, err = s.mounted(id.name())
	if lerr == nil || err != nil {
		return t, isMounted, err
	}
	if errors.Is(lerr, os.ErrNotExist) {
		// What is mounted belongs to a tree that has been deleted.
		return nil, false, s.unmount(id.name())
	}
	return nil, isMounted, nil
}

// acquire mounts the tree of id, and builds it first if it is not there.
func (s *Store) acquire(ctx context.Context, id ID, from *source) (_ *Reference, err error) {
	ctx, end := span(ctx, "tree.wait", id.Manifest)
	release := s.hold(id)
	defer func() {
		if err != nil {
			release(false)
		}
		end(err)
	}()
	ref := &Reference{ID: id, Path: s.mountpoint(id.name()), release: release}
	var stays bool
	if ref.Modes, stays = s.staysMounted(id); stays {
		return ref, nil
	}
	s.mu.Lock()
	w, err := s.begin(s.following(ctx), s.entry(id), from, true, nil)
	s.mu.Unlock()
	if err != nil {
		return nil, err
	}
	wait := s.maxWait
	if deadline, ok := ctx.Deadline(); ok {
		// The rest of the time is for the answer, which says how far the build is.
		wait = min(wait, time.Until(deadline)*9/10)
	}
	select {
	case <-w.done:
		if w.err != nil {
			s.mu.Lock()
			s.entry(id).forgetFailure() // this request is told now
			s.mu.Unlock()
			return nil, w.err
		}
		ref.Modes, ref.Built = w.modes, w.built
		return ref, nil
	case <-ctx.Done():
		return nil, s.unfinished(id, ctx.Err())
	case <-time.After(wait):
		return nil, s.unfinished(id, errdefs.ErrUnavailable)
	}
}

// staysMounted is the common case: the tree is known to be mounted, and still is. The caller
// holds a claim, so that it stays.
func (s *Store) staysMounted(id ID) (unpack.Modes, bool) {
	s.mu.Lock()
	e := s.entry(id)
	known, modes := e.state == mounted, e.modes
	s.mu.Unlock()
	if !known || !s.has(id) {
		return unpack.Modes{}, false
	}
	still, err := s.mounted(id.name())
	return modes, still && err == nil
}

// unfinished says how far the build of id is, to a request that cannot wait, or why the
// one before it failed if nobody has been told.
func (s *Store) unfinished(id ID, why error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.entry(id)
	far, before := "", ""
	p := e.progress
	if plain := s.entries[id.plain().name()]; p == nil && plain != nil { // what a shifted tree is made of
		p = plain.progress
	}
	if p != nil && p.total > 0 {
		far = fmt.Sprintf(" (%d %% of %.1f MiB)", 100*p.done.Load()/p.total, float64(p.total)/(1<<20))
	}
	if f := e.failure; f != nil && s.now().Sub(f.at) < tellFailure {
		if !f.told {
			f.told = true
			return f.err
		}
		before = fmt.Sprintf(", after a try that failed (%v)", f.err)
	}
	return &UnfinishedError{fmt.Errorf("artifact %s is still being unpacked%s%s; unpacking goes on, try again: %w", id.Manifest, far, before, why)}
}

// UnfinishedError is the error of a request that could not wait until a tree was built and
// mounted. The work goes on.
type UnfinishedError struct{ err error }

// Error implements error.
func (e *UnfinishedError) Error() string { return e.err.Error() }

// Unwrap returns why the request could not wait: the error of its context, or
// errdefs.ErrUnavailable.
func (e *UnfinishedError) Unwrap() error { return errors.Unwrap(e.err) }

// hold keeps the tree of id from garbage collection until the returned function is called.
// Its argument says whether a References lists the ID by then.
func (s *Store) hold(id ID) func(listed bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.entry(id)
	s.claim(e)
	return func(listed bool) {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.unclaim(e, listed)
	}
}

// claim is hold under s.mu.
func (s *Store) claim(e *entry) {
	e.held++
	if s.taken != nil {
		s.taken[e.id.name()] = true
	}
}

// unclaim ends a claim. The caller holds s.mu.
func (s *Store) unclaim(e *entry, listed bool) {
	if e.held--; e.held == 0 && !listed {
		s.Wake() // perhaps nobody needs it: the caller failed, or gave up
	}
}
