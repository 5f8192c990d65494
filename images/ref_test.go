// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package images

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/artifact-snapshotter/artifact-snapshotter/blobs"
)

func TestADigestMayBeAbbreviated(t *testing.T) {
	dir := blobs.Dir(t.TempDir())
	// Two begin alike.
	a, b := digest.Digest("sha256:ab1"+strings.Repeat("0", 61)), digest.Digest("sha256:ab2"+strings.Repeat("0", 61))
	c := digest.Digest("sha512:ac" + strings.Repeat("0", 126))
	for _, d := range []digest.Digest{a, b, c} {
		if err := os.MkdirAll(filepath.Dir(dir.Path(d)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(dir.Path(d), nil, 0o444); err != nil {
			t.Fatal(err)
		}
	}
	for ref, want := range map[string]digest.Digest{
		a.String(): a, a.Encoded(): a, "ab1": a, "sha256:ab2": b, "ac": c, "sha512:a": c,
	} {
		if hex, err := Complete(ref, dir); err != nil || hex != want.Encoded() {
			t.Errorf("%s is %s (%v), want %s", ref, hex, err, want)
		}
		if !HasPrefix(want, ref) {
			t.Errorf("%s does not begin with %s", want, ref)
		}
	}
	for ref, is := range map[string]func(error) bool{
		"ab": errdefs.IsInvalidArgument, "sha256:": errdefs.IsInvalidArgument, "llama": errdefs.IsInvalidArgument, "": errdefs.IsInvalidArgument,
		"ff": errdefs.IsNotFound, "sha256:ac": errdefs.IsNotFound, a.Encoded() + "0": errdefs.IsNotFound,
	} {
		if hex, err := Complete(ref, dir); !is(err) {
			t.Errorf("%q is %q (%v)", ref, hex, err)
		}
	}
	if _, err := Complete("ab", dir); !strings.Contains(err.Error(), a.String()+", "+b.String()) {
		t.Errorf("the error does not list the digests: %v", err)
	}
	if HasPrefix("", "a") || HasPrefix(a, "AB1") || HasPrefix(a, "sha512:ab") {
		t.Error("what is not the beginning of a digest is taken for it")
	}
}

func TestWhatCannotBeAReferenceIsRefused(t *testing.T) {
	for ref, good := range map[string]bool{
		"registry.example.com/models/llama:v1": true, "llama": true, "127.0.0.1:5000/x": true, "ab": true,
		digest.FromString("x").String(): true, "sha256:ab": true, "r/x@" + digest.FromString("x").String(): true,
		"": false, "a b": false, "a\x1b": false, "sha256:": false, "sha256:xyz": false, "sha256:AB": false, "sha256:" + strings.Repeat("a", 129): false,
	} {
		if err := CheckRef(ref); good != (err == nil) || !good && !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", ref, err)
		}
	}
}
