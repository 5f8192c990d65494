// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package plugin

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/content/proxy"
	"github.com/containerd/containerd/v2/pkg/dialer"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

var emptyBlob = digest.FromBytes(nil)

// The reason for planting: with the empty blob containerd pulls an artifact
// that has an empty file, without it does not.
func TestThePreCreatedEmptyBlobMakesAPullWork(t *testing.T) {
	n := newNode(t, "")
	n.start(t, tool(t, "containerd"))
	reference, _ := serveArtifact(t, []byte("weights"), nil)
	pull := func() (string, error) {
		output, err := exec.Command(tool(t, "crictl"), "--timeout=30s",
			"--runtime-endpoint=unix://"+n.address, "--image-endpoint=unix://"+n.address,
			"pull", reference).CombinedOutput()
		return string(output), err
	}

	if output, err := pull(); err == nil || !strings.Contains(output, "size of zero") {
		t.Fatalf("pull without the empty blob: %v, want an error about a size of zero\n%s", err, output)
	}
	both := []string{"k8s.io", "other"}
	wantEmptyBlob(t, n, both, both)
	if output, err := pull(); err != nil {
		t.Fatalf("pull with the empty blob: %v\n%s", err, output)
	}
}

func TestADamagedEmptyBlobIsReplaced(t *testing.T) {
	n := newNode(t, "")
	n.start(t, tool(t, "containerd"))
	store := contentStore(t, n.address)
	both := []string{"k8s.io", "other"}
	ctx := namespaces.WithNamespace(t.Context(), "other")
	wantLabel := func() {
		t.Helper()
		info, err := store.Info(ctx, emptyBlob)
		if err != nil || info.Size != 0 || info.Labels[gcRootLabel] == "" {
			t.Errorf("the empty blob is %+v, %v; want size 0 and the label %s", info, err, gcRootLabel)
		}
	}

	unlabel := func() {
		t.Helper()
		if _, err := store.Update(ctx, content.Info{Digest: emptyBlob}, "labels."+gcRootLabel); err != nil {
			t.Fatal(err)
		}
	}

	wantEmptyBlob(t, n, both, both)
	wantLabel()
	wantEmptyBlob(t, n, both, nil)

	unlabel()
	wantEmptyBlob(t, n, both, []string{"other"})
	wantLabel()

	collect := func() {
		t.Helper()
		if output, err := n.ctr(t, "--namespace", "other", "content", "prune", "references"); err != nil {
			t.Fatalf("collect garbage: %v\n%s", err, output)
		}
	}
	collect()
	wantLabel()
	unlabel()
	collect()
	if _, err := store.Info(ctx, emptyBlob); !errdefs.IsNotFound(err) {
		t.Fatalf("without the label the blob should have been collected: %v", err)
	}
	wantEmptyBlob(t, n, both, []string{"other"})
	wantLabel()
}

// The daemon may start before containerd, and somebody may remove the blob.
func TestTheEmptyBlobComesBack(t *testing.T) {
	var logged buffer
	log.L.Logger.SetOutput(&logged)
	t.Cleanup(func() { log.L.Logger.SetOutput(os.Stderr) })
	n := newNode(t, "")
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		keepEmptyBlobs(ctx, n.address, []string{"k8s.io"}, 50*time.Millisecond)
	}()
	defer func() { cancel(); <-done }()
	eventually(t, "a warning", func() error { return logged.has("level=warning", 1) })

	n.start(t, tool(t, "containerd"))
	store := contentStore(t, n.address)
	inNamespace := namespaces.WithNamespace(t.Context(), "k8s.io")
	eventually(t, "the blob is planted", func() error {
		_, err := store.Info(inNamespace, emptyBlob)
		return err
	})
	eventually(t, "the success is logged", func() error { return logged.has("level=info", 1) })

	if err := store.Delete(inNamespace, emptyBlob); err != nil && !errdefs.IsNotFound(err) {
		t.Fatal(err)
	}
	eventually(t, "the blob is planted again", func() error {
		_, err := store.Info(inNamespace, emptyBlob)
		return err
	})
	eventually(t, "that is logged, too", func() error { return logged.has("level=info", 2) })
	if err := logged.has("level=warning", 1); err != nil {
		t.Errorf("only the first failure is for everyone to read: %v", err)
	}
}

func wantEmptyBlob(t *testing.T, n *node, in, want []string) {
	t.Helper()
	planted, err := ensureEmptyBlobs(t.Context(), n.address, in)
	if err != nil || !reflect.DeepEqual(planted, want) {
		t.Fatalf("plant in %q: %q, %v; want %q", in, planted, err, want)
	}
}

func contentStore(t *testing.T, address string) content.Store {
	t.Helper()
	conn, err := grpc.NewClient(dialer.DialAddress(address), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return proxy.NewContentStore(conn)
}

// serveArtifact serves an artifact with the given raw layers from a registry
// that can nothing but be pulled from, and returns its reference and digest.
func serveArtifact(t *testing.T, layers ...[]byte) (string, digest.Digest) {
	t.Helper()
	blobs := map[string][]byte{}
	add := func(mediaType string, data []byte) ocispec.Descriptor {
		desc := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
		blobs[desc.Digest.String()] = data
		return desc
	}
	manifest := ocispec.Manifest{
		Versioned:    specs.Versioned{SchemaVersion: 2},
		MediaType:    ocispec.MediaTypeImageManifest,
		ArtifactType: "application/vnd.cncf.model.manifest.v1+json",
	}
	var ids []string
	for _, layer := range layers {
		manifest.Layers = append(manifest.Layers, add("application/vnd.cncf.model.weight.v1.raw", layer))
		ids = append(ids, digest.FromBytes(layer).String())
	}
	// With rootfs, so that containerd's own unpacker can unpack it.
	config, err := json.Marshal(map[string]any{"rootfs": map[string]any{"diff_ids": ids}})
	if err != nil {
		t.Fatal(err)
	}
	manifest.Config = add("application/vnd.cncf.model.config.v1+json", config)
	data, err := json.Marshal(manifest)
	if err != nil {
		t.Fatal(err)
	}
	top := add(ocispec.MediaTypeImageManifest, data)
	blobs["v1"] = data

	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		last := r.URL.Path[strings.LastIndex(r.URL.Path, "/")+1:]
		data, ok := blobs[last]
		switch {
		case r.URL.Path == "/v2/":
		case !ok:
			http.NotFound(w, r)
		default:
			w.Header().Set("Content-Type", "application/octet-stream")
			if strings.Contains(r.URL.Path, "/manifests/") {
				w.Header().Set("Content-Type", top.MediaType)
				w.Header().Set("Docker-Content-Digest", top.Digest.String())
			}
			http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(data))
		}
	}))
	t.Cleanup(server.Close)
	return strings.TrimPrefix(server.URL, "http://") + "/model:v1", top.Digest
}

// buffer is a bytes.Buffer that may be read while it is written.
type buffer struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.Write(p)
}

// has returns an error unless word occurs n times.
func (b *buffer) has(word string, n int) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if got := strings.Count(b.text.String(), word); got != n {
		return fmt.Errorf("%q occurs %d times, want %d, in:\n%s", word, got, n, b.text.String())
	}
	return nil
}
