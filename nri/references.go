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
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/store"
	"github.com/artifact-snapshotter/artifact-snapshotter/unpack"
)

// reference is what a container shows.
type reference struct {
	// Boot is the boot of the kernel in which it was created.
	Boot string `json:"boot,omitempty"`
	// Runtime is the name of the runtime whose it is; "" if a version of this program has
	// recorded it that did not ask.
	Runtime string `json:"runtime,omitempty"`
	Sandbox string `json:"sandbox"`
	// Uptime is how long the kernel had run when it was recorded: the wall clock may be
	// set. It is 0 if a version of this program has recorded it that wrote down the latter.
	Uptime time.Duration `json:"uptime,omitempty"`
	Shows  []shown       `json:"shows"`
}

// shown is a store.ID.
type shown struct {
	Manifest digest.Digest `json:"manifest"`
	UID      string        `json:"uidmap,omitempty"`
	GID      string        `json:"gidmap,omitempty"`
}

func shownOf(id store.ID) shown {
	return shown{Manifest: id.Manifest, UID: id.Owners.UID, GID: id.Owners.GID}
}

func (s shown) id() store.ID {
	return store.ID{Manifest: s.Manifest, Owners: unpack.IDMap{UID: s.UID, GID: s.GID}}
}

// references are those of all containers: a file for each, so that they outlive the
// daemon. They are not synced to the disk: Trees and mounts do not outlive a crash of
// the node either.
type references struct {
	dir, boot string

	mu sync.Mutex
	by map[string]reference // by container
	// ended are the containers and sandboxes that have ended of late, and the uptime then.
	ended map[string]time.Duration
}

const recordSuffix = ".json"

// containerID is what a container's ID may be, for it is the name of a file.
var containerID = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,199}$`)

func openReferences(ctx context.Context, dir string) (*references, error) {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return nil, fmt.Errorf("cannot tell whether the node was booted since the last start: %w", err)
	}
	r := &references{dir: dir, boot: string(bytes.TrimSpace(boot)), by: map[string]reference{}, ended: map[string]time.Duration{}}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		container, ok := strings.CutSuffix(e.Name(), recordSuffix)
		if ok {
			of, err := readReference(path)
			switch {
			case err != nil: // only a crash of the node leaves such a one, and no container with it
				log.G(ctx).WithError(err).WithField("container", container).Warn("removing the record of a container, which cannot be read")
			case of.Boot == r.boot || of.Boot == "":
				r.by[container] = of
				continue
			}
		}
		if err := os.RemoveAll(path); err != nil {
			return nil, err
		}
	}
	return r, nil
}

func readReference(path string) (r reference, err error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return r, err
	}
	if err := json.Unmarshal(b, &r); err != nil {
		return r, err
	}
	for _, s := range r.Shows {
		if err := s.Manifest.Validate(); err != nil {
			return r, fmt.Errorf("digest %.255q: %w", s.Manifest, err)
		}
	}
	return r, nil
}

// shown is the store.References of the plugin.
func (r *references) shown(context.Context) (ids []store.ID, _ error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, of := range r.by {
		for _, s := range of.Shows {
			ids = append(ids, s.id())
		}
	}
	return ids, nil
}

// add is set for a container that is being created. What asks for it may come late, after
// what tells that the container or its pod has ended: a daemon that was stopped deals with
// all of it at once, in any order. Then it is errdefs.ErrNotFound.
func (r *references) add(runtime, container, sandbox string, ids []store.ID) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, id := range []string{container, sandbox} {
		if _, ok := r.ended[id]; ok {
			return fmt.Errorf("container %.255s, or its pod, has ended before it was created: %w", container, errdefs.ErrNotFound)
		}
	}
	return r.put(runtime, container, sandbox, ids)
}

// end takes note that a container or a sandbox has ended. Nothing of it comes later than
// settling.
func (r *references) end(id string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := uptime()
	maps.DeleteFunc(r.ended, func(_ string, then time.Duration) bool { return now-then > settling })
	r.ended[id] = now
}

// set records what a container of the runtime shows. An artifact that it shows twice counts
// once.
func (r *references) set(runtime, container, sandbox string, ids []store.ID) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.put(runtime, container, sandbox, ids)
}

// put is set under the lock.
func (r *references) put(runtime, container, sandbox string, ids []store.ID) error {
	if !containerID.MatchString(container) {
		return fmt.Errorf("%.255q is not the ID of a container: %w", container, errdefs.ErrInvalidArgument)
	}
	of := reference{Boot: r.boot, Runtime: runtime, Sandbox: sandbox, Uptime: uptime()}
	for _, id := range ids {
		if s := shownOf(id); !slices.Contains(of.Shows, s) {
			of.Shows = append(of.Shows, s)
		}
	}
	b, err := json.Marshal(of)
	if err != nil {
		return err
	}
	if err := r.write(filepath.Join(r.dir, container+recordSuffix), b); err != nil {
		return fmt.Errorf("cannot record what the container shows: %w", err)
	}
	r.by[container] = of
	return nil
}

// uptime is how long the kernel has run, with the time that it was suspended
// (clock_gettime(2), CLOCK_BOOTTIME, which every kernel has).
func uptime() time.Duration {
	var now unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_BOOTTIME, &now)
	return time.Duration(now.Nano())
}

// write puts b into the place of the file at once, whatever happens.
func (r *references) write(path string, b []byte) error {
	tmp := path + ".new"
	if err := os.WriteFile(tmp, b, 0o600); err != nil {
		return errors.Join(err, os.RemoveAll(tmp))
	}
	return os.Rename(tmp, path)
}

// get is what a container shows; false if nothing.
func (r *references) get(container string) (reference, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	of, ok := r.by[container]
	return of, ok
}

// drop forgets a container, and returns what it has shown; false if nothing.
func (r *references) drop(container string) (of reference, ok bool, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if of, ok = r.by[container]; !ok {
		return of, false, nil
	}
	if err := os.Remove(filepath.Join(r.dir, container+recordSuffix)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return of, true, err
	}
	delete(r.by, container)
	return of, true, nil
}

// of are the containers of a sandbox; those of all if it is "".
func (r *references) of(sandbox string) (containers []string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for container, of := range r.by {
		if sandbox == "" || of.Sandbox == sandbox {
			containers = append(containers, container)
		}
	}
	return containers
}
