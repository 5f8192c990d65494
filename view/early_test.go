// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package view

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
	"github.com/artifact-snapshotter/artifact-snapshotter/unpack"
)

// gzipped makes an artifact of a raw file and a compressed tar. Nothing of it is
// there but what it returns the paths of.
func (s *site) gzipped(n int) (target ocispec.Descriptor, blobs map[string][]byte) {
	s.t.Helper()
	member := pack.Member{Data: fmt.Appendf(nil, "tarred %d", n)}
	member.Name, member.Mode = "weights", 0o644
	archive, err := pack.TarOf(member)
	if err != nil {
		s.t.Fatal(err)
	}
	compressed, err := pack.Gzip(archive)
	if err != nil {
		s.t.Fatal(err)
	}
	a := pack.Artifact{Layers: []pack.Layer{
		{MediaType: "application/vnd.cncf.model.weight.v1.tar+gzip", Data: compressed, DiffID: digest.FromBytes(archive)},
		{
			MediaType: "application/vnd.cncf.model.weight.v1.raw", Data: fmt.Appendf(nil, "raw %d", n),
			Annotations: map[string]string{"org.cncf.model.filepath": "raw"},
		},
	}}
	elsewhere := s.t.TempDir()
	if target, err = a.WriteTo(elsewhere); err != nil {
		s.t.Fatal(err)
	}
	blobs = map[string][]byte{}
	found, err := filepath.Glob(filepath.Join(elsewhere, "blobs/*/*"))
	if err != nil {
		s.t.Fatal(err)
	}
	for _, p := range found {
		b, err := os.ReadFile(p)
		if err != nil {
			s.t.Fatal(err)
		}
		blobs[filepath.Base(p)] = b
	}
	return target, blobs
}

// arrive puts a blob into the content store as containerd does.
func (s *site) arrive(hex string, b []byte) {
	s.t.Helper()
	dir := filepath.Join(s.config.Content.String(), "blobs/sha256")
	ingest := filepath.Join(s.config.Content.String(), "ingest")
	for _, d := range []string{dir, ingest} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			s.t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(ingest, hex), b, 0o600); err != nil {
		s.t.Fatal(err)
	}
	if err := os.Rename(filepath.Join(ingest, hex), filepath.Join(dir, hex)); err != nil {
		s.t.Fatal(err)
	}
}

// run runs the store until the test ends, and returns when it sees what arrives.
func (s *site) run() {
	s.t.Helper()
	s.Close()
	s.config.Early = true
	s.open()
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { s.Run(ctx) })
	s.t.Cleanup(func() { cancel(); running.Wait() })
	for i := 0; ; i++ { // the watch begins with the directory, or a second later
		d, blobs := s.gzipped(1000 + i)
		for hex, b := range blobs {
			if hex != d.Digest.Encoded() {
				s.arrive(hex, b)
			}
		}
		s.arrive(d.Digest.Encoded(), blobs[d.Digest.Encoded()])
		for deadline := time.Now().Add(500 * time.Millisecond); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
			if s.has(ID{Manifest: d.Digest}) {
				return
			}
		}
		if i == 20 {
			s.t.Fatal("nothing is unpacked early")
		}
	}
}

func TestCompressedLayersAreUnpackedWhileTheyArrive(t *testing.T) {
	s := newSite(t)
	s.run()
	d, blobs := s.gzipped(1)
	manifest := d.Digest.Encoded()
	s.arrive(manifest, blobs[manifest])
	id := ID{Manifest: d.Digest}
	for hex, b := range blobs {
		if hex != manifest {
			if s.has(id) {
				t.Error("the tree is there, the layers are not")
			}
			s.arrive(hex, b)
		}
	}
	eventually(t, "the tree is built", func() bool { return s.has(id) })
	v := s.acquire(d)
	for name, want := range map[string]string{"weights": "tarred 1", "raw": "raw 1"} {
		if b, err := os.ReadFile(filepath.Join(v.Path, name)); err != nil || string(b) != want {
			t.Errorf("%s: %q, %v", name, b, err)
		}
	}
}

func TestAPodDoesNotWaitForWhatWillNotArrive(t *testing.T) {
	s := newSite(t)
	s.run()
	d, blobs := s.gzipped(1)
	var layer string
	for hex, b := range blobs {
		if string(b) == "raw 1" {
			layer = hex
		} else {
			s.arrive(hex, b)
		}
	}
	eventually(t, "the build has begun", func() bool {
		s.Store.mu.Lock()
		defer s.Store.mu.Unlock()
		return s.early[ID{Manifest: d.Digest}.name()] != nil
	})
	if _, err := s.Acquire(context.Background(), d, unpack.IDMap{}); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), layer) {
		t.Errorf("%v, want that %s is missing", err, layer)
	}
	s.arrive(layer, blobs[layer])
	s.acquire(d).Release()
}

func TestAPullThatIsGivenUpLeavesNothing(t *testing.T) {
	s := newSite(t)
	s.run()
	d, blobs := s.gzipped(1)
	manifest := d.Digest.Encoded()
	s.arrive(manifest, blobs[manifest])
	name := ID{Manifest: d.Digest}.name()
	waiting := func() bool {
		s.Store.mu.Lock()
		defer s.Store.mu.Unlock()
		return s.early[name] != nil
	}
	eventually(t, "the build has begun", waiting)
	s.forget(d)
	eventually(t, "the build has ended", func() bool { return !waiting() })
	s.wantState(ID{Manifest: d.Digest}, false, false)
}
