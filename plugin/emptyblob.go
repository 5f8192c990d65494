// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package plugin

import (
	"bytes"
	"context"
	"fmt"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/content/proxy"
	"github.com/containerd/containerd/v2/pkg/dialer"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

const (
	// emptyBlobInterval is how often the empty blob is looked for after it was
	// planted: somebody may delete it, or start containerd on a new root.
	emptyBlobInterval = 3 * time.Minute
	// emptyBlobTimeout bounds one attempt, in case containerd hangs.
	emptyBlobTimeout = 20 * time.Second
	minEmptyBlobWait = 100 * time.Millisecond
	maxEmptyBlobWait = 30 * time.Second
	// warnAfter is the failure in a row that is a warning, once: it comes after
	// 1.5 s, since a containerd that is just starting is nothing to warn of.
	warnAfter = 5

	// gcRootLabel keeps content from containerd's garbage collector
	// (docs/garbage-collection.md of containerd). Any value will do; a time is
	// what containerd itself sets.
	gcRootLabel = "containerd.io/gc.root"
)

// keepEmptyBlobs sees to it that the empty blob is in the content store of every
// namespace, and looks for it again after the given time, until ctx ends.
// containerd need not run yet.
//
// containerd's fetcher refuses a blob of size zero (core/remotes/handlers.go,
// Fetch: "reports content size of zero"), unless the content store has it.
func keepEmptyBlobs(ctx context.Context, address string, in []string, again time.Duration) {
	if len(in) == 0 {
		return
	}
	logger := log.G(ctx).WithField("containerd", address)
	wait, failures := minEmptyBlobWait, 0
	for ctx.Err() == nil {
		planted, err := ensureEmptyBlobs(ctx, address, in)
		if len(planted) > 0 {
			logger.WithField("namespaces", planted).Info("Planted the empty blob: artifacts with an empty file or config can be pulled")
		}
		next := again
		if err == nil {
			wait, failures = minEmptyBlobWait, 0
		} else {
			failures++
			level := log.DebugLevel
			if failures == warnAfter {
				level = log.WarnLevel
			}
			logger.WithError(err).Log(level, "Cannot plant the empty blob: artifacts with an empty file or config cannot be pulled; still trying")
			next, wait = wait, min(2*wait, maxEmptyBlobWait)
		}
		select {
		case <-ctx.Done():
		case <-time.After(next):
		}
	}
}

// plant makes one attempt for all namespaces and returns those where something
// had to be done.
func ensureEmptyBlobs(ctx context.Context, address string, in []string) (planted []string, err error) {
	ctx, cancel := context.WithTimeout(ctx, emptyBlobTimeout)
	defer cancel()
	conn, err := grpc.NewClient(dialer.DialAddress(address),
		grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, fmt.Errorf("connect to containerd: %w", err)
	}
	defer func() { _ = conn.Close() }()
	store := proxy.NewContentStore(conn)
	for _, namespace := range in {
		changed, err := ensureEmptyBlob(namespaces.WithNamespace(ctx, namespace), store)
		if changed {
			planted = append(planted, namespace)
		}
		if err != nil {
			return planted, fmt.Errorf("plant the empty blob in namespace %s: %w", namespace, err)
		}
	}
	return planted, nil
}

// ensureEmptyBlob plants the empty blob in the namespace of ctx and reports whether
// there was anything to do.
func ensureEmptyBlob(ctx context.Context, store content.Store) (changed bool, err error) {
	// A garbage collection may take what has no label yet between two steps.
	for range 3 {
		var done bool
		done, err = writeEmptyBlob(ctx, store)
		changed = changed || done
		if !errdefs.IsNotFound(err) {
			break
		}
	}
	return changed, err
}

func writeEmptyBlob(ctx context.Context, store content.Store) (changed bool, err error) {
	empty := ocispec.Descriptor{MediaType: "application/octet-stream", Digest: digest.FromBytes(nil)}
	labels := map[string]string{gcRootLabel: time.Now().UTC().Format(time.RFC3339)}

	info, err := store.Info(ctx, empty.Digest)
	if errdefs.IsNotFound(err) {
		// If it comes in another way meanwhile (a pull, or a store that the
		// namespaces share), this succeeds without setting the labels.
		if err := content.WriteBlob(ctx, store, "artifact-snapshotter-empty-blob", bytes.NewReader(nil),
			empty, content.WithLabels(labels)); err != nil {
			return false, err
		}
		changed = true
		info, err = store.Info(ctx, empty.Digest)
	}
	if err != nil {
		return changed, err
	}
	if info.Labels[gcRootLabel] != "" {
		return changed, nil
	}
	_, err = store.Update(ctx, content.Info{Digest: empty.Digest, Labels: labels}, "labels."+gcRootLabel)
	return true, err
}
