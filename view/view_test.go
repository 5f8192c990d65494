// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package view

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
	"github.com/artifact-snapshotter/artifact-snapshotter/internal/blobdir"
	"github.com/artifact-snapshotter/artifact-snapshotter/unpack"
)

// site is a content store and a store over it, with a list of users.
type site struct {
	*Store
	t      *testing.T
	config Config

	mu    sync.Mutex
	shown []ID
	err   error
}

func newSite(t *testing.T) *site {
	t.Helper()
	s := &site{t: t, config: Config{Root: t.TempDir(), State: t.TempDir(), Content: blobdir.Dir(t.TempDir()), Limits: unpack.DefaultLimits}}
	t.Cleanup(func() {
		if err := mount.UnmountRecursive(s.config.State, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	s.open()
	return s
}

// open opens the store, as after a restart.
func (s *site) open() {
	s.t.Helper()
	store, err := Open(context.Background(), s.config)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { store.Close() })
	store.AddUsers(func(context.Context) ([]ID, error) {
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.shown, s.err
	})
	s.Store = store
}

func (s *site) show(ids ...ID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.shown = ids
}

// pack makes an artifact of one file.
func (s *site) pack(content string) ocispec.Descriptor {
	s.t.Helper()
	a := pack.Artifact{Layers: []pack.Layer{{
		MediaType: "application/vnd.cncf.model.weight.v1.raw", Data: []byte(content),
		Annotations: map[string]string{"org.cncf.model.filepath": "weights"},
	}}}
	d, err := a.WriteTo(s.config.Content.String())
	if err != nil {
		s.t.Fatal(err)
	}
	return d
}

func (s *site) acquire(d ocispec.Descriptor) *View {
	s.t.Helper()
	v, err := s.Acquire(context.Background(), d, unpack.IDMap{})
	if err != nil {
		s.t.Fatal(err)
	}
	return v
}

func (s *site) sweep() {
	s.t.Helper()
	if err := s.Sweep(context.Background()); err != nil {
		s.t.Fatal(err)
	}
}

func (s *site) wantState(id ID, tree, mounted bool) {
	s.t.Helper()
	if got := s.has(id); got != tree {
		s.t.Errorf("the tree is there: %v, want %v", got, tree)
	}
	if got, err := s.mounted(id.name()); got != mounted || err != nil {
		s.t.Errorf("the tree is mounted: %v, %v, want %v", got, err, mounted)
	}
}

func (s *site) forget(d ocispec.Descriptor) {
	s.t.Helper()
	if err := os.Remove(s.content.Path(d.Digest)); err != nil {
		s.t.Fatal(err)
	}
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within 20 s", what)
		}
	}
}

func TestAViewLivesAsLongAsItsUsers(t *testing.T) {
	s := newSite(t)
	d := s.pack("bytes")
	v := s.acquire(d)
	s.sweep()
	s.wantState(v.ID, true, true) // held
	s.show(v.ID)
	v.Release()
	s.sweep()
	s.wantState(v.ID, true, true) // listed
	if b, err := os.ReadFile(filepath.Join(v.Path, "weights")); err != nil || string(b) != "bytes" {
		t.Errorf("%q, %v", b, err)
	}
	s.forget(d)
	s.sweep()
	s.wantState(v.ID, true, true) // in use, so it does not matter that the runtime deleted it
	s.show()
	s.sweep()
	s.wantState(v.ID, false, false)
	for _, dir := range []string{s.trees, s.sharedDir(), s.mounts} {
		if left, err := list(dir); len(left) != 0 || err != nil {
			t.Errorf("left in %s: %v %v", dir, left, err)
		}
	}
}

func TestATreeIsKeptForTheNextPodWhileTheManifestIsThere(t *testing.T) {
	s := newSite(t)
	v := s.acquire(s.pack("bytes"))
	v.Release()
	s.sweep()
	s.wantState(v.ID, true, false)
	s.acquire(ocispec.Descriptor{Digest: v.ID.Manifest}).Release()
	s.wantState(v.ID, true, true)
}

func TestOneTreeAndOneMountForAllWhoAsk(t *testing.T) {
	s := newSite(t)
	d := s.pack("bytes")
	var wg sync.WaitGroup
	paths := make([]string, 50)
	for i := range paths {
		wg.Go(func() {
			v, err := s.Acquire(context.Background(), d, unpack.IDMap{})
			if err != nil {
				t.Error(err)
				return
			}
			paths[i] = v.Path
		})
	}
	wg.Wait()
	mounts, err := mountinfo.GetMounts(mountinfo.SingleEntryFilter(paths[0]))
	if err != nil {
		t.Fatal(err)
	}
	trees, err := list(s.trees)
	if len(mounts) != 1 || len(trees) != 1 || err != nil {
		t.Errorf("%d mounts at %s, trees %v (%v); want one of each", len(mounts), paths[0], trees, err)
	}
}

func TestABuildOutlivesTheRequestThatBeganIt(t *testing.T) {
	s := newSite(t)
	d := s.pack("bytes")
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	v, err := s.Acquire(ctx, d, unpack.IDMap{})
	if err == nil {
		v.Release() // it was quicker
	} else if !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	id := ID{Manifest: d.Digest}
	eventually(t, "the tree is built", func() bool { return s.has(id) })
	eventually(t, "nothing holds it", func() bool {
		s.Store.mu.Lock()
		defer s.Store.mu.Unlock()
		return len(s.held) == 0
	})
	s.sweep()
	s.wantState(id, true, false)
}

func TestARequestDoesNotWaitForALongBuild(t *testing.T) {
	s := newSite(t)
	s.maxWait = time.Millisecond
	d := s.pack("bytes")
	done := make(chan struct{})
	build := s.builds.DoChan(ID{Manifest: d.Digest}.name(), func() (any, error) { <-done; return nil, nil })
	far := &progress{total: 8 << 30}
	far.done.Store(2 << 30)
	s.progress[d.Digest] = far
	_, err := s.Acquire(context.Background(), d, unpack.IDMap{})
	if !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "still being unpacked (25 % of 8192.0 MiB)") {
		t.Errorf("%v, want unavailable, and how far it is", err)
	}
	s.maxWait = time.Minute
	soon, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
	defer cancel()
	if _, err := s.Acquire(soon, d, unpack.IDMap{}); !errdefs.IsUnavailable(err) {
		t.Errorf("%v, want the answer before the deadline", err)
	}
	close(done)
	<-build
	s.acquire(d).Release()
}

func TestCloseEndsBuildsAndRefusesMore(t *testing.T) {
	s := newSite(t)
	d := s.pack("bytes")
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Acquire(context.Background(), d, unpack.IDMap{}); !errdefs.IsUnavailable(err) {
		t.Errorf("%v, want unavailable", err)
	}
}

func TestAnImageIsNoView(t *testing.T) {
	s := newSite(t)
	image, err := pack.Image(ocispec.ImageConfig{}, false)
	if err != nil {
		t.Fatal(err)
	}
	d, err := image.WriteTo(s.config.Content.String())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Acquire(context.Background(), d, unpack.IDMap{}); !errors.Is(err, artifact.ErrNotArtifact) {
		t.Errorf("%v, want %v", err, artifact.ErrNotArtifact)
	}
	if left, _ := list(s.trees); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
}

func TestEachUserNamespaceHasItsTree(t *testing.T) {
	s := newSite(t)
	d := s.pack("bytes")
	plain := s.acquire(d)
	shifted, err := s.Acquire(context.Background(), d, unpack.IDMap{UID: "0:200000:65536", GID: "0:200000:65536"})
	if err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]uint32{plain.Path: 0, shifted.Path: 200000} {
		var st unix.Stat_t
		if err := unix.Stat(filepath.Join(path, "weights"), &st); err != nil {
			t.Fatal(err)
		}
		if st.Uid != want {
			t.Errorf("%s: owner %d, want %d", path, st.Uid, want)
		}
	}
}

func TestAShiftedTreeGoesWithItsLastPod(t *testing.T) {
	s := newSite(t)
	s.Close()
	s.config.Rungs.Tar = unpack.Extract
	s.open()
	d := s.pack("bytes")
	v, err := s.Acquire(context.Background(), d, unpack.IDMap{UID: "0:200000:65536", GID: "0:200000:65536"})
	if err != nil {
		t.Fatal(err)
	}
	plain := ID{Manifest: d.Digest}
	s.wantState(v.ID, true, true)
	s.wantState(plain, true, false) // what it was made from
	s.show(v.ID)
	v.Release()
	s.sweep()
	s.wantState(v.ID, true, true)
	s.show()
	s.sweep()
	s.wantState(v.ID, false, false)
	s.wantState(plain, true, false)
}

func TestTreesForManyUserNamespacesAreMadeAtOnce(t *testing.T) {
	s := newSite(t)
	d := s.pack("bytes")
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			m := unpack.IDMap{}
			if i%2 == 0 {
				m.UID = fmt.Sprintf("0:%d:65536", 65536*(1+i))
				m.GID = m.UID
			}
			v, err := s.Acquire(context.Background(), d, m)
			if err != nil {
				t.Error(err)
				return
			}
			if b, err := os.ReadFile(filepath.Join(v.Path, "weights")); err != nil || string(b) != "bytes" {
				t.Errorf("%q, %v", b, err)
			}
		})
	}
	wg.Wait()
}

func TestNothingGoesWhenAUserCannotTell(t *testing.T) {
	s := newSite(t)
	d := s.pack("bytes")
	v := s.acquire(d)
	v.Release()
	s.forget(d)
	s.err = errors.New("the database is locked")
	if err := s.Sweep(context.Background()); !errors.Is(err, s.err) {
		t.Errorf("%v, want %v", err, s.err)
	}
	s.wantState(v.ID, true, true)
}

func TestNothingGoesWhenTheContentRootIsUnreadable(t *testing.T) {
	s := newSite(t)
	v := s.acquire(s.pack("bytes"))
	v.Release()
	blobs := filepath.Join(s.config.Content.String(), "blobs")
	if err := os.Rename(blobs, blobs+".away"); err != nil {
		t.Fatal(err)
	}
	s.sweep()
	s.wantState(v.ID, true, false)
	if err := os.WriteFile(blobs, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	s.sweep()
	s.wantState(v.ID, true, false)
}

func TestTheReasonOfAFailureReachesWhoeverAsksNext(t *testing.T) {
	s := newSite(t)
	d := s.pack("bytes")
	var layer string
	for _, blob := range s.blobs() {
		if b, err := os.ReadFile(blob); err == nil && string(b) == "bytes" {
			layer = blob
		}
	}
	if err := os.Remove(layer); err != nil {
		t.Fatal(err)
	}
	a, err := artifact.Read(context.Background(), s.content, d)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.serve(s.closing, ID{Manifest: d.Digest}, &source{Artifact: a}); !errdefs.IsNotFound(err) { // for nobody
		t.Fatal(err)
	}
	// Blocked, so that it can only be the reason of before.
	done := make(chan struct{})
	build := s.builds.DoChan(ID{Manifest: d.Digest}.name(), func() (any, error) { <-done; return nil, nil })
	s.maxWait = time.Millisecond
	_, first := s.Acquire(context.Background(), d, unpack.IDMap{})
	_, second := s.Acquire(context.Background(), d, unpack.IDMap{})
	close(done)
	<-build
	if !errdefs.IsNotFound(first) || !errdefs.IsUnavailable(second) {
		t.Errorf("%v, then %v; want the reason once, then another try", first, second)
	}
}

func TestAPanicIsAnError(t *testing.T) {
	s := newSite(t)
	_, err := s.serve(s.closing, ID{Manifest: s.pack("bytes").Digest}, &source{Artifact: &artifact.Artifact{Layers: []artifact.Layer{{
		// No manifest is read into this: it has no digest.
		Format: artifact.FormatRaw, File: artifact.File{Path: "f"},
	}}}})
	if !errdefs.IsInternal(err) {
		t.Errorf("%v, want an internal error", err)
	}
}

func TestAnUnusedTreeIsNoSecondCopy(t *testing.T) {
	s := newSite(t)
	d := s.pack("bytes")
	v := s.acquire(d)
	s.show(v.ID)
	v.Release()
	for _, blob := range s.blobs() { // the runtime deletes the image and pulls it again
		if err := os.Remove(blob); err != nil {
			t.Fatal(err)
		}
	}
	s.pack("bytes")
	s.sweep()
	s.wantState(v.ID, true, true) // a pod reads it
	s.show()
	s.sweep()
	s.wantState(v.ID, false, false)
}

func (s *site) blobs() []string {
	s.t.Helper()
	blobs, err := filepath.Glob(filepath.Join(s.config.Content.String(), "blobs/*/*"))
	if err != nil || len(blobs) == 0 {
		s.t.Fatal(blobs, err)
	}
	return blobs
}

func TestAChangeOfTheRungWhileAPodRuns(t *testing.T) {
	s := newSite(t)
	s.Close()
	s.config.Rungs = unpack.Rungs{Raw: unpack.Link, Tar: unpack.Extract}
	s.open()
	d := s.pack("bytes")
	v := s.acquire(d)
	s.show(v.ID)
	s.Close()
	s.config.Rungs = unpack.Rungs{Raw: unpack.Overlay, Tar: unpack.Extract}
	s.open()
	shifted, err := s.Acquire(context.Background(), d, unpack.IDMap{UID: "0:200000:65536", GID: "0:200000:65536"})
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{v.Path, shifted.Path} {
		if b, err := os.ReadFile(filepath.Join(path, "weights")); err != nil || string(b) != "bytes" {
			t.Errorf("%q, %v", b, err)
		}
	}
}

func TestATreeThatMayBeMountedIsKept(t *testing.T) {
	s := newSite(t)
	s.Close()
	s.config.Rungs = unpack.Rungs{Raw: unpack.Copy, Tar: unpack.Extract} // which every kernel has
	s.open()
	v := s.acquire(s.pack("bytes"))
	v.Release()
	s.sweep()
	s.Close()
	loop := s.mountpoint(v.ID.name()) // cannot be looked at, as on a broken disk
	if err := os.Symlink(loop, loop); err != nil {
		t.Fatal(err)
	}
	s.config.Rungs = unpack.Rungs{Raw: unpack.Link, Tar: unpack.Extract}
	if _, err := Open(context.Background(), s.config); err == nil || !strings.Contains(err.Error(), "cannot tell whether "+loop+" is mounted") {
		t.Errorf("%v, want that it cannot tell", err)
	}
	if !s.has(v.ID) {
		t.Error("the tree is gone")
	}
}

func TestSweepsDoNotDisturbEachOther(t *testing.T) {
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
			if err := s.Sweep(context.Background()); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
}

func TestAForcedRungThatDoesNotWorkIsAnErrorAtStart(t *testing.T) {
	c := Config{Root: t.TempDir(), State: t.TempDir(), Content: blobdir.Dir(t.TempDir()), Rungs: unpack.Rungs{Raw: "ladder"}}
	if _, err := Open(context.Background(), c); !errdefs.IsInvalidArgument(err) {
		t.Errorf("%v, want an invalid argument", err)
	}
}

func TestRunSweepsWhenTheRuntimeDeletesAManifest(t *testing.T) {
	s := newSite(t)
	d := s.pack("bytes")
	v := s.acquire(d)
	v.Release()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); s.Run(ctx) }()
	eventually(t, "the unused mount is gone", func() bool { mounted, err := s.mounted(v.ID.name()); return !mounted && err == nil })
	// The watch is in place before the first sweep or soon after; a deletion
	// that it misses is found by the next.
	eventually(t, "the tree is gone", func() bool {
		other := s.pack(fmt.Sprint(time.Now().UnixNano()))
		s.forget(other)
		os.Remove(s.content.Path(d.Digest))
		return !s.has(v.ID)
	})
	cancel()
	<-done
}

func TestCopiesGoWithTheLastTreeThatLinksToThem(t *testing.T) {
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
	s.sweep()
	if shared := s.sharedNames(); len(shared) != 1 {
		t.Fatalf("shared: %v, want the one of the layer", shared)
	}
	s.forget(d)
	s.sweep()
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

func TestAFlatTarGoesWithTheLastTreeThatLinksToIt(t *testing.T) {
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
		s.sweep()
		shared := s.sharedNames()
		if len(shared) != 2 {
			t.Fatalf("shared: %v, want the flat tar and the symlink to it", shared)
		}
		s.forget(d)
	}
	s.sweep()
	if shared := s.sharedNames(); len(shared) != 0 {
		t.Errorf("left: %v", shared)
	}
}

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
