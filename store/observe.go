// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package store

import (
	"context"
	"errors"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/containerd/v2/pkg/tracing"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	"go.opentelemetry.io/otel/trace"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/unpack"
)

// Observer is told of what a Store does, by several goroutines at once. A function
// that is nil is not called, and none may call the Store.
type Observer struct {
	// Counted is told of every n bytes of contents that trees and snapshots retain, including
	// those of builds that fail later.
	Counted func(how unpack.Retention, n int64)
	// Built is told of every build of a tree that has ended.
	Built func(Build)
	// Answered is told of every request for the image volume of an artifact: how long the
	// answer took, and why the volume is refused.
	Answered func(took time.Duration, err error)
	// Collected is told of every garbage collection.
	Collected func(Collection)
}

// Build is how the build of a tree ended.
type Build struct {
	// Modes are how the tree was to be laid out.
	Modes unpack.Modes
	// OnPull says that it began while the runtime pulled the artifact. Duration is mostly
	// that of the pull then.
	OnPull   bool
	Duration time.Duration
	// Bytes is how many bytes were retained in each way; nil if the tree was made from
	// another one.
	Bytes map[unpack.Retention]int64
	// Err is why the build failed; nil if there is a tree.
	Err error
}

// Collection is what a garbage collection did.
type Collection struct {
	// Trees is how many trees it removed.
	Trees int
	// Freed is how many bytes of the disk it freed.
	Freed    int64
	Duration time.Duration
	Err      error
}

// Stats counts what a Store has.
type Stats struct {
	// Trees is how many trees there are, by their modes.
	Trees map[unpack.Modes]int
	// Mounts is how many of them are mounted.
	Mounts int
	// References is how many entries the References list.
	References int
	// Size is what the trees, and what they share, add to the disk, in bytes.
	Size int64
}

// Stats counts what the store has at this moment.
func (s *Store) Stats(ctx context.Context) (Stats, error) {
	stats := Stats{Trees: map[unpack.Modes]int{}}
	names, err := list(s.trees)
	if err != nil {
		return stats, err
	}
	for _, name := range names {
		if manifest(name) == "" {
			continue
		}
		if t, err := unpack.Load(filepath.Join(s.trees, name)); err == nil { // otherwise it is about to be removed
			stats.Trees[t.Modes]++
			stats.Size += t.Size
		}
	}
	mounts, err := list(s.mounts)
	if err != nil {
		return stats, err
	}
	stats.Mounts = len(mounts)
	s.mu.Lock()
	references := s.references
	s.mu.Unlock()
	for _, list := range references {
		ids, err := list(ctx)
		if err != nil {
			return stats, err
		}
		stats.References += len(ids)
	}
	return stats, nil
}

// Fields returns how many bytes b retained in each way, for the log.
func (b Build) Fields() log.Fields {
	f := log.Fields{}
	for key, how := range map[string]unpack.Retention{
		"linked": unpack.Linked, "reflinked": unpack.Reflinked, "copied": unpack.Copied, "decompressed": unpack.Decompressed,
	} {
		if n := b.Bytes[how]; n > 0 {
			f[key] = n
		}
	}
	return f
}

// observe logs and counts a build of id that has ended.
func (s *Store) observe(ctx context.Context, id ID, b Build) {
	if s.observer.Built != nil {
		s.observer.Built(b)
	}
	if b.Err != nil {
		return // the request that needs the tree logs it
	}
	f := b.Fields()
	maps.Copy(f, log.Fields{"artifact": id.Manifest, "duration": b.Duration, "on_pull": b.OnPull, "raw": b.Modes.Raw, "tar": b.Modes.Tar})
	log.G(ctx).WithFields(f).Info("built the tree of an artifact")
}

// following returns the store's own context, in which builds outlive the requests that began
// them, with the log fields and the trace of the request's context.
func (s *Store) following(ctx context.Context) context.Context {
	return log.WithLogger(trace.ContextWithSpan(s.closing, trace.SpanFromContext(ctx)), log.G(ctx))
}

// span begins a span if there is a trace, and returns the function that ends it.
func span(ctx context.Context, name string, artifact digest.Digest) (context.Context, func(error)) {
	ctx, span := tracing.StartSpan(ctx, name, tracing.WithAttribute("artifact", artifact.String()))
	return ctx, func(err error) {
		span.SetStatus(err)
		span.End()
	}
}

// freed returns how many bytes of the disk are freed if dir is removed: those of files that
// have no other name.
func freed(dir string) (bytes int64) {
	err := filepath.WalkDir(dir, func(p string, _ fs.DirEntry, err error) error {
		var st unix.Stat_t
		if err == nil && unix.Lstat(p, &st) == nil && (st.Nlink == 1 || st.Mode&unix.S_IFMT == unix.S_IFDIR) {
			bytes += st.Blocks * 512
		}
		return nil
	})
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		log.L.WithError(err).Debug("cannot tell how much disk space is freed")
	}
	return bytes
}
