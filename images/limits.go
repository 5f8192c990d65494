// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package images

import (
	"time"

	"github.com/artifact-snapshotter/artifact-snapshotter/internal/retry"
)

// Calls to containerd.
const (
	// connectTimeout bounds the wait for containerd's first answer.
	connectTimeout = 5 * time.Second
	// callTimeout bounds one call to containerd, which may hang.
	callTimeout = 20 * time.Second
)

// Questions about images.
const (
	// checkWait is how long [Watcher.Check] waits for containerd's images to be known:
	// longer than it takes to reconnect to a containerd that has just started.
	checkWait = 10 * time.Second
	// lateWait is the wait if the images have been unknown for checkWait already. It
	// delays other pods (see Rules in docs/design.md), and is long enough for a
	// containerd that comes back after a while.
	lateWait = time.Second

	// maxNamed artifacts are named in an error, each with maxNameBytes of its name:
	// the error must fit into the 1,024 bytes of a Kubernetes event.
	maxNamed     = 4
	maxNameBytes = 112
)

// The watch of containerd's events. A containerd that is just starting is no reason for
// a warning: the fifth failure comes after 1.5 s.
var (
	reconnect      = retry.Policy{Min: 100 * time.Millisecond, Max: 500 * time.Millisecond, WarnAfter: 5} // Max is less than lateWait
	retryEmptyBlob = retry.Policy{Min: 100 * time.Millisecond, Max: 30 * time.Second, WarnAfter: 5}
)

const (
	// helloAgain is the time between the first events to a new subscription.
	helloAgain = 100 * time.Millisecond
	// helloWait is how long an event may take to come back once one has.
	helloWait = 30 * time.Second

	// EmptyBlobInterval is how often [KeepEmptyBlob] should check.
	EmptyBlobInterval = 3 * time.Minute
	// emptyBlobAttempts is how often garbage collection may remove the empty blob
	// before it has its label.
	emptyBlobAttempts = 3
)
