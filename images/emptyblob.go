// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package images

import (
	"bytes"
	"context"
	"fmt"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// LabelGCRoot excludes content and snapshots from containerd's garbage collection
// (docs/garbage-collection.md of containerd). Any value will do; containerd itself sets
// a time, as [GCRootTime] does.
const LabelGCRoot = "containerd.io/gc.root"

// GCRootTime is a value for [LabelGCRoot].
func GCRootTime() string { return time.Now().UTC().Format(time.RFC3339) }

// KeepEmptyBlob pre-creates the empty blob in the namespaces, and checks again after the
// given time, until ctx ends. containerd need not run yet. Somebody may delete the blob,
// or start containerd on a new root.
func KeepEmptyBlob(ctx context.Context, address string, in []string, again time.Duration) {
	if len(in) == 0 {
		return
	}
	ctx = log.WithLogger(ctx, log.G(ctx).WithField("containerd", address))
	retryEmptyBlob.Run(ctx, "cannot pre-create the empty blob: artifacts with an empty file or config cannot be pulled; still trying",
		func() (time.Duration, error) {
			created, err := ensureEmptyBlobs(ctx, address, in)
			if len(created) > 0 {
				log.G(ctx).WithField("namespaces", created).Info("pre-created the empty blob: artifacts with an empty file or config can be pulled")
			}
			return again, err
		})
}

// ensureEmptyBlobs makes one attempt for all namespaces, and returns those that it
// changed.
func ensureEmptyBlobs(ctx context.Context, address string, in []string) (changed []string, err error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	c, err := Connect(ctx, address)
	if err != nil {
		return nil, err
	}
	defer func() { _ = c.Close() }()
	for _, namespace := range in {
		done, err := EnsureEmptyBlob(namespaces.WithNamespace(ctx, namespace), c.ContentStore(), digest.Canonical)
		if done {
			changed = append(changed, namespace)
		}
		if err != nil {
			return changed, fmt.Errorf("namespace %s: %w", namespace, err)
		}
	}
	return changed, nil
}

// EnsureEmptyBlob puts the blob of no bytes, under its digest by the algorithm, into the
// content store of ctx's namespace, and reports whether it changed anything.
//
// containerd's fetcher refuses a blob of size zero (core/remotes/handlers.go, Fetch:
// "reports content size of zero") unless the content store already has it. So an
// artifact with an empty file or an empty config can be pulled only after this.
//
// The lease of ctx retains the blob, or [LabelGCRoot] if ctx has no lease.
func EnsureEmptyBlob(ctx context.Context, store content.Store, algorithm digest.Algorithm) (changed bool, err error) {
	// Before the label is set, a garbage collection may remove the blob.
	for range emptyBlobAttempts {
		var done bool
		done, err = ensureEmptyBlob(ctx, store, algorithm.FromBytes(nil))
		changed = changed || done
		if !errdefs.IsNotFound(err) {
			break
		}
	}
	if err != nil {
		return changed, fmt.Errorf("put the empty blob into containerd's content store: %w", err)
	}
	return changed, nil
}

func ensureEmptyBlob(ctx context.Context, store content.Store, empty digest.Digest) (changed bool, err error) {
	_, leased := leases.FromContext(ctx)
	labels := map[string]string{LabelGCRoot: GCRootTime()}
	opts := []content.Opt{content.WithLabels(labels)}
	if leased {
		opts = nil
	}
	info, err := store.Info(ctx, empty)
	if leased || errdefs.IsNotFound(err) {
		changed = errdefs.IsNotFound(err)
		// This succeeds without setting the labels if the namespace has the blob by
		// now, by a pull, or from a store that namespaces share.
		if err := content.WriteBlob(ctx, store, "artifact-snapshotter-empty-"+empty.Algorithm().String(), bytes.NewReader(nil),
			ocispec.Descriptor{Digest: empty}, opts...); err != nil {
			return false, err
		}
		info, err = store.Info(ctx, empty)
	}
	if err != nil || leased || info.Labels[LabelGCRoot] != "" {
		return changed, err
	}
	_, err = store.Update(ctx, content.Info{Digest: empty, Labels: labels}, "labels."+LabelGCRoot)
	return true, err
}
