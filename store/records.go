// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package store

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/containerd/log"
)

// Records are what a front end has mounted, one file for each Record below a directory. They
// are for a front end whose runtime keeps no such list. They survive the end of the daemon.
// They are not synced to the disk, because no mount survives a crash of the node either.
type Records[R Record] struct {
	// Dir is the directory, and Boot the ID of this boot of the kernel.
	Dir, Boot string

	mu     sync.Mutex
	byName map[string]R
}

// Record is what is known of one mount or of those of one container, as JSON.
type Record interface {
	// Mounts returns the ID of the boot of the kernel in which it was written, and which
	// trees are mounted.
	Mounts() (boot string, trees []ID)
}

const recordSuffix = ".json"

// OpenRecords reads the records below dir, and removes those of an earlier boot and those that
// cannot be read. The trees in them are protected from the garbage collection of s, which must
// not run before.
func OpenRecords[R Record](ctx context.Context, dir string, s *Store) (*Records[R], error) {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return nil, fmt.Errorf("cannot tell whether the node was booted since the last start: %w", err)
	}
	r := &Records[R]{Dir: dir, Boot: string(bytes.TrimSpace(boot)), byName: map[string]R{}}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		if name, ok := strings.CutSuffix(e.Name(), recordSuffix); ok {
			record, boot, err := readRecord[R](path)
			switch {
			case err != nil: // only a crash of the node leaves one, and no mount survives that
				log.G(ctx).WithError(err).WithField("path", path).Warn("removing a record of what is mounted, which cannot be read")
			case boot == r.Boot:
				r.byName[name] = record
				continue
			}
		}
		if err := os.RemoveAll(path); err != nil {
			return nil, err
		}
	}
	s.AddReferences(r.Trees)
	return r, nil
}

// ProtectRecorded is OpenRecords for a front end that is disabled, whose mounts may still be in
// use, and returns how many records there are. The trees stay until the front end is enabled
// again, or the node is booted. If dir does not exist, it does nothing.
func ProtectRecorded[R Record](ctx context.Context, dir string, s *Store) (int, error) {
	if _, err := os.Stat(dir); errors.Is(err, os.ErrNotExist) {
		return 0, nil
	}
	r, err := OpenRecords[R](ctx, dir, s)
	if err != nil {
		return 0, err
	}
	return len(r.byName), nil
}

func readRecord[R Record](path string) (record R, boot string, err error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return record, "", err
	}
	if err := json.Unmarshal(b, &record); err != nil {
		return record, "", err
	}
	boot, trees := record.Mounts()
	for _, id := range trees {
		if err := id.Manifest.Validate(); err != nil {
			return record, "", fmt.Errorf("digest %.255q: %w", id.Manifest, err)
		}
	}
	return record, boot, nil
}

// Trees is a References of the trees that the records list.
func (r *Records[R]) Trees(context.Context) (ids []ID, _ error) {
	for _, record := range r.All() {
		_, trees := record.Mounts()
		ids = append(ids, trees...)
	}
	return ids, nil
}

// All returns all records, by their names.
func (r *Records[R]) All() map[string]R {
	r.mu.Lock()
	defer r.mu.Unlock()
	return maps.Clone(r.byName)
}

// Get returns the record with the name; ok is false if there is none.
func (r *Records[R]) Get(name string) (record R, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	record, ok = r.byName[name]
	return record, ok
}

// Put adds the record, or replaces the one with the name, which must be that of a file.
func (r *Records[R]) Put(name string, record R) error {
	b, err := json.Marshal(record)
	if err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	// Not containerd's pkg/atomicfile: it syncs, and the runtime waits for this.
	path := filepath.Join(r.Dir, name+recordSuffix)
	if err = os.WriteFile(path+".new", b, 0o600); err == nil {
		err = os.Rename(path+".new", path)
	}
	if err != nil {
		return errors.Join(err, os.RemoveAll(path+".new"))
	}
	r.byName[name] = record
	return nil
}

// Remove removes the record with the name, and returns it; ok is false if there was none.
func (r *Records[R]) Remove(name string) (record R, ok bool, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if record, ok = r.byName[name]; !ok {
		return record, false, nil
	}
	if err := os.Remove(filepath.Join(r.Dir, name+recordSuffix)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return record, true, err
	}
	delete(r.byName, name)
	return record, true, nil
}
