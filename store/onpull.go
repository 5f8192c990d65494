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
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
	"github.com/artifact-snapshotter/artifact-snapshotter/blobs"
)

// Decompressing a layer takes time. containerd decompresses the layers of images while it
// fetches the next ones, and the store does the same for artifacts. The manifest is the first
// of an artifact's blobs to arrive in the runtime's directory: a build begins with it, and
// waits for the other blobs.

// pull is the pull of an artifact whose tree is in the state pulling.
type pull struct {
	manifest, config digest.Digest
	size             int64         // about how much memory the build takes, in bytes
	stopped          chan struct{} // closed when the build is not to wait any more
	once             sync.Once

	// Guarded by Store.mu: the encoded digests of the layers once the build waits for them;
	// when the build began, and when a layer last arrived or grew, zero if none has.
	blobs        map[string]bool
	begun, moved time.Time
}

// stop ends the waiting for blobs, not the build.
func (p *pull) stop() { p.once.Do(func() { close(p.stopped) }) }

// expedite makes a build not wait any more: what is not there now counts as missing. The
// caller holds s.mu.
func (s *Store) expedite(e *entry) {
	if e.pull != nil {
		e.pull.stop()
		e.enter(building)
	}
}

// pulls are the trees in the state pulling. The caller holds s.mu.
func (s *Store) pulls() (waiting []*entry) {
	for _, e := range s.entries {
		if e.pull != nil {
			waiting = append(waiting, e)
		}
	}
	return waiting
}

// arrived is told of a new blob.
func (s *Store) arrived(ctx context.Context, path string) {
	if !s.onPull {
		return
	}
	s.mu.Lock()
	s.moved(filepath.Base(path))
	s.tellChanged()
	s.mu.Unlock()
	s.buildOnPull(ctx, path)
}

// moved notes progress of a blob. The caller holds s.mu.
func (s *Store) moved(blob string) {
	for _, e := range s.pulls() {
		if e.pull.blobs[blob] {
			e.pull.moved = s.now()
		}
	}
}

// lookForProgress notes which blobs the runtime is receiving, and expedites builds for which
// nothing has arrived within patience.
func (s *Store) lookForProgress() {
	s.mu.Lock()
	waiting := len(s.pulls())
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
	for _, e := range s.pulls() {
		last := e.pull.begun
		if e.pull.moved.After(last) {
			last = e.pull.moved
		}
		if s.now().Sub(last) >= patience {
			s.expedite(e)
		}
	}
}

// makeRoom reports whether a build of that size may wait, too. If there is no room it
// expedites builds for which nothing arrives, those first that have waited longest. The
// caller holds s.mu.
func (s *Store) makeRoom(size int64) bool {
	waiting := s.pulls()
	slices.SortFunc(waiting, func(a, b *entry) int {
		return cmp.Or(a.pull.moved.Compare(b.pull.moved), a.pull.begun.Compare(b.pull.begun))
	})
	for _, e := range waiting {
		size += e.pull.size
	}
	for _, e := range waiting {
		if size <= maxOnPull || s.now().Sub(e.pull.moved) < alive {
			break
		}
		size -= e.pull.size
		s.expedite(e)
	}
	return size <= maxOnPull
}

// buildOnPull begins to build the tree of the artifact whose manifest has arrived as the file
// path, if that takes time: if it has compressed layers. If this fails, the next pod that
// asks gets the reason.
func (s *Store) buildOnPull(ctx context.Context, path string) {
	config, desc, ok := readManifest(path)
	named := func(d blobs.Dir) bool { return d.Path(desc.Digest) == path }
	if !ok || !slices.ContainsFunc(s.content.All(), named) {
		return
	}
	from := &source{read: func(ctx context.Context) (*artifact.Artifact, error) { return artifact.Read(ctx, s.content, desc) }}
	p := &pull{manifest: desc.Digest, config: config, size: stalledAfter + perManifestByte*desc.Size, stopped: make(chan struct{}), begun: s.now()}
	s.lookForProgress()
	s.mu.Lock()
	defer s.mu.Unlock()
	if e := s.entry(ID{Manifest: desc.Digest}); e.work == nil && s.makeRoom(p.size) {
		_, _ = s.begin(s.following(ctx), e, from, false, p) // else the store is closing
	}
}

// isWorthIt waits for the config of an artifact that is being pulled, and reports whether its
// tree is to be built now: its layers are compressed, so that the build takes time, or a
// request waits for it.
func (s *Store) isWorthIt(ctx context.Context, w *work, from *source, p *pull) (bool, error) {
	if err := s.await(ctx, p, p.config); err != nil {
		return false, err
	}
	a, err := from.get(ctx)
	if err != nil {
		return false, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	p.blobs = map[string]bool{}
	for _, l := range a.Layers {
		p.blobs[l.Descriptor.Digest.Encoded()] = true
	}
	return w.mount || slices.ContainsFunc(a.Layers, func(l artifact.Layer) bool { return l.Compression != artifact.CompressionNone }), nil
}

// readManifest reads the file path if it looks like a manifest that is not an image's, and
// returns the digest of its config.
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
	var m struct { // no more than is needed: a whole manifest takes much more memory
		MediaType string `json:"mediaType"`
		Config    struct {
			MediaType string        `json:"mediaType"`
			Digest    digest.Digest `json:"digest"`
		} `json:"config"`
	}
	if json.Unmarshal(b, &m) != nil || m.MediaType != "" && !images.IsManifestType(m.MediaType) || m.Config.Digest.Validate() != nil || artifact.IsImageConfig(m.Config.MediaType) {
		return "", desc, false
	}
	// The build checks the digest in the file's name.
	return m.Config.Digest, ocispec.Descriptor{Digest: digest.FromBytes(b), Size: int64(len(b))}, true
}

// await waits until the runtime has the blob, or the build is not to wait any more.
func (s *Store) await(ctx context.Context, p *pull, blob digest.Digest) error {
	again := time.NewTicker(lookAgain)
	defer again.Stop()
	for {
		changed := s.changed()
		if _, err := os.Lstat(s.content.Path(blob)); err == nil {
			return nil
		}
		if s.deleted(p.manifest) {
			return fmt.Errorf("the pull of %s has been given up: %w", p.manifest, errdefs.ErrNotFound)
		}
		select {
		case <-changed:
		case <-p.stopped:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		case <-again.C:
		}
	}
}
