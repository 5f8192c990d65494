// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package node

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/process"
)

// spawn starts a daemon that logs to logs/<name>. With notify it must say
// READY=1 as in sd_notify(3) before spawn returns.
func (n *Node) spawn(name string, args []string, notify bool) (*process.Process, error) {
	o := process.Options{Name: name, Args: args, Env: n.env(), Log: n.logPath(name)}
	if notify {
		o.Notify = n.path("notify-" + name)
		if n.options.Traces != "" {
			o.Env = append(o.Env, "OTEL_TRACES_EXPORTER=otlp", "OTEL_EXPORTER_OTLP_ENDPOINT="+n.options.Traces, "OTEL_BSP_SCHEDULE_DELAY=100")
		}
	}
	return process.Start(n.ctx, o)
}

// run runs a program and returns its standard output. The error contains its standard
// error.
func (n *Node) run(program string, args ...string) (string, error) {
	return n.runContext(n.ctx, program, args...)
}

// runContext is run, but kills the program when ctx ends.
func (n *Node) runContext(ctx context.Context, program string, args ...string) (string, error) {
	return process.Run(ctx, n.env(), program, args...)
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
