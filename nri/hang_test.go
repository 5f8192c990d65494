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

// Tests of what happens to a container while the plugin or the runtime hangs.

const failedToHandle = "plugin 50-test failed to handle CreateContainer request"

// created starts a runtime that has accepted the plugin and created a container with an artifact,
// and returns CRI-O's mounts of the artifact.
func (s *site) created(connected chan bool) (*runtime, []*api.Mount) {
	s.t.Helper()
	mounts := s.crioModel()
	r := s.startRuntime()
	s.t.Cleanup(r.end)
	r.await(connected, true)
	r.wantMounted("first", mounts)
	return r, mounts
}

// wantMounted waits until the runtime has accepted the plugin, which then mounts the artifact.
func (r *runtime) wantMounted(id string, mounts []*api.Mount) {
	r.t.Helper()
	eventually(r.t, "the artifact is mounted", func() bool {
		got, err := r.create(id, mounts...)
		if err != nil {
			r.t.Fatal(err)
		}
		return len(got.GetMounts()) == 3
	})
}

// A runtime that supports NRI's failure policy creates no container without the plugin's answer,
// and keeps the plugin.
func TestWhileThePluginHangsNoContainerIsCreated(t *testing.T) {
	s := newSite(t)
	connected := s.run()
	r, mounts := s.created(connected)
	r.answers.hang()
	for range 2 {
		if got, err := r.create("late", mounts...); err == nil || !strings.Contains(err.Error(), failedToHandle) {
			t.Errorf("got %+v, %v; want %q", got, err, failedToHandle)
		}
	}
	r.answers.goOn()
	r.wantMounted("next", mounts)
	if len(connected) > 0 {
		t.Error("the runtime has disconnected the plugin")
	}
	if err := r.RemovePodSandbox(t.Context(), &adaptation.RemovePodSandboxRequest{Pod: &api.PodSandbox{Id: sandbox}}); err != nil {
		t.Fatal(err)
	}
	s.wantRecords()
}

func TestIfThePluginEndsBeforeItAnswersTheContainerIsNotCreated(t *testing.T) {
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
		t.Errorf("got %v, want %q", err, failedToHandle)
	}
	r.await(connected, false)
	r.await(connected, true)
	r.wantMounted("next", mounts)
}

// With passthrough the runtime's own mounts are good enough.
func TestWithPassthroughAContainerIsCreatedWhileThePluginHangs(t *testing.T) {
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
	r.wantMounted("next", mounts)
}

// A daemon that was stopped receives the requests for the creation and the end of a container together.
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
				t.Errorf("got %v, want an error that says the container has ended", err)
			}
			s.wantRecords()
		})
	}
}

// mute is a runtime that registers a plugin, but never configures it.
type mute struct{}

func (mute) RegisterPlugin(context.Context, *api.RegisterPluginRequest) (*api.Empty, error) {
	return &api.Empty{}, nil
}

func (mute) UpdateContainers(context.Context, *api.UpdateContainersRequest) (*api.UpdateContainersResponse, error) {
	return nil, nil
}

// The plugin tries again forever, so a leak in each attempt adds up.
func TestARuntimeThatDoesNotAcceptThePluginLeaksNothing(t *testing.T) {
	for name, serve := range map[string]func(multiplex.Mux) error{
		"accepts only the connection": func(multiplex.Mux) error { return nil },
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
					t.Errorf("served: %v, %v; want an error that says the runtime has not accepted the plugin", served, err)
				}
			}
			ctx, cancel := context.WithTimeout(t.Context(), s.registerTimeout/2)
			defer cancel()
			if _, err := s.serve(ctx); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("when the daemon ends: %v", err)
			}
			eventually(t, "the stubs have ended", func() bool {
				stacks := make([]byte, 1<<20)
				stacks = stacks[:goruntime.Stack(stacks, true)]
				return !bytes.Contains(stacks, []byte("github.com/containerd/nri/pkg/stub.(*stub)"))
			})
		})
	}
}
