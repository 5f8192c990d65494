// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package nri

import (
	"time"

	"github.com/artifact-snapshotter/artifact-snapshotter/internal/retry"
)

// The limits and time-outs of the plugin. One more is in package store: MaxWait, the longest
// that a request waits for a tree, and one in the runtime: plugin_request_timeout, 2 s by
// default, the longest that the runtime waits for an answer.

// reconnect is how the plugin connects again. Max is short because containers that a runtime
// creates before the plugin is connected do not get their artifacts. The warning comes after
// some seconds, because a runtime that is still starting is not worth one.
var reconnect = retry.Policy{Min: 50 * time.Millisecond, Max: 500 * time.Millisecond, WarnAfter: 10}

const (
	// registerTimeout bounds the wait for Configure. A runtime gives a plugin 5 seconds to
	// register, and may close the connection without an error. The wait for Synchronize has no
	// bound: containerd delays it while it stops a container, for the whole grace period, and
	// creates containers without a plugin that has disconnected meanwhile.
	registerTimeout = 20 * time.Second
	// answerShare is the part of the runtime's time in which the plugin answers. A runtime goes
	// on without a plugin that is late (pkg/adaptation/plugin.go of NRI, isFatalError).
	answerShare = 3. / 4
	// mountShare is the part of the plugin's own time for mounting. The rest is for telling the
	// user that a tree is not ready.
	mountShare = 2. / 3
	// creationWindow is how long a container that the runtime does not list may still be
	// created: an earlier connection answered the request for its creation.
	creationWindow = 2 * time.Minute
	// maxNameBytes is the longest name of a layer that can be part of a path (PATH_MAX of
	// linux/limits.h). It bounds the work of matching CRI-O's mounts.
	maxNameBytes = 4095
)
