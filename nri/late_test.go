// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package nri

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/log"
	"github.com/containerd/nri/pkg/api"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// A runtime goes on without a plugin that is late, and the container has the wrong files.
func TestAnAnswerIsNotLate(t *testing.T) {
	site := newSite(t)
	store := string(site.crio.dir)
	index := filepath.Join(store, ocispec.ImageIndexFile)
	if err := os.MkdirAll(store, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mkfifo(index, 0o600); err != nil { // whoever reads it waits
		t.Fatal(err)
	}
	s := &session{Plugin: site.Plugin, runtime: crio, logger: log.L}
	ctx, cancel := context.WithTimeout(t.Context(), 400*time.Millisecond)
	defer cancel()
	_, _, err := s.CreateContainer(ctx, &api.PodSandbox{Id: "sandbox"}, &api.Container{Id: "container", Mounts: []*api.Mount{{
		Type: "bind", Source: store + "/blobs/sha256/" + strings.Repeat("0", 64), Destination: "/model/file",
	}}})
	if err == nil || !strings.Contains(err.Error(), "test: this node is too busy") {
		t.Errorf("got %v, want that the node is too busy", err)
	}
	if ctx.Err() != nil {
		t.Error("the answer is late")
	}
	w, err := os.OpenFile(index, os.O_WRONLY, 0) // lets the reader go
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestAPartOfTheTimeIsTheRuntimes(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
	defer cancel()
	part, stop := within(ctx, 3, 4)
	defer stop()
	if deadline, ok := part.Deadline(); !ok || time.Until(deadline) > 46*time.Minute || time.Until(deadline) < 30*time.Minute {
		t.Errorf("the deadline is in %v", time.Until(deadline))
	}
	whole, stop := within(t.Context(), 3, 4)
	defer stop()
	if _, ok := whole.Deadline(); ok {
		t.Error("there is a deadline where the runtime has none")
	}
}
