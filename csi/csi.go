// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

// Package csi is the front end for kubelet: a CSI driver whose volumes are artifacts, given by
// their references (https://github.com/container-storage-interface/spec). It needs no container
// runtime, because the node pulls these artifacts itself (package pull), and shows them from the
// same trees as the other front ends (package store).
//
// A volume is inline in a pod, or a PersistentVolume with the same attributes. Publishing it is
// a bind of the tree's one shared mount; nothing is staged, and there is no controller. Before
// the bind there is a record of it below the daemon's root, so no volume is forgotten when the
// daemon is killed.
//
// Kubelet waits longer after each failed call, up to two minutes. So a call waits until the
// volume is there, or until just before its deadline, and its error then is the progress.
package csi

import (
	"context"
	"path/filepath"
	"sync"
	"time"

	csiapi "github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/containerd/log"

	"github.com/artifact-snapshotter/artifact-snapshotter/pull"
	"github.com/artifact-snapshotter/artifact-snapshotter/store"
)

// Name is the name of the driver, and of its CSIDriver object.
const Name = "artifact-snapshotter.dev"

// Config is the configuration of a Driver.
type Config struct {
	// Root is the daemon's directory. The records are in Root/csi.
	Root string
	// Node is the ID of the node, its name in Kubernetes; Version that of the driver.
	Node, Version string
	// Store holds the trees, and Puller the artifacts.
	Store  *store.Store
	Puller *pull.Puller
	// DockerConfig is the path of the node's own config.json with credentials; it need not
	// exist.
	DockerConfig string
}

// Driver implements the services of the CSI specification. It is safe for concurrent use.
type Driver struct {
	csiapi.UnimplementedIdentityServer
	csiapi.UnimplementedNodeServer
	Config
	records records
	closing context.Context

	mu   sync.Mutex
	busy map[string]bool // the target paths at which a call is at work
}

// New returns a Driver, and protects the trees of its volumes from the garbage collection of
// c.Store, which must not run before. Calls that wait end with ctx.
func New(ctx context.Context, c Config) (*Driver, error) {
	opened, err := store.OpenRecords[record](ctx, recordsDir(c.Root), c.Store)
	if err != nil {
		return nil, err
	}
	r := records{opened}
	c.Puller.Protect(r.references)
	return &Driver{Config: c, records: r, closing: ctx, busy: map[string]bool{}}, nil
}

// ProtectRecorded protects the trees of volumes that are published, for a daemon whose driver
// is disabled: pods may still use them. It must be called before the garbage collection of s
// runs. Without records it does nothing.
func ProtectRecorded(ctx context.Context, root string, s *store.Store) error {
	n, err := store.ProtectRecorded[record](ctx, recordsDir(root), s)
	if n > 0 {
		log.G(ctx).WithField("volumes", n).Warn("CSI is disabled, but volumes of it are in use: their trees stay on the node until CSI is enabled again, or the node is booted")
	}
	return err
}

func recordsDir(root string) string { return filepath.Join(root, "csi") }

// begin makes the call the only one at work on the target path. ok is false if there is another.
func (d *Driver) begin(target string) (end func(), ok bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.busy[target] {
		return nil, false
	}
	d.busy[target] = true
	return func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		delete(d.busy, target)
	}, true
}

// holding returns a context that ends when the call has to answer.
func (d *Driver) holding(ctx context.Context) (context.Context, context.CancelFunc) {
	wait := hold
	if deadline, ok := ctx.Deadline(); ok {
		left := time.Until(deadline)
		wait = left - min(left/answer, maxAnswer)
	}
	ctx, cancel := context.WithTimeout(ctx, wait)
	stop := context.AfterFunc(d.closing, cancel)
	return ctx, func() {
		stop()
		cancel()
	}
}
