// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/errdefs"
	"github.com/coreos/go-systemd/v22/dbus"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/client"
)

// running is the containerd that runs.
type running struct {
	*client.Client
	patient patient
	pid     int
	unit    string // "" if it is no service
	config  string // its configuration file, "" if that is not known
	started time.Time
}

// service is the name of a unit in a line of /proc/PID/cgroup.
var service = regexp.MustCompile(`(?m)^(?:0:|\d+:name=systemd):.*?/([^/]+\.service)(?:/.*)?$`)

// askRuntime is nil if no containerd answers.
func (r *installRun) askRuntime(ctx context.Context) (*running, error) {
	c, err := client.Connect(ctx, r.cfg.ContainerdAddress, "default", proxyName)
	if errdefs.IsUnavailable(err) {
		return nil, nil //nolint:nilnil // there is none
	}
	if err != nil {
		return nil, err
	}
	found := &running{Client: c, patient: patient{Config: r.cfg, containerd: c}}
	if err := found.identify(r.cfg.ContainerdAddress); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return found, nil
}

// identify finds the process that listens on the socket, and the unit that it is of.
func (c *running) identify(address string) error {
	conn, err := net.Dial("unix", socketOf(address))
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return err
	}
	var peer *unix.Ucred
	var perr error
	err = raw.Control(func(fd uintptr) { peer, perr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if err := errors.Join(err, perr); err != nil {
		return err
	}
	c.pid = int(peer.Pid)
	groups, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", c.pid))
	if err != nil {
		return fmt.Errorf("containerd's process cannot be seen from here: %w", err)
	}
	if found := service.FindSubmatch(groups); found != nil {
		c.unit = string(found[1])
	}
	if c.config, err = configOf(c.pid); err != nil {
		return err
	}
	c.started, err = startOf(c.pid)
	return err
}

// configOf is the configuration file of a containerd: that of its command line, or the
// default one.
func configOf(pid int) (string, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil {
		return "", err
	}
	args := bytes.Split(bytes.TrimSuffix(text, []byte{0}), []byte{0})
	if filepath.Base(string(args[0])) != "containerd" {
		return "", nil // it is part of another program
	}
	config := containerdFiles[0]
	for i, arg := range args {
		flag, value, found := strings.Cut(string(arg), "=")
		switch {
		case flag != "--config" && flag != "-config" && flag != "-c" && flag != "--c":
		case found:
			config = value
		case i+1 < len(args):
			config = string(args[i+1])
		}
	}
	if !filepath.IsAbs(config) {
		return "", nil
	}
	return config, nil
}

// startOf is when a process was started, by the kernel's clock and to its tick
// (proc_pid_stat(5), starttime).
func startOf(pid int) (time.Time, error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return time.Time{}, err
	}
	// Behind the name, which may be anything, in parentheses.
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	if len(fields) < 20 {
		return time.Time{}, fmt.Errorf("/proc/%d/stat has %d fields", pid, len(fields))
	}
	ticks, err := strconv.ParseInt(fields[19], 10, 64)
	if err != nil {
		return time.Time{}, err
	}
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &now); err != nil {
		return time.Time{}, err
	}
	const perSecond = 100 // USER_HZ, of every architecture of Linux that Go has
	age := time.Duration(now.Nano()) - time.Duration(ticks)*time.Second/perSecond
	return time.Now().Add(-age), nil
}

// loaded is the socket of the snapshotter in the running containerd, "" if it has none.
func (c *running) loaded(ctx context.Context) (string, error) {
	found, err := c.patient.plugin(ctx, plugins.SnapshotPlugin, proxyName)
	if err != nil || found == nil {
		return "", err
	}
	if address := socketOf(found.Exports["address"]); address != "" {
		return address, nil
	}
	return compiledIn, nil
}

// stale says whether containerd was started before its files were last changed, or
// has loaded something else than wanted.
func (r *installRun) stale(ctx context.Context, c *running, wanted string) (bool, error) {
	loaded, err := c.loaded(ctx)
	if err != nil || loaded != wanted && loaded != compiledIn {
		return true, err
	}
	d, err := findDropIn(r.main)
	if err != nil {
		return false, err
	}
	for _, path := range []string{r.main, d.path} {
		// Within a second or so nobody knows: the tick, and the clocks.
		if fi, err := os.Stat(path); err == nil && fi.ModTime().After(c.started.Add(time.Second)) {
			return true, nil
		}
	}
	return false, nil
}

// restartRuntime restarts containerd and waits until it has loaded what is wanted.
func (r *installRun) restartRuntime(ctx context.Context, c *running, wanted string) error {
	conn, err := dbus.NewWithContext(ctx)
	if err != nil {
		return fmt.Errorf("systemd cannot be asked to restart %s, do it by hand: %w", c.unit, err)
	}
	defer conn.Close()
	back := ""
	if wanted != "" {
		back = fmt.Sprintf(" (`%s uninstall` takes all back)", name)
	}
	if err := job(ctx, conn.RestartUnitContext, c.unit); err != nil {
		return fmt.Errorf("restart containerd%s: %w", back, err)
	}
	r.say("restarted " + c.unit)
	deadline := time.Now().Add(restartTimeout)
	for {
		got := "nothing"
		if again, err := r.askRuntime(ctx); err == nil && again != nil {
			loaded, err := again.loaded(ctx)
			if err := errors.Join(err, again.Close()); err == nil && loaded == wanted {
				return nil
			}
			got = strconv.Quote(loaded)
		}
		if time.Now().After(deadline) || ctx.Err() != nil {
			return fmt.Errorf("containerd was restarted, and has loaded %s as the snapshotter %s; see journalctl -u %s%s: %w", got, proxyName, c.unit, back, errdefs.ErrUnavailable)
		}
		time.Sleep(200 * time.Millisecond)
	}
}
