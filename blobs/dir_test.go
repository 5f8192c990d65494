// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package blobs

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

var algorithmList = []digest.Algorithm{digest.SHA256, digest.SHA384, digest.SHA512}

// newDir returns a directory with the directories of every algorithm.
func newDir(t *testing.T) Dir {
	t.Helper()
	d := Dir(t.TempDir())
	for _, a := range algorithmList {
		if err := os.MkdirAll(filepath.Join(string(d), "blobs", string(a)), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return d
}

func write(t *testing.T, path, data string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(data), 0o444); err != nil {
		t.Fatal(err)
	}
}

// wantError fails unless err is of the kind and has each of the texts.
func wantError(t *testing.T, err, kind error, texts ...string) {
	t.Helper()
	if !errors.Is(err, kind) {
		t.Fatalf("error %v, want one that is %q", err, kind)
	}
	for _, text := range texts {
		if !strings.Contains(err.Error(), text) {
			t.Errorf("error %q does not say %q", err, text)
		}
	}
}

func TestBlobsAreFoundAndRead(t *testing.T) {
	d := newDir(t)
	for _, algorithm := range algorithmList {
		for _, data := range []string{"some bytes", ""} {
			dgst := algorithm.FromString(data)
			want := filepath.Join(string(d), "blobs", string(algorithm), dgst.Encoded())
			if got := d.Path(dgst); got != want {
				t.Errorf("path %s, want %s", got, want)
			}
			write(t, want, data)

			desc, err := d.Find(dgst.Encoded())
			if err != nil {
				t.Fatal(err)
			}
			if desc.Digest != dgst || desc.Size != int64(len(data)) {
				t.Errorf("found %+v, want %s of %d bytes", desc, dgst, len(data))
			}
			for _, size := range []int64{0, -1, int64(len(data))} {
				ra, err := d.ReaderAt(t.Context(), ocispec.Descriptor{Digest: dgst, Size: size})
				if err != nil {
					t.Fatal(err)
				}
				got, err := io.ReadAll(content.NewReader(ra))
				if err != nil || string(got) != data || ra.Size() != int64(len(data)) {
					t.Errorf("read %q of %d bytes, %v; want %q", got, ra.Size(), err, data)
				}
				if err := ra.Close(); err != nil {
					t.Error(err)
				}
			}
		}
	}
}

func TestMissingBlobNamesTheDirectory(t *testing.T) {
	dgst := digest.FromString("missing")
	for name, d := range map[string]Dir{
		"no blob":      newDir(t),
		"no directory": Dir(filepath.Join(t.TempDir(), "none")),
	} {
		_, err := d.Find(dgst.Encoded())
		wantError(t, err, errdefs.ErrNotFound, string(d), dgst.String(), "content root")
		ra, err := d.ReaderAt(t.Context(), ocispec.Descriptor{Digest: dgst})
		wantError(t, err, errdefs.ErrNotFound, string(d), dgst.String(), "content root")
		if ra != nil {
			t.Errorf("%s: a reader beside an error", name)
		}
	}
}

func TestABlobOfAnotherSizeIsRefused(t *testing.T) {
	d := newDir(t)
	dgst := digest.FromString("12345")
	write(t, d.Path(dgst), "12345")
	before := openFiles(t)
	_, err := d.ReaderAt(t.Context(), ocispec.Descriptor{Digest: dgst, Size: 6})
	wantError(t, err, errdefs.ErrFailedPrecondition, dgst.String(), "has 5 bytes", "says 6")
	if after := openFiles(t); after != before {
		t.Errorf("%d open files became %d", before, after)
	}
}

func openFiles(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

func TestOnlyDigestsAreSearched(t *testing.T) {
	// This file could be reached by a digest that is used as a path.
	d := newDir(t)
	write(t, filepath.Join(string(d), "secret"), "secret")
	hex := digest.FromString("x").Encoded()
	for _, bad := range []digest.Digest{
		"", "x", ":", "sha256", "sha256:", "sha256:../../secret", "../..:secret", "..:" + digest.Digest(hex),
		"sha256:" + digest.Digest(hex[:63]), "sha256:" + digest.Digest(hex+"0"), "sha256:" + digest.Digest(strings.ToUpper(hex)),
		"sha256:" + digest.Digest(strings.Repeat("../", 21)+"."), "sha256:" + digest.Digest(hex[:63]+"\x00"), "md5:d41d8cd98f00b204e9800998ecf8427e",
	} {
		if path := d.Path(bad); path != "" {
			t.Errorf("path %q for the digest %q", path, bad)
		}
		_, err := d.ReaderAt(t.Context(), ocispec.Descriptor{Digest: bad})
		wantError(t, err, errdefs.ErrInvalidArgument, "digest")
	}
	for _, bad := range []string{
		"", "x", hex[:63], hex + "0", strings.ToUpper(hex), strings.Repeat("../", 21) + ".", strings.Repeat("/", 64), "sha256:" + hex,
		strings.Repeat("g", 96), strings.Repeat("\x00", 128), strings.Repeat("a", 1<<20),
	} {
		_, err := d.Find(bad)
		wantError(t, err, errdefs.ErrInvalidArgument, "not the hex")
		if len(err.Error()) > 1024 {
			t.Errorf("error of %d bytes", len(err.Error()))
		}
	}
}

func TestOnlyRegularFilesAreBlobs(t *testing.T) {
	for name, place := range map[string]func(path string) error{
		"symbolic link to a file": func(path string) error { return os.Symlink("/proc/version", path) },
		"dangling symbolic link":  func(path string) error { return os.Symlink("nowhere", path) },
		"directory":               func(path string) error { return os.Mkdir(path, 0o755) },
		"FIFO":                    func(path string) error { return unix.Mkfifo(path, 0o644) },
	} {
		t.Run(name, func(t *testing.T) {
			d := newDir(t)
			dgst := digest.FromString(name)
			if err := place(d.Path(dgst)); err != nil {
				t.Fatal(err)
			}
			_, err := d.Find(dgst.Encoded())
			wantError(t, err, errdefs.ErrFailedPrecondition, d.Path(dgst), "not a regular file")
			_, err = d.ReaderAt(t.Context(), ocispec.Descriptor{Digest: dgst})
			wantError(t, err, errdefs.ErrFailedPrecondition, d.Path(dgst), "not a regular file")
		})
	}
}

// Root is not stopped by permissions: here a directory is a file, or a loop of symbolic
// links.
func TestAnUnreadableDirectoryIsReportedWithItsReason(t *testing.T) {
	dgst := digest.FromString("x")
	for _, test := range []struct {
		place  func(path string) error
		reason unix.Errno
	}{
		{func(path string) error { return os.WriteFile(path, nil, 0o644) }, unix.ENOTDIR},
		{func(path string) error { return os.Symlink("blobs", path) }, unix.ELOOP},
	} {
		d := Dir(t.TempDir())
		if err := test.place(filepath.Join(string(d), "blobs")); err != nil {
			t.Fatal(err)
		}
		_, err := d.Find(dgst.Encoded())
		wantError(t, err, test.reason, d.Path(dgst), test.reason.Error())
		_, err = d.ReaderAt(t.Context(), ocispec.Descriptor{Digest: dgst})
		wantError(t, err, test.reason, d.Path(dgst), test.reason.Error())
		if errdefs.IsNotFound(err) {
			t.Errorf("%v passes for a missing blob", err)
		}
	}
}
