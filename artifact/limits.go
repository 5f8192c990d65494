// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package artifact

// All limits of this package. What exceeds one is errdefs.ErrInvalidArgument. The limits of
// archives and their members are in unpack/limits.go.
const (
	// maxManifestSize and maxConfigSize, in bytes, bound what Read takes into memory:
	// a manifest or an index, and a config. Registries need to accept 4 MiB only (OCI
	// distribution-spec, "Pushing Manifests"), and containerd fetches little more
	// (core/remotes/docker/resolver.go, MaxManifestSize).
	maxManifestSize = 8 << 20
	maxConfigSize   = 8 << 20
	// minDescriptor, in bytes, is less than any descriptor has, whose digest alone is
	// longer. A manifest that lists more descriptors than fit is refused before they are
	// parsed: in memory a descriptor is fifty times as large as the two bytes that can
	// stand for it.
	minDescriptor = 64
	// maxIndexDepth is the number of indexes that may lead to a manifest.
	maxIndexDepth = 3

	// maxIdentifiedManifest and maxIdentifiedIndex, in bytes, bound what Identify reads.
	// An index takes up to 30 times its size in memory, a manifest once.
	maxIdentifiedManifest = 64 << 20
	maxIdentifiedIndex    = 8 << 20
	// maxIdentifiedDepth is the number of indexes that Identify follows. Digests allow no
	// circle, but Identify does not verify them, and a damaged disk could have one.
	maxIdentifiedDepth = 16

	// maxMediaType, in bytes, bounds a media type, so that errors stay readable. RFC 6838,
	// section 4.2, allows 127 for each of its two names.
	maxMediaType = 255

	// maxName and maxPath, in bytes, are the limits of Linux for a name and for a path
	// without its terminating NUL (NAME_MAX and PATH_MAX of linux/limits.h).
	maxName = 255
	maxPath = 4095
	// maxDepth is the number of directories that may lie above a file. Linux has no such
	// limit, but every level costs a look-up.
	maxDepth = 128
)
