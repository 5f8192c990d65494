// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package store

import "time"

// MaxWait is how long a request may wait in all: until the runtime's images are known, and
// for a build. containerd holds a lock during a request to the snapshotter: its garbage
// collector waits for the lock, and every other request waits for the collector
// (core/metadata/snapshot.go). A request for a large compressed artifact must not stop the
// node's other pods; kubelet asks again.
const MaxWait = 20 * time.Second

// The other limits and time-outs of the store. Those of building a tree are unpack.Limits.
const (
	// tellFailure is how long the next request is told of a failure that nobody waited for:
	// kubelet asks again within 5 minutes (pkg/kubelet/kubelet.go, MaxCrashLoopBackOff).
	tellFailure = 5 * time.Minute

	// collectEvery is how often garbage is collected when no event tells of it: there is no
	// watch, or something could not be removed.
	collectEvery = time.Minute
	// settle is how long a garbage collection waits for more deletions after the first: the
	// runtime's own garbage collection deletes blobs by the hundred.
	settle = 200 * time.Millisecond
	// probeAge is how old the directory of a probe must be to be removed at the start. A
	// younger one may be that of another process, which probes now.
	probeAge = time.Minute

	// lookEvery is how often directories of blobs are looked for, and those that cannot be
	// watched are looked into.
	lookEvery = time.Second
	// coarse is more than the times of files lag behind the clock: the kernel takes them from
	// its last tick.
	coarse = time.Second
	// maxRef is the longest name of a blob that containerd receives that is read, in bytes.
	maxRef = 4 << 10

	// maxManifest is the largest file that is tried as the manifest of an artifact that is
	// being pulled, in bytes: what the OCI distribution specification asks registries to take.
	maxManifest = 4 << 20
	// maxOnPull bounds the memory of builds that wait for a pull, in bytes: stalledAfter for
	// each, and perManifestByte for each byte of the manifest. The layers that are read from
	// a manifest take 2.5 to 3.3 times its size. What looks like a manifest may be a file of
	// an artifact, whose blobs never come.
	maxOnPull       = 64 << 20
	stalledAfter    = 256 << 10
	perManifestByte = 4
	// patience is how long such a build waits without progress. containerd gives up a pull
	// after the same time (image_pull_progress_timeout in docs/cri/config.md).
	patience = 5 * time.Minute
	// alive is how long after its last progress such a build is not expedited to make room
	// for others.
	alive = 30 * time.Second
	// lookAgain is how often such a build looks by itself whether a blob has arrived, and
	// whether the manifest is still there: a pull that is given up leaves it to the runtime's
	// garbage collection.
	lookAgain = time.Minute
)
