// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package store

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
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
	"github.com/artifact-snapshotter/artifact-snapshotter/blobs"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
	"github.com/artifact-snapshotter/artifact-snapshotter/unpack"
)

// site is a content store and a Store on it, with a References that lists used.
type site struct {
	*Store
	t      *testing.T
	config Config

	mu   sync.Mutex
	used []ID
	err  error
}

func newSite(t *testing.T) *site {
	t.Helper()
	s := &site{t: t, config: Config{Root: t.TempDir(), State: t.TempDir(), Content: blobs.Dir(t.TempDir()), Limits: unpack.DefaultLimits}}
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
	store.AddReferences(func(context.Context) ([]ID, error) {
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.used, s.err
	})
	s.Store = store
}

func (s *site) uses(ids ...ID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.used = ids
}

// pack makes an artifact with one file.
func (s *site) pack(content string) ocispec.Descriptor {
	s.t.Helper()
	d, err := pack.File("weights", content).WriteTo(s.config.Content.String())
	if err != nil {
		s.t.Fatal(err)
	}
	return d
}

func (s *site) acquire(d ocispec.Descriptor) *Reference {
	s.t.Helper()
	v, err := s.Acquire(context.Background(), d, unpack.IDMap{})
	if err != nil {
		s.t.Fatal(err)
	}
	return v
}

func (s *site) collect() {
	s.t.Helper()
	if err := s.CollectGarbage(context.Background()); err != nil {
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

// held returns how many claims there are on trees.
func (s *site) held() (n int) {
	s.Store.mu.Lock()
	defer s.Store.mu.Unlock()
	for _, e := range s.entries {
		n += e.held
	}
	return n
}

// stateOf returns the state of the tree of d, and whether work on it is under way.
func (s *site) stateOf(d ocispec.Descriptor) (_ state, works bool) {
	s.Store.mu.Lock()
	defer s.Store.mu.Unlock()
	e := s.entry(ID{Manifest: d.Digest})
	return e.state, e.work != nil
}

// openGated opens the store again so that every build waits at its end, whether it fails or
// not, until the returned function is called.
func (s *site) openGated() (open func()) {
	s.t.Helper()
	s.Close()
	gate := make(chan struct{})
	s.config.Observer.Built = func(Build) { <-gate }
	s.open()
	open = sync.OnceFunc(func() { close(gate) })
	s.t.Cleanup(open)
	return open
}

// soon asks for d as a request that cannot wait.
func (s *site) soon(d ocispec.Descriptor) error {
	s.maxWait = time.Millisecond
	v, err := s.Acquire(context.Background(), d, unpack.IDMap{})
	s.maxWait = time.Minute
	if err == nil {
		v.Release()
	}
	return err
}

func (s *site) forget(d ocispec.Descriptor) {
	s.t.Helper()
	if err := os.Remove(s.content.Path(d.Digest)); err != nil {
		s.t.Fatal(err)
	}
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within 2 minutes", what)
		}
	}
}

func TestAMountStaysAsLongAsItIsClaimedOrListed(t *testing.T) {
	s := newSite(t)
	d := s.pack("bytes")
	v := s.acquire(d)
	s.collect()
	s.wantState(v.ID, true, true) // held
	s.uses(v.ID)
	v.Release()
	s.collect()
	s.wantState(v.ID, true, true) // listed
	if b, err := os.ReadFile(filepath.Join(v.Path, "weights")); err != nil || string(b) != "bytes" {
		t.Errorf("%q, %v", b, err)
	}
	s.forget(d)
	s.collect()
	s.wantState(v.ID, true, true) // in use, so it does not matter that the runtime deleted it
	s.uses()
	s.collect()
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
	s.collect()
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

func TestARequestForAMountedTreeReadsNoFile(t *testing.T) {
	s := newSite(t)
	d := s.pack("bytes")
	first := s.acquire(d)
	defer first.Release()
	s.forget(d)
	if err := os.WriteFile(filepath.Join(s.path(first.ID), "tree.json"), []byte("unreadable"), 0o600); err != nil {
		t.Fatal(err)
	}
	again := s.acquire(d)
	defer again.Release()
	if again.Path != first.Path || again.Modes != s.Modes() || again.Built != nil {
		t.Errorf("%+v, want %+v without a build", again, first)
	}
}

func TestABuildOutlivesTheRequestThatBeganIt(t *testing.T) {
	s := newSite(t)
	d := s.pack("bytes")
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	v, err := s.Acquire(ctx, d, unpack.IDMap{})
	if err == nil {
		v.Release() // the build was quicker
	} else if !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	id := ID{Manifest: d.Digest}
	eventually(t, "the tree is built", func() bool { return s.has(id) })
	eventually(t, "nothing holds it", func() bool { return s.held() == 0 })
	s.collect()
	s.wantState(id, true, false)
}

func TestARequestDoesNotWaitForALongBuild(t *testing.T) {
	s := newSite(t)
	s.Close()
	gate := make(chan struct{})
	const large = 3 << 20
	s.config.Observer.Counted = func(_ unpack.Retention, n int64) {
		if n == large {
			<-gate
		}
	}
	s.open()
	open := sync.OnceFunc(func() { close(gate) })
	t.Cleanup(open)
	a := pack.Artifact{}
	for i, size := range []int{1 << 20, large} {
		member := pack.Member{Data: make([]byte, size-3*512)} // beside a header and two blocks at the end
		member.Name, member.Mode = fmt.Sprint("weights", i), 0o644
		archive, err := pack.TarOf(member)
		if err != nil || len(archive) != size {
			t.Fatal(len(archive), err)
		}
		a.Layers = append(a.Layers, pack.Layer{MediaType: "application/vnd.cncf.model.weight.v1.tar", Data: archive})
	}
	d, err := a.WriteTo(s.config.Content.String())
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "the request is told how far the build is", func() bool {
		err := s.soon(d)
		if !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "still being unpacked") {
			t.Fatalf("%v, want unavailable", err)
		}
		return strings.Contains(err.Error(), "still being unpacked (25 % of 4.0 MiB)")
	})
	soon, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
	defer cancel()
	if _, err := s.Acquire(soon, d, unpack.IDMap{}); !errdefs.IsUnavailable(err) {
		t.Errorf("%v, want the answer before the deadline", err)
	}
	open()
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

func TestAnImageIsNotAnArtifact(t *testing.T) {
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

func TestAShiftedTreeIsRemovedWithItsLastPod(t *testing.T) {
	s := newSite(t)
	s.Close()
	s.config.Modes.Tar = unpack.Extract
	s.open()
	d := s.pack("bytes")
	v, err := s.Acquire(context.Background(), d, unpack.IDMap{UID: "0:200000:65536", GID: "0:200000:65536"})
	if err != nil {
		t.Fatal(err)
	}
	plain := ID{Manifest: d.Digest}
	s.wantState(v.ID, true, true)
	s.wantState(plain, true, false) // what it was made from
	s.uses(v.ID)
	v.Release()
	s.collect()
	s.wantState(v.ID, true, true)
	s.uses()
	s.collect()
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

// failUnseen lets the build of an artifact whose layer is missing fail after the only request
// for it has given up, and returns what puts the layer back. Builds do not wait after that.
func (s *site) failUnseen(d ocispec.Descriptor) (cure func()) {
	s.t.Helper()
	open := s.openGated()
	a, err := artifact.Read(context.Background(), s.content, d)
	if err != nil {
		s.t.Fatal(err)
	}
	layer := s.content.Path(a.Layers[0].Descriptor.Digest)
	elsewhere := filepath.Join(s.t.TempDir(), "layer")
	if err := os.Rename(layer, elsewhere); err != nil {
		s.t.Fatal(err)
	}
	if err := s.soon(d); !errdefs.IsUnavailable(err) {
		s.t.Fatal(err)
	}
	open()
	eventually(s.t, "the build has failed", func() bool { state, works := s.stateOf(d); return state == failed && !works })
	return func() {
		if err := os.Rename(elsewhere, layer); err != nil {
			s.t.Fatal(err)
		}
	}
}

func TestAFailureIsForgottenWhenTheNextTrySucceeds(t *testing.T) {
	s := newSite(t)
	d := s.pack("bytes")
	s.failUnseen(d)()
	s.acquire(d).Release()
	if f := s.entry(ID{Manifest: d.Digest}).failure; f != nil {
		t.Errorf("not forgotten: %v", f)
	}
}

// Whoever asks next begins another try, and is told of the one before if this one takes
// too long to wait for.
func TestTheReasonOfAFailureReachesWhoeverAsksNext(t *testing.T) {
	s := newSite(t)
	d := s.pack("bytes")
	cure := s.failUnseen(d)
	clock := &clock{}
	s.now = clock.now
	gate := make(chan struct{})
	s.observer.Built = func(Build) { <-gate } // another try, which does not end
	if err := s.soon(d); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "its blob is not in") {
		t.Errorf("%v, want the reason", err)
	}
	// Another pod may have waited for it, too.
	if err := s.soon(d); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "after a try that failed (artifact "+d.Digest.String()) {
		t.Errorf("%v, want that it goes on, and the reason", err)
	}
	clock.pass(tellFailure)
	if err := s.soon(d); !errdefs.IsUnavailable(err) || strings.Contains(err.Error(), "failed") {
		t.Errorf("%v, want nothing of a failure of long ago", err)
	}
	close(gate)
	eventually(t, "this try has failed, too", func() bool { _, works := s.stateOf(d); return !works })
	clock.pass(tellFailure)
	s.collect()
	if f := s.entry(ID{Manifest: d.Digest}).failure; f != nil {
		t.Errorf("not forgotten: %v", f)
	}
	cure()
	s.acquire(d).Release()
}

func TestWhoeverWaitsForAFailureIsToldOnce(t *testing.T) {
	s := newSite(t)
	d := s.pack("bytes")
	cure := s.failUnseen(d)
	if _, err := s.Acquire(context.Background(), d, unpack.IDMap{}); !errdefs.IsNotFound(err) {
		t.Errorf("%v, want the reason", err)
	}
	cure()
	gate := make(chan struct{})
	s.observer.Built = func(Build) { <-gate }
	if err := s.soon(d); !errdefs.IsUnavailable(err) || strings.Contains(err.Error(), "failed") {
		t.Errorf("%v, want that it goes on, and no old reason", err)
	}
	close(gate)
	s.acquire(d).Release()
}

func TestAPanicIsAnError(t *testing.T) {
	s := newSite(t)
	_, err := s.Store.acquire(context.Background(), ID{Manifest: s.pack("bytes").Digest}, &source{artifact: &artifact.Artifact{Layers: []artifact.Layer{{
		// No manifest is read into this: it has no digest.
		Format: artifact.FormatRaw, File: artifact.File{Path: "f"},
	}}}})
	if !errdefs.IsInternal(err) {
		t.Errorf("%v, want an internal error", err)
	}
}
