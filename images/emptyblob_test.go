// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package images

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"

	"github.com/artifact-snapshotter/artifact-snapshotter/internal/containerdtest"
)

var emptyBlob = digest.FromBytes(nil)

// The reason for planting: with the empty blob containerd pulls an artifact
// that has an empty file, without it does not.
func TestThePreCreatedEmptyBlobMakesAPullWork(t *testing.T) {
	n := containerdtest.New(t, "")
	n.Start(t, containerdtest.Tool(t, "containerd"))
	reference, _ := containerdtest.ServeArtifact(t, []byte("weights"), nil)
	pull := func() (string, error) {
		output, err := exec.Command(containerdtest.Tool(t, "crictl"), "--timeout=30s",
			"--runtime-endpoint=unix://"+n.Address, "--image-endpoint=unix://"+n.Address,
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
	n := containerdtest.New(t, "")
	n.Start(t, containerdtest.Tool(t, "containerd"))
	store := n.ContentStore(t)
	both := []string{"k8s.io", "other"}
	ctx := namespaces.WithNamespace(t.Context(), "other")
	wantLabel := func() {
		t.Helper()
		info, err := store.Info(ctx, emptyBlob)
		if err != nil || info.Size != 0 || info.Labels[LabelGCRoot] == "" {
			t.Errorf("the empty blob is %+v, %v; want size 0 and the label %s", info, err, LabelGCRoot)
		}
	}

	unlabel := func() {
		t.Helper()
		if _, err := store.Update(ctx, content.Info{Digest: emptyBlob}, "labels."+LabelGCRoot); err != nil {
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
		if output, err := n.Ctr(t, "--namespace", "other", "content", "prune", "references"); err != nil {
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
	n := containerdtest.New(t, "")
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		KeepEmptyBlob(ctx, n.Address, []string{"k8s.io"}, 50*time.Millisecond)
	}()
	defer func() { cancel(); <-done }()
	containerdtest.Eventually(t, "a warning", func() error { return logged.has("level=warning", 1) })

	n.Start(t, containerdtest.Tool(t, "containerd"))
	store := n.ContentStore(t)
	inNamespace := namespaces.WithNamespace(t.Context(), "k8s.io")
	containerdtest.Eventually(t, "the blob is planted", func() error {
		_, err := store.Info(inNamespace, emptyBlob)
		return err
	})
	containerdtest.Eventually(t, "the success is logged", func() error { return logged.has("level=info", 1) })

	if err := store.Delete(inNamespace, emptyBlob); err != nil && !errdefs.IsNotFound(err) {
		t.Fatal(err)
	}
	containerdtest.Eventually(t, "the blob is planted again", func() error {
		_, err := store.Info(inNamespace, emptyBlob)
		return err
	})
	containerdtest.Eventually(t, "that is logged, too", func() error { return logged.has("level=info", 2) })
	if err := logged.has("level=warning", 1); err != nil {
		t.Errorf("only the first failure is for everyone to read: %v", err)
	}
}

func wantEmptyBlob(t *testing.T, n *containerdtest.Containerd, in, want []string) {
	t.Helper()
	planted, err := ensureEmptyBlobs(t.Context(), n.Address, in)
	if err != nil || !reflect.DeepEqual(planted, want) {
		t.Fatalf("plant in %q: %q, %v; want %q", in, planted, err, want)
	}
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
