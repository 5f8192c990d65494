// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package nri

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/pkg/stub"
	"github.com/containerd/ttrpc"
)

// Run connects to the runtime that listens on the socket, and serves it until ctx ends. It
// connects again whenever the connection ends. The runtime need not be running yet.
func (p *Plugin) Run(ctx context.Context) {
	logger := log.G(ctx).WithField("nri", p.Socket)
	reconnect.Run(log.WithLogger(ctx, logger), "cannot connect to NRI: the runtime mounts image volumes by itself until this succeeds; still trying", func() (time.Duration, error) {
		served, err := p.serve(ctx)
		if !served {
			return 0, err
		}
		if ctx.Err() == nil {
			logger.WithError(err).Info("lost the connection to the runtime: it mounts image volumes by itself until the NRI plugin is connected again")
		}
		return reconnect.Min, nil
	})
}

// serve is Run for one connection. It reports whether the runtime accepted the plugin.
func (p *Plugin) serve(ctx context.Context) (served bool, err error) {
	var dialer net.Dialer
	conn, err := dialer.DialContext(ctx, "unix", p.Socket)
	if err != nil {
		return false, err
	}
	defer func() { _ = conn.Close() }()
	s := &session{Plugin: p, logger: log.G(ctx), registered: make(chan struct{}), configured: make(chan struct{}), synchronized: make(chan struct{})}
	options := []stub.Option{
		stub.WithLogger(stubLogger{s.logger}), stub.WithConnection(conn),
		stub.WithPluginName(p.Name), stub.WithPluginIdx(p.Index),
		stub.WithTTRPCOptions([]ttrpc.ClientOpts{ttrpc.WithUnaryClientInterceptor(s.called)}, nil),
	}
	if !p.Passthrough {
		// Without the plugin's answer a container would have the wrong files, so its creation
		// must fail. By default a runtime disconnects a plugin that is late and creates further
		// containers without it, so the plugin must stay connected. With Passthrough the
		// defaults are right. A runtime before NRI 0.12.5 ignores the policy.
		options = append(options, stub.WithFailurePolicy(&api.FailurePolicy{FailRequest: true, KeepConnected: true}))
	}
	plugin, err := stub.New(s, options...)
	if err != nil {
		return false, err
	}
	ended := make(chan error, 1)
	go func() { ended <- plugin.Run(ctx) }()
	select {
	case err := <-ended:
		return false, connectionError(err)
	case <-time.After(p.registerTimeout):
		err = fmt.Errorf("the runtime has accepted the connection, but not the plugin: %w", errdefs.ErrUnavailable)
	case <-ctx.Done():
		err = ctx.Err()
	case <-s.configured:
	}
	if err != nil {
		_ = conn.Close()
		s.logger.WithError(s.giveUp(plugin, ended)).Debug("gave up a connection to NRI")
		return false, err
	}
	select {
	case err := <-ended:
		return false, connectionError(err)
	case <-ctx.Done():
		return false, ctx.Err()
	case <-s.synchronized:
	}
	if p.Observer.Connected != nil {
		p.Observer.Connected(true)
		defer p.Observer.Connected(false)
	}
	log.G(ctx).WithFields(log.Fields{"nri": p.Socket, "runtime": s.runtime, "version": s.version, "nri_version": plugin.RuntimeNRIVersion()}).Info("mounting artifacts for a runtime by NRI")
	p.checkAddress(ctx, s.runtime)
	return true, connectionError(<-ended)
}

// giveUp ends a stub that the runtime has not configured and whose connection is closed, and
// returns its error. A stub that has registered waits for Configure forever, even without a
// connection (Start in pkg/stub/stub.go of NRI), so giveUp calls Configure and makes it fail.
func (s *session) giveUp(plugin stub.Stub, ended <-chan error) error {
	select {
	case err := <-ended:
		return err
	case <-s.registered:
	}
	service, ok := plugin.(api.PluginService)
	if !ok {
		return fmt.Errorf("NRI's stub is not an api.PluginService but a %T: %w", plugin, errdefs.ErrNotImplemented)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	_, _ = service.Configure(ctx, &api.ConfigureRequest{}) // it fails on purpose
	return <-ended
}

// checkAddress warns once if containerd has accepted the plugin, but its socket is not at
// ContainerdAddress. The daemon starts without that socket, because a node with CRI-O has none.
func (p *Plugin) checkAddress(ctx context.Context, runtime string) {
	if runtime != containerd {
		return
	}
	if _, err := os.Stat(p.ContainerdAddress); err != nil {
		p.addressWarning.Do(func() {
			log.G(ctx).WithError(err).WithField("containerd_address", p.ContainerdAddress).
				Warn("containerd has accepted the NRI plugin, but its socket is not at containerd_address: artifact volumes are refused until it is")
		})
	}
}

// connectionError returns the error for a connection that has ended with err, which may be nil.
func connectionError(err error) error {
	if err == nil {
		err = errdefs.ErrUnavailable
	}
	return fmt.Errorf("the connection has ended: %w", err)
}

// session is the Plugin in one connection to a runtime. Its exported methods are the handlers
// that the stub looks for; the runtime calls one at a time.
type session struct {
	*Plugin
	logger           *log.Entry
	runtime, version string
	registered       chan struct{} // closed when the runtime has answered RegisterPlugin
	configured       chan struct{} // closed when the runtime has called Configure
	synchronized     chan struct{} // closed when Synchronize has ended
}

// called intercepts the stub's calls to the runtime. It makes only one: RegisterPlugin.
func (s *session) called(ctx context.Context, req *ttrpc.Request, resp *ttrpc.Response, _ *ttrpc.UnaryClientInfo, call ttrpc.Invoker) error {
	err := call(ctx, req, resp)
	if err == nil {
		closeOnce(s.registered)
	}
	return err
}

// Configure notes which runtime has connected.
func (s *session) Configure(ctx context.Context, _, runtime, version string) (api.EventMask, error) {
	if err := ctx.Err(); err != nil { // see giveUp
		return 0, err
	}
	s.runtime, s.version = runtime, version
	closeOnce(s.configured)
	return 0, nil // subscribe to all events that session has a method for
}

// Synchronize makes the records agree with all containers of the runtime.
func (s *session) Synchronize(ctx context.Context, pods []*api.PodSandbox, containers []*api.Container) ([]*api.ContainerUpdate, error) {
	s.synchronize(log.WithLogger(ctx, s.logger), s.runtime, pods, containers)
	closeOnce(s.synchronized)
	return nil, nil
}

// closeOnce closes the channel unless it is closed. Concurrent calls are not allowed.
func closeOnce(c chan struct{}) {
	select {
	case <-c:
	default:
		close(c)
	}
}

// CreateContainer mounts the artifacts of the container. Its error is shown in the pod's event.
// The error has no errdefs kind: for some kinds the runtime creates the container without the
// plugin, and for others it drops the text. So that the runtime always has an answer in time,
// CreateContainer does not wait for work that ignores the end of ctx.
func (s *session) CreateContainer(ctx context.Context, pod *api.PodSandbox, c *api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate, error) {
	ctx = log.WithLogger(ctx, s.logger.WithFields(log.Fields{"sandbox": pod.GetId(), "container": c.GetName()}))
	ctx, cancel := within(ctx, answerShare)
	defer cancel()
	type answer struct {
		adjustment *api.ContainerAdjustment
		err        error
	}
	answered := make(chan answer, 1)
	go func() {
		adjustment, err := s.mount(ctx, s.runtime, pod, c)
		answered <- answer{adjustment, err}
	}()
	var a answer
	select {
	case a = <-answered:
	case <-ctx.Done():
		a.err = errBusy
		s.logger.WithError(a.err).WithField("container", c.GetName()).Warn("gave up the image volumes of a container")
		if s.Passthrough {
			a.err = nil
		}
	}
	if a.err != nil {
		return nil, nil, errors.New(s.Name + ": " + a.err.Error())
	}
	return a.adjustment, nil, nil
}

// StopContainer removes the record of a container that has ended, or whose creation has failed
// after CreateContainer.
func (s *session) StopContainer(ctx context.Context, _ *api.PodSandbox, c *api.Container) ([]*api.ContainerUpdate, error) {
	return nil, s.RemoveContainer(ctx, nil, c)
}

// RemoveContainer removes the record of a container for which StopContainer was not called.
func (s *session) RemoveContainer(ctx context.Context, _ *api.PodSandbox, c *api.Container) error {
	s.records.end(c.GetId())
	s.missed.remove(c.GetId())
	s.unmount(log.WithLogger(ctx, s.logger), c.GetId())
	return nil
}

// RemovePodSandbox removes the remaining records of a pod. If another plugin refuses a
// container, CRI-O calls nothing else.
func (s *session) RemovePodSandbox(ctx context.Context, pod *api.PodSandbox) error {
	s.records.end(pod.GetId())
	s.missed.remove(pod.GetId())
	s.unmount(log.WithLogger(ctx, s.logger), s.records.containers(pod.GetId())...)
	return nil
}

// stubLogger logs all messages of the stub at the level debug: only a developer needs them.
type stubLogger struct{ *log.Entry }

func (l stubLogger) Debugf(_ context.Context, format string, args ...any) {
	l.Entry.Debugf("NRI: "+format, args...)
}

func (l stubLogger) Infof(ctx context.Context, format string, args ...any) {
	l.Debugf(ctx, format, args...)
}

func (l stubLogger) Warnf(ctx context.Context, format string, args ...any) {
	l.Debugf(ctx, format, args...)
}

func (l stubLogger) Errorf(ctx context.Context, format string, args ...any) {
	l.Debugf(ctx, format, args...)
}
