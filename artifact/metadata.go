// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package artifact

import (
	"encoding/json"
	"fmt"
	"io/fs"
	"math"
	"time"

	"github.com/containerd/errdefs"
	modelspec "github.com/modelpack/model-spec/specs-go/v1"
)

// defaultMode is the mode of a raw layer's file if the layer does not say it.
const defaultMode = 0o644

// set sets the path, cleaning name, and the attributes.
func (f *File) set(name string, annotations map[string]string, created time.Time) (err error) {
	if f.Path, err = CleanPath(name); err != nil {
		return err
	}
	return f.setAttributes(annotations, created)
}

// setAttributes sets mode, owner and time from the file metadata annotation of a raw layer,
// see https://github.com/modelpack/model-spec/blob/main/docs/annotations.md. Their defaults
// are 0644, 0:0 and created.
func (f *File) setAttributes(annotations map[string]string, created time.Time) error {
	meta := modelspec.FileMetadata{Mode: defaultMode, ModTime: created}
	for _, key := range []string{modelspec.AnnotationFileMetadata, legacyAnnotationFileMetadata} {
		if annotations[key] == "" {
			continue
		}
		if err := parseFileMetadata(annotations[key], &meta); err != nil {
			return fmt.Errorf("annotation %s: %w", key, err)
		}
		break
	}
	if meta.ModTime.IsZero() {
		meta.ModTime = created
	}
	f.Mode = fs.FileMode(meta.Mode) & fs.ModePerm
	f.UID, f.GID, f.ModTime = meta.Uid, meta.Gid, meta.ModTime
	return nil
}

// parseFileMetadata overwrites the fields of meta that value has. Name and size do not
// count: the path annotation and the blob decide.
func parseFileMetadata(value string, meta *modelspec.FileMetadata) error {
	// With a pointer to the pointer, the JSON null becomes nil.
	if err := json.Unmarshal([]byte(value), &meta); err != nil {
		return fmt.Errorf("malformed file metadata: %.300v: %w", err, errdefs.ErrInvalidArgument)
	}
	if err := checkUnambiguous[modelspec.FileMetadata]([]byte(value)); err != nil {
		return fmt.Errorf("malformed file metadata: %v: %w", err, errdefs.ErrInvalidArgument)
	}
	var why string
	switch {
	case meta == nil:
		why = "malformed file metadata: null"
	case meta.Mode > 0o177777: // the 16 bits of st_mode, inode(7)
		why = fmt.Sprintf("mode %d is not a Unix file mode", meta.Mode)
	case meta.Uid == math.MaxUint32 || meta.Gid == math.MaxUint32: // (uid_t)-1, chown(2)
		why = fmt.Sprintf("owner %d:%d: %d is no user or group", meta.Uid, meta.Gid, uint32(math.MaxUint32))
	case meta.Size < 0:
		why = fmt.Sprintf("negative size %d", meta.Size)
	case meta.Typeflag != 0 && meta.Typeflag != '0': // regular file in tar headers, old and new
		why = fmt.Sprintf("type flag %d is not a regular file", meta.Typeflag)
	default:
		return nil
	}
	return fmt.Errorf("%s: %w", why, errdefs.ErrInvalidArgument)
}
