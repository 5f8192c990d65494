// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package csi

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/containerd/log"

	"github.com/artifact-snapshotter/artifact-snapshotter/store"
)

// record says which tree is published at a path.
type record struct {
	Boot   string `json:"boot"` // the boot of the kernel in which the volume was published
	Target string `json:"target"`
	Volume string `json:"volume"`
	// Reference is what the volume was asked for by.
	Reference string `json:"reference"`
	// Pod is the pod's UID, if kubelet has said it.
	Pod  string   `json:"pod,omitempty"`
	Tree store.ID `json:"tree"`
	// Bytes is the size of the artifact's blobs.
	Bytes int64 `json:"bytes"`
}

// records are the records of all published volumes, one file for each, whose name is a digest
// of the path. They survive the end of the daemon. They are not synced to the disk: no mount
// survives a crash of the node either.
type records struct {
	dir, boot string

	mu       sync.Mutex
	byTarget map[string]record
}

const recordSuffix = ".json"

// openRecords reads the records below dir, and removes those of an earlier boot and those that
// cannot be read.
func openRecords(ctx context.Context, dir string) (*records, error) {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return nil, fmt.Errorf("cannot tell whether the node was booted since the last start: %w", err)
	}
	r := &records{dir: dir, boot: string(bytes.TrimSpace(boot)), byTarget: map[string]record{}}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		if strings.HasSuffix(e.Name(), recordSuffix) {
			rec, err := readRecord(path)
			switch {
			case err != nil: // only a crash of the node leaves one, and no mount survives that
				log.G(ctx).WithError(err).WithField("path", path).Warn("removing the record of a volume, which cannot be read")
			case rec.Boot == r.boot:
				r.byTarget[rec.Target] = rec
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
	if err := rec.Tree.Manifest.Validate(); err != nil {
		return rec, fmt.Errorf("digest %.255q: %w", rec.Tree.Manifest, err)
	}
	return rec, nil
}

// trees is the store.References of the driver.
func (r *records) trees(context.Context) (ids []store.ID, _ error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, rec := range r.byTarget {
		ids = append(ids, rec.Tree)
	}
	return ids, nil
}

// references are those of the published volumes.
func (r *records) references() (names []string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, rec := range r.byTarget {
		names = append(names, rec.Reference)
	}
	return names
}

func (r *records) get(target string) (record, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	rec, ok := r.byTarget[target]
	return rec, ok
}

func (r *records) path(target string) string {
	sum := sha256.Sum256([]byte(target))
	return filepath.Join(r.dir, hex.EncodeToString(sum[:])+recordSuffix)
}

// add writes the record.
func (r *records) add(rec record) error {
	rec.Boot = r.boot
	b, err := json.Marshal(rec)
	if err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	path := r.path(rec.Target)
	if err = os.WriteFile(path+".new", b, 0o600); err == nil {
		err = os.Rename(path+".new", path)
	}
	if err != nil {
		return fmt.Errorf("cannot record the volume: %w", errors.Join(err, os.RemoveAll(path+".new")))
	}
	r.byTarget[rec.Target] = rec
	return nil
}

func (r *records) remove(target string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, ok := r.byTarget[target]; !ok {
		return nil
	}
	if err := os.Remove(r.path(target)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("cannot remove the record of the volume: %w", err)
	}
	delete(r.byTarget, target)
	return nil
}
