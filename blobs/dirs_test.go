// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package blobs

import (
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

func TestABlobIsTakenFromTheFirstDirectoryThatHasIt(t *testing.T) {
	missing := Dir(filepath.Join(t.TempDir(), "none"))
	first, second := newDir(t), newDir(t)
	ds := Dirs{missing, first, second}
	both, one := digest.FromString("both"), digest.FromString("one")
	write(t, first.Path(both), "both")
	write(t, second.Path(both), "both")
	write(t, second.Path(one), "one")
	for dgst, want := range map[digest.Digest]Dir{both: first, one: second, digest.FromString("nowhere"): missing} {
		if got := ds.Path(dgst); got != want.Path(dgst) {
			t.Errorf("path %s, want one in %s", got, want)
		}
	}
	for dgst, want := range map[digest.Digest]string{both: "both", one: "one"} {
		desc, err := ds.Find(dgst.Encoded())
		if err != nil || desc.Digest != dgst || desc.Size != int64(len(want)) {
			t.Errorf("found %+v, %v; want %s", desc, err, dgst)
		}
		ra, err := ds.ReaderAt(t.Context(), desc)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(content.NewReader(ra)); err != nil || string(got) != want {
			t.Errorf("read %q, %v; want %q", got, err, want)
		}
		ra.Close()
	}
}

func TestAMissingBlobNamesAllDirectories(t *testing.T) {
	first, second := newDir(t), newDir(t)
	dgst := digest.FromString("missing")
	_, err := Dirs{first, second}.Find(dgst.Encoded())
	wantError(t, err, errdefs.ErrNotFound, dgst.Encoded(), string(first), string(second))
	ra, err := Dirs{first, second}.ReaderAt(t.Context(), ocispec.Descriptor{Digest: dgst})
	wantError(t, err, errdefs.ErrNotFound, dgst.Encoded(), string(first), string(second))
	if ra != nil {
		t.Error("a reader beside an error")
	}
	_, err = Dirs{first, second}.Find("x")
	wantError(t, err, errdefs.ErrInvalidArgument, "not the hex")
}

// A directory that cannot be read may have the blob.
func TestABlobIsNotMissingIfADirectoryCannotBeRead(t *testing.T) {
	broken := Dir(t.TempDir())
	if err := os.WriteFile(filepath.Join(string(broken), "blobs"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	dgst := digest.FromString("x")
	for _, ds := range []Dirs{{broken, newDir(t)}, {newDir(t), broken}} {
		_, err := ds.Find(dgst.Encoded())
		wantError(t, err, unix.ENOTDIR, string(broken))
		if errdefs.IsNotFound(err) {
			t.Errorf("%v passes for a missing blob", err)
		}
	}
}
