// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package blobs

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// FuzzPath looks for blobs by any digest and any hex. None may lead out of the directory of
// its algorithm, and a blob that is found must have that name.
func FuzzPath(f *testing.F) {
	there := digest.FromString("x")
	for _, text := range []string{
		there.String(), there.Encoded(), "sha256:", "", "sha256:../../../etc/passwd", "../x:" + there.Encoded(), strings.ToUpper(there.Encoded()),
		digest.SHA512.FromString("x").String(), digest.SHA384.FromString("x").Encoded(), strings.Repeat("/", 64), strings.Repeat(".", 64), "sha256:" + there.Encoded()[:63] + "\x00",
	} {
		f.Add(text)
	}
	d := Dir(f.TempDir())
	path := d.Path(there)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		f.Fatal(err)
	}
	if err := os.WriteFile(path, []byte("x"), 0o444); err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, text string) {
		if p := d.Path(digest.Digest(text)); p != "" {
			dir, name := filepath.Split(p)
			if filepath.Dir(filepath.Dir(filepath.Clean(dir))) != string(d) || !strings.HasSuffix(text, ":"+name) || strings.ContainsAny(name, "/\x00") {
				t.Errorf("%q is at %s", text, p)
			}
		}
		desc, err := d.Find(text)
		if err == nil && (desc.Digest != there || text != there.Encoded() || desc.Size != 1) {
			t.Errorf("%q is found as %+v", text, desc)
		}
		if err != nil && !errdefs.IsNotFound(err) && !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: an error of another kind: %v", text, err)
		}
		ra, err := d.ReaderAt(t.Context(), ocispec.Descriptor{Digest: digest.Digest(text)})
		if err == nil {
			ra.Close()
		}
		if err == nil && digest.Digest(text) != there || err != nil && !errdefs.IsNotFound(err) && !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q is read: %v", text, err)
		}
	})
}
