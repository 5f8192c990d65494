// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package artifact

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// MayHaveConfig reports whether containerd's CRI may know the image target by this config. It
// is for images for which Identify returns ErrTooLarge, and takes little memory whatever their
// size. CRI can find the config only if a manifest names it, and that only if the target names
// it, or names an index that does, and so on. So the answer is true if one of all these names
// the config, in whatever place. A manifest of 64 MiB takes less than a second, an index of
// 64 MiB of digests some seconds, for it looks for each of them.
func MayHaveConfig(ctx context.Context, blobs content.Provider, target ocispec.Descriptor, config digest.Digest) (bool, error) {
	seen, queue := map[digest.Digest]bool{target.Digest: true}, []digest.Digest{target.Digest}
	for len(queue) > 0 {
		next := queue[0]
		queue = queue[1:]
		ra, err := blobs.ReaderAt(ctx, ocispec.Descriptor{Digest: next})
		if errdefs.IsNotFound(err) {
			continue // CRI cannot read it either
		}
		if err != nil {
			return false, fmt.Errorf("blob %s: %w", next, err)
		}
		found := false
		err = digestsIn(ctx, content.NewReader(ra), func(d digest.Digest) {
			found = found || d == config
			if seen[d] || images.IsManifestType(target.MediaType) {
				return
			}
			// Only blobs that are there are remembered: a document can name any number of others.
			if there, err := blobs.ReaderAt(ctx, ocispec.Descriptor{Digest: d}); err == nil {
				there.Close()
				seen[d] = true
				queue = append(queue, d)
			}
		})
		ra.Close()
		if found || err != nil {
			return found, err
		}
	}
	return false, nil
}

// maxDigestText, in bytes, is more than the longest digest has in JSON, where each of its
// characters may be escaped as six.
const maxDigestText = 6*len("sha512:") + 6*128

// digestsIn calls each with every string in a JSON object that may be a digest. It reads
// nothing that does not begin as an object.
func digestsIn(ctx context.Context, r io.Reader, each func(digest.Digest)) error {
	in := bufio.NewReaderSize(r, 1<<16)
	var text []byte // of the string that has begun, as far as it may be a digest
	begun, inside, escaped := false, false, false
	for {
		part, err := in.ReadSlice('"')
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if object := bytes.TrimLeft(part, " \t\r\n"); !begun && len(object) > 0 {
			if begun = object[0] == '{'; !begun {
				return nil
			}
		}
		part, quote := bytes.CutSuffix(part, []byte{'"'})
		if inside {
			if len(text) <= maxDigestText {
				text = append(text, part...)
			}
			backslashes := len(part) - len(bytes.TrimRight(part, `\`))
			escaped = (backslashes%2 == 1) != (escaped && backslashes == len(part))
		}
		switch {
		case err != nil && !errors.Is(err, bufio.ErrBufferFull):
			if errors.Is(err, io.EOF) {
				err = nil
			}
			return err
		case !quote:
		case inside && escaped:
			text, escaped = append(text, '"'), false
		default:
			if inside {
				if d := unquoted(text); d != "" {
					each(d)
				}
			}
			inside, text = !inside, text[:0]
		}
	}
}

// unquoted returns the digest that a JSON string may be, whose quotes are not in the text; ""
// if it is none.
func unquoted(text []byte) digest.Digest {
	if len(text) > maxDigestText {
		return ""
	}
	s := string(text)
	if bytes.ContainsRune(text, '\\') && json.Unmarshal(fmt.Appendf(nil, `"%s"`, text), &s) != nil {
		return ""
	}
	if _, hex, _ := strings.Cut(s, ":"); len(hex) != 64 && len(hex) != 96 && len(hex) != 128 || !strings.HasPrefix(s, "sha") {
		return ""
	}
	return digest.Digest(s)
}
