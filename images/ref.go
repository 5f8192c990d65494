// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package images

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"unicode"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/artifact-snapshotter/artifact-snapshotter/blobs"
)

// digestPrefix matches a digest or the beginning of one, with or without its algorithm.
var digestPrefix = regexp.MustCompile(`^(?:(sha256|sha384|sha512):)?([0-9a-f]{1,128})$`)

// CheckRef returns errdefs.ErrInvalidArgument for a text that is neither the name of an image
// nor a digest or the beginning of one. It does not say whether there is such an image.
func CheckRef(ref string) error {
	algorithm, _, found := strings.Cut(ref, ":")
	var reason string
	switch {
	case ref == "":
		reason = "it is empty"
	case strings.ContainsFunc(ref, func(r rune) bool { return unicode.IsSpace(r) || !unicode.IsPrint(r) }):
		reason = "it has a space or a control character"
	case found && digest.Algorithm(algorithm).Available() && !digestPrefix.MatchString(ref):
		reason = "a digest has only the digits 0-9 and a-f"
	default:
		return nil
	}
	return fmt.Errorf("%.255q is neither the name of an image, like registry.example.com/models/llama:v1, nor a digest: %s: %w", ref, reason, errdefs.ErrInvalidArgument)
}

// HasPrefix reports whether ref, with or without the algorithm, is the digest or begins it.
func HasPrefix(d digest.Digest, ref string) bool {
	m := digestPrefix.FindStringSubmatch(ref)
	return m != nil && d.Validate() == nil && (m[1] == "" || m[1] == d.Algorithm().String()) && strings.HasPrefix(d.Encoded(), m[2])
}

// IsDigest reports whether ref is a digest or the beginning of one. It may be the name of an
// image all the same.
func IsDigest(ref string) bool { return digestPrefix.MatchString(ref) }

// Complete returns the hex of the digest that ref is, or that of the only blob whose digest
// begins so. If there is none, the error is errdefs.ErrNotFound.
func Complete(ref string, from blobs.Source) (hex string, err error) {
	m := digestPrefix.FindStringSubmatch(ref)
	if m == nil {
		return "", errdefs.ErrInvalidArgument.WithMessage(fmt.Sprintf("%.255q is not a digest", ref))
	}
	var found []digest.Digest
	for _, dir := range from.All() {
		for _, algorithm := range []digest.Algorithm{digest.SHA256, digest.SHA384, digest.SHA512} {
			entries, _ := os.ReadDir(filepath.Join(string(dir), "blobs", string(algorithm))) // Find has the error
			for _, entry := range entries {
				if d := digest.NewDigestFromEncoded(algorithm, entry.Name()); HasPrefix(d, ref) {
					found = append(found, d)
				}
			}
		}
	}
	d, err := unique(ref, found)
	if err != nil {
		return "", err
	}
	if d == "" {
		return "", errdefs.ErrNotFound.WithMessage(fmt.Sprintf("no blob in %s has the digest %s; check that this is the runtime's content root", from, ref))
	}
	return d.Encoded(), nil
}

// unique returns the only one of the digests that ref begins, or ref itself. It returns "" if
// there is none; several are errdefs.ErrInvalidArgument.
func unique(ref string, all []digest.Digest) (digest.Digest, error) {
	var found []string
	for _, d := range all {
		if d.String() == ref || d.Encoded() == ref {
			return d, nil
		}
		found = append(found, d.String())
	}
	slices.Sort(found)
	switch found = slices.Compact(found); len(found) {
	case 0:
		return "", nil
	case 1:
		return digest.Digest(found[0]), nil
	}
	return "", fmt.Errorf("several digests begin with %s: %s; add digits: %w", ref, strings.Join(found[:min(len(found), maxNamed)], ", "), errdefs.ErrInvalidArgument)
}

// complete returns the digest that ref begins among those of the images and of the manifests
// that they stand for, or "".
func (r Reader) complete(ctx context.Context, ref string, all []images.Image) (digest.Digest, error) {
	if !digestPrefix.MatchString(ref) {
		return "", nil
	}
	var found []digest.Digest
	for _, i := range all {
		if HasPrefix(i.Target.Digest, ref) {
			found = append(found, i.Target.Digest)
		}
		if images.IsManifestType(i.Target.MediaType) {
			continue // a manifest stands for itself only
		}
		if image, err := r.Read(ctx, i); err == nil && HasPrefix(image.Manifest, ref) {
			found = append(found, image.Manifest)
		}
	}
	return unique(ref, found)
}
