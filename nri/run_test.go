// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package nri

import (
	"context"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/log"
	"github.com/containerd/nri/pkg/adaptation"
	"github.com/containerd/nri/pkg/api"
)

// runtime is a runtime's side of NRI, which names itself CRI-O.
type runtime struct {
	*adaptation.Adaptation
	t          *testing.T
	site       *site
	containers []*api.Container // the containers of the runtime

	// The test relays the plugin's connection, because nothing ends it when a runtime in the
	// same process stops.
	listener net.Listener
	mu       sync.Mutex
	conns    []net.Conn
	answers  gate
}

// gate delays the plugin's messages from hang to goOn, as if the plugin hung.
type gate struct {
	mu   sync.RWMutex
	held chan struct{} // receives when a message is delayed
}

func (g *gate) hang() {
	g.held = make(chan struct{}, 100) // before mu is locked, for the reader
	g.mu.Lock()
}

func (g *gate) goOn() { g.mu.Unlock() }

// gated reads the plugin's messages.
type gated struct {
	io.Reader
	*gate
}

func (g gated) Read(b []byte) (int, error) {
	n, err := g.Reader.Read(b)
	if !g.mu.TryRLock() {
		g.held <- struct{}{}
		g.mu.RLock()
	}
	g.mu.RUnlock()
	return n, err
}

// accept connects the plugin with the runtime at that socket.
func (r *runtime) accept(socket string) {
	for {
		plugin, err := r.listener.Accept()
		if err != nil {
			return
		}
		runtime, err := net.Dial("unix", socket)
		if err != nil {
			r.t.Error(err)
			return
		}
		r.mu.Lock()
		r.conns = append(r.conns, plugin, runtime)
		r.mu.Unlock()
		go func() {
			io.Copy(plugin, runtime)
			plugin.Close() // the runtime has disconnected it
		}()
		go io.Copy(runtime, gated{plugin, &r.answers})
	}
}

// end ends the runtime.
func (r *runtime) end() {
	r.listener.Close()
	r.Stop()
	r.hangUp()
}

// hangUp closes the connection with the plugin.
func (r *runtime) hangUp() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, c := range r.conns {
		c.Close()
	}
	r.conns = nil
}

func (s *site) startRuntime(containers ...*api.Container) *runtime {
	s.t.Helper()
	r := &runtime{t: s.t, site: s, containers: containers}
	var pods []*api.PodSandbox
	if len(containers) > 0 {
		pods = []*api.PodSandbox{{Id: sandbox}}
	}
	sync := func(ctx context.Context, f adaptation.SyncCB) error {
		_, err := f(ctx, pods, r.containers)
		return err
	}
	update := func(context.Context, []*api.ContainerUpdate) ([]*api.ContainerUpdate, error) { return nil, nil }
	var err error
	r.Adaptation, err = adaptation.New(crio, "1.37.0", sync, update,
		adaptation.WithSocketPath(s.Socket+".runtime"), adaptation.WithPluginPath(filepath.Join(s.root, "none")), adaptation.WithPluginConfigPath(filepath.Join(s.root, "none")))
	if err != nil {
		s.t.Fatal(err)
	}
	if err := r.Start(); err != nil {
		s.t.Fatal(err)
	}
	if r.listener, err = net.Listen("unix", s.Socket); err != nil {
		s.t.Fatal(err)
	}
	go r.accept(s.Socket + ".runtime")
	return r
}

func (r *runtime) create(id string, mounts ...*api.Mount) (*api.ContainerAdjustment, error) {
	answer, err := r.CreateContainer(r.t.Context(), &adaptation.CreateContainerRequest{
		Pod: &api.PodSandbox{Id: sandbox}, Container: &api.Container{Id: id, PodSandboxId: sandbox, Mounts: mounts, Annotations: r.site.annotations},
	})
	return answer.GetAdjust(), err
}

// run runs the plugin until the test ends.
func (s *site) run() (connected chan bool) {
	s.t.Helper()
	connected = make(chan bool, 10)
	s.Socket = filepath.Join(s.root, "nri.sock")
	s.Observer.Connected = func(yes bool) { connected <- yes }
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { s.Run(ctx) })
	s.t.Cleanup(func() { cancel(); running.Wait() })
	return connected
}

// await waits until the plugin reports that. The runtime has accepted it a moment later.
func (r *runtime) await(connected chan bool, want bool) {
	r.t.Helper()
	select {
	case got := <-connected:
		if got != want {
			r.t.Fatalf("connected: %v, want %v", got, want)
		}
	case <-time.After(2 * time.Minute):
		r.t.Fatalf("connected: not %v within 2 minutes", want)
	}
}

func TestThePluginConnectsAgainWhenTheRuntimeIsRestarted(t *testing.T) {
	s := newSite(t)
	connected := s.run() // the runtime is not there yet
	mounts := s.crioModel()
	var running []*api.Container
	for range 3 {
		r := s.startRuntime(running...)
		r.await(connected, true)
		var got *api.ContainerAdjustment
		eventually(t, "the container is adjusted", func() bool {
			var err error
			if got, err = r.create("runs", mounts...); err != nil {
				t.Fatal(err)
			}
			return len(got.GetMounts()) > 0
		})
		i := slices.IndexFunc(got.GetMounts(), func(m *api.Mount) bool { return m.GetDestination() == "/model" })
		if i < 0 || len(got.Mounts) != 3 {
			t.Fatalf("the adjustment is %+v", got)
		}
		running = []*api.Container{{Id: "runs", PodSandboxId: sandbox, Mounts: got.Mounts}}
		s.wantRecords("runs")
		r.end()
		r.await(connected, false)
		s.wantRecords("runs")
	}
	r := s.startRuntime(running...)
	r.await(connected, true)
	s.wantRecords("runs")
	eventually(t, "the pod is gone", func() bool {
		if err := r.RemovePodSandbox(t.Context(), &adaptation.RemovePodSandboxRequest{Pod: &api.PodSandbox{Id: sandbox}}); err != nil {
			t.Fatal(err)
		}
		return len(s.records.All()) == 0
	})
	r.end()
	r.await(connected, false)
}

// containerd synchronizes no plugin while it stops a container, and creates the next one without a
// plugin that has disconnected meanwhile.
func TestThePluginWaitsForSynchronizeForAsLongAsItTakes(t *testing.T) {
	s := newSite(t)
	mounts := s.crioModel()
	s.registerTimeout = 500 * time.Millisecond
	s.Socket = filepath.Join(s.root, "nri.sock")
	r := s.startRuntime()
	defer r.end()
	stopping := r.BlockPluginSync()
	defer stopping.Unblock()
	connected := s.run()
	time.Sleep(3 * s.registerTimeout)
	created := make(chan *api.ContainerAdjustment, 1)
	go func() {
		defer r.BlockPluginSync().Unblock() // as containerd does, behind the plugin that waits
		got, err := r.create("queued", mounts...)
		if err != nil {
			t.Error(err)
		}
		created <- got
	}()
	time.Sleep(100 * time.Millisecond)
	stopping.Unblock()
	if got := <-created; len(got.GetMounts()) != 3 {
		t.Errorf("the adjustment is %+v", got)
	}
	r.await(connected, true)
}

func TestTheErrorOfARefusedVolumeReachesTheRuntime(t *testing.T) {
	s := newSite(t)
	connected := s.run()
	r := s.startRuntime()
	defer r.end()
	r.await(connected, true)
	mounts := []*api.Mount{s.crio.mountOf("/model/file", "f")}
	eventually(t, "the container is refused", func() bool {
		_, err := r.create("refused", mounts...)
		if err != nil && !strings.Contains(err.Error(), "test: image volume /model/file: CRI-O mounts a layer at /model/file, but does not say") {
			t.Fatal(err)
		}
		return err != nil
	})
	// The runtime does not disconnect the plugin because of it.
	if _, err := r.create("refused", mounts...); err == nil {
		t.Error("the second time it is not refused")
	}
	s.wantRecords()
}

func TestAWrongContainerdAddressIsLoggedOnce(t *testing.T) {
	t.Cleanup(func() { log.L.Logger.SetOutput(os.Stderr) })
	there := t.TempDir()
	for _, tt := range []struct {
		runtime, address string
		want             int
	}{{containerd, there, 0}, {crio, there + "/none", 0}, {containerd, there + "/none", 1}} {
		var text strings.Builder
		log.L.Logger.SetOutput(&text)
		p := &Plugin{Config: Config{ContainerdAddress: tt.address}}
		for range 2 {
			p.checkAddress(t.Context(), tt.runtime)
		}
		if n := strings.Count(text.String(), "containerd_address="+tt.address); n != tt.want {
			t.Errorf("%s at %s: logged %d times: %s", tt.runtime, tt.address, n, text.String())
		}
	}
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within 2 minutes", what)
		}
	}
}
