// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package store

import (
	"context"
	"os"
	"testing"
)

// Pods do not wait while garbage collection asks the References. A tree that they acquire
// meanwhile stays, although no list has it.
func TestATreeAcquiredDuringGarbageCollectionStays(t *testing.T) {
	s := newSite(t)
	before, during, d := s.pack("before"), s.pack("during"), s.pack("old")
	old := s.acquire(d)
	old.Release()
	kept := []*Reference{s.acquire(before)}
	s.AddReferences(func(context.Context) ([]ID, error) {
		v := s.acquire(during)
		v.Release() // as if the References that were asked before list it now
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

// A node may have thousands of trees that nothing uses, and collects garbage each minute.
func TestGarbageCollectionReadsATreeOnce(t *testing.T) {
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
	if err := os.WriteFile(meta, []byte("{}"), 0o600); err != nil { // a tree with this file would be removed
		t.Fatal(err)
	}
	s.collect()
	if _, err := os.Stat(meta); err != nil {
		t.Errorf("it was read again: %v", err)
	}
	if err := os.WriteFile(meta, text, 0o600); err != nil {
		t.Fatal(err)
	}
	// Another tree of that name has another file.
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

// A pod that starts leaves no garbage.
func TestOnlyAClaimThatEndsUnlistedAsksForGarbageCollection(t *testing.T) {
	s := newSite(t)
	d := s.pack("bytes")
	for name, tt := range map[string]struct {
		end   func(*Reference)
		woken int
	}{"listed": {(*Reference).Listed, 0}, "given up": {(*Reference).Release, 1}} {
		v := s.acquire(d)
		if len(s.wake) > 0 {
			t.Errorf("%s: a garbage collection is asked for while it is claimed", name)
		}
		if tt.end(v); len(s.wake) != tt.woken {
			t.Errorf("%s: garbage collections asked for: %d, want %d", name, len(s.wake), tt.woken)
		}
		s.collect()
		select {
		case <-s.wake:
		default:
		}
	}
}
