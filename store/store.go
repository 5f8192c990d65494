// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

// Package view holds the Trees of a node's artifacts: one Tree and one shared
// mount for each artifact, however many pods show it, and the sweep that
// removes what nobody shows.
//
// The store keeps no list of users. Those who show artifacts know them already
// (the snapshotter in its database) and are asked, so that there is nothing to
// disagree about after a crash. Trees, copies and mounts are what lies in its
// directories:
//
//	<root>/trees/<name>      a Tree (package unpack)
//	<root>/trees/new-*       one being built, or to be removed (and probe-*)
//	<root>/blobs/<algorithm> what Trees share: flat tars, and blobs that could
//	                         not be linked from the runtime's
//	<root>/boot              the boot of the kernel that the above are of
//	<state>/mounts/<name>    the shared mount of a Tree that somebody shows
//
// The store never calls containerd: it is used inside of snapshotter calls,
// where a call back can deadlock against containerd's garbage collector.
package store

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/singleflight"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
	"github.com/artifact-snapshotter/artifact-snapshotter/blobs"
	"github.com/artifact-snapshotter/artifact-snapshotter/unpack"
)

// MaxWait is how long a request may wait in all: until containerd's images are known, and
// for a build. containerd holds a lock during a request to the snapshotter: its garbage
// collector waits for the lock, and every other request waits for the collector
// (core/metadata/snapshot.go). A request for a large compressed artifact must not stop
// the node's other pods; kubelet asks again.
const MaxWait = 20 * time.Second

// Config says where the store keeps what.
type Config struct {
	// Root is the directory for Trees. On the file system of Content no byte
	// is copied; on another one each blob is copied once.
	Root string
	// State is the directory for mounts. It does not have to survive a reboot.
	State string
	// Content is where the runtime keeps its blobs, or each of the runtimes.
	Content blobs.Source
	// Modes are how layers are laid out; "" takes the best that works here.
	Modes unpack.Modes
	// DirectIO takes only modes whose files can be read with O_DIRECT.
	DirectIO bool
	// Limits are what building Trees may take of the node.
	Limits unpack.Limits
	// Early lets Run build the Trees of artifacts with compressed layers while
	// the runtime pulls them.
	DecompressOnPull bool
	// Images are those of the runtime whose volumes front ends ask for; nil if nothing is
	// known of them, and then volumes are mounted without a check.
	Images Images
	// Observer is told of what the store does.
	Observer Observer
}

// References lists the artifacts that somebody shows at this moment. It must not
// call the store.
type References func(context.Context) ([]ID, error)

// Store is safe for concurrent use.
type Store struct {
	trees, mounts string
	content       blobs.Source
	shared        blobs.Dir
	modes         unpack.Modes
	directIO      bool
	budget        *unpack.Budget
	images        Images
	observer      Observer

	builds  singleflight.Group
	maxWait time.Duration
	now     func() time.Time
	// closing ends the builds, which outlive the requests that began them.
	closing context.Context
	close   context.CancelFunc
	running sync.WaitGroup
	wake    chan struct{} // asks Run for a sweep

	// seen are the directories of blobs that have been there.
	seen sync.Map

	// sweeping is held by a sweep while it asks Users. mu makes "nobody shows it, so it
	// goes" one step against Acquire.
	collecting sync.Mutex
	mu         sync.Mutex
	references []References
	retained   []References
	held       map[string]int // views by Tree name that no Users lists yet
	// taken are the names that have been held at any time since a sweep began to ask
	// Users; nil while no sweep is asking.
	taken map[string]bool
	// sources are the Manifest and the Source of Trees that a sweep has read, by name,
	// until another Tree is published by that name.
	sources map[string]*unpack.Tree
	// building are the names in trees that builds write to, progress is how far
	// they are, and failed how those ended that nobody had waited for, by the
	// name of the Tree to be.
	building map[string]bool
	progress map[digest.Digest]*progress
	failed   map[string]*failure
	// early are the builds that began with their manifest's arrival, by the name
	// of the Tree to be; nil if none may. received is what the runtime had of the
	// blobs that it was receiving.
	early    map[string]*early
	received map[string]int64
	opened   time.Time
	arrivals arrivals
}

// Modes are how the store lays out layers.
func (s *Store) Modes() unpack.Modes { return s.modes }

// AddReferences makes the sweep ask u who shows what. All doors must be added before
// Run.
func (s *Store) AddReferences(r References) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.references = append(s.references, r)
}

// Close ends the builds that are under way and leaves every mount to the pods
// that show it.
func (s *Store) Close() error {
	s.mu.Lock()
	s.close()
	s.mu.Unlock()
	s.running.Wait()
	return nil
}

// Reference is an artifact that is mounted. It stays until Release, and after that
// for as long as some Users lists its ID.
type Reference struct {
	// ID is what Users must list.
	ID ID
	// Path is the shared, read-only mount. Bind it where it is wanted.
	Path string
	// Modes are those that the Tree was laid out by; "" if another version of this
	// program has done it.
	Modes unpack.Modes
	// Built is the build that the caller has waited for; nil if the Tree was there.
	Built *Build

	release func(listed bool)
}

// Release ends the caller's claim. Call it once; if the ID is to stay shown, after it is
// listed.
func (v *Reference) Release() { v.release(false) }

// Listed is Release for a caller whose Users list the ID, so that there is nothing to
// sweep.
func (v *Reference) Listed() { v.release(true) }

// Find is the descriptor of the blob whose encoded digest is hex, all that
// containerd says of an image volume.
func (s *Store) Find(hex string) (ocispec.Descriptor, error) { return s.content.Find(hex) }

// Acquire mounts the artifact whose manifest or index is target. The Tree is
// built by the first who asks, once for all who ask meanwhile. When ctx ends,
// or the build takes longer than a request should, the build goes on for the
// next one; the latter is errdefs.ErrUnavailable. An image that is no artifact
// is artifact.ErrNotArtifact.
func (s *Store) Acquire(ctx context.Context, target ocispec.Descriptor, owners unpack.IDMap) (*Reference, error) {
	id := ID{Manifest: target.Digest, Owners: owners}
	release := s.hold(id.name())
	// The common case needs no JSON: the Tree is there, under the digest that
	// was asked for.
	var from *source
	if !s.has(id) {
		a, err := s.read(ctx, target)
		if err != nil {
			release(false)
			return nil, err
		}
		from = &source{Artifact: a}
		if a.Manifest.Digest != target.Digest { // of an index, this platform's
			release(true) // there was nothing
			id.Manifest = a.Manifest.Digest
			release = s.hold(id.name())
		}
	}
	return s.acquire(ctx, id, from, release)
}

// read reads the artifact whose manifest or index is target.
func (s *Store) read(ctx context.Context, target ocispec.Descriptor) (a *artifact.Artifact, err error) {
	ctx, end := span(ctx, "artifact.read", target.Digest)
	defer func() { end(err) }()
	return artifact.Read(ctx, s.content, target)
}

// acquire mounts the Tree of id, which is taken hold of, and builds it before if
// it is not there. What it is built from may be nil if it was.
func (s *Store) acquire(ctx context.Context, id ID, from *source, release func(listed bool)) (_ *Reference, err error) {
	ctx, end := span(ctx, "tree.wait", id.Manifest)
	defer func() { end(err) }()
	s.expedite(ID{Manifest: id.Manifest}.name())
	wait := s.maxWait
	if deadline, ok := ctx.Deadline(); ok {
		// So that the answer, which says how far the build is, still gets there.
		wait = min(wait, time.Until(deadline)*9/10)
	}
	timeout := time.After(wait)
	var built *Build
	for {
		build := s.builds.DoChan(id.name(), func() (any, error) { return s.serve(s.following(ctx), id, from) })
		var err error
		select {
		case r := <-build:
			if err = r.Err; err != nil {
				s.forgetFailure(id.name()) // this is it
				break
			}
			if b, ok := r.Val.(*Build); ok && b != nil { // an early one
				built = b
			}
			tree, _ := r.Val.(served)
			built = cmp.Or(built, tree.built)
			// We may have joined a build that was about to end, and whose mount was
			// swept before we held the name: try again.
			mounted, merr := s.mounted(id.name())
			if err = merr; err != nil {
				break
			}
			if !mounted {
				continue
			}
			return &Reference{ID: id, Path: s.mountpoint(id.name()), Modes: tree.modes, Built: built, release: release}, nil
		case <-ctx.Done():
			err = s.unfinished(id, ctx.Err())
		case <-timeout:
			err = s.unfinished(id, errdefs.ErrUnavailable)
		}
		release(false)
		return nil, err
	}
}

// hold excludes name from the sweep until the returned function is called. The argument of
// that says whether a Users lists the name by then.
func (s *Store) hold(name string) func(listed bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.held[name]++
	if s.taken != nil {
		s.taken[name] = true
	}
	return func(listed bool) {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.held[name]--; s.held[name] > 0 {
			return
		}
		delete(s.held, name)
		if !listed {
			s.Wake() // nobody may show it: the caller failed, or gave up
		}
	}
}

func (s *Store) has(id ID) bool { return s.hasName(id.name()) }

func (s *Store) hasName(name string) bool {
	_, err := unpack.Load(filepath.Join(s.trees, name))
	return err == nil
}

// Tree is the Tree of id, if it is built.
func (s *Store) Tree(id ID) (*unpack.Tree, error) {
	t, err := unpack.Load(filepath.Join(s.trees, id.name()))
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("artifact %s is not unpacked: %w", id.Manifest, errdefs.ErrNotFound)
	}
	return t, err
}

// Shown is the ID of the Tree whose shared mount the path is, or is in, if a View for
// these owners, or for none, can have had it.
func (s *Store) Shown(path string, owners unpack.IDMap) (ID, bool) {
	rel, err := filepath.Rel(s.mounts, path)
	if err != nil {
		return ID{}, false
	}
	name, _, _ := strings.Cut(rel, "/")
	for _, o := range []unpack.IDMap{{}, owners} {
		id := ID{Manifest: manifest(name), Owners: o}
		if id.Manifest != "" && id.name() == name {
			return id, true
		}
	}
	return ID{}, false
}

func (s *Store) mountpoint(name string) string { return filepath.Join(s.mounts, name) }

// mounted is whether a Tree of that name is mounted. An error is that nobody can tell:
// pods may show it.
func (s *Store) mounted(name string) (bool, error) {
	ok, err := mountinfo.Mounted(s.mountpoint(name))
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("cannot tell whether %s is mounted: %w", s.mountpoint(name), err)
	}
	return ok, nil
}

// unmount takes the shared mount away. Pods that still show it (there are none
// but those whose containerd has forgotten them) have binds of their own.
func (s *Store) unmount(name string) error {
	target := s.mountpoint(name)
	_, seen := os.Lstat(target)
	if errors.Is(seen, os.ErrNotExist) {
		return nil
	}
	// What a dead disk shows cannot be looked at, but can be unmounted.
	if err := mount.UnmountAll(target, unix.MNT_DETACH); err != nil {
		if seen != nil {
			err = seen
		}
		return fmt.Errorf("unmount %s: %w", target, err)
	}
	if err := os.Remove(target); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

func list(dir string) ([]string, error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	return d.Readdirnames(-1)
}
