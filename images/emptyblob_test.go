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

// This is the reason to pre-create the empty blob.
func TestContainerdPullsAnEmptyFileOnlyIfTheEmptyBlobExists(t *testing.T) {
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

func TestAnEmptyBlobWithoutItsLabelIsRepaired(t *testing.T) {
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
func TestTheEmptyBlobIsCreatedAgain(t *testing.T) {
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
	containerdtest.Eventually(t, "the blob is created", func() error {
		_, err := store.Info(inNamespace, emptyBlob)
		return err
	})
	containerdtest.Eventually(t, "the success is logged", func() error { return logged.has("level=info", 1) })

	if err := store.Delete(inNamespace, emptyBlob); err != nil && !errdefs.IsNotFound(err) {
		t.Fatal(err)
	}
	containerdtest.Eventually(t, "the blob is created again", func() error {
		_, err := store.Info(inNamespace, emptyBlob)
		return err
	})
	containerdtest.Eventually(t, "this is logged, too", func() error { return logged.has("level=info", 2) })
	if err := logged.has("level=warning", 1); err != nil {
		t.Errorf("only one failure is a warning: %v", err)
	}
}

func wantEmptyBlob(t *testing.T, n *containerdtest.Containerd, in, want []string) {
	t.Helper()
	created, err := ensureEmptyBlobs(t.Context(), n.Address, in)
	if err != nil || !reflect.DeepEqual(created, want) {
		t.Fatalf("create in %q: %q, %v; want %q", in, created, err, want)
	}
}

// buffer is a bytes.Buffer that may be read while it is being written.
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

// A pull has a lease, which retains the blob as long as the image needs it.
func TestAPullLeavesNoEmptyBlobBehind(t *testing.T) {
	n := containerdtest.New(t, "")
	n.Start(t, containerdtest.Tool(t, "containerd"))
	c, err := Connect(t.Context(), n.Address)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	ctx := namespaces.WithNamespace(t.Context(), "default")
	leased, done, err := c.WithLease(ctx)
	if err != nil {
		t.Fatal(err)
	}
	sha512 := digest.SHA512.FromBytes(nil)
	for _, want := range []bool{true, false} {
		if changed, err := EnsureEmptyBlob(leased, c.ContentStore(), digest.SHA512); err != nil || changed != want {
			t.Errorf("changed %t, %v, want %t", changed, err, want)
		}
	}
	collect := func() {
		if output, err := n.Ctr(t, "--namespace", "default", "content", "prune", "references"); err != nil {
			t.Fatalf("collect garbage: %v\n%s", err, output)
		}
	}
	collect()
	if info, err := c.ContentStore().Info(ctx, sha512); err != nil || len(info.Labels) > 0 {
		t.Errorf("with the lease: %+v, %v", info, err)
	}
	if err := done(ctx); err != nil {
		t.Fatal(err)
	}
	collect()
	if _, err := c.ContentStore().Info(ctx, sha512); !errdefs.IsNotFound(err) {
		t.Errorf("without the lease: %v, want that it is not found", err)
	}
}
