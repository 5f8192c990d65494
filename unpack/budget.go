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

// Limits are what unpacking may take of a node.
type Limits struct {
	// Memory is the bytes that all decompression at one time may take. One layer
	// at a time is always decompressed: 4 MiB for gzip, 136 MiB for zstd, whose
	// streams may ask for a window of 128 MiB.
	Memory int64
	// Expansion is how many times the size of its blob a compressed layer may
	// have; it does not count for the first 64 MiB.
	Expansion int64
	// Reserve is the share in percent of the file system of the Trees that is
	// left free, 0 to 99.
	Reserve int
}

// DefaultLimits are those of a configuration that says nothing.
var DefaultLimits = Limits{Memory: 512 << 20, Expansion: 50, Reserve: 5}

// alwaysAllowed is what any compressed layer may have: a small tar is mostly
// zeros, and one of many small files mostly headers.
const alwaysAllowed = 64 << 20

// Budget keeps all builds of a process together within Limits.
type Budget struct {
	limits        Limits
	memory, cores *semaphore.Weighted
	large         *semaphore.Weighted // of plans, see largePlan

	mu   sync.Mutex
	busy map[string]chan struct{} // closed when the thing is free
}

// NewBudget returns a Budget of which nothing is taken.
func NewBudget(l Limits) *Budget {
	return &Budget{
		limits: l,
		memory: semaphore.NewWeighted(l.Memory),
		cores:  semaphore.NewWeighted(int64(runtime.GOMAXPROCS(0))),
		large:  semaphore.NewWeighted(1),
		busy:   map[string]chan struct{}{},
	}
}

// Lock waits until it holds the lock of that name, or ctx ends. There is one for every
// compressed blob, which artifacts that share it, or pods with different user namespaces,
// may need at the same time; others must have other names, such as paths.
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

// largePlan waits until no other plan is large: one of maxEntries takes 1.5 GB
// while it is written.
func (b *Budget) largePlan(ctx context.Context) (release func(), err error) {
	if err := b.large.Acquire(ctx, 1); err != nil {
		return nil, err
	}
	return func() { b.large.Release(1) }, nil
}

// take waits for the memory and the core to decompress a layer.
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

// expanded is how many bytes a compressed layer of size may have.
func (b *Budget) expanded(size int64) int64 {
	if size > math.MaxInt64/b.limits.Expansion {
		return math.MaxInt64
	}
	return max(alwaysAllowed, size*b.limits.Expansion)
}

// room refuses size bytes that the file system of f has no room for, before the
// node's disk is full.
func (b *Budget) room(f *os.File, size int64) error {
	if size == 0 {
		return nil
	}
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
		return pathError("statfs", f.Name(), err)
	}
	if st.Blocks == 0 { // it does not say, as ramfs
		return nil
	}
	free := st.Bavail * uint64(st.Bsize)
	reserve := st.Blocks / 100 * uint64(b.limits.Reserve) * uint64(st.Bsize)
	if uint64(size) > free || free-uint64(size) < reserve {
		return fmt.Errorf("%d bytes are needed and %d are free, where %d are to stay free (reserved_space): %w", size, free, reserve, unix.ENOSPC)
	}
	return nil
}
