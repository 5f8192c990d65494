// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package client

import "time"

// How long containerd keeps what nothing refers to yet, if this process is killed.
const (
	// pullLease keeps what an unfinished pull has fetched, for the next pull.
	pullLease = 24 * time.Hour
	// unpackLease keeps the snapshot of an attempt to unpack. An attempt takes less: the
	// daemon answers after 20 seconds (MaxWait in package store).
	unpackLease = 5 * time.Minute
	// viewLease keeps the view of a mount until the view has images.LabelGCRoot.
	viewLease = 5 * time.Minute
	// collectLease is for a lease whose only purpose is to be deleted.
	collectLease = time.Minute
)

// maxUsers of an artifact are named in an error.
const maxUsers = 4

// viewTimeout bounds how long View goes on after the caller has given up.
const viewTimeout = 5 * time.Second

const (
	// leaseTimeout bounds the deletion of a lease: a containerd that hangs must not delay
	// the end of this process.
	leaseTimeout = 5 * time.Second

	// retryWait is the wait between two attempts.
	retryWait = time.Second
	// maxUnreachable consecutive attempts may be unable to reach the daemon, which may just
	// be restarting, before one more gives up.
	maxUnreachable = 5
)

// maxRemote, in bytes, bounds a manifest or a config that is read from a registry. It is more
// than package artifact accepts, so the error is package artifact's.
const maxRemote = 16 << 20
