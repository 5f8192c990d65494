// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
	"github.com/artifact-snapshotter/artifact-snapshotter/blobs"
)

// Shared returns how many bytes of the tree's contents are in the same files, on the disk
// and in the page cache, as the runtime's blobs of the layers.
func (t *Tree) Shared(blobs blobs.Source, layers []artifact.Layer) (size int64, err error) {
	type inode struct{ dev, ino uint64 }
	stat := func(path string) (inode, int64, error) {
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return inode{}, 0, pathError("lstat", path, err)
		}
		return inode{st.Dev, st.Ino}, st.Size, nil
	}
	theirs := map[inode]bool{}
	for _, l := range layers {
		if id, _, err := stat(blobs.Path(l.Descriptor.Digest)); err == nil { // otherwise the runtime has deleted it
			theirs[id] = true
		}
	}
	data := filepath.Join(t.dir, dataDir)
	files, err := os.ReadDir(data)
	if err != nil {
		return 0, err
	}
	for _, f := range files {
		id, bytes, err := stat(filepath.Join(data, f.Name()))
		if err != nil {
			return 0, err
		}
		if theirs[id] {
			size += bytes
			delete(theirs, id)
		}
	}
	return size, nil
}
