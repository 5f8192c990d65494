// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package images

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/artifact-snapshotter/artifact-snapshotter/blobs"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
)

// newTestWatcher returns a Watcher that waits long. Its directory of blobs has the artifacts,
// all with one config.
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

// fakeStream returns a stream to which published events come back.
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

// following makes the Watcher follow the stream until the end of the test.
func following(t *testing.T, w *Watcher, s stream, handle func(*events.Envelope) error) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- w.follow(ctx, s, handle) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; !errors.Is(err, context.Canceled) {
			t.Errorf("the Watcher has ended early: %v", err)
		}
	})
}

func noImages(*events.Envelope) error { return errors.New("there is an event of an image") }

// know makes the images, given as NAMESPACE/NAME, the known ones.
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

// A hello event answers all Checks that asked before it was published, and a list all that asked
// before it was begun.
func TestOneHelloEventAnswersAllChecksBeforeIt(t *testing.T) {
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
	asked(2) // the first may have been published already
	asked(2)
	due(0) // one at a time
	w.set(func() { w.seen = 1 })
	due(2)
	asked(3)
	// The second is lost with its stream, and then the images are listed.
	if got := w.publishing(); got != 3 {
		t.Errorf("the list answers %d, want 3", got)
	}
	asked(4)
	w.set(func() { w.seen = 3 })
	due(4)
}

func TestOnlyOneHelloEventIsUnderWay(t *testing.T) {
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
		t.Errorf("%d events more than one have been published", len(published))
	}
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

// An event that begin published may come back late. It is not the one that is waited for.
func TestAStreamThatIsSilentAfterAnOldEventEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := NewWatcher("", "")
		w.ask()
		s, _ := fakeStream(1)
		if err := s.hello(t.Context(), 0); err != nil {
			t.Fatal(err)
		}
		s.publish = func(context.Context, string, events.Event) error { return nil }
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

// The subscription may begin after the first event has been published.
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

func TestRunWithoutContainerdEndsWithItsContext(t *testing.T) {
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
