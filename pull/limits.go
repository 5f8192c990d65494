// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package pull

import "time"

// DefaultLimits are the limits of a Config that sets none.
var DefaultLimits = Limits{Blobs: 4, Connections: 16, Memory: 256 << 20, Stall: 20 * time.Second, Reserve: 5}

// Limits bound what pulls take of the node. They are for all pulls together.
type Limits struct {
	// Blobs is how many blobs are downloaded at once, and Connections how many connections
	// they have in all: one large blob is fetched by several if each is slow.
	Blobs, Connections int
	// Memory bounds the parts of blobs that have arrived before it is their turn, in bytes.
	Memory int64
	// Stall is how long a host may send nothing, or next to nothing, before the next host is
	// asked.
	Stall time.Duration
	// Reserve is the percentage of the file system that stays free.
	Reserve int
}

const (
	// ways is how many connections one blob has at most.
	ways = 8
	// minPart is the least size of the part of a blob that one connection fetches, in bytes.
	minPart = 1 << 20
	// slow is the throughput of one connection, in bytes a second, below which a large blob
	// is fetched by several. Above it the disk and the digest are what takes the time, and
	// the buffers of several connections make it slower.
	slow = 200 << 20
	// probe is how long the throughput of one connection is measured, and twice that the one of
	// several, which have to be so many times as fast.
	probe  = 500 * time.Millisecond
	faster = 1.5

	// trickle is how many bytes a host must send in each Limits.Stall: fewer are a stall.
	trickle = 64 << 10
	// maxDocument is the longest answer that is not a blob, in bytes: a manifest, a token.
	// It is more than containerd's resolver accepts of a manifest (docker.MaxManifestSize).
	maxDocument = 8 << 20
	// maxHeader is the longest header of an answer, in bytes.
	maxHeader = 256 << 10

	// minBackoff is how long a pull waits after all hosts have failed for a reason that may
	// pass. Each further failure doubles it, up to maxBackoff.
	minBackoff = 500 * time.Millisecond
	maxBackoff = 30 * time.Second
	// maxRetryAfter bounds how long a pull obeys the header Retry-After at a time.
	maxRetryAfter = time.Minute
	// patience is how long a blob is tried without a further byte.
	patience = 5 * time.Minute
	// abandoned is how long a pull goes on that nobody waits for. It is more than kubelet
	// waits between two tries (2 minutes and 2 seconds).
	abandoned = 5 * time.Minute
	// keepPartial is how long what has arrived of a failed pull stays, for the next try.
	keepPartial = 24 * time.Hour
	// collectEvery is how often garbage is collected when nothing else asks for it.
	collectEvery = 10 * time.Minute
	// maxReaders is how many permissions are remembered. Over it all are forgotten, and the
	// registry is asked again.
	maxReaders = 10_000

	// bufferSize is the size of the buffer between a connection and the disk, in bytes.
	bufferSize = 1 << 20
)
