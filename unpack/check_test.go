// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
)

// Before anything is pulled, only the manifest tells.
func TestCheckRefusesWhatTheManifestTells(t *testing.T) {
	raw := func(path, content string) artifact.Layer {
		return artifact.Layer{Format: artifact.FormatRaw, File: artifact.File{Path: path}, Descriptor: ocispec.Descriptor{Digest: digest.FromString(content), Size: int64(len(content))}}
	}
	archive := artifact.Layer{Format: artifact.FormatTar, Descriptor: ocispec.Descriptor{Digest: digest.FromString("tar"), Size: 3}}
	huge, odd := raw("huge", "x"), raw("odd", "")
	huge.Descriptor.Size = maxEntries * entryBytes
	odd.Descriptor.Digest = digest.FromString("not nothing")
	for name, c := range map[string]struct {
		layers []artifact.Layer
		want   string // "" if it is accepted
	}{
		"files":                          {[]artifact.Layer{raw("a", "1"), raw("b/c", "2"), raw("b/d", "")}, ""},
		"a file twice":                   {[]artifact.Layer{raw("a", "1"), raw("a", "1")}, ""},
		"a path twice":                   {[]artifact.Layer{raw("a", "1"), raw("a", "2")}, "layer 1 "},
		"a path twice and an archive":    {[]artifact.Layer{raw("a", "1"), archive, raw("a", "2")}, "layer 2 "},
		"a file in a file":               {[]artifact.Layer{raw("a", "1"), raw("a/b", "2")}, `"a" must be a directory`},
		"what an archive may prepare":    {[]artifact.Layer{raw("a", "1"), archive, raw("a/b", "2")}, ""},
		"a file that is a directory":     {[]artifact.Layer{raw("a/b", "1"), raw("a", "2")}, `file "a" is a directory`},
		"more than an artifact can have": {[]artifact.Layer{huge}, "more than"},
		"no bytes of another digest":     {[]artifact.Layer{odd}, "not the digest of no bytes"},
	} {
		a := &artifact.Artifact{Layers: c.layers}
		for i := range a.Layers {
			a.Layers[i].Index = i
		}
		err := Check(t.Context(), a)
		if c.want == "" && err != nil || c.want != "" && (!errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
}
