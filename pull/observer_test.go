// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package pull

import (
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/artifact-snapshotter/artifact-snapshotter/blobs"
	"github.com/artifact-snapshotter/artifact-snapshotter/internal/registrytest"
)

// What an Observer is told is what happened: nothing twice, and nothing of what was there.
func TestAnObserverIsToldOfPulls(t *testing.T) {
	registry := registrytest.Start(t, t.TempDir(), false)
	layers := contents(t, 3<<20, 70_000)
	push(t, registry, "v1", layers)
	var fetched, linked, pulled, removed atomic.Int64
	failed := make(chan error, 10)
	observer := Observer{
		Fetched: func(n int64) { fetched.Add(n) },
		Linked:  func(n int64) { linked.Add(n) },
		Pulled:  func(time.Duration) { pulled.Add(1) },
		Failed:  func(err error) { failed <- err },
		Removed: func() { removed.Add(1) },
	}
	p := open(t, Config{Observer: observer})
	for range 2 {
		if _, err := pull(t, p, registry); err != nil {
			t.Fatal(err)
		}
	}
	const files = 3<<20 + 70_000
	// The manifest and the config come on top.
	if got := fetched.Load(); got <= files || got > files+10_000 || linked.Load() != 0 || pulled.Load() != 1 {
		t.Errorf("fetched %d bytes for %d of files, linked %d, in %d pulls", got, files, linked.Load(), pulled.Load())
	}
	if _, err := p.Pull(t.Context(), Request{Reference: ref(t, registry+"/"+repository+":none"), Policy: IfNotPresent}); err == nil {
		t.Error("a tag that is not there was pulled")
	}
	if err := <-failed; !errdefs.IsNotFound(err) {
		t.Errorf("the failure is %v", err)
	}
	stats, err := p.Stats(t.Context())
	if err != nil || stats != (Stats{Artifacts: 1}) {
		t.Errorf("got %+v, %v", stats, err)
	}
	if err := p.evict(in(t.Context()), 1<<62); err != nil {
		t.Fatal(err)
	}
	if removed.Load() != 1 {
		t.Errorf("%d artifacts were removed", removed.Load())
	}

	// Another one finds the blobs in a directory of the node.
	fetched.Store(0)
	theirs := open(t, Config{})
	if _, err := pull(t, theirs, registry); err != nil {
		t.Fatal(err)
	}
	p = open(t, Config{Root: filepath.Join(t.TempDir(), "content"), Others: []blobs.Dir{theirs.Dir()}, Observer: observer})
	if _, err := pull(t, p, registry); err != nil {
		t.Fatal(err)
	}
	if linked.Load() < files || fetched.Load() >= 10_000 {
		t.Errorf("linked %d bytes and fetched %d", linked.Load(), fetched.Load())
	}
	if len(failed) != 0 {
		t.Errorf("there is another failure: %v", <-failed)
	}
}
