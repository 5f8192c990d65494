// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

// Package retry repeats a task in the background, also while something that the task
// needs is not there.
package retry

import (
	"context"
	"time"

	"github.com/containerd/log"
)

// Policy says how long to wait after a failure, and which failure to warn about.
type Policy struct {
	// Min is the wait after the first failure in a row. Each further failure doubles
	// it, up to Max.
	Min, Max time.Duration
	// WarnAfter is the failure in a row that is logged as a warning. The others are
	// debug messages, so that a lasting failure is reported once and a service that
	// is just starting not at all.
	WarnAfter int
}

// Run calls task until ctx ends. If task succeeds, Run waits for as long as task says
// before it calls it again. If it fails, Run logs message with the error and waits as p
// says.
func (p Policy) Run(ctx context.Context, message string, task func() (next time.Duration, err error)) {
	wait, failures := p.Min, 0
	for ctx.Err() == nil {
		next, err := task()
		if ctx.Err() != nil {
			return
		}
		if err == nil {
			wait, failures = p.Min, 0
		} else {
			failures++
			level := log.DebugLevel
			if failures == p.WarnAfter {
				level = log.WarnLevel
			}
			log.G(ctx).WithError(err).Log(level, message)
			next, wait = wait, min(2*wait, p.Max)
		}
		_ = Sleep(ctx, next)
	}
}

// Sleep waits for d. It returns early, with the error of ctx, if ctx ends.
func Sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
