// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package store

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
	"github.com/artifact-snapshotter/artifact-snapshotter/blobs"
)

// A compressed layer takes time to unpack, which containerd spends on the layers
// of images while it fetches the next ones. The store does the same for
// artifacts: the manifest is the first of their blobs to arrive in the runtime's
// directory, and a build can begin with it and wait for the others.

const (
	// maxManifest is the largest file that is looked at for a manifest: what the
	// OCI distribution specification asks registries to take.
	maxManifest = 4 << 20
	// maxOnPull is about how many bytes of memory builds that wait for blobs may take:
	// stalledAfter each, and perManifestByte for each byte of the manifest, of which the
	// layers that are read from it take 2.5 to 3.3. What looks like a manifest may be a
	// file of an artifact, whose blobs never come.
	maxOnPull       = 64 << 20
	stalledAfter    = 256 << 10
	perManifestByte = 4
	// patience is how long a build waits without progress. containerd gives up a pull
	// after the same time (image_pull_progress_timeout in docs/cri/config.md).
	patience = 5 * time.Minute
	// alive is how long after its last progress a build is not ended to make room for
	// others.
	alive = 30 * time.Second
	// lookAgain is how often a build that waits for a blob looks by itself whether
	// it has arrived, and whether the manifest is still there: a pull that is given
	// up leaves it to the runtime's garbage collection.
	lookAgain = time.Minute
)

// early is a build that began with the arrival of its manifest.
type early struct {
	manifest digest.Digest
	size     int64         // about what it takes of memory
	hurry    chan struct{} // closed when a pod asks, or nothing arrives any more: then all is there, or never will be
	once     sync.Once

	// Guarded by Store.mu: the encoded digests of the layers, when the build began, and
	// when a layer last arrived or grew; zero if none has.
	blobs        map[string]bool
	begun, moved time.Time
}

// stop ends the waiting for blobs, not the build.
func (e *early) stop() { e.once.Do(func() { close(e.hurry) }) }

// arrived is told of a new blob.
func (s *Store) arrived(ctx context.Context, path string) {
	if s.early == nil {
		return
	}
	blob := filepath.Base(path)
	s.mu.Lock()
	s.moved(blob)
	s.mu.Unlock()
	s.arrivals.tell(blob)
	s.unpackEarly(ctx, path)
}

// moved notes progress of a blob. The caller holds s.mu.
func (s *Store) moved(blob string) {
	for _, e := range s.early {
		if e.blobs[blob] {
			e.moved = s.now()
		}
	}
}

// lookForProgress notes which blobs the runtime is receiving, and ends the waiting of builds
// for which nothing has arrived within patience.
func (s *Store) lookForProgress() {
	s.mu.Lock()
	waiting := len(s.early)
	s.mu.Unlock()
	if waiting == 0 {
		return
	}
	receiving := s.receiving()
	s.mu.Lock()
	defer s.mu.Unlock()
	for blob, size := range receiving {
		if before, there := s.received[blob]; !there || before != size {
			s.moved(blob)
		}
	}
	s.received = receiving
	for _, e := range s.early {
		last := e.begun
		if e.moved.After(last) {
			last = e.moved
		}
		if s.now().Sub(last) >= patience {
			e.stop()
		}
	}
}

// makeRoom reports whether e may wait, too. If there is no room it ends the waiting of
// builds for which nothing arrives, those first that have waited longest. The caller holds
// s.mu.
func (s *Store) makeRoom(e *early) bool {
	total := e.size
	for _, other := range s.early {
		total += other.size
	}
	for total > maxOnPull {
		var name string
		var longest *early
		for n, other := range s.early {
			if longest == nil || cmp.Or(other.moved.Compare(longest.moved), other.begun.Compare(longest.begun)) < 0 {
				name, longest = n, other
			}
		}
		if longest == nil || s.now().Sub(longest.moved) < alive {
			return false
		}
		longest.stop()
		delete(s.early, name)
		total -= longest.size
	}
	return true
}

// unpackEarly begins to build the Tree of the artifact whose manifest has arrived
// as the file path, if it is one that takes time: one with compressed layers. What
// fails is left to the pod that asks, which gets the reason.
func (s *Store) unpackEarly(ctx context.Context, path string) {
	config, desc, ok := readManifest(path)
	named := func(d blobs.Dir) bool { return d.Path(desc.Digest) == path }
	if !ok || !slices.ContainsFunc(s.content.All(), named) {
		return
	}
	e := &early{manifest: desc.Digest, size: stalledAfter + perManifestByte*desc.Size, hurry: make(chan struct{}), begun: s.now()}
	id := ID{Manifest: desc.Digest}
	name := id.name()
	s.lookForProgress()
	s.mu.Lock()
	_, known := s.early[name]
	begin := !known && s.makeRoom(e)
	if begin {
		s.early[name] = e
	}
	s.mu.Unlock()
	if !begin {
		return
	}
	done := func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.early[name] == e {
			delete(s.early, name)
		}
	}
	if !s.begin() {
		done()
		return
	}
	go func() {
		defer s.running.Done()
		defer done()
		if err := s.buildOnPull(s.closing, id, desc, config, e); err != nil {
			log.G(ctx).WithError(err).WithField("artifact", desc.Digest).Debug("not unpacked while it was pulled")
		}
	}()
}

func (s *Store) buildOnPull(ctx context.Context, id ID, desc ocispec.Descriptor, config digest.Digest, e *early) error {
	if err := s.await(ctx, e, config); err != nil {
		return err
	}
	a, err := artifact.Read(ctx, s.content, desc)
	if err != nil {
		return err
	}
	if !slices.ContainsFunc(a.Layers, func(l artifact.Layer) bool { return l.Compression != artifact.CompressionNone }) {
		return nil // a matter of milliseconds
	}
	s.mu.Lock()
	e.blobs = map[string]bool{}
	for _, l := range a.Layers {
		e.blobs[l.Descriptor.Digest.Encoded()] = true
	}
	s.mu.Unlock()
	log.G(ctx).WithField("artifact", id.Manifest).Debug("unpacking while it is pulled")
	defer s.hold(id.name())(false)
	_, err, _ = s.builds.Do(id.name(), func() (any, error) {
		if t, mounted, err := s.load(id); t != nil || mounted || err != nil {
			return nil, err
		}
		_, b, err := s.build(ctx, id, &source{Artifact: a}, func(ctx context.Context, blob digest.Digest) error { return s.await(ctx, e, blob) })
		return b, err
	})
	return err
}

// readManifest reads the file path if it looks like the manifest of something
// that is not an image, and returns the digest of its config.
func readManifest(path string) (config digest.Digest, desc ocispec.Descriptor, ok bool) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return "", desc, false
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil || !fi.Mode().IsRegular() || fi.Size() > maxManifest {
		return "", desc, false
	}
	brace := make([]byte, 1) // most blobs are not even JSON
	if _, err := f.ReadAt(brace, 0); err != nil || brace[0] != '{' {
		return "", desc, false
	}
	b, err := io.ReadAll(f)
	if err != nil || !bytes.Contains(b, []byte(`"schemaVersion"`)) {
		return "", desc, false
	}
	var m struct { // no more than is needed: a manifest is a lot larger in memory
		MediaType string `json:"mediaType"`
		Config    struct {
			MediaType string        `json:"mediaType"`
			Digest    digest.Digest `json:"digest"`
		} `json:"config"`
	}
	if json.Unmarshal(b, &m) != nil || m.MediaType != "" && !images.IsManifestType(m.MediaType) || m.Config.Digest.Validate() != nil || artifact.IsImageConfig(m.Config.MediaType) {
		return "", desc, false
	}
	// The digest of the file's name is checked by whoever reads it to build.
	return m.Config.Digest, ocispec.Descriptor{Digest: digest.FromBytes(b), Size: int64(len(b))}, true
}

// await waits until the runtime has the blob, or waiting has ended.
func (s *Store) await(ctx context.Context, e *early, blob digest.Digest) error {
	again := time.NewTicker(lookAgain)
	defer again.Stop()
	for {
		arrived := s.arrivals.of(blob.Encoded())
		if _, err := os.Lstat(s.content.Path(blob)); err == nil {
			return nil
		}
		if s.deleted(e.manifest) {
			return fmt.Errorf("the pull of %s has been given up: %w", e.manifest, errdefs.ErrNotFound)
		}
		select {
		case <-arrived:
		case <-e.hurry:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		case <-again.C:
		}
	}
}

// hurry ends the waiting of a build that began early.
func (s *Store) expedite(name string) {
	s.mu.Lock()
	e := s.early[name]
	s.mu.Unlock()
	if e != nil {
		e.stop()
	}
}
