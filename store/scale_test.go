// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package store

import (
	"context"
	"os"
	"testing"
)

// Pods do not wait while a sweep asks who shows what, and what they acquire meanwhile
// stays, though nobody has told the sweep of it.
func TestWhatIsAcquiredWhileASweepAsksStays(t *testing.T) {
	s := newSite(t)
	before, during, d := s.pack("before"), s.pack("during"), s.pack("old")
	old := s.acquire(d)
	old.Release()
	kept := []*Reference{s.acquire(before)}
	s.AddReferences(func(context.Context) ([]ID, error) {
		v := s.acquire(during)
		v.Release() // its Users have listed it when they were asked already
		kept[0].Release()
		kept = append(kept, v)
		return nil, nil
	})
	s.collect()
	s.wantState(old.ID, true, false)
	for _, v := range kept {
		s.wantState(v.ID, true, true)
	}
	if s.taken != nil || s.held() > 0 {
		t.Errorf("after garbage collection, %v are taken and %d held", s.taken, s.held())
	}
}

// A node may have thousands of Trees that nobody shows, and sweeps each minute.
func TestASweepReadsATreeOnce(t *testing.T) {
	s := newSite(t)
	d := s.pack("bytes")
	v := s.acquire(d)
	v.Release()
	s.collect()
	meta := s.path(v.ID) + "/tree.json"
	text, err := os.ReadFile(meta)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(meta, []byte("{}"), 0o600); err != nil { // what is read would go
		t.Fatal(err)
	}
	s.collect()
	if _, err := os.Stat(meta); err != nil {
		t.Errorf("it was read again: %v", err)
	}
	if err := os.WriteFile(meta, text, 0o600); err != nil {
		t.Fatal(err)
	}
	// Another Tree of that name is another file to read.
	s.forget(d)
	s.collect()
	s.wantState(v.ID, false, false)
	if len(s.entries) > 0 {
		t.Errorf("of no tree is known %v", s.entries)
	}
	s.pack("bytes")
	again := s.acquire(d)
	again.Release()
	s.collect()
	s.wantState(again.ID, true, false)
}

// A pod that starts leaves nothing to sweep.
func TestOnlyAClaimThatEndsUnlistedIsSwept(t *testing.T) {
	s := newSite(t)
	d := s.pack("bytes")
	for name, tt := range map[string]struct {
		end   func(*Reference)
		woken int
	}{"listed": {(*Reference).Listed, 0}, "given up": {(*Reference).Release, 1}} {
		v := s.acquire(d)
		if len(s.wake) > 0 {
			t.Errorf("%s: a sweep is asked for while it is held", name)
		}
		if tt.end(v); len(s.wake) != tt.woken {
			t.Errorf("%s: sweeps asked for: %d, want %d", name, len(s.wake), tt.woken)
		}
		s.collect()
		select {
		case <-s.wake:
		default:
		}
	}
}
