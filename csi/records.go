// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package csi

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"

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

// Mounts implements store.Record.
func (r record) Mounts() (string, []store.ID) { return r.Boot, []store.ID{r.Tree} }

// records are the records of all published volumes.
type records struct{ *store.Records[record] }

// name returns the name of the record of the volume at the path target.
func name(target string) string {
	sum := sha256.Sum256([]byte(target))
	return hex.EncodeToString(sum[:])
}

// references are those of the published volumes.
func (r records) references() (names []string) {
	for _, rec := range r.All() {
		names = append(names, rec.Reference)
	}
	return names
}

func (r records) get(target string) (record, bool) { return r.Get(name(target)) }

// add writes the record.
func (r records) add(rec record) error {
	rec.Boot = r.Boot
	if err := r.Put(name(rec.Target), rec); err != nil {
		return fmt.Errorf("cannot record the volume: %w", err)
	}
	return nil
}

func (r records) remove(target string) error {
	if _, _, err := r.Remove(name(target)); err != nil {
		return fmt.Errorf("cannot remove the record of the volume: %w", err)
	}
	return nil
}
