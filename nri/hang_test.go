// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package nri

import (
	"bytes"
	"context"
	"errors"
	"net"
	"path/filepath"
	goruntime "runtime"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/containerd/nri/pkg/adaptation"
	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/pkg/net/multiplex"
	"github.com/containerd/ttrpc"
)

// What becomes of a container while either side hangs.

const failedToHandle = "plugin 50-test failed to handle CreateContainer request"

// created is a runtime with the plugin, and the mounts of a container with an artifact,
// which is shown.
func (s *site) created(connected chan bool) (*runtime, []*api.Mount) {
	s.t.Helper()
	mounts := s.crioModel()
	r := s.startRuntime()
	s.t.Cleanup(r.end)
	r.await(connected, true)
	r.wantShown("first", mounts)
	return r, mounts
}

// wantShown waits until the runtime has taken the plugin.
func (r *runtime) wantShown(id string, mounts []*api.Mount) {
	r.t.Helper()
	eventually(r.t, "the artifact is shown", func() bool {
		got, err := r.create(id, mounts...)
		if err != nil {
			r.t.Fatal(err)
		}
		return len(got.GetMounts()) == 3
	})
}

// A runtime that knows NRI's failure policy creates no container without the plugin's
// answer, and goes on asking.
func TestAContainerIsNotCreatedWithoutTheAnswerOfAPluginThatHangs(t *testing.T) {
	s := newSite(t)
	connected := s.run()
	r, mounts := s.created(connected)
	r.answers.hang()
	for range 2 {
		if got, err := r.create("late", mounts...); err == nil || !strings.Contains(err.Error(), failedToHandle) {
			t.Errorf("got %+v, %v; want that %s", got, err, failedToHandle)
		}
	}
	r.answers.goOn()
	r.wantShown("next", mounts)
	if len(connected) > 0 {
		t.Error("the plugin has been taken away")
	}
	if err := r.RemovePodSandbox(t.Context(), &adaptation.RemovePodSandboxRequest{Pod: &api.PodSandbox{Id: sandbox}}); err != nil {
		t.Fatal(err)
	}
	s.wantRecords()
}

func TestAContainerIsNotCreatedIfThePluginEndsBeforeItAnswers(t *testing.T) {
	s := newSite(t)
	connected := s.run()
	r, mounts := s.created(connected)
	r.answers.hang()
	created := make(chan error)
	go func() {
		_, err := r.create("lost", mounts...)
		created <- err
	}()
	<-r.answers.held
	r.hangUp()
	r.answers.goOn()
	if err := <-created; err == nil || !strings.Contains(err.Error(), failedToHandle) {
		t.Errorf("got %v, want that %s", err, failedToHandle)
	}
	r.await(connected, false)
	r.await(connected, true)
	r.wantShown("next", mounts)
}

// With passthrough the runtime's own mounts are as good as an answer.
func TestAContainerIsCreatedWithoutAPluginThatMayBePassed(t *testing.T) {
	s := newSite(t)
	s.Passthrough = true
	connected := s.run()
	r, mounts := s.created(connected)
	r.answers.hang()
	if got, err := r.create("late", mounts...); err != nil || len(got.GetMounts()) > 0 {
		t.Errorf("got %+v, %v; want the runtime's own mounts", got, err)
	}
	r.answers.goOn()
	r.await(connected, false)
	r.await(connected, true)
	r.wantShown("next", mounts)
}

// A daemon that was stopped finds the creation of a container and its end together.
func TestAContainerThatHasEndedIsNotRecorded(t *testing.T) {
	s := newSite(t)
	session := &session{Plugin: s.Plugin, logger: log.L}
	pod, c := &api.PodSandbox{Id: sandbox}, &api.Container{Id: "late", Mounts: []*api.Mount{volumeOf("/model", s.model(s.content))}}
	for name, end := range map[string]func() error{
		"stopped":            func() error { _, err := session.StopContainer(t.Context(), pod, c); return err },
		"removed":            func() error { return session.RemoveContainer(t.Context(), pod, c) },
		"its pod is removed": func() error { return session.RemovePodSandbox(t.Context(), pod) },
	} {
		t.Run(name, func(t *testing.T) {
			s.open()
			session.Plugin = s.Plugin
			if err := end(); err != nil {
				t.Fatal(err)
			}
			if _, _, err := session.CreateContainer(t.Context(), pod, c); err == nil || !strings.Contains(err.Error(), "has ended before it was created") {
				t.Errorf("got %v, want that the container has ended", err)
			}
			s.wantRecords()
		})
	}
}

// mute is a runtime that takes a plugin, and never configures it.
type mute struct{}

func (mute) RegisterPlugin(context.Context, *api.RegisterPluginRequest) (*api.Empty, error) {
	return &api.Empty{}, nil
}

func (mute) UpdateContainers(context.Context, *api.UpdateContainersRequest) (*api.UpdateContainersResponse, error) {
	return nil, nil
}

// The plugin tries again without end: what it leaves behind at each try adds up.
func TestARuntimeThatDoesNotTakeThePluginLeavesNothing(t *testing.T) {
	for name, serve := range map[string]func(multiplex.Mux) error{
		"takes the connection alone": func(multiplex.Mux) error { return nil },
		"registers the plugin": func(m multiplex.Mux) error {
			l, err := m.Listen(multiplex.RuntimeServiceConn)
			if err != nil {
				return err
			}
			server, err := ttrpc.NewServer()
			if err != nil {
				return err
			}
			api.RegisterRuntimeService(server, mute{})
			go server.Serve(context.Background(), l)
			return nil
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t)
			s.registerTimeout = 300 * time.Millisecond
			s.Socket = filepath.Join(s.root, "nri.sock")
			l, err := net.Listen("unix", s.Socket)
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			go func() {
				for {
					conn, err := l.Accept()
					if err != nil {
						return
					}
					if err := serve(multiplex.Multiplex(conn)); err != nil {
						t.Error(err)
					}
				}
			}()
			for range 3 {
				if served, err := s.serve(t.Context()); served || !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "but not the plugin") {
					t.Errorf("served: %v, %v; want that the runtime has not taken the plugin", served, err)
				}
			}
			ctx, cancel := context.WithTimeout(t.Context(), s.registerTimeout/2)
			defer cancel()
			if _, err := s.serve(ctx); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("at the end of the daemon: %v", err)
			}
			eventually(t, "the stubs have ended", func() bool {
				stacks := make([]byte, 1<<20)
				stacks = stacks[:goruntime.Stack(stacks, true)]
				return !bytes.Contains(stacks, []byte("github.com/containerd/nri/pkg/stub.(*stub)"))
			})
		})
	}
}
