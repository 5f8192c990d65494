// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package nri

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/containerd/log"
	"github.com/containerd/nri/pkg/api"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/artifact-snapshotter/artifact-snapshotter/blobs"
)

// stalled is a directory of blobs on a disk that hangs until closed is closed.
type stalled struct {
	blobs.Dir
	closed chan struct{}
}

func (s stalled) Find(hex string) (ocispec.Descriptor, error) {
	<-s.closed
	return s.Dir.Find(hex)
}

// A runtime creates the container without a plugin that is late, with the wrong files.
func TestAnAnswerIsNotLateWhenTheDiskHangs(t *testing.T) {
	site := newSite(t)
	mounts := site.crioModel()
	disk := stalled{site.crio.dir, make(chan struct{})}
	defer close(disk.closed)
	site.Blobs = disk
	s := &session{Plugin: site.Plugin, runtime: crio, logger: log.L}
	ctx, cancel := context.WithTimeout(t.Context(), 400*time.Millisecond)
	defer cancel()
	_, _, err := s.CreateContainer(ctx, &api.PodSandbox{Id: "sandbox"}, &api.Container{
		Id: "container", Mounts: mounts, Annotations: site.annotations,
	})
	if err == nil || !strings.Contains(err.Error(), "test: this node is too busy") {
		t.Errorf("got %v, want an error that says the node is too busy", err)
	}
	if ctx.Err() != nil {
		t.Error("the answer is late")
	}
}

func TestThePluginAnswersBeforeTheRuntimesDeadline(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
	defer cancel()
	part, stop := within(ctx, answerShare)
	defer stop()
	if deadline, ok := part.Deadline(); !ok || time.Until(deadline) > 46*time.Minute || time.Until(deadline) < 30*time.Minute {
		t.Errorf("the deadline is in %v", time.Until(deadline))
	}
	whole, stop := within(t.Context(), answerShare)
	defer stop()
	if _, ok := whole.Deadline(); ok {
		t.Error("there is a deadline where the runtime has none")
	}
}
