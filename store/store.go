// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

// Package store keeps the trees of a node's artifacts: for each artifact one tree (package
// unpack) and one shared mount, however many pods use it. Garbage collection removes what
// nothing uses.
//
// Front ends ask for image volumes with [Store.MountVolume], and for other mounts with
// [Store.Acquire]. The store keeps no list of who uses a tree: the front ends have one on
// disk, and are asked for it (References), so that nothing can disagree after a crash; those
// without a database have [Records]. What
// trees and mounts there are is read from the directories of the store:
//
//	<root>/trees/<name>      a tree
//	<root>/trees/new-*       a tree that is being built, or trash; probe-* is of a probe
//	<root>/blobs/<algorithm> what trees share: decompressed archives, and blobs that could
//	                         not be linked from the runtime's
//	<root>/boot              the boot ID of the kernel when the trees were built
//	<state>/mounts/<name>    the shared mount of a tree
//
// What is known of one tree beside that, and the work on it, is a state machine (state.go).
//
// The store never calls containerd. It works inside calls of containerd to the snapshotter,
// and a call back would deadlock with containerd's garbage collector.
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
)

// Config says where the store keeps its files, and how.
type Config struct {
	// Root is the directory for trees. If it is on the file system of Content, no byte is
	// copied; otherwise each blob is copied once.
	Root string
	// State is the directory for mounts. It does not have to survive a reboot.
	State string
	// Content is where the runtime, or each runtime of the node, keeps its blobs.
	Content blobs.Source
	// Modes are how layers are laid out; "" is the best mode that works on this node.
	Modes unpack.Modes
	// DirectIO allows only modes whose files can be read with O_DIRECT.
	DirectIO bool
	// Limits bound the memory and the disk space that building trees uses.
	Limits unpack.Limits
	// DecompressOnPull lets Run build the trees of artifacts with compressed layers while the
	// runtime pulls them.
	DecompressOnPull bool
	// Images are those of the runtime whose volumes front ends ask for; nil if nothing is
	// known of them, and then volumes are mounted without a check.
	Images Images
	// Observer is told of what the store does.
	Observer Observer
}

// References lists the trees that a front end uses at this moment. It must not call the
// store.
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
	seen sync.Map

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
	// change is closed when a blob may have arrived or been deleted.
	change chan struct{}
	// received is how much the runtime had of the blobs that it was receiving, in bytes.
	received map[string]int64
}

// Modes returns how the store lays out layers.
func (s *Store) Modes() unpack.Modes { return s.modes }

// AddRetained keeps the trees that r lists from being removed, even when nobody uses them: a
// mount that was made from a view may outlive the view. They are unmounted all the same.
func (s *Store) AddRetained(r References) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.retained = append(s.retained, r)
}

// AddReferences keeps the trees that r lists mounted. Every front end must be added before
// Run.
func (s *Store) AddReferences(r References) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.references = append(s.references, r)
}

// Close cancels the builds that are under way. Mounts stay for the pods that use them.
func (s *Store) Close() error {
	s.mu.Lock()
	s.close()
	s.mu.Unlock()
	s.running.Wait()
	return nil
}

// Reference is a claim on a tree that is mounted. The mount stays until the claim ends, and
// after that as long as a References lists the ID.
type Reference struct {
	// ID is what the References of a front end must list.
	ID ID
	// Path is the shared, read-only mount. Front ends mount it by unpack.Bind.
	Path string
	// Modes are how the tree was laid out; "" if another version of this program built it.
	Modes unpack.Modes
	// Built is the build that the caller waited for; nil if the tree was there.
	Built *Build

	release func(listed bool)
}

// Release ends the claim, and asks for a garbage collection. Call it, or Listed, once.
func (r *Reference) Release() { r.release(false) }

// Listed ends the claim of a caller whose References lists the ID by now.
func (r *Reference) Listed() { r.release(true) }

// Find returns the descriptor of the blob whose encoded digest is hex.
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

// AcquireLayers is Acquire for layers that have no manifest. chain identifies them: it must
// be the digest of no other layers, and of no manifest. It is the Manifest of the Reference's
// ID. read is called if the tree is not there. The layers' blobs are in from.
func (s *Store) AcquireLayers(ctx context.Context, chain digest.Digest, from blobs.Source, owners unpack.IDMap, read func(context.Context) (*artifact.Artifact, error)) (*Reference, error) {
	return s.acquire(ctx, ID{Manifest: chain, Owners: owners}, &source{read: read, blobs: from})
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

// Tree returns the tree of id; errdefs.ErrNotFound if it is not built.
func (s *Store) Tree(id ID) (*unpack.Tree, error) {
	t, err := unpack.Load(filepath.Join(s.trees, id.name()))
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("artifact %s is not unpacked: %w", id.Manifest, errdefs.ErrNotFound)
	}
	return t, err
}

// MountedAt returns the ID of the tree whose shared mount the path is, or is in, if the tree
// is one for these owners or for none.
func (s *Store) MountedAt(path string, owners unpack.IDMap) (ID, bool) {
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

// mounted reports whether a tree of that name is mounted. On an error pods may use it.
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

// unmount removes the shared mount. Pods that still use it, which only exist if containerd
// has forgotten them, have bind mounts of their own.
func (s *Store) unmount(name string) error {
	target := s.mountpoint(name)
	_, seen := os.Lstat(target)
	if errors.Is(seen, os.ErrNotExist) {
		return nil
	}
	// A mount from a broken disk cannot be looked at, but can be unmounted.
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
