// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package artifact

import (
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
)

// CleanPath returns the path in the volume, slash-separated and relative, of a name: the
// path of a raw layer, or the name of a tar member without leading slashes. "./a//b/"
// becomes "a/b".
//
// It refuses with errdefs.ErrInvalidArgument an absolute path, "..", a NUL byte, a name
// over 255 bytes, a path over 4095 bytes or below more than 128 directories, and a path
// that names no file, such as "." or "". Every other byte is allowed: to Linux names are
// bytes, a backslash is an ordinary one, and nothing requires UTF-8.
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
