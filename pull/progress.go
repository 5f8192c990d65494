// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package pull

import (
	"fmt"
	"math"
	"sync/atomic"
	"time"
)

// progress is how far a download is, in bytes. The manifest says the total.
type progress struct {
	done, fetched, total atomic.Int64
	// began is when the first blob was asked for, in nanoseconds of the Unix epoch.
	began atomic.Int64
}

// had counts n bytes that were on the node already.
func (p *progress) had(n int64) { p.done.Add(n) }

// add counts n bytes that have come from a host.
func (p *progress) add(n int64) {
	p.done.Add(n)
	p.fetched.Add(n)
}

func (p *progress) text(now time.Time) string {
	done, total := p.done.Load(), p.total.Load()
	if total == 0 {
		return "pulling: the manifest has not arrived"
	}
	text := fmt.Sprintf("pulling: %s (%d %%)", ofBytes(done, total), int64(float64(done)/float64(total)*100))
	elapsed := now.Sub(time.Unix(0, p.began.Load())).Seconds()
	rate := float64(p.fetched.Load()) / max(elapsed, 0.001)
	if rate < 1 {
		return text + ", nothing has arrived yet"
	}
	left := time.Duration(min(float64(total-done)/rate, math.MaxInt32)) * time.Second
	return fmt.Sprintf("%s, %s/s, about %s left", text, Bytes(int64(rate)), roughly(left))
}

// ofBytes says "3.2 of 16.1 GiB".
func ofBytes(done, total int64) string {
	unit, name := unitOf(total)
	return fmt.Sprintf("%.1f of %.1f %s", float64(done)/unit, float64(total)/unit, name)
}

// Bytes returns n with a unit, for people.
func Bytes(n int64) string {
	unit, name := unitOf(n)
	value := float64(n) / unit
	if value >= 100 || unit == 1 {
		return fmt.Sprintf("%.0f %s", value, name)
	}
	return fmt.Sprintf("%.1f %s", value, name)
}

func unitOf(n int64) (float64, string) {
	unit, name := 1.0, "B"
	for _, next := range []string{"KiB", "MiB", "GiB", "TiB", "PiB"} {
		if float64(n)/unit < 1024 {
			break
		}
		unit, name = unit*1024, next
	}
	return unit, name
}

// roughly rounds a duration so that two calls a second apart mostly say the same.
func roughly(d time.Duration) string {
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%ds", max(10*((d+9*time.Second)/(10*time.Second)), 10))
	case d < time.Hour:
		return fmt.Sprintf("%dm", (d+30*time.Second)/time.Minute)
	default:
		return fmt.Sprintf("%dh%02dm", d/time.Hour, d%time.Hour/time.Minute)
	}
}

// UnfinishedError is the error of a request that could not wait for the download, which goes
// on.
type UnfinishedError struct {
	text string
	why  error
}

// Error implements error: it says how far the download is.
func (e *UnfinishedError) Error() string { return e.text }

// Unwrap returns why the request could not wait.
func (e *UnfinishedError) Unwrap() error { return e.why }
