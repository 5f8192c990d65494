// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package client

import (
	"context"
	"sync"

	"github.com/containerd/log"
)

// maxUnpacks is how many artifacts are unpacked at once in the background. The
// daemon has limits of its own for what one may take of the node.
const maxUnpacks = 2

// unpacker unpacks artifacts in the background.
type unpacker struct {
	running sync.WaitGroup
	slots   chan struct{}
	mu      sync.Mutex
	wanted  map[string]bool // by namespace and manifest
}

func newUnpacker() *unpacker {
	return &unpacker{slots: make(chan struct{}, maxUnpacks), wanted: map[string]bool{}}
}

// unpack unpacks the artifact, unless it is about to: a pull makes several images,
// one for each name.
func (u *unpacker) unpack(ctx context.Context, c *Client, image Image) {
	manifest := image.Artifact.Manifest.Digest
	key := c.Namespace + "/" + manifest.String()
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.wanted[key] {
		return
	}
	u.wanted[key] = true
	u.running.Go(func() {
		defer func() {
			u.mu.Lock()
			defer u.mu.Unlock()
			delete(u.wanted, key)
		}()
		select {
		case u.slots <- struct{}{}:
			defer func() { <-u.slots }()
		case <-ctx.Done():
			return
		}
		logger := log.G(ctx).WithField("artifact", manifest).WithField("namespace", c.Namespace)
		switch name, err := c.Unpack(ctx, image); {
		case ctx.Err() != nil: // the daemon ends, or containerd does
		case err != nil:
			logger.WithError(err).Warn("Cannot unpack what has been pulled; `artifact-snapshotter unpack` tries it again")
		default:
			logger.WithField("snapshot", name).Debug("Unpacked what has been pulled")
		}
	})
}
