// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package images

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/artifact-snapshotter/artifact-snapshotter/blobs"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
)

func TestCheckRefusesImagesInConflict(t *testing.T) {
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
	// A change that is no list must not end the wait.
	s, _ := fakeStream(1)
	following(t, w, s, noImages)
	w.set(func() {})
	w.know(t.Context(), targets, "k8s.io/one", "k8s.io/two")
	if err := <-checked; !errdefs.IsFailedPrecondition(err) {
		t.Errorf("got %v, want that it is refused", err)
	}
}

// Check must know what CRI knew when CRI asked, also if the event has not been handled yet.
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
	// Check asks while another event is being handled, and while the hello event of another
	// Check is under way.
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

// If the images have been unknown for long, a pod does not wait as long as before.
func TestCheckWaitsLessIfTheImagesHaveBeenUnknownForLong(t *testing.T) {
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

func TestCheckEndsWithAnError(t *testing.T) {
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
