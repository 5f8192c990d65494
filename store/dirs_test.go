// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package store

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/artifact-snapshotter/artifact-snapshotter/blobs"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
	"github.com/artifact-snapshotter/artifact-snapshotter/unpack"
)

// newDirs returns a site with two directories of blobs, and a third that does not exist.
func newDirs(t *testing.T) (s *site, first, second blobs.Dir) {
	t.Helper()
	s = newSite(t)
	s.Close()
	first, second = blobs.Dir(t.TempDir()), blobs.Dir(t.TempDir())
	s.config.Content = blobs.Dirs{blobs.Dir(filepath.Join(t.TempDir(), "none")), first, second}
	s.open()
	return s, first, second
}

func TestAnArtifactIsFoundInAnyDirectory(t *testing.T) {
	s, first, second := newDirs(t)
	for i, dir := range []blobs.Dir{first, second} {
		d, err := pack.File("weights", fmt.Sprint("bytes ", i)).WriteTo(string(dir))
		if err != nil {
			t.Fatal(err)
		}
		if found, err := s.Find(d.Digest.Encoded()); err != nil || found.Digest != d.Digest {
			t.Errorf("found %+v, %v; want %s", found, err, d.Digest)
		}
		v := s.acquire(d)
		if b, err := os.ReadFile(filepath.Join(v.Path, "weights")); err != nil || string(b) != fmt.Sprint("bytes ", i) {
			t.Errorf("read %q, %v", b, err)
		}
		v.Release()
	}
}

func TestATreeIsRemovedWhenNoDirectoryHasItsManifest(t *testing.T) {
	s, first, second := newDirs(t)
	d, err := pack.File("weights", "bytes").WriteTo(string(first))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := pack.File("weights", "bytes").WriteTo(string(second)); err != nil {
		t.Fatal(err)
	}
	v := s.acquire(d)
	v.Release()
	s.collect()
	s.wantState(v.ID, true, false)
	if err := os.Remove(second.Path(d.Digest)); err != nil {
		t.Fatal(err)
	}
	s.collect()
	s.wantState(v.ID, true, false)
	if err := os.Remove(first.Path(d.Digest)); err != nil {
		t.Fatal(err)
	}
	s.collect()
	s.wantState(v.ID, false, false)
}

func TestNothingIsRemovedIfADirectoryIsUnreadable(t *testing.T) {
	s, first, second := newDirs(t)
	d, err := pack.File("weights", "bytes").WriteTo(string(first))
	if err != nil {
		t.Fatal(err)
	}
	v := s.acquire(d)
	v.Release()
	if err := os.Remove(first.Path(d.Digest)); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(string(second), "blobs"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	s.collect()
	s.wantState(v.ID, true, false)
}

// If the disk with the blobs is unmounted, the runtime has deleted nothing.
func TestNothingIsRemovedWhenADirectoryDisappears(t *testing.T) {
	s, first, second := newDirs(t)
	for _, dir := range []blobs.Dir{first, second} {
		if err := os.MkdirAll(filepath.Join(string(dir), "blobs/sha256"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	d, err := pack.File("weights", "bytes").WriteTo(string(second))
	if err != nil {
		t.Fatal(err)
	}
	v := s.acquire(d)
	s.collect() // while it is in use, so that nobody looks for its manifest
	v.Release()
	blobs := filepath.Join(string(second), "blobs")
	if err := os.Rename(blobs, blobs+"-elsewhere"); err != nil {
		t.Fatal(err)
	}
	s.collect()
	s.wantState(v.ID, true, false)
	if err := os.Rename(blobs+"-elsewhere", blobs); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(second.Path(d.Digest)); err != nil {
		t.Fatal(err)
	}
	s.collect()
	s.wantState(v.ID, false, false)
}

func TestCompressedLayersAreUnpackedInWhateverDirectoryTheyArrive(t *testing.T) {
	s := newSite(t)
	first := blobs.Dir(t.TempDir())
	second := s.config.Content // where blobs arrive
	if err := os.MkdirAll(filepath.Join(second.String(), "blobs/sha256"), 0o755); err != nil {
		t.Fatal(err)
	}
	s.Close()
	s.config.DecompressOnPull = true
	s.config.Content = blobs.Dirs{first, blobs.Dir(second.String())}
	s.open()
	s.config.Content = second
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { s.Run(ctx) })
	t.Cleanup(func() { cancel(); running.Wait() })
	d, blobs := s.gzipped(1)
	manifest := d.Digest.Encoded()
	s.arrive(manifest, blobs[manifest])
	for hex, b := range blobs {
		if hex != manifest {
			s.arrive(hex, b)
		}
	}
	eventually(t, "the tree is built", func() bool { return s.has(ID{Manifest: d.Digest}) })
}

func TestThePathOfAMountTellsItsTree(t *testing.T) {
	s := newSite(t)
	d := s.pack("bytes")
	owners := unpack.IDMap{UID: "0:200000:65536", GID: "0:200000:65536"}
	for _, o := range []unpack.IDMap{{}, owners} {
		v, err := s.Acquire(t.Context(), d, o)
		if err != nil {
			t.Fatal(err)
		}
		for path, want := range map[string]bool{
			v.Path: true, filepath.Join(v.Path, "sub/path"): true,
			v.Path + "x": false, filepath.Dir(v.Path): false, "/": false, "": false, "relative": false,
		} {
			if id, ok := s.MountedAt(path, o); ok != want || ok && id != v.ID {
				t.Errorf("%s shows %v, %v; want %v", path, id, ok, want)
			}
		}
		if _, ok := s.MountedAt(v.Path, unpack.IDMap{UID: "0:1:2"}); ok != (o == unpack.IDMap{}) {
			t.Errorf("for other owners %v is shown: %v", o, ok)
		}
		v.Release()
	}
}
