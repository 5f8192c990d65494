// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package install

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/errdefs"
	"github.com/coreos/go-systemd/v22/dbus"
	"github.com/prometheus/procfs"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/client"
	"github.com/artifact-snapshotter/artifact-snapshotter/internal/containerdconfig"
)

// running is a running containerd.
type running struct {
	*client.Client
	pid     int
	unit    string // "" if it is not a systemd service
	config  string // its main file, "" if unknown
	started time.Time
}

// connect returns nil if no containerd answers.
func (r *run) connect(ctx context.Context) (*running, error) {
	c, err := client.Connect(ctx, r.Daemon.ContainerdAddress, "default", containerdconfig.Snapshotter)
	if errdefs.IsUnavailable(err) {
		return nil, nil //nolint:nilnil // there is none
	}
	if err != nil {
		return nil, err
	}
	found := &running{Client: c}
	if err := found.identify(r.Daemon.ContainerdAddress); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return found, nil
}

// service matches the name of a unit in the path of a cgroup.
var service = regexp.MustCompile(`.*?/([^/]+\.service)(?:/.*)?$`)

// identify finds the process that listens on the socket.
func (c *running) identify(address string) error {
	conn, err := net.Dial("unix", containerdconfig.Socket(address))
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
	proc, err := procfs.NewProc(c.pid)
	if err != nil {
		return fmt.Errorf("containerd's process is not visible from here: %w", err)
	}
	groups, gerr := proc.Cgroups()
	args, aerr := proc.CmdLine()
	stat, serr := proc.Stat()
	if err := errors.Join(gerr, aerr, serr); err != nil {
		return err
	}
	for _, group := range groups {
		// systemd's own hierarchy, or that of cgroup v2.
		if found := service.FindStringSubmatch(group.Path); found != nil && (group.HierarchyID == 0 || slices.Contains(group.Controllers, "name=systemd")) {
			c.unit = found[1]
		}
	}
	c.config = mainOf(args)
	seconds, err := stat.StartTime() // since 1970, the boot time rounded down to seconds
	c.started = time.Unix(0, int64(seconds*float64(time.Second)))
	return err
}

// mainOf is the main file of a containerd with that command line: --config, or the default.
func mainOf(args []string) string {
	if len(args) == 0 || filepath.Base(args[0]) != "containerd" {
		return "" // it is part of another program
	}
	config := containerdconfig.Files[0]
	for i, arg := range args {
		flag, value, found := strings.Cut(arg, "=")
		switch {
		case flag != "--config" && flag != "-config" && flag != "-c" && flag != "--c":
		case found:
			config = value
		case i+1 < len(args):
			config = args[i+1]
		}
	}
	if !filepath.IsAbs(config) {
		return ""
	}
	return config
}

// loaded is the socket of the snapshotter in the running containerd; "" if it has none.
func (c *running) loaded(ctx context.Context) (string, error) {
	return containerdconfig.LoadedAddress(ctx, c.Client.Client, plugins.SnapshotPlugin, containerdconfig.Snapshotter)
}

// stale reports whether containerd was started before its files were last changed, or
// has loaded another snapshotter than wanted.
func (r *run) stale(ctx context.Context, c *running, wanted string) (bool, error) {
	loaded, err := c.loaded(ctx)
	if err != nil || loaded != wanted && loaded != containerdconfig.CompiledIn {
		return true, err
	}
	d, err := containerdconfig.FindDropIn(r.main)
	if err != nil {
		return false, err
	}
	for _, path := range []string{r.main, d.Path} {
		// The clocks agree to a second or so.
		if fi, err := os.Stat(path); err == nil && fi.ModTime().After(c.started.Add(time.Second)) {
			return true, nil
		}
	}
	return false, nil
}

// restartContainerd restarts containerd and waits until it has loaded what is wanted.
func (r *run) restartContainerd(ctx context.Context, c *running, wanted string) error {
	conn, err := dbus.NewWithContext(ctx)
	if err != nil {
		return fmt.Errorf("cannot ask systemd to restart %s, restart it by hand: %w", c.unit, err)
	}
	defer conn.Close()
	undo := ""
	if wanted != "" {
		undo = fmt.Sprintf(" (`%s uninstall` undoes everything)", program)
	}
	if err := job(ctx, conn.RestartUnitContext, c.unit); err != nil {
		return fmt.Errorf("restart containerd%s: %w", undo, err)
	}
	r.reportf("restarted %s", c.unit)
	deadline := time.Now().Add(restartTimeout)
	for {
		got := "nothing"
		if again, err := r.connect(ctx); err == nil && again != nil {
			loaded, err := again.loaded(ctx)
			if err := errors.Join(err, again.Close()); err == nil && loaded == wanted {
				return nil
			}
			got = strconv.Quote(loaded)
		}
		if time.Now().After(deadline) || ctx.Err() != nil {
			return fmt.Errorf("containerd was restarted, but has loaded %s as the snapshotter %s; see journalctl -u %s%s: %w", got, containerdconfig.Snapshotter, c.unit, undo, errdefs.ErrUnavailable)
		}
		time.Sleep(200 * time.Millisecond)
	}
}
