// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package store

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/blobs"
	"github.com/artifact-snapshotter/artifact-snapshotter/unpack"
)

// newDisk returns a site whose root is on a disk of 2 MiB. fill fills the disk.
func newDisk(t *testing.T) (s *site, fill func(name string)) {
	t.Helper()
	s = newSite(t)
	s.Close()
	if err := unix.Mount("tmpfs", s.config.Root, "tmpfs", 0, "size=2m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := mount.UnmountAll(s.config.Root, 0); err != nil {
			t.Error(err)
		}
	})
	return s, func(name string) {
		name = filepath.Join(s.config.Root, name)
		if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, make([]byte, 4<<20), 0o600); !errors.Is(err, unix.ENOSPC) {
			t.Fatalf("the disk is not full: %v", err)
		}
	}
}

func TestAFullDiskIsSweptAtTheStart(t *testing.T) {
	s, fill := newDisk(t)
	fill("trees/new-1/file")
	s.open()
	s.acquire(s.pack("x")).Release()
	s.collect() // mounts keep files of the root open
}

// Kubernetes counts errors with the same text as one event, and each build has another
// directory.
func TestAFullDiskIsSaidTheSameEachTime(t *testing.T) {
	s, fill := newDisk(t)
	s.config.Content = blobs.Dir(filepath.Join(s.config.Root, "content")) // so that no blob is copied
	d := s.pack("x")
	s.open()
	fill("file")
	var said []string
	for range 2 {
		_, err := s.Acquire(context.Background(), d, unpack.IDMap{})
		if !errdefs.IsResourceExhausted(err) || !strings.Contains(err.Error(), "/trees/new-*") {
			t.Fatalf("%v, want a full disk at trees/new-*", err)
		}
		said = append(said, err.Error())
	}
	if said[0] != said[1] {
		t.Errorf("%s, after %s", said[1], said[0])
	}
}
