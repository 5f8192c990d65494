// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package store

import (
	"context"
	"errors"
	"maps"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/artifact-snapshotter/artifact-snapshotter/unpack"
)

// told records what an Observer is told.
type told struct {
	mu          sync.Mutex
	bytes       map[unpack.Retention]int64
	builds      []Build
	collections []Collection
}

func (o *told) observer() Observer {
	return Observer{
		Counted: func(how unpack.Retention, n int64) {
			o.mu.Lock()
			defer o.mu.Unlock()
			o.bytes[how] += n
		},
		Built: func(b Build) {
			o.mu.Lock()
			defer o.mu.Unlock()
			o.builds = append(o.builds, b)
		},
		Collected: func(s Collection) {
			o.mu.Lock()
			defer o.mu.Unlock()
			o.collections = append(o.collections, s)
		},
	}
}

func newObserved(t *testing.T, modes unpack.Modes) (*site, *told) {
	t.Helper()
	s, o := newSite(t), &told{bytes: map[unpack.Retention]int64{}}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s.config.Modes, s.config.Observer = modes, o.observer()
	s.open()
	return s, o
}

func TestAnObserverIsToldHowBytesCame(t *testing.T) {
	const content = "some bytes"
	for mode, how := range map[unpack.Mode]unpack.Retention{unpack.Overlay: unpack.Linked, unpack.Link: unpack.Linked, unpack.Copy: unpack.Copied} {
		s, o := newObserved(t, unpack.Modes{Raw: mode})
		d := s.pack(content)
		first := s.acquire(d)
		second := s.acquire(d)
		if o.bytes[unpack.Reflinked] > 0 && how == unpack.Copied {
			how = unpack.Reflinked // the file system of the test supports it
		}
		if first.Built == nil || first.Built.Bytes[how] != int64(len(content)) || first.Built.Modes.Raw != mode || second.Built != nil {
			t.Errorf("%s: the first who asked was told of %+v, the second of %+v", mode, first.Built, second.Built)
		}
		if want := map[unpack.Retention]int64{how: int64(len(content))}; !maps.Equal(o.bytes, want) {
			t.Errorf("%s: %v, want %v", mode, o.bytes, want)
		}
		if len(o.builds) != 1 || o.builds[0].Err != nil || o.builds[0].OnPull || o.builds[0].Duration <= 0 {
			t.Errorf("%s: %+v", mode, o.builds)
		}
		stats, err := s.Stats(context.Background())
		// A tree of links has only directories, which take no space on a tmpfs.
		if err != nil || stats.Trees[s.Modes()] != 1 || stats.Mounts != 1 || stats.References != 0 || stats.Size == 0 && mode != unpack.Link {
			t.Errorf("%s: %+v (%v)", mode, stats, err)
		}
		s.uses(first.ID, first.ID)
		if stats, err := s.Stats(context.Background()); err != nil || stats.References != 2 {
			t.Errorf("%s: %+v (%v)", mode, stats, err)
		}
		first.Release()
		second.Release()
	}
}

func TestAnObserverIsToldWhatGarbageCollectionFrees(t *testing.T) {
	s, o := newObserved(t, unpack.Modes{})
	s.collect()
	content := strings.Repeat("x", 1<<20)
	one, two := s.pack(content), s.pack(content+"y")
	s.acquire(one).Release()
	s.acquire(two).Release()
	s.collect()
	o.collections = nil
	s.forget(one) // but not its layer, whose bytes are still the runtime's
	s.collect()
	if done := o.collections[0]; len(o.collections) != 1 || done.Trees != 1 || done.Freed >= 1<<20 || done.Freed == 0 || done.Err != nil {
		t.Errorf("%+v", o.collections)
	}
	a, err := s.read(context.Background(), two)
	if err != nil {
		t.Fatal(err)
	}
	s.forget(two)
	s.forget(a.Layers[0].Descriptor)
	s.collect()
	if done := o.collections[1]; done.Trees != 1 || done.Freed <= 1<<20 || done.Freed > 2<<20 {
		t.Errorf("%+v", done)
	}
	s.mu.Lock()
	s.references = append(s.references, func(context.Context) ([]ID, error) { return nil, errors.New("no list") })
	s.mu.Unlock()
	if err := s.CollectGarbage(context.Background()); err == nil || o.collections[len(o.collections)-1].Err == nil {
		t.Errorf("a garbage collection that fails: %v, %+v", err, o.collections[len(o.collections)-1])
	}
}

func TestAnObserverIsToldOfFailures(t *testing.T) {
	s, o := newObserved(t, unpack.Modes{})
	d := s.pack("bytes")
	a, err := s.read(context.Background(), d)
	if err != nil {
		t.Fatal(err)
	}
	s.forget(a.Layers[0].Descriptor)
	if _, err := s.Acquire(context.Background(), d, unpack.IDMap{}); !errdefs.IsNotFound(err) {
		t.Errorf("%v", err)
	}
	if len(o.builds) != 1 || !errdefs.IsNotFound(o.builds[0].Err) || len(o.bytes) != 0 {
		t.Errorf("%+v, %v", o.builds, o.bytes)
	}
}

func TestARequestThatCannotWaitIsToldSo(t *testing.T) {
	s := newSite(t)
	d := s.pack("bytes")
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	open := s.openGated() // so that it cannot end before the request does
	_, err := s.Acquire(ctx, d, unpack.IDMap{})
	if _, ok := errors.AsType[*UnfinishedError](err); !ok || !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	open()
}
