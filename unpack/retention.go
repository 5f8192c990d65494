// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"errors"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/blobs"
)

// Retention is how a tree gets a content that it retains.
type Retention string

// The ways to retain a blob; the first that works is taken. Members that are extracted from
// a tar are Copied, too.
const (
	Linked    Retention = "link"
	Reflinked Retention = "reflink"
	Copied    Retention = "copy"
)

// Decompressed is how a tree gets the content of a compressed blob. The decompressed bytes
// count.
const Decompressed Retention = "decompress"

// Retentions has all of them.
var Retentions = []Retention{Linked, Reflinked, Copied, Decompressed}

// RetentionDiagnosis is how blobs can be retained in a root.
type RetentionDiagnosis struct {
	Root  Location `json:"root"`
	Blobs Location `json:"blobs"`
	// Apart is the boundary between root and blobs.
	Apart Boundary `json:"apart,omitempty"`
	// Blob is the blob with which Retention was tried. If there is none, both are "".
	Blob      string    `json:"blob,omitempty"`
	Retention Retention `json:"retention,omitempty"`
	// Error is why Blob could not be linked or, without a Retention, not be retained.
	Error string `json:"error,omitempty"`
}

// DiagnoseRetention tries how a blob of content can be retained in root, with the first
// blob that exists.
func DiagnoseRetention(root Location, content blobs.Dir) (RetentionDiagnosis, error) {
	dir, err := Locate(filepath.Join(string(content), "blobs", "sha256"))
	if err != nil {
		return RetentionDiagnosis{}, err
	}
	s := RetentionDiagnosis{Root: root, Blobs: dir, Apart: root.between(dir)}
	blobs, err := os.ReadDir(dir.Existing)
	if err != nil {
		return RetentionDiagnosis{}, err
	}
	probe, err := os.MkdirTemp(root.Existing, ProbeDirs)
	if err != nil {
		return RetentionDiagnosis{}, err
	}
	defer os.RemoveAll(probe)
	for _, b := range blobs {
		desc, err := content.Find(b.Name())
		if err != nil {
			continue // not a blob, or deleted meanwhile
		}
		err = s.retain(content.Path(desc.Digest), filepath.Join(probe, "blob"))
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.EMLINK) {
			continue
		}
		s.Blob = desc.Digest.String()
		if link := (*os.LinkError)(nil); errors.As(err, &link) {
			err = os.NewSyscallError("link", link.Err) // without the paths
		}
		if err != nil {
			s.Error = err.Error()
		}
		break
	}
	return s, nil
}

// retain does what contents.retain does, without copying. The error is the one of the link.
func (s *RetentionDiagnosis) retain(blob, target string) error {
	err := os.Link(blob, target)
	switch {
	case err == nil:
		s.Retention = Linked
		return nil
	case !errors.Is(err, unix.EXDEV) && !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.EOPNOTSUPP):
		return err
	}
	src, oerr := os.Open(blob)
	if oerr != nil {
		return oerr
	}
	defer src.Close()
	dst, oerr := os.Create(target)
	if oerr != nil {
		return oerr
	}
	defer dst.Close()
	s.Retention = Copied
	if unix.IoctlFileClone(int(dst.Fd()), int(src.Fd())) == nil {
		s.Retention = Reflinked
	}
	return err
}
