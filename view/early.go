// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package view

import (
	"bytes"
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
	"github.com/artifact-snapshotter/artifact-snapshotter/internal/blobdir"
)

// A compressed layer takes time to unpack, which containerd spends on the layers
// of images while it fetches the next ones. The store does the same for
// artifacts: the manifest is the first of their blobs to arrive in the runtime's
// directory, and a build can begin with it and wait for the others.

const (
	// maxManifest is the largest file that is looked at for a manifest: what the
	// OCI distribution specification asks registries to take.
	maxManifest = 4 << 20
	// maxEarly is how many builds may wait for blobs at once: what looks like a
	// manifest may be a file of an artifact, whose blobs never come.
	maxEarly = 16
	// lookAgain is how often a build that waits for a blob looks by itself whether
	// it has arrived, and whether the manifest is still there: a pull that is given
	// up leaves it to the runtime's garbage collection.
	lookAgain = time.Minute
)

// arrivals tells of files that appear.
type arrivals struct {
	mu      sync.Mutex
	waiting map[string]chan struct{} // by the name of the file, whatever directory it comes to
}

// of is closed when the file has arrived, or something may have been missed.
func (a *arrivals) of(name string) <-chan struct{} {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.waiting[name] == nil {
		if a.waiting == nil {
			a.waiting = map[string]chan struct{}{}
		}
		a.waiting[name] = make(chan struct{})
	}
	return a.waiting[name]
}

// tell tells those who wait for the file.
func (a *arrivals) tell(name string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if ch, ok := a.waiting[name]; ok {
		close(ch)
		delete(a.waiting, name)
	}
}

// tellAll tells everybody who waits to look again.
func (a *arrivals) tellAll() {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, ch := range a.waiting {
		close(ch)
	}
	clear(a.waiting)
}

// early is a build that began with the arrival of its manifest.
type early struct {
	manifest digest.Digest
	hurry    chan struct{} // closed when a pod asks: then all has arrived, or never will
	once     sync.Once
}

// arrived is told of a new blob.
func (s *Store) arrived(ctx context.Context, path string) {
	if s.early == nil {
		return
	}
	s.arrivals.tell(filepath.Base(path))
	s.unpackEarly(ctx, path)
}

// arrivedBefore looks for what has arrived in dir since the store was opened and
// before it was watched. What is older is unpacked when a pod asks.
func (s *Store) arrivedBefore(ctx context.Context, dir string) {
	d, err := os.Open(dir)
	if err != nil {
		return // the watch tells of the next ones
	}
	defer d.Close()
	if fi, err := d.Stat(); err != nil || !fi.ModTime().After(s.opened) {
		return // nothing has arrived
	}
	for ctx.Err() == nil {
		entries, err := d.ReadDir(256) // there may be many, and most are old
		for _, e := range entries {
			if fi, err := e.Info(); err == nil && fi.ModTime().After(s.opened) {
				s.arrived(ctx, filepath.Join(dir, e.Name()))
			}
		}
		if err != nil {
			return
		}
	}
}

// unpackEarly begins to build the Tree of the artifact whose manifest has arrived
// as the file path, if it is one that takes time: one with compressed layers. What
// fails is left to the pod that asks, which gets the reason.
func (s *Store) unpackEarly(ctx context.Context, path string) {
	config, desc, ok := readManifest(path)
	named := func(d blobdir.Dir) bool { return d.Path(desc.Digest) == path }
	if !ok || !slices.ContainsFunc(s.content.All(), named) {
		return
	}
	e := &early{manifest: desc.Digest, hurry: make(chan struct{})}
	id := ID{Manifest: desc.Digest}
	name := id.name()
	s.mu.Lock()
	_, known := s.early[name]
	begin := !known && len(s.early) < maxEarly
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
		delete(s.early, name)
	}
	if !s.begin() {
		done()
		return
	}
	go func() {
		defer s.running.Done()
		defer done()
		if err := s.buildEarly(s.closing, id, desc, config, e); err != nil {
			log.G(ctx).WithError(err).WithField("artifact", desc.Digest).Debug("not unpacked while it was pulled")
		}
	}()
}

func (s *Store) buildEarly(ctx context.Context, id ID, desc ocispec.Descriptor, config digest.Digest, e *early) error {
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
	log.G(ctx).WithField("artifact", id.Manifest).Debug("unpacking while it is pulled")
	defer s.hold(id.name())()
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

// await waits until the runtime has the blob, or a pod cannot wait any longer.
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
func (s *Store) hurry(name string) {
	s.mu.Lock()
	e := s.early[name]
	s.mu.Unlock()
	if e != nil {
		e.once.Do(func() { close(e.hurry) })
	}
}
