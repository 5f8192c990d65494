// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package nri

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/store"
)

// record says which trees are mounted in a container.
type record struct {
	Boot    string `json:"boot"`    // the boot of the kernel in which the container was created
	Runtime string `json:"runtime"` // the name of the container's runtime
	Sandbox string `json:"sandbox"`
	// Uptime is the uptime of the kernel when the record was written, in nanoseconds. Unlike
	// the wall clock it cannot be set.
	Uptime time.Duration `json:"uptime"`
	Trees  []store.ID    `json:"trees"`
}

// records are the records of all containers, one file for each. They survive the end of the
// daemon. They are not synced to the disk: no mount survives a crash of the node either.
type records struct {
	dir, boot string

	mu          sync.Mutex
	byContainer map[string]record
	// ended holds the containers and sandboxes that ended within creationWindow, with the
	// uptime then.
	ended map[string]time.Duration
}

const recordSuffix = ".json"

// idPattern matches the ID of a container or sandbox. It makes a safe file name.
var idPattern = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,199}$`)

// openRecords reads the records below dir, and removes those of an earlier boot and those that
// cannot be read.
func openRecords(ctx context.Context, dir string) (*records, error) {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return nil, fmt.Errorf("cannot tell whether the node was booted since the last start: %w", err)
	}
	r := &records{dir: dir, boot: string(bytes.TrimSpace(boot)), byContainer: map[string]record{}, ended: map[string]time.Duration{}}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		if container, ok := strings.CutSuffix(e.Name(), recordSuffix); ok {
			rec, err := readRecord(path)
			switch {
			case err != nil: // only a crash of the node leaves one, and no container survives that
				log.G(ctx).WithError(err).WithField("container", container).Warn("removing the record of a container, which cannot be read")
			case rec.Boot == r.boot:
				r.byContainer[container] = rec
				continue
			}
		}
		if err := os.RemoveAll(path); err != nil {
			return nil, err
		}
	}
	return r, nil
}

func readRecord(path string) (rec record, err error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return rec, err
	}
	if err := json.Unmarshal(b, &rec); err != nil {
		return rec, err
	}
	for _, id := range rec.Trees {
		if err := id.Manifest.Validate(); err != nil {
			return rec, fmt.Errorf("digest %.255q: %w", id.Manifest, err)
		}
	}
	return rec, nil
}

// trees is the store.References of the plugin.
func (r *records) trees(context.Context) (ids []store.ID, _ error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, rec := range r.byContainer {
		ids = append(ids, rec.Trees...)
	}
	return ids, nil
}

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
	return r.write(runtime, container, sandbox, ids)
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
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.write(runtime, container, sandbox, ids)
}

// write is set with the lock held.
func (r *records) write(runtime, container, sandbox string, ids []store.ID) (err error) {
	if !idPattern.MatchString(container) {
		return fmt.Errorf("%.255q is not the ID of a container: %w", container, errdefs.ErrInvalidArgument)
	}
	rec := record{Boot: r.boot, Runtime: runtime, Sandbox: sandbox, Uptime: uptime()}
	for _, id := range ids {
		if !slices.Contains(rec.Trees, id) {
			rec.Trees = append(rec.Trees, id)
		}
	}
	b, err := json.Marshal(rec)
	if err != nil {
		return err
	}
	// Not containerd's pkg/atomicfile: it syncs, and the runtime waits for this.
	path := filepath.Join(r.dir, container+recordSuffix)
	if err = os.WriteFile(path+".new", b, 0o600); err == nil {
		err = os.Rename(path+".new", path)
	}
	if err != nil {
		return fmt.Errorf("cannot record the artifacts of the container: %w", errors.Join(err, os.RemoveAll(path+".new")))
	}
	r.byContainer[container] = rec
	return nil
}

// uptime is the uptime of the kernel, including the time that it was suspended (CLOCK_BOOTTIME,
// clock_gettime(2), which every kernel has).
func uptime() time.Duration {
	var now unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_BOOTTIME, &now)
	return time.Duration(now.Nano())
}

// get returns the record of a container; ok is false if it has none.
func (r *records) get(container string) (rec record, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	rec, ok = r.byContainer[container]
	return rec, ok
}

// remove removes the record of a container and returns it; ok is false if it had none.
func (r *records) remove(container string) (rec record, ok bool, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if rec, ok = r.byContainer[container]; !ok {
		return rec, false, nil
	}
	if err := os.Remove(filepath.Join(r.dir, container+recordSuffix)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return rec, true, err
	}
	delete(r.byContainer, container)
	return rec, true, nil
}

// containers returns the containers of a sandbox that have a record; those of all sandboxes if
// sandbox is "".
func (r *records) containers(sandbox string) (ids []string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for container, rec := range r.byContainer {
		if sandbox == "" || rec.Sandbox == sandbox {
			ids = append(ids, container)
		}
	}
	return ids
}
