// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package store

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/blobs"
	"github.com/artifact-snapshotter/artifact-snapshotter/unpack"
)

func TestOpenKeepsMountsAndGarbageCollectionRemovesUnusedOnes(t *testing.T) {
	s := newSite(t)
	shown, unused := s.acquire(s.pack("1")), s.acquire(s.pack("2"))
	s.uses(shown.ID)
	// What a crash during a build, and a killed probe, leave.
	for _, dir := range []string{"new-1/fs", "probe-2/target"} {
		if err := os.MkdirAll(filepath.Join(s.trees, dir), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Mount("tmpfs", filepath.Join(s.trees, "probe-2/target"), "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	s.Close()
	s.open()
	s.collect()
	s.wantState(shown.ID, true, true)
	s.wantState(unused.ID, true, false)
	if names, err := list(s.trees); len(names) != 2 || err != nil {
		t.Errorf("left: %v %v", names, err)
	}
}

func TestTreesAndCopiesDoNotOutliveABoot(t *testing.T) {
	s := newSite(t)
	v := s.acquire(s.pack("1"))
	s.uses(v.ID)
	s.Close()
	if err := s.unmount(v.ID.name()); err != nil { // as a reboot does
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(s.sharedDir(), "sha256"), 0o700); err != nil {
		t.Fatal(err)
	}
	for file, content := range map[string]string{"boot": "another", "blobs/sha256/0123": "not synced"} {
		if err := os.WriteFile(filepath.Join(s.config.Root, file), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s.open()
	s.wantState(v.ID, false, false)
	s.collect()
	for _, dir := range []string{s.trees, s.sharedDir()} {
		if left, err := list(dir); len(left) != 0 || err != nil {
			t.Errorf("left in %s: %v %v", dir, left, err)
		}
	}
	s.Close()
	s.open()
	v = s.acquire(ocispec.Descriptor{Digest: v.ID.Manifest})
	s.wantState(v.ID, true, true)
}

// The mounts are in another directory than the trees, and can outlive them.
func TestAMountWithoutItsTreeIsReplaced(t *testing.T) {
	for _, how := range []string{"the daemon restarts", "the daemon goes on"} {
		t.Run(how, func(t *testing.T) {
			s := newSite(t)
			v := s.acquire(s.pack("bytes"))
			s.uses(v.ID)
			if err := os.RemoveAll(filepath.Join(s.config.Root, "trees", v.ID.name())); err != nil {
				t.Fatal(err)
			}
			if how == "the daemon restarts" {
				s.Close()
				s.open()
			}
			v = s.acquire(ocispec.Descriptor{Digest: v.ID.Manifest})
			if b, err := os.ReadFile(filepath.Join(v.Path, "weights")); err != nil || string(b) != "bytes" {
				t.Errorf("%q, %v", b, err)
			}
		})
	}
}

// An update of the daemon may change the format of trees while pods use old ones.
func TestATreeOfAnotherVersionIsUsedAsLongAsItIsMounted(t *testing.T) {
	s := newSite(t)
	d := s.pack("bytes")
	v := s.acquire(d)
	s.uses(v.ID)
	v.Release()
	s.Close()
	tree := filepath.Join(s.trees, v.ID.name())
	if err := os.WriteFile(filepath.Join(tree, "tree.json"), []byte(`{"format": 1}`), 0o600); err != nil {
		t.Fatal(err)
	}
	s.open()
	s.collect()
	second := s.acquire(d)
	if b, err := os.ReadFile(filepath.Join(second.Path, "weights")); err != nil || string(b) != "bytes" {
		t.Errorf("the second pod: %q, %v", b, err)
	}
	if b, err := os.ReadFile(filepath.Join(tree, "tree.json")); err != nil || string(b) != `{"format": 1}` {
		t.Errorf("the tree was built again below a running pod: %s, %v", b, err)
	}
	second.Release()
	s.uses()
	s.collect()
	if _, err := os.Lstat(tree); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the tree has not gone with its last pod: %v", err)
	}
	s.acquire(d).Release()
	s.wantState(v.ID, true, true)
}

// Nothing that would build a tree again may touch one that pods use.
func TestATreeOfAnotherVersionIsNotReplacedWhileItIsMounted(t *testing.T) {
	shifted := unpack.IDMap{UID: "0:200000:65536", GID: "0:200000:65536"}
	for name, again := range map[string]func(t *testing.T, s *site, d ocispec.Descriptor){
		"a pull": func(t *testing.T, s *site, d ocispec.Descriptor) {
			s.arrived(context.Background(), s.content.Path(d.Digest))
			s.running.Wait()
			if state, _ := s.stateOf(d); state != mounted {
				t.Errorf("the state is %d, want that it is mounted", state)
			}
		},
		"another pod": func(t *testing.T, s *site, d ocispec.Descriptor) {
			v := s.acquire(d)
			defer v.Release()
			if b, err := os.ReadFile(filepath.Join(v.Path, "weights")); err != nil || string(b) != "tarred 1" {
				t.Errorf("the second pod: %q, %v", b, err)
			}
		},
		"a pod with a user namespace": func(t *testing.T, s *site, d ocispec.Descriptor) {
			v, err := s.Acquire(context.Background(), d, shifted)
			if err != nil {
				t.Fatal(err)
			}
			defer v.Release()
			if b, err := os.ReadFile(filepath.Join(v.Path, "weights")); err != nil || string(b) != "tarred 1" {
				t.Errorf("the second pod: %q, %v", b, err)
			}
		},
		"a build by mistake": func(t *testing.T, s *site, d ocispec.Descriptor) {
			id := ID{Manifest: d.Digest}
			a, err := s.read(context.Background(), d)
			if err != nil {
				t.Fatal(err)
			}
			if _, _, err := s.build(context.Background(), &entry{id: id}, &source{artifact: a}, nil); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "delete them and try again") {
				t.Errorf("%v, want what is in the way", err)
			}
		},
	} {
		for _, modes := range []unpack.Modes{{}, {Raw: unpack.Overlay, Tar: unpack.Extract}} {
			t.Run(fmt.Sprintf("%s %s", name, modes.Tar), func(t *testing.T) {
				s := newSite(t)
				s.Close()
				s.config.Modes, s.config.DecompressOnPull = modes, true
				s.open()
				d, blobs := s.gzipped(1)
				for hex, b := range blobs {
					s.arrive(hex, b)
				}
				v := s.acquire(d)
				s.uses(v.ID)
				v.Release()
				pod := filepath.Join(s.config.State, "pod") // with a bind mount of its own
				if err := errors.Join(os.Mkdir(pod, 0o755), unix.Mount(v.Path, pod, "", unix.MS_BIND, "")); err != nil {
					t.Fatal(err)
				}
				s.Close()
				if err := os.WriteFile(filepath.Join(s.trees, v.ID.name(), "tree.json"), []byte(`{"format": 1}`), 0o600); err != nil {
					t.Fatal(err)
				}
				s.open()
				for hex, b := range blobs { // deleted, and pulled again
					if err := os.Remove(s.content.Path(digest.NewDigestFromEncoded(digest.SHA256, hex))); err != nil {
						t.Fatal(err)
					}
					s.collect()
					s.arrive(hex, b)
				}
				again(t, s, d)
				s.collect()
				for file, want := range map[string]string{"weights": "tarred 1", "raw": "raw 1"} {
					if b, err := os.ReadFile(filepath.Join(pod, file)); err != nil || string(b) != want {
						t.Errorf("the running pod: %q, %v; want %q", b, err, want)
					}
				}
				s.uses() // its last pod is gone
				s.collect()
				s.wantState(v.ID, false, false)
				s.acquire(d).Release()
				s.wantState(v.ID, true, true)
			})
		}
	}
}

func TestAChangeOfTheModeWhileAPodRuns(t *testing.T) {
	s := newSite(t)
	s.Close()
	s.config.Modes = unpack.Modes{Raw: unpack.Link, Tar: unpack.Extract}
	s.open()
	d := s.pack("bytes")
	v := s.acquire(d)
	s.uses(v.ID)
	s.Close()
	s.config.Modes = unpack.Modes{Raw: unpack.Overlay, Tar: unpack.Extract}
	s.open()
	shifted, err := s.Acquire(context.Background(), d, unpack.IDMap{UID: "0:200000:65536", GID: "0:200000:65536"})
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{v.Path, shifted.Path} {
		if b, err := os.ReadFile(filepath.Join(path, "weights")); err != nil || string(b) != "bytes" {
			t.Errorf("%q, %v", b, err)
		}
	}
}

func TestATreeThatMayBeMountedIsKept(t *testing.T) {
	s := newSite(t)
	s.Close()
	s.config.Modes = unpack.Modes{Raw: unpack.Copy, Tar: unpack.Extract} // which every kernel has
	s.open()
	d := s.pack("bytes")
	v := s.acquire(d)
	v.Release()
	s.collect()
	s.Close()
	loop := s.mountpoint(v.ID.name()) // cannot be looked at, as on a broken disk
	if err := os.Symlink(loop, loop); err != nil {
		t.Fatal(err)
	}
	s.config.Modes = unpack.Modes{Raw: unpack.Link, Tar: unpack.Extract}
	s.open()
	if _, err := s.Acquire(context.Background(), d, unpack.IDMap{}); err == nil || !strings.Contains(err.Error(), "cannot tell whether "+loop+" is mounted") {
		t.Errorf("%v, want that it cannot tell", err)
	}
	if !s.has(v.ID) {
		t.Error("the tree is gone")
	}
}

func TestATreeThatCannotBeUnmountedIsKept(t *testing.T) {
	s := newSite(t)
	d := s.pack("bytes")
	v := s.acquire(d)
	v.Release()
	s.collect()
	s.forget(d)
	loop := s.mountpoint(v.ID.name())
	if err := os.Symlink(loop, loop); err != nil {
		t.Fatal(err)
	}
	if err := s.CollectGarbage(context.Background()); !errors.Is(err, unix.ELOOP) {
		t.Errorf("%v, want that it cannot be unmounted", err)
	}
	if !s.has(v.ID) {
		t.Error("the tree is gone")
	}
	if err := os.Remove(loop); err != nil {
		t.Fatal(err)
	}
	s.collect()
	s.wantState(v.ID, false, false)
}

func TestAForcedModeThatDoesNotWorkIsAnErrorAtStart(t *testing.T) {
	c := Config{Root: t.TempDir(), State: t.TempDir(), Content: blobs.Dir(t.TempDir()), Modes: unpack.Modes{Raw: "none such"}}
	if _, err := Open(context.Background(), c); !errdefs.IsInvalidArgument(err) {
		t.Errorf("%v, want an invalid argument", err)
	}
}
