// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

// Package process starts the programs of a test's nodes and clusters, waits for them, and
// ends them.
package process

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// Process is a daemon; nil if it was never started.
type Process struct {
	name string
	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended and was waited for
}

// Options say how Start starts a daemon.
type Options struct {
	Name string   // in errors
	Args []string // program and arguments
	Env  []string // as exec.Cmd's
	Log  string   // file to which its output is appended

	// Notify is the path of a socket on which the daemon must say READY=1 as in
	// sd_notify(3) before Start returns; "" does not wait.
	Notify string
}

// Start starts a daemon.
func Start(ctx context.Context, o Options) (*Process, error) {
	if err := os.MkdirAll(filepath.Dir(o.Log), 0o755); err != nil {
		return nil, err
	}
	log, err := os.OpenFile(o.Log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd := exec.Command(o.Args[0], o.Args[1:]...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Env = o.Env
	// Its own process group keeps Ctrl-C from a daemon: the test program must clean up.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}

	var ready *net.UnixConn
	if o.Notify != "" {
		if err := os.RemoveAll(o.Notify); err != nil {
			return nil, err
		}
		if ready, err = net.ListenUnixgram("unixgram", &net.UnixAddr{Name: o.Notify, Net: "unixgram"}); err != nil {
			return nil, err
		}
		defer ready.Close()
		cmd.Env = append(cmd.Env, "NOTIFY_SOCKET="+o.Notify)
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", o.Name, err)
	}
	p := &Process{name: o.Name, cmd: cmd, done: make(chan struct{})}
	go func() {
		_ = cmd.Wait() // the state says it all
		close(p.done)
	}()
	if o.Notify != "" {
		if err := p.waitReady(ctx, ready); err != nil {
			return nil, errors.Join(err, p.Stop(syscall.SIGKILL))
		}
	}
	return p, nil
}

func (p *Process) waitReady(ctx context.Context, ready *net.UnixConn) error {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	go func() {
		select {
		case <-p.done:
		case <-ctx.Done():
		}
		_ = ready.SetReadDeadline(time.Now()) // ends the read below
	}()
	buf := make([]byte, 4096)
	for {
		size, err := ready.Read(buf)
		switch {
		case err == nil && strings.Contains(string(buf[:size]), "READY=1"):
			return nil
		case err == nil: // STATUS= and the like
		case !p.Running():
			return fmt.Errorf("%s ended (%s) before it was ready", p.name, p.cmd.ProcessState)
		default:
			return fmt.Errorf("wait for %s to be ready: %w", p.name, errors.Join(ctx.Err(), err))
		}
	}
}

// Running reports whether the process was started and has not ended.
func (p *Process) Running() bool {
	if p == nil {
		return false
	}
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// PID is its process ID.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Ended returns nil while the process runs, and then an error that says how it ended.
func (p *Process) Ended() error {
	if p.Running() {
		return nil
	}
	return fmt.Errorf("%s has ended: %s", p.name, p.cmd.ProcessState)
}

// Stop sends the signal and waits. After two minutes it kills the process and returns an
// error.
func (p *Process) Stop(signal os.Signal) error {
	if !p.Running() {
		return nil
	}
	if err := p.cmd.Process.Signal(signal); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("stop %s: %w", p.name, err)
	}
	select {
	case <-p.done:
		return nil
	case <-time.After(2 * time.Minute):
	}
	err := p.cmd.Process.Kill()
	<-p.done
	return errors.Join(fmt.Errorf("%s did not end within two minutes of the signal %q and was killed", p.name, signal), err)
}

// Run runs a program for at most ten minutes and returns its standard output; its
// standard error is in the error.
func Run(ctx context.Context, env []string, program string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	cmd.Env = env
	if err := cmd.Run(); err != nil {
		return stdout.String(), fmt.Errorf("%s %s: %w\n%s", filepath.Base(program), strings.Join(args, " "), errors.Join(ctx.Err(), err), stderr.String())
	}
	return stdout.String(), nil
}

// Await calls done until it returns nil, for at most the given time.
func Await(ctx context.Context, limit time.Duration, what string, done func() error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		err := done()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for %s: %w: %w", what, ctx.Err(), err)
		case <-tick.C:
		}
	}
}
