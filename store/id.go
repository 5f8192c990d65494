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

// ID is what a Tree shows: an artifact, to pods whose user namespace maps its
// owners.
type ID struct {
	Manifest digest.Digest
	Owners   unpack.IDMap
}

// name is the ID as a file name: <algorithm>-<hex>, and behind another "-" a
// short hash of the owners' map if there is one.
func (id ID) name() string {
	name := id.Manifest.Algorithm().String() + "-" + id.Manifest.Encoded()
	if id.shifted() {
		sum := sha256.Sum256([]byte(id.Owners.UID + " " + id.Owners.GID))
		name += "-" + hex.EncodeToString(sum[:8])
	}
	return name
}

// plain is the ID of the same artifact for pods without a user namespace.
func (id ID) plain() ID { return ID{Manifest: id.Manifest} }

// shifted reports whether the owners are of a user namespace. kubelet gives each
// pod a range of its own, so that no other pod will ask for the same Tree.
func (id ID) shifted() bool { return id.Owners != (unpack.IDMap{}) }

// isShifted reports it of a name.
func isShifted(name string) bool { return strings.Count(name, "-") > 1 }

// manifest is the digest in a name, or "" if it is not one.
func manifest(name string) digest.Digest {
	algorithm, rest, _ := strings.Cut(name, "-")
	encoded, _, _ := strings.Cut(rest, "-")
	d := digest.NewDigestFromEncoded(digest.Algorithm(algorithm), encoded)
	if d.Validate() != nil {
		return ""
	}
	return d
}

// TreeDir is where a store in root keeps the Tree of an artifact for pods without
// a user namespace, if it is there.
func TreeDir(root string, manifest digest.Digest) string {
	return filepath.Join(root, "trees", ID{Manifest: manifest}.name())
}
