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
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
	"github.com/artifact-snapshotter/artifact-snapshotter/blobs"
	"github.com/artifact-snapshotter/artifact-snapshotter/unpack"
	"github.com/artifact-snapshotter/artifact-snapshotter/unpack/differ"
)

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
	onPull        bool
	budget        *unpack.Budget
	images        Images
	observer      Observer

	maxWait time.Duration
	now     func() time.Time
	opened  time.Time
	// closing ends the work, which outlives the requests that began it.
	closing context.Context
	close   context.CancelFunc
	running sync.WaitGroup
	wake    chan struct{} // asks Run for a garbage collection
	// seen are the directories of blobs that have been there.
	seen     sync.Map
	arrivals arrivals

	// collecting is held while garbage collection asks the References. mu makes "nobody
	// uses it, so it goes" one step against a new claim.
	collecting sync.Mutex
	mu         sync.Mutex
	references []References
	retained   []References
	// entries are what is known of trees, by their names. A tree that is in none is in the
	// state unknown.
	entries map[string]*entry
	// taken are the names that have been claimed at any time since a garbage collection began
	// to ask the References; nil while none is asking.
	taken map[string]bool
	// reserved are the directories in trees that something writes to.
	reserved map[string]bool
	// received is how much the runtime had of the blobs that it was receiving, in bytes.
	received map[string]int64
}

// Modes are how the store lays out layers.
func (s *Store) Modes() unpack.Modes { return s.modes }

// AddRetained keeps the trees that r lists from being removed, even when nobody uses them: a
// mount that was made from a view may outlive the view. They are unmounted all the same.
func (s *Store) AddRetained(r References) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.retained = append(s.retained, r)
}

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

// Acquire mounts the artifact whose manifest or index is target. The tree is built and
// mounted for the first request, once for all that ask meanwhile. If ctx ends, or the build
// takes longer than a request may wait, the error is an *UnfinishedError and the build goes
// on for the next request. An image that is no artifact is artifact.ErrNotArtifact.
//
// If the tree is mounted already, no manifest is read.
func (s *Store) Acquire(ctx context.Context, target ocispec.Descriptor, owners unpack.IDMap) (*Reference, error) {
	id := ID{Manifest: target.Digest, Owners: owners}
	from := &source{read: func(ctx context.Context) (*artifact.Artifact, error) { return s.read(ctx, target) }}
	if !s.has(id) {
		a, err := from.get(ctx)
		if err != nil {
			return nil, err
		}
		id.Manifest = a.Manifest.Digest // of an index, the manifest for this platform
	}
	return s.acquire(ctx, id, from)
}

// AcquireLayers is Acquire for the layers that the snapshots in dirs retain
// (differ.Retained), the lowest first. chain identifies them: it must be no other chain, and
// no manifest. It is the Manifest of the Reference's ID.
func (s *Store) AcquireLayers(ctx context.Context, chain digest.Digest, dirs []string, owners unpack.IDMap) (*Reference, error) {
	read := func(context.Context) (*artifact.Artifact, error) { return differ.Chain(chain, dirs) }
	return s.acquire(ctx, ID{Manifest: chain, Owners: owners}, &source{read: read, retained: dirs})
}

// Applier returns a differ that unpacks layers within the limits of the store, and retains
// them in the snapshots of the snapshotter whose directory of snapshots is dir.
func (s *Store) Applier(dir string) *differ.Applier {
	return &differ.Applier{Snapshots: dir, Options: s.options(ID{}), Scratch: s.scratch}
}

// read reads the artifact whose manifest or index is target.
func (s *Store) read(ctx context.Context, target ocispec.Descriptor) (a *artifact.Artifact, err error) {
	ctx, end := span(ctx, "artifact.read", target.Digest)
	defer func() { end(err) }()
	return artifact.Read(ctx, s.content, target)
}

// has reports whether the tree is built; it may be of another version of this program.
func (s *Store) has(id ID) bool {
	_, err := os.Lstat(s.path(id))
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
