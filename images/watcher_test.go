// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package images

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"

	"github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/artifact-snapshotter/artifact-snapshotter/blobs"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
)

// sampleImage returns an artifact with the digests of those words.
func sampleImage(name, manifest, config string) *Image {
	dgst := digest.FromString(manifest)
	return &Image{
		Image:    images.Image{Name: name, Target: ocispec.Descriptor{Digest: dgst}},
		Manifest: dgst,
		Config:   digest.FromString(config),
	}
}

func TestConflictsAreImagesOfOneConfigWithAnotherManifest(t *testing.T) {
	one, oneByDigest := sampleImage("one:v1", "one", "shared"), sampleImage("one@sha256:1", "one", "shared")
	two, own := sampleImage("two:v1", "two", "shared"), sampleImage("own:v1", "own", "own")
	id := sampleImage(digest.FromString("shared").String(), "three", "shared")
	image, same := sampleImage("image:v1", "image", "shared"), sampleImage("same:v1", "same", "shared")
	image.container, same.container = true, true
	refused := sampleImage("refused:v1", "image", "shared") // by an index that lies of its size, say
	for _, tt := range []struct {
		name string
		all  []*Image
		want map[string]string // names by manifest
	}{
		{"none", nil, nil},
		{"one", []*Image{one}, nil},
		{"two names of one", []*Image{one, oneByDigest}, nil},
		{"other configs", []*Image{one, own}, nil},
		{"two", []*Image{one, oneByDigest, two, own}, map[string]string{"one": "two:v1", "two": "one:v1 one@sha256:1"}},
		{"the image ID is no name", []*Image{one, oneByDigest, sampleImage(id.Name, "one", "shared")}, nil},
		{"an image that has lost its names", []*Image{one, id}, map[string]string{"three": "one:v1"}},
		{"images", []*Image{image, same}, nil},
		{"images and an artifact", []*Image{image, same, one}, map[string]string{"image": "one:v1", "same": "one:v1", "one": "image:v1 same:v1"}},
		{"an artifact of the manifest of an image", []*Image{image, refused}, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			sharing, all := sharings(tt.all), map[digest.Digest]string{}
			for manifest, names := range tt.want {
				all[digest.FromString(manifest)] = names
			}
			for _, i := range tt.all {
				want := strings.Fields(all[i.Manifest])
				for limit := range 3 {
					some, more := sharing[i.Config].With(*i, limit)
					var names []string
					for _, other := range some {
						names = append(names, other.Name)
					}
					if !slices.Equal(names, want[:min(limit, len(want))]) || len(names)+more != len(want) {
						t.Errorf("%s is in conflict with %q and %d more, want %d of %q", i.Name, names, more, limit, want)
					}
				}
			}
		})
	}
}

func TestAConflictNamesFewArtifactsOnce(t *testing.T) {
	sharing := func(all ...*Image) *Sharing { return sharings(all)[digest.FromString("shared")] }
	one, two := sampleImage("one:v1", "one", "shared"), sampleImage("two:v1", "two", "shared")
	err := sharing(two, one, sampleImage("two@sha256:2", "two", "shared"), sampleImage(digest.FromString("shared").String(), "one", "shared"), sampleImage("esc\x1b[2J", "three", "shared")).conflict(*one)
	if !errdefs.IsFailedPrecondition(err) {
		t.Errorf("the error is of another kind: %v", err)
	}
	for _, want := range []string{
		`: "esc\x1b[2J" (` + Short(digest.FromString("three")) + `), "one:v1" (` + Short(digest.FromString("one")) + `), "two:v1" (` + Short(digest.FromString("two")) + "); ",
		"crictl rmi " + digest.FromString("shared").Encoded()[:12],
	} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("the error does not say %q: %v", want, err)
		}
	}
	// The same ones in whatever order, and in no more bytes than an event has.
	var many []*Image
	for i := range 2000 {
		name := fmt.Sprintf("registry.example.com/%s/%04d:v1", strings.Repeat("é\x1b", 400), i)
		many = append(many, sampleImage(name+"@"+digest.FromString(name).String(), name, "shared"), sampleImage(name, name, "shared"))
	}
	want := sharing(many...).conflict(*many[7])
	if len(want.Error()) > 1024 || strings.Count(want.Error(), `:v1" (sha256:`) != 4 || !utf8.ValidString(want.Error()) {
		t.Errorf("%d bytes: %v", len(want.Error()), want)
	}
	for i := range 4 {
		if named := fmt.Sprintf(`/%04d:v1" (`, i); !strings.Contains(want.Error(), named) {
			t.Errorf("the error does not have %s: %v", named, want)
		}
	}
	if !strings.Contains(want.Error(), ", and 1996 more; ") {
		t.Errorf("the error does not count the others: %v", want)
	}
	slices.Reverse(many)
	if got := sharing(many...).conflict(*many[len(many)-8]); got.Error() != want.Error() {
		t.Errorf("in another order it is\n%v, not\n%v", got, want)
	}
}

// newTestWatcher is a Watcher that waits long, and has the artifacts, all with one
// config, in its directory of blobs.
func newTestWatcher(t *testing.T, names ...string) (*Watcher, map[string]digest.Digest) {
	t.Helper()
	dir := t.TempDir()
	targets := map[string]digest.Digest{}
	for _, name := range names {
		a := pack.Artifact{ArtifactType: pack.GenericType, ConfigType: ocispec.MediaTypeEmptyJSON, Layers: []pack.Layer{{MediaType: "text/plain", Data: []byte(name)}}}
		desc, err := a.WriteTo(dir)
		if err != nil {
			t.Fatal(err)
		}
		targets[name] = desc.Digest
	}
	w := NewWatcher("/no/containerd.sock", blobs.Dir(dir))
	w.checkWait, w.lateWait = time.Minute, time.Minute
	return w, targets
}

// fakeStream is a stream to which what is published comes back.
func fakeStream(capacity int) (stream, chan *events.Envelope) {
	envelopes := make(chan *events.Envelope, capacity)
	return stream{
		envelopes: envelopes,
		topic:     helloTopic + "test",
		publish: func(_ context.Context, topic string, event events.Event) error {
			e, err := typeurl.MarshalAny(event)
			envelopes <- &events.Envelope{Topic: topic, Event: e}
			return err
		},
	}, envelopes
}

// following has the Watcher follow the stream until the end of the test.
func following(t *testing.T, w *Watcher, s stream, handle func(*events.Envelope) error) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- w.follow(ctx, s, handle) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; !errors.Is(err, context.Canceled) {
			t.Errorf("the Watcher ended before: %v", err)
		}
	})
}

func noImages(*events.Envelope) error { return errors.New("there is an event of an image") }

// know makes the images known, by namespace and name.
func (w *Watcher) know(ctx context.Context, targets map[string]digest.Digest, images ...string) {
	known := map[string]*catalog{}
	for _, i := range images {
		namespace, name, _ := strings.Cut(i, "/")
		if known[namespace] == nil {
			known[namespace] = newCatalog()
		}
		known[namespace].put(w.identify(ctx, imageRecord(name, targets[name])))
	}
	w.set(func() { w.known = known })
}

func imageRecord(name string, target digest.Digest) images.Image {
	return images.Image{Name: name, Target: ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: target}}
}

func TestCheckRefusesWhatMayBeAnother(t *testing.T) {
	w, targets := newTestWatcher(t, "one", "two")
	for _, name := range []string{"image", "same image"} {
		ordinary := pack.Artifact{ConfigType: ocispec.MediaTypeImageConfig, Config: []byte("{}"), Layers: []pack.Layer{{MediaType: ocispec.MediaTypeImageLayer, Data: []byte(name)}}}
		desc, err := ordinary.WriteTo(string(w.blobs))
		if err != nil {
			t.Fatal(err)
		}
		targets[name] = desc.Digest
	}
	s, _ := fakeStream(1)
	following(t, w, s, noImages)
	for _, tt := range []struct {
		name   string
		known  []string
		target string
		refuse bool
	}{
		{"alone", []string{"k8s.io/one"}, "one", false},
		{"with another", []string{"k8s.io/one", "k8s.io/two"}, "one", true},
		{"the other one", []string{"k8s.io/one", "k8s.io/two"}, "two", true},
		{"in another namespace", []string{"k8s.io/one", "default/two"}, "one", false},
		{"not known, alone", nil, "one", false},
		{"not known, with another", []string{"k8s.io/two"}, "one", true},
		{"with an image", []string{"k8s.io/image", "k8s.io/one"}, "one", true},
		{"an image with an artifact", []string{"k8s.io/image", "k8s.io/one"}, "image", true},
		{"an image with an image", []string{"k8s.io/image", "k8s.io/same image"}, "image", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w.know(t.Context(), targets, tt.known...)
			err := w.Check(t.Context(), "k8s.io", targets[tt.target])
			if tt.refuse != errdefs.IsFailedPrecondition(err) || !tt.refuse && err != nil {
				t.Errorf("got %v, want refused: %v", err, tt.refuse)
			}
		})
	}
}

func TestCheckWaitsForTheList(t *testing.T) {
	w, targets := newTestWatcher(t, "one", "two")
	checked := make(chan error)
	go func() { checked <- w.Check(t.Context(), "k8s.io", targets["one"]) }()
	// It must not be content with an empty list that is none.
	s, _ := fakeStream(1)
	following(t, w, s, noImages)
	w.set(func() {})
	w.know(t.Context(), targets, "k8s.io/one", "k8s.io/two")
	if err := <-checked; !errdefs.IsFailedPrecondition(err) {
		t.Errorf("got %v, want that it is refused", err)
	}
}

// What CRI knows when it asks is known to Check, if the event is not dealt with yet.
func TestCheckWaitsForTheEventsBeforeIt(t *testing.T) {
	w, targets := newTestWatcher(t, "one", "two")
	w.know(t.Context(), targets, "k8s.io/one")
	s, envelopes := fakeStream(3)
	released := make(chan struct{})
	handle := func(e *events.Envelope) error {
		<-released
		if e.Topic == "/images/create" {
			w.know(t.Context(), targets, "k8s.io/one", "k8s.io/two")
		}
		return nil
	}
	// Check asks while the stream is busy with another event, and while a hello event
	// of somebody else is on its way.
	envelopes <- &events.Envelope{Topic: "/images/delete"}
	envelopes <- &events.Envelope{Topic: "/images/create"}
	following(t, w, s, handle)
	checked := make(chan error)
	for range 3 {
		go func() { checked <- w.Check(t.Context(), "k8s.io", targets["one"]) }()
	}
	close(released)
	for range 3 {
		if err := <-checked; !errdefs.IsFailedPrecondition(err) {
			t.Errorf("got %v, want that it is refused", err)
		}
	}
}

// An event answers those who asked before it was published, all of them, and a list
// those who asked before it was begun.
func TestOneEventAnswersAllWhoAskedBeforeIt(t *testing.T) {
	w, _ := newTestWatcher(t)
	due := func(want int) {
		t.Helper()
		if _, got := w.due(); got != want {
			t.Errorf("the event %d is due, want %d", got, want)
		}
	}
	asked := func(want int) {
		t.Helper()
		if got := w.ask(); got != want {
			t.Errorf("the answer is event %d, want %d", got, want)
		}
	}
	due(0)
	asked(1)
	asked(1)
	due(1)
	asked(2) // the first may be on its way already
	asked(2)
	due(0) // one at a time
	w.set(func() { w.seen = 1 })
	due(2)
	asked(3)
	// The second is lost with its stream; then there is a list.
	if got := w.publishing(); got != 3 {
		t.Errorf("the list answers %d, want 3", got)
	}
	asked(4)
	w.set(func() { w.seen = 3 })
	due(4)
}

func TestNoMoreEventsThanComeBack(t *testing.T) {
	w, targets := newTestWatcher(t, "one")
	w.know(t.Context(), targets, "k8s.io/one")
	s, _ := fakeStream(1)
	published := make(chan struct{}, 100)
	s.envelopes = nil // nothing comes back
	s.publish = func(context.Context, string, events.Event) error {
		published <- struct{}{}
		return nil
	}
	following(t, w, s, noImages)
	w.checkWait = time.Millisecond
	for range 20 {
		if err := w.Check(t.Context(), "k8s.io", targets["one"]); !errdefs.IsUnavailable(err) {
			t.Errorf("got %v, want that it is unavailable", err)
		}
	}
	<-published
	if len(published) > 0 {
		t.Errorf("%d events more than one were published", len(published))
	}
}

// A list that has been missing for long is not waited for as long by each pod.
func TestPatienceEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := NewWatcher("", blobs.Dir(t.TempDir()))
		check := func(want time.Duration) {
			t.Helper()
			begin := time.Now()
			if err := w.Check(t.Context(), "k8s.io", digest.FromString("x")); !errdefs.IsUnavailable(err) {
				t.Errorf("got %v, want that it is unavailable", err)
			}
			if took := time.Since(begin); took != want {
				t.Errorf("it waited for %v, want %v", took, want)
			}
		}
		time.Sleep(time.Second)
		check(checkWait)
		check(lateWait)
		w.set(func() { w.known = map[string]*catalog{} })
		check(checkWait) // for the event
	})
}

func TestAStreamThatIsSilentEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := NewWatcher("", "")
		w.ask()
		s, _ := fakeStream(1)
		s.envelopes = nil
		if err := w.follow(t.Context(), s, noImages); !errdefs.IsUnavailable(err) {
			t.Errorf("got %v, want that it is unavailable", err)
		}
	})
}

func TestAStreamThatFailsEnds(t *testing.T) {
	w, _ := newTestWatcher(t)
	failed := make(chan error, 1)
	s := stream{failed: failed, publish: func(context.Context, string, events.Event) error { return nil }}
	failed <- errors.New("broken")
	close(failed)
	if err := w.follow(t.Context(), s, noImages); !strings.Contains(err.Error(), "broken") {
		t.Errorf("the error does not say why: %v", err)
	}
	if _, err := s.begin(t.Context()); !errdefs.IsUnavailable(err) {
		t.Errorf("got %v, want that it is unavailable", err)
	}
}

// A subscription may come into being after the first event has been published.
func TestAStreamBeginsWithTheFirstEventThatComesBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, envelopes := fakeStream(3)
		publish, published := s.publish, 0
		s.publish = func(ctx context.Context, topic string, event events.Event) error {
			if published++; published < 3 {
				return nil
			}
			envelopes <- &events.Envelope{Topic: "/images/create"}
			return publish(ctx, topic, event)
		}
		early, err := s.begin(t.Context())
		if err != nil || len(early) != 1 || early[0].Topic != "/images/create" || published != 3 {
			t.Errorf("got %v, %v after %d events", early, err, published)
		}
	})
}

func TestCheckDoesNotWaitForEver(t *testing.T) {
	w, targets := newTestWatcher(t, "one")
	w.checkWait, w.lateWait = time.Nanosecond, time.Nanosecond
	for _, broken := range []error{nil, errors.New("the list is odd"), fmt.Errorf("no answer: %w", errdefs.ErrUnavailable)} {
		w.set(func() { w.broken = broken })
		err := w.Check(t.Context(), "k8s.io", targets["one"])
		if !errdefs.IsUnavailable(err) || broken != nil && !strings.Contains(err.Error(), broken.Error()) {
			t.Errorf("got %v, want that it is unavailable because of: %v", err, broken)
		}
	}
	w.checkWait = time.Minute
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := w.Check(ctx, "k8s.io", targets["one"]); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want that it is canceled", err)
	}
}

// A Watcher without a containerd goes on trying, and ends.
func TestRunEndsWithItsContext(t *testing.T) {
	w, targets := newTestWatcher(t, "one")
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	w.checkWait, w.lateWait = time.Second, time.Second
	go func() {
		defer close(ended)
		w.Run(ctx)
	}()
	if err := w.Check(t.Context(), "k8s.io", targets["one"]); !strings.Contains(err.Error(), "no such file or directory") {
		t.Errorf("the error does not say why: %v", err)
	}
	cancel()
	<-ended
}
