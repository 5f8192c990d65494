// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package store

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
)

func TestNothingIsRemovedIfReferencesCannotBeListed(t *testing.T) {
	s := newSite(t)
	d := s.pack("bytes")
	v := s.acquire(d)
	v.Release()
	s.forget(d)
	s.err = errors.New("the database is locked")
	if err := s.CollectGarbage(context.Background()); !errors.Is(err, s.err) {
		t.Errorf("%v, want %v", err, s.err)
	}
	s.wantState(v.ID, true, true)
}

func TestAFailureIsForgottenWithItsArtifact(t *testing.T) {
	s := newSite(t)
	d := s.pack("bytes")
	s.failUnseen(d)
	s.collect()
	if s.entry(ID{Manifest: d.Digest}).failure == nil {
		t.Error("whoever asks next is not told")
	}
	s.forget(d)
	s.collect()
	if s.entry(ID{Manifest: d.Digest}).failure != nil {
		t.Error("whoever pulls it again is told")
	}
}

func TestNothingIsRemovedIfTheContentRootIsUnreadable(t *testing.T) {
	s := newSite(t)
	v := s.acquire(s.pack("bytes"))
	v.Release()
	blobs := filepath.Join(s.config.Content.String(), "blobs")
	if err := os.Rename(blobs, blobs+".away"); err != nil {
		t.Fatal(err)
	}
	s.collect()
	s.wantState(v.ID, true, false)
	if err := os.WriteFile(blobs, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	s.collect()
	s.wantState(v.ID, true, false)
}

func TestAnUnusedTreeIsNoSecondCopy(t *testing.T) {
	s := newSite(t)
	d := s.pack("bytes")
	v := s.acquire(d)
	s.uses(v.ID)
	v.Release()
	for _, blob := range s.blobs() { // the runtime deletes the image and pulls it again
		if err := os.Remove(blob); err != nil {
			t.Fatal(err)
		}
	}
	s.pack("bytes")
	s.collect()
	s.wantState(v.ID, true, true) // a pod reads it
	s.uses()
	s.collect()
	s.wantState(v.ID, false, false)
}

// containerd sets the times of a blob after it has renamed it into place, and a build may begin
// in between.
func TestATreeIsNotStaleWhenItsManifestGetsItsTimesLate(t *testing.T) {
	s := newSite(t)
	v := s.acquire(s.pack("bytes"))
	v.Release()
	for _, blob := range s.blobs() {
		late := time.Now().Add(time.Hour)
		if err := os.Chtimes(blob, late, late); err != nil {
			t.Fatal(err)
		}
	}
	s.collect()
	s.wantState(v.ID, true, false)
}

func (s *site) blobs() []string {
	s.t.Helper()
	blobs, err := filepath.Glob(filepath.Join(s.config.Content.String(), "blobs/*/*"))
	if err != nil || len(blobs) == 0 {
		s.t.Fatal(blobs, err)
	}
	return blobs
}

func TestGarbageCollectionsDoNotDisturbEachOther(t *testing.T) {
	s := newSite(t)
	for i := range 200 {
		content := filepath.Join(s.sharedDir(), "sha256", fmt.Sprint(i))
		if err := os.MkdirAll(filepath.Dir(content), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(os.WriteFile(content, nil, 0o600), os.Symlink(filepath.Base(content), content+".tar")); err != nil {
			t.Fatal(err)
		}
	}
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			if err := s.CollectGarbage(context.Background()); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
}

func TestRunCollectsGarbageWhenTheRuntimeDeletesAManifest(t *testing.T) {
	s := newSite(t)
	d := s.pack("bytes")
	v := s.acquire(d)
	v.Release()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); s.Run(ctx) }()
	eventually(t, "the unused mount is gone", func() bool { mounted, err := s.mounted(v.ID.name()); return !mounted && err == nil })
	// The watch begins before the first garbage collection or soon after. The next one finds
	// a deletion that the watch misses.
	eventually(t, "the tree is gone", func() bool {
		other := s.pack(fmt.Sprint(time.Now().UnixNano()))
		s.forget(other)
		os.Remove(s.content.Path(d.Digest))
		return !s.has(v.ID)
	})
	cancel()
	<-done
}

func TestCopiesAreRemovedWithTheLastTreeThatLinksToThem(t *testing.T) {
	s := newSite(t)
	if err := unix.Mount("tmpfs", s.config.Content.String(), "tmpfs", 0, "size=16m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := mount.UnmountAll(s.config.Content.String(), 0); err != nil {
			t.Error(err)
		}
	})
	d := s.pack("on another file system")
	s.acquire(d).Release()
	s.collect()
	if shared := s.sharedNames(); len(shared) != 1 {
		t.Fatalf("shared: %v, want the one of the layer", shared)
	}
	s.forget(d)
	s.collect()
	if shared := s.sharedNames(); len(shared) != 0 {
		t.Errorf("copies left: %v", shared)
	}
}

func (s *site) sharedNames() []string {
	s.t.Helper()
	names, err := filepath.Glob(filepath.Join(s.sharedDir(), "*/*"))
	if err != nil {
		s.t.Fatal(err)
	}
	return names
}

func TestADecompressedTarIsRemovedWithTheLastTreeThatLinksToIt(t *testing.T) {
	s := newSite(t)
	member := pack.Member{Data: []byte("bytes")}
	member.Name, member.Mode = "weights", 0o644
	archive, err := pack.TarOf(member)
	if err != nil {
		t.Fatal(err)
	}
	compressed, err := pack.Gzip(archive)
	if err != nil {
		t.Fatal(err)
	}
	var targets []ocispec.Descriptor
	for i := range 2 { // two artifacts with one layer, without DiffIDs
		a := pack.Artifact{Config: fmt.Appendf(nil, "{\"n\": %d}", i), Layers: []pack.Layer{{
			MediaType: "application/vnd.cncf.model.weight.v1.tar+gzip", Data: compressed,
		}}}
		d, err := a.WriteTo(s.config.Content.String())
		if err != nil {
			t.Fatal(err)
		}
		targets = append(targets, d)
		s.acquire(d).Release()
	}
	for _, d := range targets {
		s.collect()
		shared := s.sharedNames()
		if len(shared) != 2 {
			t.Fatalf("shared: %v, want the flat tar and the symlink to it", shared)
		}
		s.forget(d)
	}
	s.collect()
	if shared := s.sharedNames(); len(shared) != 0 {
		t.Errorf("left: %v", shared)
	}
}
