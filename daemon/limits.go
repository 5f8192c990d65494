// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package daemon

import "time"

// The time-outs of the process. Those of requests are in the packages that answer them.
const (
	// stopTimeout bounds the wait for running calls when the daemon stops.
	stopTimeout = 10 * time.Second
	// flushTimeout bounds the time to export the last spans before the daemon ends.
	flushTimeout = 2 * time.Second
	// gatherTimeout bounds the time to collect the metrics for one request.
	gatherTimeout = 10 * time.Second
	// metricsRetry is the wait before the next try to listen on a metrics_address that
	// another process uses.
	metricsRetry = 10 * time.Second
)
