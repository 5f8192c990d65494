// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package node

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

// process is a daemon of the node; nil if it was never started.
type process struct {
	name string
	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended and has been waited for
}

func (p *process) running() bool {
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

// stop sends the signal and waits. After two minutes it kills the process and returns an
// error.
func (p *process) stop(signal os.Signal) error {
	if !p.running() {
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

// spawn starts a daemon that logs to logs/<name>. With notify it returns after the daemon
// has sent READY=1, see sd_notify(3).
func (n *Node) spawn(name string, args []string, notify bool) (*process, error) {
	if err := os.MkdirAll(n.path("logs"), 0o755); err != nil {
		return nil, err
	}
	log, err := os.OpenFile(n.logPath(name), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Env = n.env()
	if n.options.Traces != "" && notify {
		cmd.Env = append(cmd.Env, "OTEL_TRACES_EXPORTER=otlp", "OTEL_EXPORTER_OTLP_ENDPOINT="+n.options.Traces, "OTEL_BSP_SCHEDULE_DELAY=100")
	}
	// A process group of its own keeps Ctrl-C from the daemon, because the test program
	// must clean up.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}

	var ready *net.UnixConn
	if notify {
		socket := n.path("notify-" + name)
		if err := os.RemoveAll(socket); err != nil {
			return nil, err
		}
		if ready, err = net.ListenUnixgram("unixgram", &net.UnixAddr{Name: socket, Net: "unixgram"}); err != nil {
			return nil, err
		}
		defer ready.Close()
		cmd.Env = append(cmd.Env, "NOTIFY_SOCKET="+socket)
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	p := &process{name: name, cmd: cmd, done: make(chan struct{})}
	go func() {
		_ = cmd.Wait() // ProcessState has the result
		close(p.done)
	}()
	if notify {
		if err := n.waitReady(p, ready); err != nil {
			return nil, errors.Join(err, p.stop(syscall.SIGKILL))
		}
	}
	return p, nil
}

func (n *Node) waitReady(p *process, ready *net.UnixConn) error {
	ctx, cancel := context.WithTimeout(n.ctx, 3*time.Minute)
	defer cancel()
	go func() {
		select {
		case <-p.done:
		case <-ctx.Done():
		}
		_ = ready.SetReadDeadline(time.Now()) // ends the Read below
	}()
	buf := make([]byte, 4096)
	for {
		size, err := ready.Read(buf)
		switch {
		case err == nil && strings.Contains(string(buf[:size]), "READY=1"):
			return nil
		case err == nil: // STATUS= and others
		case !p.running():
			return fmt.Errorf("%s ended (%s) before it was ready", p.name, p.cmd.ProcessState)
		default:
			return fmt.Errorf("wait for %s to be ready: %w", p.name, errors.Join(ctx.Err(), err))
		}
	}
}

// run runs a program and returns its standard output. The error contains its standard
// error.
func (n *Node) run(program string, args ...string) (string, error) {
	return n.runContext(n.ctx, program, args...)
}

// runContext is run, but kills the program when ctx ends.
func (n *Node) runContext(ctx context.Context, program string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	cmd.Env = n.env()
	if err := cmd.Run(); err != nil {
		return stdout.String(), fmt.Errorf("%s %s: %w\n%s", filepath.Base(program), strings.Join(args, " "), errors.Join(ctx.Err(), err), stderr.String())
	}
	return stdout.String(), nil
}

// env puts the tools first in PATH, where containerd finds its shim, disables the
// registry's traces, and hides the machine's storage configuration from CRI-O.
func (n *Node) env() []string {
	return append(os.Environ(), "PATH="+n.containerd+":"+n.tools+":"+os.Getenv("PATH"), "OTEL_TRACES_EXPORTER=none",
		"CONTAINERS_STORAGE_CONF="+n.path("storage.conf"))
}

func (n *Node) logPath(name string) string { return filepath.Join(n.path("logs"), name) }

// Logs returns the last lines of every log, each under a heading. After Stop it returns
// what it returned at Stop.
func (n *Node) Logs() string {
	if n.lastLogs != "" {
		return n.lastLogs
	}
	var out strings.Builder
	for _, log := range []struct {
		name  string
		lines int
	}{{"containerd", 60}, {"crio", 60}, {"daemon", 60}, {"kubelet", 60}, {"registry", 5}, {"systemd", 20}, {"journal", 100}} {
		text, err := os.ReadFile(n.logPath(log.name))
		if err != nil {
			continue // never started
		}
		lines := strings.Split(strings.TrimSpace(string(text)), "\n")
		lines = lines[max(0, len(lines)-log.lines):]
		fmt.Fprintf(&out, "==> %s, last %d lines of its log\n%s\n", log.name, len(lines), strings.Join(lines, "\n"))
	}
	return out.String()
}
