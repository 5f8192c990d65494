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
//	<root>/copies/<hex>      a blob that could not be linked from the runtime's
//	<root>/boot              the boot of the kernel that the above are of
//	<state>/mounts/<name>    the shared mount of a Tree that somebody shows
//
// The store never calls containerd: it is used inside of snapshotter calls,
// where a call back can deadlock against containerd's garbage collector.
package view

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/moby/sys/mountinfo"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/singleflight"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
	"github.com/artifact-snapshotter/artifact-snapshotter/internal/blobdir"
	"github.com/artifact-snapshotter/artifact-snapshotter/unpack"
)

// maxWait is how long a request waits for a build. containerd holds a lock of
// the snapshotter's during a request: its garbage collector waits for it, and
// every other request waits for the collector (core/metadata/snapshot.go). A
// request for a large compressed artifact must not stop the node's other pods;
// kubelet asks again.
const maxWait = 20 * time.Second

// Config says where the store keeps what.
type Config struct {
	// Root is the directory for Trees. On the file system of Content no byte
	// is copied; on another one each blob is copied once.
	Root string
	// State is the directory for mounts. It does not have to survive a reboot.
	State string
	// Content is where the runtime keeps its blobs.
	Content blobdir.Dir
	// Rung is how raw layers are laid out; "" takes the best that works here.
	Rung unpack.Rung
}

// Users lists the artifacts that somebody shows at this moment. It must not
// call the store.
type Users func(context.Context) ([]ID, error)

// Store is safe for concurrent use.
type Store struct {
	trees, copies, mounts string
	content               blobdir.Dir
	rung                  unpack.Rung

	builds  singleflight.Group
	maxWait time.Duration
	// closing ends the builds, which outlive the requests that began them.
	closing context.Context
	close   context.CancelFunc
	running sync.WaitGroup
	wake    chan struct{} // asks Run for a sweep

	// mu makes "nobody shows it, so it goes" one step against Acquire.
	mu    sync.Mutex
	users []Users
	held  map[string]int // views by Tree name that no Users lists yet
	// building are the names in trees that builds write to; progress is how far
	// they are, and failed how those ended that nobody had waited for, by the
	// name of the Tree to be.
	building map[string]bool
	progress map[string]*progress
	failed   map[string]error
}

// Open opens the store in c.Root and puts right what a crash or a reboot left.
// Trees and copies of an earlier boot go, since they were never synced to the
// disk; so do mounts of Trees that are no more. Mounts that are still there are
// kept; the first sweep takes those that nobody shows, and whatever is to be
// removed. A rung that does not work here is an error.
func Open(ctx context.Context, c Config) (*Store, error) {
	s := &Store{
		trees:    filepath.Join(c.Root, "trees"),
		copies:   filepath.Join(c.Root, "copies"),
		mounts:   filepath.Join(c.State, "mounts"),
		content:  c.Content,
		rung:     c.Rung,
		maxWait:  maxWait,
		wake:     make(chan struct{}, 1),
		held:     map[string]int{},
		building: map[string]bool{},
		progress: map[string]*progress{},
		failed:   map[string]error{},
	}
	s.closing, s.close = context.WithCancel(context.WithoutCancel(ctx))
	// Everything above what is mounted into a pod with a user namespace must
	// be searchable by its users; what is behind a mount need not be.
	for _, d := range []struct {
		path string
		mode os.FileMode
	}{{c.Root, 0o711}, {s.trees, 0o700}, {c.State, 0o711}, {s.mounts, 0o711}} {
		if err := makeDir(d.path, d.mode); err != nil {
			return nil, err
		}
	}
	if err := s.chooseRung(ctx); err != nil {
		return nil, err
	}
	if err := s.recover(ctx, filepath.Join(c.Root, "boot")); err != nil {
		return nil, err
	}
	return s, nil
}

// makeDir makes dir, with that mode whatever the umask, unless it is there.
func makeDir(dir string, mode os.FileMode) error {
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return err
	}
	err := os.Mkdir(dir, mode)
	if errors.Is(err, os.ErrExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return os.Chmod(dir, mode)
}

func (s *Store) chooseRung(ctx context.Context) error {
	if s.rung != "" {
		return unpack.Try(s.trees, s.rung)
	}
	rung, why := unpack.Probe(s.trees)
	if rung == "" {
		return fmt.Errorf("no way to lay out raw layers works: %w", why)
	}
	logger := log.G(ctx).WithField("rung", rung)
	if why != nil {
		logger.WithError(why).Warn("raw layers are laid out in a lesser way than could be")
	} else {
		logger.Info("raw layers are laid out")
	}
	s.rung = rung
	return nil
}

// recover sets aside what cannot be used after a crash, a reboot or a change of
// the rung. marker is a file that holds the boot of the last time.
func (s *Store) recover(ctx context.Context, marker string) error {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return fmt.Errorf("cannot tell whether the node was booted since the last start: %w", err)
	}
	last, err := os.ReadFile(marker)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	rebooted := !bytes.Equal(boot, last)
	names, err := list(s.trees)
	if err != nil {
		return err
	}
	for _, name := range names {
		if manifest(name) == "" {
			continue // the sweep's
		}
		t, err := unpack.Load(filepath.Join(s.trees, name))
		if err == nil && !rebooted && (t.Rung == s.rung || s.mounted(name)) {
			continue
		}
		log.G(ctx).WithField("tree", name).Info("removing a tree of an earlier boot or of another rung")
		if err := errors.Join(s.unmount(name), s.setAside(filepath.Join(s.trees, name))); err != nil {
			return fmt.Errorf("cannot remove the tree %s: %w", name, err)
		}
	}
	if rebooted {
		if err := s.setAside(s.copies); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	if err := makeDir(s.copies, 0o700); err != nil {
		return err
	}
	// A mount without its Tree shows an empty directory: somebody has removed
	// the root, or given the daemon another one.
	mounts, err := list(s.mounts)
	if err != nil {
		return err
	}
	for _, name := range mounts {
		if !s.hasName(name) {
			if err := s.unmount(name); err != nil {
				return err
			}
		}
	}
	if !rebooted {
		return nil
	}
	return os.WriteFile(marker, boot, 0o600)
}

// setAside renames p to what the next sweep removes: at once, where removing it
// takes time, or space that a full disk does not have.
func (s *Store) setAside(p string) error {
	return os.Rename(p, filepath.Join(s.trees, aside()))
}

// aside is a new name in trees that is not one of a Tree.
func aside() string { return "new-" + strings.ToLower(rand.Text()) }

// AddUsers makes the sweep ask u who shows what. All doors must be added before
// Run.
func (s *Store) AddUsers(u Users) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.users = append(s.users, u)
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

// View is an artifact that is mounted. It stays until Release, and after that
// for as long as some Users lists its ID.
type View struct {
	// ID is what Users must list.
	ID ID
	// Path is the shared, read-only mount. Bind it where it is wanted.
	Path string

	release func()
}

// Release ends the caller's claim. Call it once, after the ID is listed.
func (v *View) Release() { v.release() }

// Acquire mounts the artifact whose manifest or index is target. The Tree is
// built by the first who asks, once for all who ask meanwhile. When ctx ends,
// or the build takes longer than a request should, the build goes on for the
// next one; the latter is errdefs.ErrUnavailable. An image that is no artifact
// is artifact.ErrNotArtifact.
func (s *Store) Acquire(ctx context.Context, target ocispec.Descriptor, owners unpack.IDMap) (*View, error) {
	id := ID{Manifest: target.Digest, Owners: owners}
	release := s.hold(id.name())
	// The common case needs no JSON: the Tree is there, under the digest that
	// was asked for.
	var a *artifact.Artifact
	if !s.has(id) {
		var err error
		if a, err = artifact.Read(ctx, s.content, target); err != nil {
			release()
			return nil, err
		}
		if a.Manifest.Digest != target.Digest { // of an index, this platform's
			release()
			id.Manifest = a.Manifest.Digest
			release = s.hold(id.name())
		}
	}
	if err := s.takeFailure(id.name()); err != nil {
		release()
		return nil, err
	}
	timeout := time.After(s.maxWait)
	for {
		build := s.builds.DoChan(id.name(), func() (any, error) { return nil, s.serve(id, a) })
		var err error
		select {
		case r := <-build:
			if err = r.Err; err != nil {
				_ = s.takeFailure(id.name()) // this is it
				break
			}
			// A call that was about to end when we joined it may have been
			// swept before we took hold.
			if !s.mounted(id.name()) {
				continue
			}
			return &View{ID: id, Path: s.mountpoint(id.name()), release: release}, nil
		case <-ctx.Done():
			err = s.unfinished(id, ctx.Err())
		case <-timeout:
			err = s.unfinished(id, errdefs.ErrUnavailable)
		}
		release()
		return nil, err
	}
}

// progress is how many bytes of an artifact's blobs a build has done.
type progress struct {
	done  atomic.Int64
	total int64
}

// unfinished says how far the build of id is, for somebody who cannot wait.
func (s *Store) unfinished(id ID, why error) error {
	s.mu.Lock()
	p := s.progress[id.name()]
	s.mu.Unlock()
	far := ""
	if p != nil && p.total > 0 {
		far = fmt.Sprintf(" (%d %% of %d MiB)", 100*p.done.Load()/p.total, p.total>>20)
	}
	return fmt.Errorf("artifact %s is still being unpacked%s, which goes on; try again: %w", id.Manifest, far, why)
}

// serve mounts the Tree of id for all who wait for it, and keeps the reason if
// it cannot: they may have given up by then. A panic, of a decoder that has met
// what its authors have not thought of, must not end the daemon.
func (s *Store) serve(id ID, a *artifact.Artifact) (err error) {
	if !s.begin() {
		return fmt.Errorf("the snapshotter is shutting down: %w", errdefs.ErrUnavailable)
	}
	defer s.running.Done()
	defer s.hold(id.name())() // also when all who asked have given up
	defer func() {
		if p := recover(); p != nil {
			log.L.WithField("artifact", id.Manifest).Errorf("panic: %v\n%s", p, debug.Stack())
			err = fmt.Errorf("artifact %s: the snapshotter has failed, please report it with its log: panic: %v: %w", id.Manifest, p, errdefs.ErrInternal)
		}
		if err != nil && s.closing.Err() == nil {
			log.L.WithError(err).WithField("artifact", id.Manifest).Warn("cannot show an artifact")
			s.mu.Lock()
			s.failed[id.name()] = err
			s.mu.Unlock()
		}
	}()
	return s.mount(s.closing, id, a)
}

// takeFailure returns why the last build failed, once, if nobody has been told.
func (s *Store) takeFailure(name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	err := s.failed[name]
	delete(s.failed, name)
	return err
}

// begin counts a build, unless the store is closing.
func (s *Store) begin() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing.Err() != nil {
		return false
	}
	s.running.Add(1)
	return true
}

// hold keeps the sweep from name until the returned function is called.
func (s *Store) hold(name string) func() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.held[name]++
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.held[name]--; s.held[name] == 0 {
			delete(s.held, name)
			s.Wake() // nobody may show it: the caller failed, or gave up
		}
	}
}

func (s *Store) has(id ID) bool { return s.hasName(id.name()) }

func (s *Store) hasName(name string) bool {
	_, err := unpack.Load(filepath.Join(s.trees, name))
	return err == nil
}

// mount makes sure that the Tree of id is there and mounted. The artifact may be
// nil if the Tree was there when it was taken hold of.
func (s *Store) mount(ctx context.Context, id ID, a *artifact.Artifact) error {
	name := id.name()
	t, err := unpack.Load(filepath.Join(s.trees, name))
	if err != nil {
		// Whatever is mounted shows another Tree, one that has been deleted.
		if err := s.unmount(name); err != nil {
			return err
		}
		if t, err = s.build(ctx, id, a); err != nil {
			return err
		}
	}
	if s.mounted(name) {
		return nil
	}
	target := s.mountpoint(name)
	if err := makeDir(target, 0o711); err != nil {
		return err
	}
	return t.Mount(target)
}

// build makes a Tree beside the others and renames it into place complete.
func (s *Store) build(ctx context.Context, id ID, a *artifact.Artifact) (*unpack.Tree, error) {
	if a == nil { // somebody has deleted it by hand
		return nil, fmt.Errorf("the tree of artifact %s has just gone, try again: %w", id.Manifest, errdefs.ErrUnavailable)
	}
	log.G(ctx).WithField("artifact", id.Manifest).Debug("building the tree")
	tmp, far := aside(), &progress{}
	for _, l := range a.Layers {
		far.total += l.Descriptor.Size
	}
	s.mu.Lock()
	s.building[tmp], s.progress[id.name()] = true, far
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.building, tmp)
		delete(s.progress, id.name())
	}()
	dir, final := filepath.Join(s.trees, tmp), filepath.Join(s.trees, id.name())
	if _, err := unpack.Build(ctx, dir, a, unpack.Options{
		Rung: s.rung, Blobs: s.content, Copies: s.copies, Owners: id.Owners,
		Progress: func(n int64) { far.done.Add(n) },
	}); err != nil {
		return nil, err
	}
	if err := s.setAside(final); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	if err := os.Rename(dir, final); err != nil {
		return nil, err
	}
	return unpack.Load(final)
}

// Tree is the Tree of id, if it is built.
func (s *Store) Tree(id ID) (*unpack.Tree, error) {
	t, err := unpack.Load(filepath.Join(s.trees, id.name()))
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("artifact %s is not unpacked: %w", id.Manifest, errdefs.ErrNotFound)
	}
	return t, err
}

func (s *Store) mountpoint(name string) string { return filepath.Join(s.mounts, name) }

func (s *Store) mounted(name string) bool {
	ok, err := mountinfo.Mounted(s.mountpoint(name))
	return ok && err == nil
}

// unmount takes the shared mount away. Pods that still show it (there are none
// but those whose containerd has forgotten them) have binds of their own.
func (s *Store) unmount(name string) error {
	target := s.mountpoint(name)
	if err := mount.UnmountAll(target, unix.MNT_DETACH); err != nil {
		return err
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

// Find is the descriptor of the blob whose encoded digest is hex, all that
// containerd says of an image volume.
func (s *Store) Find(hex string) (ocispec.Descriptor, error) { return s.content.Find(hex) }
