// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

// Package nri is the front end for runtimes that do not ask the snapshotter: CRI-O, and
// containerd with its configuration unchanged. It is a plugin of NRI
// (https://github.com/containerd/nri), which both runtimes enable by default. Before a container
// is created, the plugin looks at the container's mounts. Where the runtime has mounted an
// artifact by itself, as an empty directory (containerd) or as one bind of each blob (CRI-O), the
// plugin replaces that by the tree of the artifact. It leaves all other mounts alone.
//
// The trees are those of package store, shared with the snapshotter. Before the plugin answers,
// it writes a record of the trees in the container below the daemon's root. When it connects, it
// compares the records with the containers that the runtime lists. So it forgets no container
// when the daemon is killed, and no tree stays because a container ended meanwhile.
//
// The package depends on how the two runtimes mount artifacts, but it never calls them.
package nri

import (
	"context"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/log"

	"github.com/artifact-snapshotter/artifact-snapshotter/blobs"
	"github.com/artifact-snapshotter/artifact-snapshotter/store"
)

// Config is the configuration of a Plugin.
type Config struct {
	// Socket is the path of the runtime's NRI socket. Name is the plugin's name, and Index
	// its place in the order of plugins, two digits.
	Socket, Index, Name string
	// Root is the directory of the daemon. The records are in Root/nri.
	Root string
	// Store holds the trees.
	Store *store.Store
	// Blobs are all directories of blobs. Layouts are those of them that are artifact stores
	// of CRI-O, which are OCI layouts.
	Blobs   blobs.Source
	Layouts []blobs.Dir
	// ContainerdAddress is the socket of the containerd whose images Store knows.
	ContainerdAddress string
	// Passthrough leaves the runtime's own mounts in place if an artifact cannot be mounted.
	// Otherwise the container is not created.
	Passthrough bool
	// Observer observes the plugin, for metrics.
	Observer Observer
}

// Observer has functions that a Plugin calls, from several goroutines at once. A function that
// is nil is not called.
type Observer struct {
	// Connected is called with true when a runtime has accepted the plugin, and with false
	// when that connection has ended.
	Connected func(bool)
	// Missed is called with the number of containers that were created without the plugin, so
	// that they have the runtime's own mount of an artifact, whenever it may have changed.
	Missed func(n int)
}

// Plugin mounts artifacts for the runtime on a socket of NRI. It is safe for concurrent use.
type Plugin struct {
	Config
	records         *records
	registerTimeout time.Duration // a field because tests shorten it
	addressWarning  sync.Once
	missed          missed
}

// New returns a Plugin, and protects the trees in its records from the garbage collection of
// c.Store, which must not run before. Run starts the plugin.
func New(ctx context.Context, c Config) (*Plugin, error) {
	opened, err := store.OpenRecords[record](ctx, recordsDir(c.Root), c.Store)
	if err != nil {
		return nil, err
	}
	r := &records{Records: opened, ended: map[string]time.Duration{}}
	return &Plugin{Config: c, records: r, registerTimeout: registerTimeout, missed: missed{changed: c.Observer.Missed}}, nil
}

// ProtectRecorded protects the trees in the records below root from the garbage collection of s,
// for a daemon whose plugin is disabled: containers may still use them. It must be called before
// the garbage collection runs. The records end with the next boot of the node, or when the
// plugin is enabled and connects to the runtime. Without records it does nothing.
func ProtectRecorded(ctx context.Context, root string, s *store.Store) error {
	n, err := store.ProtectRecorded[record](ctx, recordsDir(root), s)
	if n > 0 {
		log.G(ctx).WithField("containers", n).Warn("containers have artifacts that NRI mounted, which is disabled: their trees stay on the node until NRI is enabled again or the node is booted")
	}
	return err
}

func recordsDir(root string) string { return filepath.Join(root, "nri") }
