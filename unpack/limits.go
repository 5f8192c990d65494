// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package unpack

// All limits of this package: first those that a configuration sets, then those of
// decompression, of what one artifact may contain, and of the kernel. The limits of
// manifests, configs and paths are in artifact/limits.go. What exceeds one is
// errdefs.ErrInvalidArgument, unless it says otherwise.

// Limits bound what unpacking takes of a node. They can be configured.
type Limits struct {
	// Memory, in bytes, bounds what all decompression takes at one time; more waits. One
	// layer at a time is always decompressed: 4 MiB for gzip, 136 MiB for zstd.
	Memory int64
	// Expansion is how many times the size of its blob a compressed layer may have. It
	// does not count up to 64 MiB.
	Expansion int64
	// Reserve is the part, in percent from 0 to 99, of the file system of the trees that
	// stays free. Beyond it a tree is errdefs.ErrResourceExhausted.
	Reserve int
}

// DefaultLimits are the limits that are not configured.
var DefaultLimits = Limits{Memory: 512 << 20, Expansion: 50, Reserve: 5}

const (
	// alwaysAllowed, in bytes, is what any compressed layer may decompress to: a small
	// tar is mostly zeros, and one of many small files mostly headers.
	alwaysAllowed = 64 << 20
	// zstdWindow, in bytes, bounds the window that a zstd stream may ask for, and so the
	// decoder's memory: the default limit of the zstd tool (--long=27).
	zstdWindow = 128 << 20
	// chunk, in bytes, is how much of a stream is decompressed while the chunk before it
	// is hashed and written.
	chunk = 256 << 10
	// lookEvery, in bytes, is how much is written between two looks at the free space.
	lookEvery = 16 << 20
	// maxWaiting is how many archives of an artifact are retained at one time. It bounds
	// goroutines; the Budget bounds what they take of the node.
	maxWaiting = 64
)

const (
	// maxEntries bounds the entries of an artifact, and so the inodes, memory and time
	// that it can claim: a kilobyte of gzip can hold a thousand tar headers. Every file,
	// directory and symlink is an entry, and so is a header that adds none, every
	// headerBytes of extended headers, and every entryBytes of a file, whose place in an
	// EROFS image takes as much memory as a file (go-erofs, one chunk for 65,535 blocks).
	maxEntries  = 1 << 20
	headerBytes = 4096
	entryBytes  = 65535 * tarBlock
	// maxNames, in bytes, bounds all names, targets of symlinks and extended attributes
	// of an artifact together.
	maxNames = 64 << 20
	// smallPlan is the number of entries above which only one plan is made at a time: one
	// of maxEntries takes 1.5 GB while it is written.
	smallPlan = 1 << 14
)

const (
	// maxTarget, in bytes, is the longest target of a symlink (PATH_MAX without the NUL).
	maxTarget = 4095
	// maxXattrName and maxXattrValue, in bytes, are the kernel's XATTR_NAME_MAX and one
	// less than XATTR_SIZE_MAX, the most that the length field of an EROFS attribute holds.
	maxXattrName  = 255
	maxXattrValue = 1<<16 - 1
	// maxXattrs, in bytes, is for all attributes of a file: the EROFS inode counts them
	// in units of four bytes, in 16 bits. maxXattrNames is XATTR_LIST_MAX.
	maxXattrs     = 4 * (1<<16 - 16)
	maxXattrNames = 1 << 16
	// maxDevice, in bytes, is less than an archive may have that an EROFS image refers
	// to: EROFS counts blocks, here of tarBlock, in 32 bits. A larger one is extracted.
	maxDevice = tarBlock << 32
	// maxConfigValue, in bytes, is the longest string that fsconfig(2) takes (fs/fsopen.c).
	maxConfigValue = 255
)

const (
	// maxDevices is how many archives an EROFS image may refer to: what an EROFS can count,
	// less the device of files that have no bytes. maxLoopDevices is what a node can bear.
	maxDevices     = 1<<16 - 2
	maxLoopDevices = 1000
)
