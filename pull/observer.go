// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package pull

import (
	"context"
	"errors"
	"time"
)

// Observer is told what a Puller does. Its functions may be nil, and must not block.
type Observer struct {
	// Fetched is called when n bytes have come from a registry, Linked when a blob of n bytes
	// has been linked or copied from another directory of the node.
	Fetched, Linked func(n int64)
	// Pulled is called when a download has ended with all of the artifact.
	Pulled func(took time.Duration)
	// Failed is called for each request that fails. An *UnfinishedError is no failure.
	Failed func(err error)
	// Removed is called when an artifact was removed because nobody used it.
	Removed func()
}

// complete gives the functions that are nil an empty one.
func (o Observer) complete() Observer {
	for _, f := range []*func(int64){&o.Fetched, &o.Linked} {
		if *f == nil {
			*f = func(int64) {}
		}
	}
	if o.Pulled == nil {
		o.Pulled = func(time.Duration) {}
	}
	if o.Failed == nil {
		o.Failed = func(error) {}
	}
	if o.Removed == nil {
		o.Removed = func() {}
	}
	return o
}

// failure tells the Observer of a request's error.
func (p *Puller) failure(err error) {
	if _, unfinished := errors.AsType[*UnfinishedError](err); err != nil && !unfinished {
		p.observer.Failed(err)
	}
}

// Stats are numbers of a Puller.
type Stats struct {
	// Artifacts is how many references of artifacts are on the node, Pulls how many downloads
	// are under way.
	Artifacts, Pulls int
}

// Stats counts.
func (p *Puller) Stats(ctx context.Context) (Stats, error) {
	all, err := p.images.List(in(ctx))
	p.mu.Lock()
	defer p.mu.Unlock()
	return Stats{len(all), len(p.downloads)}, err
}
