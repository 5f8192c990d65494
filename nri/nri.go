// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

// Package nri is the door for runtimes that ask no snapshotter of ours: CRI-O, and a
// containerd whose configuration is left alone. It is a plugin of NRI
// (https://github.com/containerd/nri), which both have on by default: before a
// container is created it looks at the container's mounts, and puts the files of an
// artifact where the runtime has its own idea of an image volume, an empty directory
// (containerd) or a bind of each blob (CRI-O). All other mounts it leaves alone.
//
// Trees are those of package view, whichever door the pod came through. Which
// container shows what is recorded below the root before the runtime is answered, and
// put right when the plugin connects: it neither forgets a container when the daemon
// is killed, nor keeps one that ended meanwhile.
//
// The package knows NRI, and how the two runtimes mount artifacts. It calls neither.
package nri

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/pkg/stub"
	"github.com/containerd/ttrpc"

	"github.com/artifact-snapshotter/artifact-snapshotter/blobs"
	"github.com/artifact-snapshotter/artifact-snapshotter/store"
)

const (
	minReconnect = 50 * time.Millisecond
	// maxReconnect is short: what a runtime that has just started creates before the
	// plugin is there has no artifacts.
	maxReconnect = 500 * time.Millisecond
	// warnAfter is the failure in a row that is a warning, once: it comes after some
	// seconds, since a runtime that is just starting is nothing to warn of.
	warnAfter = 10
	// registerTimeout bounds the wait for Configure. A runtime gives a plugin 5 seconds,
	// and may close the connection without a word. The wait for Synchronize is not
	// bounded: containerd holds it back while it stops a container, for all of the grace
	// period, and goes on without a plugin that has hung up by then.
	registerTimeout = 20 * time.Second
)

// Config says how to be a plugin, and of what.
type Config struct {
	// Socket is NRI's, Index where in the order of its plugins this one is (two
	// digits), and Name its name.
	Socket, Index, Name string
	// Root is the directory of the daemon, below which the records are.
	Root string
	// Views are where the Trees are.
	Views *store.Store
	// Blobs are all directories of blobs, and Layouts those of them that are stores of
	// CRI-O's: OCI layouts, whose blobs it mounts.
	Blobs   blobs.Source
	Layouts []blobs.Dir
	// ContainerdAddress is the socket of the containerd whose images the store knows.
	ContainerdAddress string
	// Passthrough leaves the runtime's own mounts where the artifact cannot be shown.
	// Else the container is not created.
	Passthrough bool
	// Observer is told of what the plugin does.
	Observer Observer
}

// Observer is told of what a Plugin does, by several goroutines at once. A function
// that is nil is not called.
type Observer struct {
	// Connected is told when a runtime has taken the plugin, and when it is lost.
	Connected func(bool)
}

// Plugin is safe for concurrent use.
type Plugin struct {
	Config
	references      *references
	registerTimeout time.Duration
	unwatched       sync.Once
}

// New returns a plugin that keeps what its records say from the sweep of c.Views, which
// must not run yet.
func New(ctx context.Context, c Config) (*Plugin, error) {
	r, err := openReferences(ctx, filepath.Join(c.Root, "nri"))
	if err != nil {
		return nil, err
	}
	c.Views.AddReferences(r.shown)
	return &Plugin{Config: c, references: r, registerTimeout: registerTimeout}, nil
}

// Keep is New for a daemon that is no plugin any more: what pods show by its records, if it
// has any below root, is kept from the sweep of views. Only a reboot ends that, or a plugin
// that meets the runtime again.
func Keep(ctx context.Context, root string, views *store.Store) error {
	dir := filepath.Join(root, "nri")
	if _, err := os.Stat(dir); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	r, err := openReferences(ctx, dir)
	if err != nil {
		return err
	}
	views.AddReferences(r.shown)
	if n := len(r.by); n > 0 {
		log.G(ctx).WithField("containers", n).Warn("NRI is off, and containers are recorded that show artifacts by it: what they show stays on the node until it is on again, or the node is booted")
	}
	return nil
}

// Run is the plugin of whatever runtime listens on the socket, until ctx ends. The
// runtime need not run yet, and may be restarted.
func (p *Plugin) Run(ctx context.Context) {
	logger := log.G(ctx).WithField("nri", p.Socket)
	wait, failures := minReconnect, 0
	for ctx.Err() == nil {
		served, err := p.serve(ctx)
		if served {
			wait, failures = minReconnect, 0
		}
		failures++
		switch {
		case ctx.Err() != nil:
		case served:
			logger.WithError(err).Info("Lost the runtime: until it is back, its image volumes are what it makes of them itself")
		case failures == warnAfter:
			logger.WithError(err).Warn("Cannot connect to NRI: image volumes are what the runtime makes of them itself until this works; still trying")
		default:
			logger.WithError(err).Debug("Cannot connect to NRI")
		}
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
		wait = min(2*wait, maxReconnect)
	}
}

// serve is Run for one connection. It reports whether the runtime has taken the plugin.
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
		// Without the plugin's answer a container would have the wrong files, so its
		// creation is to fail. By default a runtime also disconnects a plugin that is
		// late, and creates further containers without it, so it is to stay connected.
		// With passthrough the defaults are right, and the plugin connects again. A
		// runtime before NRI 0.12.5 ignores the policy.
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
		return false, lost(err)
	case <-time.After(p.registerTimeout):
		err = fmt.Errorf("the runtime has taken the connection, but not the plugin: %w", errdefs.ErrUnavailable)
	case <-ctx.Done():
		err = ctx.Err()
	case <-s.configured:
	}
	if err != nil {
		_ = conn.Close()
		s.logger.WithError(s.giveUp(plugin, ended)).Debug("gave up a connection")
		return false, err
	}
	select {
	case err := <-ended:
		return false, lost(err)
	case <-ctx.Done():
		return false, ctx.Err()
	case <-s.synchronized:
	}
	if p.Observer.Connected != nil {
		p.Observer.Connected(true)
		defer p.Observer.Connected(false)
	}
	log.G(ctx).WithFields(log.Fields{"nri": p.Socket, "runtime": s.runtime, "version": s.version, "nri_version": plugin.RuntimeNRIVersion()}).Info("Showing artifacts to a runtime by NRI")
	p.checkAddress(ctx, s.runtime)
	return true, lost(<-ended)
}

// giveUp ends a stub that the runtime has not configured and whose connection is closed, and
// returns its error. A stub that has registered waits for Configure for ever, whatever
// becomes of the connection (pkg/stub/stub.go of NRI, Start): so giveUp makes that fail.
func (s *session) giveUp(plugin stub.Stub, ended <-chan error) error {
	select {
	case err := <-ended:
		return err
	case <-s.registered:
	}
	service, ok := plugin.(api.PluginService)
	if !ok {
		return fmt.Errorf("NRI's stub is no api.PluginService but a %T: %w", plugin, errdefs.ErrNotImplemented)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	_, _ = service.Configure(ctx, &api.ConfigureRequest{}) // the error is the purpose
	return <-ended
}

// checkAddress warns of a containerd that has the plugin, and is not where its images are
// asked for, which goes on without a word: on other nodes there is no containerd.
func (p *Plugin) checkAddress(ctx context.Context, runtime string) {
	if runtime != containerd {
		return
	}
	if _, err := os.Stat(p.ContainerdAddress); err != nil {
		p.unwatched.Do(func() {
			log.G(ctx).WithError(err).WithField("containerd_address", p.ContainerdAddress).
				Warn("containerd has the plugin of NRI, but its socket is not at containerd_address: volumes of artifacts are refused until it is")
		})
	}
}

// lost is the error for a connection that has ended with err.
func lost(err error) error {
	if err == nil {
		err = errdefs.ErrUnavailable
	}
	return fmt.Errorf("the connection has ended: %w", err)
}

// session is the Plugin in one connection with a runtime. Its methods are those that
// the stub looks for; the runtime calls them one at a time.
type session struct {
	*Plugin
	logger           *log.Entry
	runtime, version string
	registered       chan struct{} // closed when the runtime has heard of the plugin
	configured       chan struct{} // closed when the runtime has told who it is
	synchronized     chan struct{} // closed when the runtime has told all that it has
}

// called is told of all calls to the runtime. The stub makes one, to register.
func (s *session) called(ctx context.Context, req *ttrpc.Request, resp *ttrpc.Response, _ *ttrpc.UnaryClientInfo, call ttrpc.Invoker) error {
	err := call(ctx, req, resp)
	if err == nil {
		once(s.registered)
	}
	return err
}

// Configure takes note of the runtime.
func (s *session) Configure(ctx context.Context, _, runtime, version string) (api.EventMask, error) {
	if err := ctx.Err(); err != nil { // see giveUp
		return 0, err
	}
	s.runtime, s.version = runtime, version
	once(s.configured)
	return 0, nil // all events that there is a method for
}

// Synchronize puts the records right: containers is all that the runtime has.
func (s *session) Synchronize(ctx context.Context, pods []*api.PodSandbox, containers []*api.Container) ([]*api.ContainerUpdate, error) {
	s.synchronize(log.WithLogger(ctx, s.logger), s.runtime, pods, containers)
	once(s.synchronized)
	return nil, nil
}

// once closes the channel unless it is closed.
func once(c chan struct{}) {
	select {
	case <-c:
	default:
		close(c)
	}
}

// CreateContainer shows the artifacts that the container mounts. Its error is what the
// pod's event says. No kind of it is for the runtime, which goes on without a plugin that
// was too slow (pkg/adaptation/plugin.go of NRI, isFatalError), or, if it knows what was
// asked of it, fails without a reason that says what to do. So there is an answer before,
// even if the node is too busy for one.
func (s *session) CreateContainer(ctx context.Context, pod *api.PodSandbox, c *api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate, error) {
	ctx = log.WithLogger(ctx, s.logger.WithFields(log.Fields{"sandbox": pod.GetId(), "container": c.GetName()}))
	ctx, cancel := within(ctx, 3, 4)
	defer cancel()
	type answer struct {
		adjustment *api.ContainerAdjustment
		err        error
	}
	answered := make(chan answer, 1)
	go func() {
		adjustment, err := s.create(ctx, s.runtime, pod, c)
		answered <- answer{adjustment, err}
	}()
	var a answer
	select {
	case a = <-answered:
	case <-ctx.Done():
		a.err = errBusy
		s.logger.WithField("container", c.GetName()).Warn(a.err)
		if s.Passthrough {
			a.err = nil
		}
	}
	if a.err != nil {
		return nil, nil, errors.New(s.Name + ": " + a.err.Error())
	}
	return a.adjustment, nil, nil
}

// StopContainer drops what the container has shown. It comes when it has ended, and
// when it could not be created after all.
func (s *session) StopContainer(ctx context.Context, _ *api.PodSandbox, c *api.Container) ([]*api.ContainerUpdate, error) {
	return nil, s.RemoveContainer(ctx, nil, c)
}

// RemoveContainer is StopContainer for one that has not been stopped.
func (s *session) RemoveContainer(ctx context.Context, _ *api.PodSandbox, c *api.Container) error {
	s.references.end(c.GetId())
	s.drop(log.WithLogger(ctx, s.logger), c.GetId())
	return nil
}

// RemovePodSandbox drops what is left of a pod. CRI-O tells of nothing else if a
// container could not be created because of another plugin.
func (s *session) RemovePodSandbox(ctx context.Context, pod *api.PodSandbox) error {
	s.references.end(pod.GetId())
	s.drop(log.WithLogger(ctx, s.logger), s.references.of(pod.GetId())...)
	return nil
}

// stubLogger is where the stub logs: what it says is for who looks for an error.
type stubLogger struct{ *log.Entry }

func (l stubLogger) Debugf(_ context.Context, format string, args ...any) {
	l.Entry.Debugf("NRI: "+format, args...)
}

func (l stubLogger) Infof(_ context.Context, format string, args ...any) {
	l.Entry.Debugf("NRI: "+format, args...)
}

func (l stubLogger) Warnf(_ context.Context, format string, args ...any) {
	l.Entry.Debugf("NRI: "+format, args...)
}

func (l stubLogger) Errorf(_ context.Context, format string, args ...any) {
	l.Entry.Debugf("NRI: "+format, args...)
}
