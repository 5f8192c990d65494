// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"context"
	"fmt"
	"math"
	"os"
	"runtime"
	"sync"

	"golang.org/x/sync/semaphore"
	"golang.org/x/sys/unix"
)

// Budget keeps all builds of a process together within Limits.
type Budget struct {
	limits        Limits
	memory, cores *semaphore.Weighted
	large         *semaphore.Weighted // see largePlan

	mu   sync.Mutex
	busy map[string]chan struct{} // the locks that are held; closed when they are released
}

// NewBudget returns a Budget of which nothing is in use.
func NewBudget(l Limits) *Budget {
	return &Budget{
		limits: l,
		memory: semaphore.NewWeighted(l.Memory),
		cores:  semaphore.NewWeighted(int64(runtime.GOMAXPROCS(0))),
		large:  semaphore.NewWeighted(1),
		busy:   map[string]chan struct{}{},
	}
}

// Lock waits until it holds the lock with this name, or ctx ends. Every compressed blob has
// a lock, named by its digest: artifacts that share it, and pods with different user
// namespaces, may need it at the same time. Callers use other names, such as paths.
func (b *Budget) Lock(ctx context.Context, name string) (unlock func(), err error) {
	for {
		b.mu.Lock()
		busy := b.busy[name]
		if busy == nil {
			free := make(chan struct{})
			b.busy[name] = free
			b.mu.Unlock()
			return func() {
				b.mu.Lock()
				defer b.mu.Unlock()
				delete(b.busy, name)
				close(free)
			}, nil
		}
		b.mu.Unlock()
		select {
		case <-busy:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// largePlan waits until no other plan is large, see smallPlan.
func (b *Budget) largePlan(ctx context.Context) (release func(), err error) {
	if err := b.large.Acquire(ctx, 1); err != nil {
		return nil, err
	}
	return func() { b.large.Release(1) }, nil
}

// take waits for the memory and the core that decompressing a layer needs.
func (b *Budget) take(ctx context.Context, memory int64) (release func(), err error) {
	memory = min(memory, b.limits.Memory)
	if err := b.memory.Acquire(ctx, memory); err != nil {
		return nil, err
	}
	if err := b.cores.Acquire(ctx, 1); err != nil {
		b.memory.Release(memory)
		return nil, err
	}
	return func() {
		b.cores.Release(1)
		b.memory.Release(memory)
	}, nil
}

// expanded returns to how many bytes a compressed blob of size bytes may decompress.
func (b *Budget) expanded(size int64) int64 {
	if size > math.MaxInt64/b.limits.Expansion {
		return math.MaxInt64
	}
	return max(alwaysAllowed, size*b.limits.Expansion)
}

// room refuses to write size bytes to the file system of f if they would not leave the
// reserve free, before the node's disk is full.
func (b *Budget) room(f *os.File, size int64) error {
	if size == 0 {
		return nil
	}
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
		return pathError("statfs", f.Name(), err)
	}
	if st.Blocks == 0 { // unknown, as for ramfs
		return nil
	}
	free := st.Bavail * uint64(st.Bsize)
	reserve := st.Blocks / 100 * uint64(b.limits.Reserve) * uint64(st.Bsize)
	if uint64(size) > free || free-uint64(size) < reserve {
		return fmt.Errorf("%d bytes are needed and %d are free, of which %d must stay free (reserved_space in the snapshotter's configuration): %w", size, free, reserve, unix.ENOSPC)
	}
	return nil
}
