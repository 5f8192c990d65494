// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package store

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
	"github.com/artifact-snapshotter/artifact-snapshotter/unpack"
)

// gzipped makes an artifact of a raw file and a compressed tar, and returns its blobs by their
// encoded digests. None of them is in the content store.
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

// run runs the store until the test ends. It returns when the store sees blobs that arrive.
func (s *site) run() {
	s.t.Helper()
	s.Close()
	s.config.DecompressOnPull = true
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
			s.t.Fatal("nothing is unpacked while it is pulled")
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
	eventually(t, "the build has begun", func() bool { state, _ := s.stateOf(d); return state == pulling })
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
	eventually(t, "the build has begun", func() bool { state, _ := s.stateOf(d); return state == pulling })
	s.forget(d)
	eventually(t, "the build has ended", func() bool { state, works := s.stateOf(d); return state == unknown && !works })
	s.wantState(ID{Manifest: d.Digest}, false, false)
}

// clock is a clock that the test sets forward.
type clock struct{ offset atomic.Int64 }

func (c *clock) now() time.Time { return time.Now().Add(time.Duration(c.offset.Load())) }

func (c *clock) pass(d time.Duration) { c.offset.Add(int64(d)) }

// openOnPull opens a store that the test tells of blobs that arrive.
func (s *site) openOnPull() *clock {
	s.t.Helper()
	s.Close()
	s.config.DecompressOnPull = true
	s.open()
	c := &clock{}
	s.now = c.now
	return c
}

// beginOnPull lets the manifest and the config of gzipped(n) arrive. It returns the layers when
// the build waits for them.
func (s *site) beginOnPull(n int) (d ocispec.Descriptor, rest map[string][]byte) {
	s.t.Helper()
	d, rest = s.gzipped(n)
	for hex, b := range rest {
		if b[0] == '{' { // the manifest or the config
			s.arrive(hex, b)
			delete(rest, hex)
		}
	}
	s.arrived(context.Background(), s.content.Path(d.Digest))
	eventually(s.t, "the build waits for layers", func() bool {
		s.Store.mu.Lock()
		defer s.Store.mu.Unlock()
		p := s.entry(ID{Manifest: d.Digest}).pull
		return p != nil && p.blobs != nil
	})
	return d, rest
}

// waits reports whether the build of d waits for blobs.
func (s *site) waits(d ocispec.Descriptor) bool {
	state, works := s.stateOf(d)
	return state == pulling && works
}

// waiting returns how many builds wait for blobs, and how many directories are written to.
func (s *site) waiting() (builds, dirs int) {
	s.Store.mu.Lock()
	defer s.Store.mu.Unlock()
	return len(s.pulls()), len(s.reserved)
}

// ingest returns the store with which containerd receives a blob, and the name that it gives to
// the blob.
func (s *site) ingest(hex string) (store content.Store, ref string) {
	s.t.Helper()
	store, err := local.NewStore(s.config.Content.String())
	if err != nil {
		s.t.Fatal(err)
	}
	desc := ocispec.Descriptor{MediaType: "application/vnd.cncf.model.weight.v1.raw", Digest: digest.NewDigestFromEncoded(digest.SHA256, hex)}
	return store, "k8s.io/7/" + remotes.MakeRefKey(context.Background(), desc)
}

// receive makes containerd have one more byte of a blob.
func (s *site) receive(hex string) {
	s.t.Helper()
	store, ref := s.ingest(hex)
	w, err := store.Writer(context.Background(), content.WithRef(ref))
	if err != nil {
		s.t.Fatal(err)
	}
	if _, err := w.Write([]byte{0}); err != nil {
		s.t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		s.t.Fatal(err)
	}
}

func TestABuildOnPullEndsWhenNothingArrives(t *testing.T) {
	s := newSite(t)
	clock := s.openOnPull()
	dead, _ := s.beginOnPull(1)
	slow, rest := s.beginOnPull(2)
	var blobs []string
	for hex := range rest {
		blobs = append(blobs, hex)
	}
	for range 3 { // hours, as for a large blob over a slow connection
		for range 60 {
			clock.pass(time.Minute)
			s.receive(blobs[0])
			s.lookForProgress()
			if !s.waits(slow) {
				t.Fatal("a build has ended whose layer still arrives")
			}
		}
		if s.waits(dead) {
			t.Fatal("a build still waits that nothing has arrived for in an hour")
		}
	}
	eventually(t, "the build that waited in vain has ended", func() bool {
		builds, dirs := s.waiting()
		return builds == 1 && dirs == 1
	})
	// One layer arrives, which is progress. The other one does not.
	store, ref := s.ingest(blobs[0])
	if err := store.Abort(context.Background(), ref); err != nil {
		t.Fatal(err)
	}
	clock.pass(patience - time.Second)
	s.arrive(blobs[0], rest[blobs[0]])
	s.arrived(context.Background(), filepath.Join(s.config.Content.String(), "blobs/sha256", blobs[0]))
	clock.pass(patience - time.Second)
	s.lookForProgress()
	if !s.waits(slow) {
		t.Error("a build has ended that a layer has just arrived for")
	}
	clock.pass(time.Second)
	s.lookForProgress()
	eventually(t, "nothing waits", func() bool {
		builds, dirs := s.waiting()
		return builds+dirs+s.held() == 0
	})
	for _, d := range []ocispec.Descriptor{dead, slow} {
		s.wantState(ID{Manifest: d.Digest}, false, false)
	}
	// When all blobs are there, a pod gets the artifact all the same.
	s.arrive(blobs[1], rest[blobs[1]])
	s.acquire(slow).Release()
}

func TestAPodJoinsABuildOnPull(t *testing.T) {
	s := newSite(t)
	s.openOnPull()
	builds := 0
	s.observer.Built = func(Build) { builds++ }
	d, rest := s.beginOnPull(1)
	for hex, b := range rest {
		s.arrive(hex, b) // which the store is not told of
	}
	v := s.acquire(d)
	defer v.Release()
	if v.Built == nil || !v.Built.OnPull || builds != 1 {
		t.Errorf("built by %+v, in %d builds; want one that began with the pull", v.Built, builds)
	}
	s.wantState(v.ID, true, true)
	if state, works := s.stateOf(d); state != mounted || works {
		t.Errorf("the state is %d, work is under way: %v", state, works)
	}
}

// An artifact that really arrives is unpacked, whatever else builds wait for.
func TestNoNumberOfBuildsThatWaitInVainKeepsOthersFromIt(t *testing.T) {
	s := newSite(t)
	s.openOnPull()
	live, rest := s.beginOnPull(0)
	var first string
	for hex := range rest {
		first = hex
		break
	}
	s.receive(first)
	const room = maxOnPull / stalledAfter
	for i := range room + 20 {
		s.beginOnPull(1 + i)
		if n, _ := s.waiting(); n > room {
			t.Fatalf("%d builds wait, want %d at most", n, room)
		}
	}
	if !s.waits(live) {
		t.Error("the build that something arrives for has made room for others")
	}
	another, more := s.beginOnPull(room + 100)
	for _, blobs := range []map[string][]byte{rest, more} {
		for hex, b := range blobs {
			s.arrive(hex, b)
			s.arrived(context.Background(), filepath.Join(s.config.Content.String(), "blobs/sha256", hex))
		}
	}
	for _, d := range []ocispec.Descriptor{live, another} {
		eventually(t, "the tree is built", func() bool { return s.has(ID{Manifest: d.Digest}) })
	}
}

// A build that waits must not use more memory than it is counted with. A manifest with many
// layers uses most.
func TestAWaitingBuildIsCountedWithTheMemoryThatItTakes(t *testing.T) {
	s := newSite(t)
	s.openOnPull()
	var layers []string
	for n := range 9000 {
		layers = append(layers, fmt.Sprintf(`{"mediaType":"a/b.tar+gzip","digest":%q,"size":5}`, digest.FromString(strconv.Itoa(n))))
	}
	manifest := fmt.Appendf(nil, `{"schemaVersion":2,"config":{"mediaType":"a/b","digest":%q,"size":2},"layers":[%s]}`, digest.FromString("{}"), strings.Join(layers, ","))
	d := ocispec.Descriptor{Digest: digest.FromBytes(manifest), Size: int64(len(manifest))}
	s.arrive(digest.FromString("{}").Encoded(), []byte("{}"))
	s.arrive(d.Digest.Encoded(), manifest)
	s.arrived(context.Background(), s.content.Path(d.Digest))
	s.Store.mu.Lock()
	p := s.entry(ID{Manifest: d.Digest}).pull
	s.Store.mu.Unlock()
	if p == nil {
		t.Fatal("nothing waits")
	}
	p.stop()
	s.Close() // nothing else uses memory meanwhile
	used := func() int64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc)
	}
	before := used()
	a, err := s.read(context.Background(), d)
	if err != nil {
		t.Fatal(err)
	}
	blobs := map[string]bool{}
	for _, l := range a.Layers {
		blobs[l.Descriptor.Digest.Encoded()] = true
	}
	if took := used() - before; took > p.size {
		t.Errorf("%d bytes of memory for a manifest of %d, want %d at most", took, d.Size, p.size)
	}
	runtime.KeepAlive(a)
	runtime.KeepAlive(blobs)
}

func TestWhatContainerdReceives(t *testing.T) {
	s := newSite(t)
	hex := digest.FromString("x").Encoded()
	ingest := filepath.Join(s.config.Content.String(), "ingest", "0123")
	if err := os.MkdirAll(ingest, 0o755); err != nil {
		t.Fatal(err)
	}
	for ref, want := range map[string]map[string]int64{
		"k8s.io/1/layer-sha256:" + hex:             {hex: 5},
		"k8s.io/12/unknown-name@sha256:" + hex:     {hex: 5},
		"artifact-snapshotter-empty-sha256":        {},
		"k8s.io/1/layer-sha256:" + hex + "/../../": {},
		"": {},
	} {
		for name, text := range map[string]string{"ref": ref, "data": "bytes"} {
			if err := os.WriteFile(filepath.Join(ingest, name), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if got := s.receiving(); !maps.Equal(got, want) {
			t.Errorf("%q: %v, want %v", ref, got, want)
		}
	}
}
