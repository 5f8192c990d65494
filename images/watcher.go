// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package images

import (
	"context"
	"crypto/rand"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	eventstypes "github.com/containerd/containerd/api/events"
	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
	"github.com/artifact-snapshotter/artifact-snapshotter/blobs"
)

// helloTopic is the topic of events that come back to their publisher.
const helloTopic = "/artifact-snapshotter/hello/"

// Watcher knows containerd's images, of all namespaces, from its events, and which
// of them are artifacts. It can be asked for conflicts inside of a snapshotter call:
// Check does not call containerd.
type Watcher struct {
	address string
	blobs   blobs.Dir

	checkWait, lateWait time.Duration // the constants, but for tests

	mu      sync.Mutex
	changed chan struct{} // closed when something below changes
	// known are the images by namespace, nil until they have been listed.
	known   map[string]*catalog
	running bool
	// broken is why known is nil, and lost since when.
	broken error
	lost   time.Time
	// asked, said and seen are numbers of hello events: of the last one that a Check
	// waits for, that has been published, and that has come back. A list of the
	// images is as good as one.
	asked, said, seen int
}

// NewWatcher returns a Watcher of the containerd with that socket and directory of
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
	reconnect.Run(ctx, "Cannot watch containerd's images: volumes of artifacts are refused until this works; still trying", func() (time.Duration, error) {
		listed, err := w.watch(ctx)
		if listed && ctx.Err() == nil {
			log.G(ctx).WithError(err).Info("Lost containerd: volumes of artifacts are refused until it is back")
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

// Running tells whether Run has been called.
func (w *Watcher) Running() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.running
}

// watch watches until the connection fails. It reports whether there was a list.
func (w *Watcher) watch(ctx context.Context) (listed bool, err error) {
	c, err := Connect(ctx, w.address)
	if err != nil {
		return false, err
	}
	defer func() { _ = c.Close() }()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	topic := helloTopic + rand.Text()
	envelopes, failed := c.Subscribe(ctx, `topic~="^/images/"`, fmt.Sprintf("topic==%q", topic))
	s := stream{envelopes: envelopes, failed: failed, topic: topic, publish: c.EventService().Publish}
	handle := func(e *events.Envelope) error { return w.handle(ctx, c.ImageService(), e) }

	// The list is asked for when the subscription is there: what is not in it comes
	// as an event. Of the subscription nothing tells but an event.
	early, err := s.begin(ctx)
	if err != nil {
		return false, err
	}
	number := w.say()
	known, err := w.list(ctx, c)
	if err != nil {
		return false, err
	}
	w.set(func() { w.known, w.seen = known, number })
	log.G(ctx).WithField("artifacts", w.Stats().Artifacts).Info("Watching containerd's images")
	for _, e := range early {
		if err := handle(e); err != nil {
			return true, err
		}
	}
	return true, w.follow(ctx, s, handle)
}

// follow deals with the events of the stream, in order, and publishes the hello
// events that Checks wait for: one at a time, so that a stream that is slow does not
// fill up with them.
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
				w.set(func() { w.seen = max(w.seen, number) })
				overdue = nil
			} else if err := handle(e); err != nil {
				return err
			}
		case err := <-s.failed:
			return ended(err)
		case <-overdue: // a new list takes less time
			return fmt.Errorf("no event has come for %v: %w", helloWait, errdefs.ErrUnavailable)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// due returns the number of the hello event that is to be published now, or 0, and
// what tells of a change.
func (w *Watcher) due() (<-chan struct{}, int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.asked == w.said || w.seen < w.said {
		return w.changed, 0
	}
	w.said = w.asked
	return w.changed, w.said
}

// ask returns the number of a hello event that is published later than now.
func (w *Watcher) ask() (number int) {
	w.set(func() {
		w.asked = w.said + 1
		number = w.asked
	})
	return number
}

// say returns the number of what answers all who have asked until now.
func (w *Watcher) say() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.said = w.asked
	return w.said
}

// set changes what is guarded by mu, and tells those who wait for a change.
func (w *Watcher) set(change func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	change()
	close(w.changed)
	w.changed = make(chan struct{})
}

// stream is a subscription to the events of images, and to those of a topic that
// nobody else has. containerd keeps the order of events (core/events/exchange), and
// publishes the one of an image before its client hears that the image is there
// (core/metadata/images.go).
type stream struct {
	envelopes <-chan *events.Envelope
	failed    <-chan error
	topic     string
	publish   func(ctx context.Context, topic string, event events.Event) error
}

// begin publishes an event until one arrives, and returns the others before it.
func (s stream) begin(ctx context.Context) (early []*events.Envelope, err error) {
	for {
		if err := s.hello(ctx, 0); err != nil {
			return nil, err
		}
		again := time.After(helloAgain)
		for waiting := true; waiting; {
			select {
			case e := <-s.envelopes:
				if e.Topic == s.topic {
					return early, nil
				}
				early = append(early, e)
			case <-again:
				waiting = false
			case err := <-s.failed:
				return nil, ended(err)
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		}
	}
}

// hello publishes the event with that number.
func (s stream) hello(ctx context.Context, number int) error {
	ctx, cancel := context.WithTimeout(namespaces.WithNamespace(ctx, "artifact-snapshotter"), callTimeout)
	defer cancel()
	if err := s.publish(ctx, s.topic, &eventstypes.NamespaceUpdate{Name: strconv.Itoa(number)}); err != nil {
		return fmt.Errorf("publish an event: %w", err)
	}
	return nil
}

// number returns the number of the event if it is one of hello's.
func (s stream) number(e *events.Envelope) (number int, ok bool) {
	if e.Topic != s.topic {
		return 0, false
	}
	var said eventstypes.NamespaceUpdate
	if err := typeurl.UnmarshalTo(e.Event, &said); err != nil {
		return 0, false
	}
	number, err := strconv.Atoi(said.Name)
	return number, err == nil
}

// ended is the error for a stream that has ended with err.
func ended(err error) error {
	if err == nil {
		err = errdefs.ErrUnavailable
	}
	return fmt.Errorf("the stream of events has ended: %w", err)
}

// list returns all images of all namespaces.
func (w *Watcher) list(ctx context.Context, c *containerd.Client) (map[string]*catalog, error) {
	all, err := c.NamespaceService().List(ctx)
	if err != nil {
		return nil, fmt.Errorf("list containerd's namespaces: %w", err)
	}
	known := map[string]*catalog{}
	read := map[digest.Digest]Image{}
	for _, namespace := range all {
		there, err := c.ImageService().List(namespaces.WithNamespace(ctx, namespace))
		if err != nil {
			return nil, fmt.Errorf("list the images of namespace %s: %w", namespace, err)
		}
		known[namespace] = readAll(ctx, w.blobs, there, read, nil)
	}
	// What was cut off is no list.
	return known, ctx.Err()
}

// brief is what is to be known of an image: the layers of all may be a lot.
func (i Image) brief() Image {
	known := i
	known.Image = images.Image{Name: i.Name, Target: ocispec.Descriptor{MediaType: i.Target.MediaType, Digest: i.Target.Digest}}
	if i.Artifact != nil {
		known.Artifact = &artifact.Artifact{Manifest: ocispec.Descriptor{Digest: i.Artifact.Manifest.Digest}, Config: i.Artifact.Config}
	}
	return known
}

// handle deals with an event. It has only the name of the image.
func (w *Watcher) handle(ctx context.Context, store images.Store, e *events.Envelope) error {
	if e.Event == nil || !strings.HasPrefix(e.Topic, "/images/") {
		return nil
	}
	v, err := typeurl.UnmarshalAny(e.Event)
	if err != nil {
		return nil // an event that is none of containerd's
	}
	named, ok := v.(interface{ GetName() string })
	if !ok {
		return nil
	}
	name := named.GetName()
	call, cancel := context.WithTimeout(namespaces.WithNamespace(ctx, e.Namespace), callTimeout)
	defer cancel()
	image, err := store.Get(call, name)
	if errdefs.IsNotFound(err) {
		w.set(func() { w.known[e.Namespace].remove(name) })
		return nil
	}
	if err != nil {
		return fmt.Errorf("image %q: %w", name, err)
	}
	known, ok := w.same(e.Namespace, image.Target.Digest)
	if !ok {
		known = readAny(ctx, w.blobs, image)
	}
	known.Name = name
	first := false // of the names of the artifact
	w.set(func() {
		if w.known[e.Namespace] == nil {
			w.known[e.Namespace] = &catalog{}
		}
		there := w.known[e.Namespace]
		first = known.Artifact != nil && !slices.ContainsFunc(there.withManifest(known.Artifact.Manifest.Digest), func(i *Image) bool { return !i.IsID() })
		there.put(known.brief())
	})
	if first && !known.IsID() {
		w.warn(ctx, e.Namespace, known)
	}
	return nil
}

// same returns an image of the namespace with that target, if one is known that
// would not be another one if it was read again.
func (w *Watcher) same(namespace string, target digest.Digest) (Image, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, i := range w.known[namespace].withTarget(target) {
		if i.Artifact != nil && i.unread == nil {
			return *i, true
		}
	}
	return Image{}, false
}
