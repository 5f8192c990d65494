// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package nri

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/store"
)

// record says which trees are mounted in a container. Its name is the container's ID.
type record struct {
	Boot    string `json:"boot"`    // the boot of the kernel in which the container was created
	Runtime string `json:"runtime"` // the name of the container's runtime
	Sandbox string `json:"sandbox"`
	// Uptime is the uptime of the kernel when the record was written, in nanoseconds. Unlike
	// the wall clock it cannot be set.
	Uptime time.Duration `json:"uptime"`
	Trees  []store.ID    `json:"trees"`
}

// Mounts implements store.Record.
func (r record) Mounts() (string, []store.ID) { return r.Boot, r.Trees }

// records are the records of all containers.
type records struct {
	*store.Records[record]

	mu sync.Mutex
	// ended holds the containers and sandboxes that ended within creationWindow, with the
	// uptime then.
	ended map[string]time.Duration
}

// idPattern matches the ID of a container or sandbox. It makes a safe file name.
var idPattern = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,199}$`)

// create is set for a container that is being created. A daemon that was stopped handles all
// requests that have waited for it at once, in any order, so the container or its sandbox may
// have ended already. Then create returns errdefs.ErrNotFound.
func (r *records) create(runtime, container, sandbox string, ids []store.ID) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, id := range []string{container, sandbox} {
		if _, ok := r.ended[id]; ok {
			return fmt.Errorf("container %.255s, or its pod, has ended before it was created: %w", container, errdefs.ErrNotFound)
		}
	}
	return r.set(runtime, container, sandbox, ids)
}

// end notes that a container or a sandbox has ended. No request for its creation comes later
// than creationWindow.
func (r *records) end(id string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := uptime()
	maps.DeleteFunc(r.ended, func(_ string, then time.Duration) bool { return now-then > creationWindow })
	r.ended[id] = now
}

// set replaces the record of a container. A tree that is mounted in it twice counts once.
func (r *records) set(runtime, container, sandbox string, ids []store.ID) error {
	if !idPattern.MatchString(container) {
		return fmt.Errorf("%.255q is not the ID of a container: %w", container, errdefs.ErrInvalidArgument)
	}
	rec := record{Boot: r.Boot, Runtime: runtime, Sandbox: sandbox, Uptime: uptime()}
	for _, id := range ids {
		if !slices.Contains(rec.Trees, id) {
			rec.Trees = append(rec.Trees, id)
		}
	}
	if err := r.Put(container, rec); err != nil {
		return fmt.Errorf("cannot record the artifacts of the container: %w", err)
	}
	return nil
}

// uptime is the uptime of the kernel, including the time that it was suspended (CLOCK_BOOTTIME,
// clock_gettime(2), which every kernel has).
func uptime() time.Duration {
	var now unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_BOOTTIME, &now)
	return time.Duration(now.Nano())
}

// containers returns the containers of a sandbox that have a record.
func (r *records) containers(sandbox string) (ids []string) {
	for container, rec := range r.All() {
		if rec.Sandbox == sandbox {
			ids = append(ids, container)
		}
	}
	return ids
}
