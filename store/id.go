// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package store

import (
	"crypto/sha256"
	"encoding/hex"
	"path/filepath"
	"strings"

	"github.com/opencontainers/go-digest"

	"github.com/artifact-snapshotter/artifact-snapshotter/unpack"
)

// ID identifies a tree.
type ID struct {
	// Manifest is the digest of the artifact's manifest, or for Store.AcquireLayers the ID of
	// the chain.
	Manifest digest.Digest
	// Owners is the user namespace of the pods that use the tree; the zero value is none.
	Owners unpack.IDMap
}

// name returns the ID as a file name: <algorithm>-<hex>, followed by "-" and a short hash of
// the owners' map if there is one.
func (id ID) name() string {
	name := id.Manifest.Algorithm().String() + "-" + id.Manifest.Encoded()
	if id.shifted() {
		sum := sha256.Sum256([]byte(id.Owners.UID + " " + id.Owners.GID))
		name += "-" + hex.EncodeToString(sum[:8])
	}
	return name
}

// plain returns the ID of the same artifact for pods without a user namespace.
func (id ID) plain() ID { return ID{Manifest: id.Manifest} }

// shifted reports whether the owners are those of a user namespace. kubelet gives each pod a
// range of its own, so no other pod will ask for the same tree.
func (id ID) shifted() bool { return id.Owners != (unpack.IDMap{}) }

// isShifted reports whether the name is that of a shifted ID.
func isShifted(name string) bool { return strings.Count(name, "-") > 1 }

// manifest returns the digest in the name of a tree, or "" if it is not such a name.
func manifest(name string) digest.Digest {
	algorithm, rest, _ := strings.Cut(name, "-")
	encoded, _, _ := strings.Cut(rest, "-")
	d := digest.NewDigestFromEncoded(digest.Algorithm(algorithm), encoded)
	if d.Validate() != nil {
		return ""
	}
	return d
}

// TreeDir returns where a store in root keeps the tree of an artifact for pods without a user
// namespace. The tree may not be there.
func TreeDir(root string, manifest digest.Digest) string {
	return filepath.Join(root, "trees", ID{Manifest: manifest}.name())
}
