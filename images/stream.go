// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package images

import (
	"context"
	"crypto/rand"
	"fmt"
	"strconv"
	"time"

	eventstypes "github.com/containerd/containerd/api/events"
	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
)

// helloTopic is the topic of events that come back to their publisher.
const helloTopic = "/artifact-snapshotter/hello/"

// stream is a subscription to the events of images, and to hello events: events with a
// number that only this process publishes and receives. When one comes back, all events
// that were published before it have come, too: containerd keeps events in order
// (core/events/exchange), and publishes the event of an image before its client hears
// that the image is there (core/metadata/images.go).
type stream struct {
	envelopes <-chan *events.Envelope
	failed    <-chan error
	topic     string
	publish   func(ctx context.Context, topic string, event events.Event) error
}

func subscribe(ctx context.Context, c *containerd.Client) stream {
	topic := helloTopic + rand.Text()
	envelopes, failed := c.Subscribe(ctx, `topic~="^/images/"`, fmt.Sprintf("topic==%q", topic))
	return stream{envelopes: envelopes, failed: failed, topic: topic, publish: c.EventService().Publish}
}

// begin publishes hello events until one comes back, which is the only sign that the
// subscription works. It returns the other events that came first.
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

// hello publishes the hello event with that number.
func (s stream) hello(ctx context.Context, number int) error {
	ctx, cancel := context.WithTimeout(namespaces.WithNamespace(ctx, "artifact-snapshotter"), callTimeout)
	defer cancel()
	if err := s.publish(ctx, s.topic, &eventstypes.NamespaceUpdate{Name: strconv.Itoa(number)}); err != nil {
		return fmt.Errorf("publish an event: %w", err)
	}
	return nil
}

// number returns the number of the event if it is a hello event.
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

// ended returns the error for a stream that has ended with err.
func ended(err error) error {
	if err == nil {
		err = errdefs.ErrUnavailable
	}
	return fmt.Errorf("the stream of events has ended: %w", err)
}
