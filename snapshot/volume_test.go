// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package snapshot

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
	"github.com/artifact-snapshotter/artifact-snapshotter/store"
	"github.com/artifact-snapshotter/artifact-snapshotter/unpack"
)

// imagesThat is a store.Images whose Check returns what the function returns.
type imagesThat func() error

func (f imagesThat) Check(context.Context, string, digest.Digest) error { return f() }
func (imagesThat) Name(string, digest.Digest) string                    { return "" }

// For the volume of an image with layers, containerd's images need not be known, and its
// manifest need not be found.
func TestAnImageVolumeOfAnImageNeedsNothingOfContainerd(t *testing.T) {
	unknown := fmt.Errorf("containerd's images are unknown: %w", errdefs.ErrUnavailable)
	n := newNode(t)
	n.images = imagesThat(func() error { return unknown })
	n.close(t)
	n.open(t)
	if _, err := n.Prepare(ctx, "layer", ""); err != nil {
		t.Fatal(err)
	}
	if err := n.Commit(ctx, "chain", "layer"); err != nil {
		t.Fatal(err)
	}
	empty, err := pack.Image(ocispec.ImageConfig{}, false)
	if err != nil {
		t.Fatal(err)
	}
	d, err := empty.WriteTo(n.content)
	if err != nil {
		t.Fatal(err)
	}
	// containerd looks into the first manifest. For an artifact this is an error.
	manifest := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: d.Digest, Size: d.Size}
	index := n.index(t, manifest, manifest)
	elsewhere := ocispec.Descriptor{Digest: "sha256:" + ocispecHex} // in another content root
	for _, tt := range []struct {
		name   string
		of     ocispec.Descriptor
		parent string
		want   error // nil is a snapshot of overlayfs
	}{
		{"an image", d, "chain", nil},
		{"an image whose index names no platforms", index, "chain", nil},
		{"an image in another content root", elsewhere, "chain", nil},
		{"an image without layers, which may be in the place of an artifact", d, "", unknown},
		{"an artifact", n.pack(t), "", unknown},
		{"an artifact in another content root", elsewhere, "", errdefs.ErrNotFound},
	} {
		mounts, err := n.Prepare(ctx, key(tt.name, tt.of), tt.parent)
		if !errors.Is(err, tt.want) || err == nil && !strings.Contains(strings.Join(mounts[0].Options, " "), filepath.Join(n.root, "overlayfs")) {
			t.Errorf("%s: %v, %v; want %v", tt.name, mounts, err, tt.want)
		}
	}
}

// index writes an index of the manifests.
func (n *node) index(t *testing.T, manifests ...ocispec.Descriptor) ocispec.Descriptor {
	t.Helper()
	text, err := json.Marshal(ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: manifests})
	if err != nil {
		t.Fatal(err)
	}
	d := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageIndex, Digest: digest.FromBytes(text), Size: int64(len(text))}
	if err := os.WriteFile(filepath.Join(n.content, "blobs", "sha256", d.Digest.Encoded()), text, 0o600); err != nil {
		t.Fatal(err)
	}
	return d
}

// containerd holds a lock while its images are waited for, and while a tree is.
func TestAVolumeHasOneBudgetForAllItWaitsFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t)
		n.close(t)
		const known = 10 * time.Second
		n.images = imagesThat(func() error { time.Sleep(known); return nil })
		built := make(chan struct{})
		n.observer.Counted = func(unpack.Retention, int64) { <-built }
		n.open(t)
		began := time.Now()
		_, err := n.Prepare(ctx, key("pod", n.pack(t)), "")
		if _, unfinished := errors.AsType[*store.UnfinishedError](err); !unfinished || !errdefs.IsUnavailable(err) {
			t.Errorf("got %v, want that the artifact is still being unpacked", err)
		}
		if took := time.Since(began); took < known || took > store.MaxWait {
			t.Errorf("it took %v, want %v at most", took, store.MaxWait)
		}
		close(built)
	})
}

// The caller of MountKey asks again. containerd holds a lock meanwhile.
func TestAViewOfMountKeyIsNotWaitedForLong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t)
		d := n.pack(t)
		key := MountKey("/mnt/model")
		if _, err := n.View(ctx, key, "", targeting(d.Digest)); err != nil {
			t.Fatal(err)
		}
		n.close(t)
		// As after a reboot, only the record is left.
		if err := errors.Join(mount.UnmountRecursive(n.state, unix.MNT_DETACH), os.RemoveAll(filepath.Join(n.root, "trees"))); err != nil {
			t.Fatal(err)
		}
		built := make(chan struct{})
		n.observer.Counted = func(unpack.Retention, int64) { <-built }
		n.open(t)
		for how, ask := range map[string]func() error{
			"Mounts": func() error { _, err := n.Mounts(ctx, key); return err },
			"View":   func() error { _, err := n.View(ctx, MountKey("/mnt/another"), "", targeting(d.Digest)); return err },
		} {
			began := time.Now()
			if err := ask(); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "still being unpacked") {
				t.Errorf("%s: got %v, want that the artifact is still being unpacked", how, err)
			}
			if took := time.Since(began); took > unpackWait {
				t.Errorf("%s took %v, want %v at most", how, took, unpackWait)
			}
		}
		close(built)
	})
}

// containerd's CRI plugin takes the chain of the DiffIDs that the config lists. An artifact
// may list those of its tar layers alone, and an image may have unpacked that chain.
func TestAnArtifactIsNotMountedAsTheChainOfAnImage(t *testing.T) {
	n := newNode(t)
	if _, err := n.Prepare(ctx, "layer", ""); err != nil {
		t.Fatal(err)
	}
	if err := n.Commit(ctx, "chain", "layer"); err != nil {
		t.Fatal(err)
	}
	good := n.pack(t)
	mounts, err := n.Prepare(ctx, key("pod", good), "chain")
	if err != nil {
		t.Fatal(err)
	}
	if got := read(t, mounts); got != "bytes" {
		t.Errorf("the volume has %q", got)
	}
	if mounts, err = n.Mounts(ctx, key("pod", good)); err != nil || read(t, mounts) != "bytes" {
		t.Errorf("asked again: %v, %v", mounts, err)
	}
	if err := n.Remove(ctx, key("pod", good)); err != nil {
		t.Error(err)
	}
	bad, err := pack.File("../escape", "x").WriteTo(n.content)
	if err != nil {
		t.Fatal(err)
	}
	if mounts, err := n.Prepare(ctx, key("pod", bad), "chain"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("an artifact that breaks a rule: %v, %v", mounts, err)
	}
}
