// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package images

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/artifact-snapshotter/artifact-snapshotter/blobs"
)

// Watcher knows containerd's images of all namespaces from containerd's events. Its
// answers ([Watcher.Check], [Watcher.Name], [Watcher.Stats]) need no call to containerd.
type Watcher struct {
	address string
	blobs   blobs.Dir

	checkWait, lateWait time.Duration // the constants, except in tests

	mu      sync.Mutex
	changed chan struct{} // closed when a field below changes
	// known has the images by namespace. It is nil until they have been listed, and
	// while containerd is not connected.
	known   map[string]*catalog
	running bool
	// broken is why known is nil, and lost since when it is.
	broken error
	lost   time.Time
	// asked, said and seen are numbers of hello events, see stream: of the last one that
	// a Check waits for, of the last one that was published, and of the last one that
	// came back. A list of the images counts as a hello event that came back.
	asked, said, seen int
}

// NewWatcher returns a Watcher of the containerd with that socket and that directory of
// blobs.
func NewWatcher(address string, blobs blobs.Dir) *Watcher {
	return &Watcher{
		address:   address,
		blobs:     blobs,
		checkWait: checkWait,
		lateWait:  lateWait,
		changed:   make(chan struct{}),
		lost:      time.Now(),
	}
}

// Run watches until ctx ends. containerd need not run yet.
func (w *Watcher) Run(ctx context.Context) {
	ctx = log.WithLogger(ctx, log.G(ctx).WithField("containerd", w.address))
	w.set(func() { w.running = true })
	reconnect.Run(ctx, "cannot watch containerd's images: volumes of artifacts are refused until this works; still trying", func() (time.Duration, error) {
		listed, err := w.watch(ctx)
		if listed && ctx.Err() == nil {
			log.G(ctx).WithError(err).Info("lost containerd: volumes of artifacts are refused until it is back")
		}
		w.set(func() {
			w.known, w.broken = nil, err
			if listed {
				w.lost = time.Now()
			}
		})
		if listed {
			err = nil
		}
		return reconnect.Min, err
	})
}

// Running reports whether Run has been called.
func (w *Watcher) Running() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.running
}

// watch watches until the connection fails, and reports whether it listed the images.
func (w *Watcher) watch(ctx context.Context) (listed bool, err error) {
	c, err := Connect(ctx, w.address)
	if err != nil {
		return false, err
	}
	defer func() { _ = c.Close() }()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s := subscribe(ctx, c)
	handle := func(e *events.Envelope) error { return w.handle(ctx, c.ImageService(), e) }

	// The images are listed once the subscription works, so that a change that is not in
	// the list comes as an event.
	early, err := s.begin(ctx)
	if err != nil {
		return false, err
	}
	number := w.publishing()
	known, err := w.list(ctx, c)
	if err != nil {
		return false, err
	}
	w.set(func() { w.known, w.seen = known, number })
	log.G(ctx).WithField("artifacts", w.Stats().Artifacts).Info("watching containerd's images")
	for _, e := range early {
		if err := handle(e); err != nil {
			return true, err
		}
	}
	return true, w.follow(ctx, s, handle)
}

// follow handles the events of the stream in order, and publishes the hello events that
// Checks wait for: one at a time, so that they do not fill up a slow stream.
func (w *Watcher) follow(ctx context.Context, s stream, handle func(*events.Envelope) error) error {
	var overdue <-chan time.Time
	for {
		changed, number := w.due()
		if number > 0 {
			if err := s.hello(ctx, number); err != nil {
				return err
			}
			overdue = time.After(helloWait)
		}
		select {
		case <-changed:
		case e := <-s.envelopes:
			if number, ok := s.number(e); ok {
				w.set(func() {
					if w.seen = max(w.seen, number); w.seen >= w.said {
						overdue = nil
					}
				})
			} else if err := handle(e); err != nil {
				return err
			}
		case err := <-s.failed:
			return ended(err)
		case <-overdue: // connecting and listing again takes less time
			return fmt.Errorf("no event has come for %v: %w", helloWait, errdefs.ErrUnavailable)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// due returns the number of the hello event to publish now, or 0, and a channel that is
// closed when this may change.
func (w *Watcher) due() (<-chan struct{}, int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.asked == w.said || w.seen < w.said {
		return w.changed, 0
	}
	w.said = w.asked
	return w.changed, w.said
}

// ask returns the number of a hello event that will be published after this call.
func (w *Watcher) ask() (number int) {
	w.set(func() {
		w.asked = w.said + 1
		number = w.asked
	})
	return number
}

// publishing returns the number of an event that answers everybody who has asked so far.
func (w *Watcher) publishing() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.said = w.asked
	return w.said
}

// set changes fields that mu guards, and wakes those who wait for a change.
func (w *Watcher) set(change func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	change()
	close(w.changed)
	w.changed = make(chan struct{})
}

// list returns all images of all namespaces.
func (w *Watcher) list(ctx context.Context, c *containerd.Client) (map[string]*catalog, error) {
	all, err := c.NamespaceService().List(ctx)
	if err != nil {
		return nil, fmt.Errorf("list containerd's namespaces: %w", err)
	}
	known := map[string]*catalog{}
	read := map[digest.Digest]Image{} // by target, since CRI gives an image several names
	for _, namespace := range all {
		records, err := c.ImageService().List(namespaces.WithNamespace(ctx, namespace))
		if err != nil {
			return nil, fmt.Errorf("list the images of namespace %s: %w", namespace, err)
		}
		known[namespace] = newCatalog()
		for _, record := range records {
			image, ok := read[record.Target.Digest]
			if !ok {
				image = w.identify(ctx, record)
				read[record.Target.Digest] = image
			}
			image.Name = record.Name
			known[namespace].put(image)
		}
	}
	return known, ctx.Err() // an incomplete list is no list
}

// identify returns what the Watcher remembers of an image.
func (w *Watcher) identify(ctx context.Context, i images.Image) Image {
	return identify(ctx, w.blobs, images.Image{Name: i.Name, Target: ocispec.Descriptor{MediaType: i.Target.MediaType, Digest: i.Target.Digest}})
}

// handle handles an event. An event has only the name of its image.
func (w *Watcher) handle(ctx context.Context, store images.Store, e *events.Envelope) error {
	if e.Event == nil || !strings.HasPrefix(e.Topic, "/images/") {
		return nil
	}
	v, err := typeurl.UnmarshalAny(e.Event)
	if err != nil {
		return nil // it is not containerd's event
	}
	named, ok := v.(interface{ GetName() string })
	if !ok {
		return nil
	}
	name := named.GetName()
	call, cancel := context.WithTimeout(namespaces.WithNamespace(ctx, e.Namespace), callTimeout)
	defer cancel()
	record, err := store.Get(call, name)
	if errdefs.IsNotFound(err) {
		w.set(func() { w.known[e.Namespace].remove(name) })
		return nil
	}
	if err != nil {
		return fmt.Errorf("image %q: %w", name, err)
	}
	image, ok := w.same(e.Namespace, record.Target.Digest)
	if !ok {
		image = w.identify(ctx, record)
	}
	image.Name = name
	first := false // of the names of its manifest
	w.set(func() {
		there := w.known[e.Namespace]
		if there == nil {
			there = newCatalog()
			w.known[e.Namespace] = there
		}
		first = !image.IsID() && !slices.ContainsFunc(there.withManifest(image.Manifest), func(i *Image) bool { return !i.IsID() })
		there.put(image)
	})
	if first {
		w.warn(ctx, e.Namespace, image)
	}
	return nil
}

// same returns an image of the namespace with that target whose config is known.
func (w *Watcher) same(namespace string, target digest.Digest) (Image, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, i := range w.known[namespace].withTarget(target) {
		if i.Config != "" {
			return *i, true
		}
	}
	return Image{}, false
}

// warn logs that a new image is in conflict with others.
func (w *Watcher) warn(ctx context.Context, namespace string, image Image) {
	w.mu.Lock()
	same := w.known[namespace].withConfig(image.Config)
	w.mu.Unlock()
	if err := refuse(image, same); err != nil {
		log.G(ctx).WithError(err).WithField("namespace", namespace).WithField("image", image.Name).
			Warn("an image is in conflict with others: image volumes of them are refused")
	}
}
