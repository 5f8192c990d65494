// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package artifact

import (
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
)

// Limits of Linux for a name and for a path without its terminating NUL
// (NAME_MAX and PATH_MAX of linux/limits.h), in bytes.
const (
	maxName = 255
	maxPath = 4095
)

// maxDepth is how many directories may lie above a file. Linux has no such
// limit, but every level costs a look-up, and no artifact needs this many.
const maxDepth = 128

// CleanPath returns the slash-separated relative path that name, the path of a
// raw layer or the name of a tar member without the slashes before it, has in the
// volume: "./a//b/" is "a/b".
//
// It refuses, with errdefs.ErrInvalidArgument, an absolute path, a ".."
// anywhere, NUL, a name over 255 bytes, a path over 4095 bytes or below more
// than 128 directories, and a name of no file, such as "." or "". It allows every other byte: names on Linux are
// bytes, a backslash is an ordinary one, and UTF-8 is only a habit.
func CleanPath(name string) (string, error) {
	refuse := func(why string) (string, error) {
		return "", fmt.Errorf("path %.255q %s: %w", name, why, errdefs.ErrInvalidArgument)
	}
	if strings.HasPrefix(name, "/") {
		return refuse("is absolute: it must be relative to the artifact's root")
	}
	if strings.Contains(name, "\x00") {
		return refuse("contains a NUL byte")
	}
	var clean strings.Builder
	depth := -1
	for part := range strings.SplitSeq(name, "/") {
		switch {
		case part == "" || part == ".":
			continue
		case part == "..":
			return refuse(`contains ".."`)
		case len(part) > maxName:
			return refuse(fmt.Sprintf("has a name of %d bytes, over the limit of %d", len(part), maxName))
		}
		depth++
		if clean.Len() > 0 {
			clean.WriteByte('/')
		}
		clean.WriteString(part)
	}
	switch {
	case clean.Len() == 0:
		return refuse("names no file")
	case depth > maxDepth:
		return refuse(fmt.Sprintf("is below %d directories, over the limit of %d", depth, maxDepth))
	case clean.Len() > maxPath:
		return refuse(fmt.Sprintf("has %d bytes, over the limit of %d", clean.Len(), maxPath))
	}
	return clean.String(), nil
}
