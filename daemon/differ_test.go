// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"os"
	"path/filepath"
	"testing"

	diffapi "github.com/containerd/containerd/api/services/diff/v1"
	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/diff/proxy"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/artifact-snapshotter/artifact-snapshotter/internal/containerdtest"
)

func TestTheDaemonIsAProxyPluginOfTypeDiff(t *testing.T) {
	cfg := testConfig(t)
	serve(t, cfg)
	conn := containerdtest.Dial(t, cfg.SocketAddress())
	remote := proxy.NewDiffApplier(diffapi.NewDiffClient(conn))
	applier, isApplier := remote.(diff.Applier)
	comparer, isComparer := remote.(diff.Comparer)
	if !isApplier || !isComparer {
		t.Fatalf("containerd's proxy is a %T", remote)
	}

	data := []byte("weights")
	desc := ocispec.Descriptor{
		MediaType: "application/vnd.docker.ai.gguf.v3", Digest: digest.FromBytes(data), Size: int64(len(data)),
		Annotations: map[string]string{ocispec.AnnotationTitle: "model.gguf"},
	}
	if err := os.WriteFile(filepath.Join(cfg.ContentRoot, "blobs", "sha256", desc.Digest.Encoded()), data, 0o400); err != nil {
		t.Fatal(err)
	}
	target := t.TempDir()
	mounts := []mount.Mount{{Type: "bind", Source: target, Options: []string{"rbind", "rw"}}}
	got, err := applier.Apply(t.Context(), desc, mounts)
	if err != nil || got.Digest != desc.Digest || got.MediaType != ocispec.MediaTypeImageLayer {
		t.Errorf("Apply: %+v, %v", got, err)
	}
	if b, err := os.ReadFile(filepath.Join(target, "model.gguf")); err != nil || string(b) != "weights" {
		t.Errorf("the file reads %q, %v", b, err)
	}
	desc.Digest = digest.FromString("none")
	if _, err := applier.Apply(t.Context(), desc, mounts); !errdefs.IsNotFound(err) {
		t.Errorf("Apply of a missing blob: %v, want errdefs.ErrNotFound", err)
	}
	if _, err := comparer.Compare(t.Context(), mounts, mounts); !errdefs.IsNotImplemented(err) {
		t.Errorf("Compare: %v, want errdefs.ErrNotImplemented", err)
	}
}
