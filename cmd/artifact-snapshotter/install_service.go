// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/coreos/go-systemd/v22/dbus"
)

// unitName is the daemon's unit.
var unitName = filepath.Base(installedUnit)

// restartTimeout is how long a service may take to be restarted, and containerd to
// answer after that.
const restartTimeout = 2 * time.Minute

// hasSystemd is sd_booted(3).
func hasSystemd() bool { return exists("/run/systemd/system") }

// job does something with a unit, and waits until systemd has done it.
func job(ctx context.Context, do func(context.Context, string, string, chan<- string) (int, error), unit string) error {
	ctx, cancel := context.WithTimeout(ctx, restartTimeout)
	defer cancel()
	done := make(chan string, 1)
	if _, err := do(ctx, unit, "replace", done); err != nil {
		return fmt.Errorf("%s: %w", unit, err)
	}
	select {
	case result := <-done:
		if result != "done" {
			return fmt.Errorf("systemd says %q of %s; see journalctl -u %[2]s: %w", result, unit, errdefs.ErrUnavailable)
		}
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%s takes too long; see journalctl -u %[1]s: %w", unit, ctx.Err())
	}
}

// startService makes systemd read the unit and start it, again if the daemon was started
// before its files were last changed: by this run, or by one that was killed.
func (r *installRun) startService(ctx context.Context) error {
	conn, err := dbus.NewWithContext(ctx)
	if err != nil {
		return fmt.Errorf("systemd cannot be asked to start the daemon: %w", err)
	}
	defer conn.Close()
	if err := conn.ReloadContext(ctx); err != nil {
		return err
	}
	if _, links, err := conn.EnableUnitFilesContext(ctx, []string{unitName}, false, false); err != nil {
		return fmt.Errorf("enable %s: %w", unitName, err)
	} else if len(links) > 0 {
		r.say("enabled " + unitName)
		if err := conn.ReloadContext(ctx); err != nil {
			return err
		}
	}
	if current, err := r.serviceIsCurrent(ctx, conn); err != nil || current {
		return err
	}
	if err := job(ctx, conn.RestartUnitContext, unitName); err != nil {
		return err
	}
	r.say("started " + unitName)
	return nil
}

// serviceIsCurrent says whether the daemon runs, and has read its files as they are.
func (r *installRun) serviceIsCurrent(ctx context.Context, conn *dbus.Conn) (bool, error) {
	state, err := conn.GetUnitPropertyContext(ctx, unitName, "ActiveState")
	if err != nil {
		return false, err
	}
	started, err := conn.GetServicePropertyContext(ctx, unitName, "ExecMainStartTimestamp") // microseconds
	if err != nil {
		return false, err
	}
	at, _ := started.Value.Value().(uint64)
	for _, path := range []string{r.binary, installedUnit, r.daemonFile()} {
		if fi, err := os.Stat(path); err == nil && fi.ModTime().After(time.UnixMicro(int64(at))) {
			return false, nil
		}
	}
	return state.Value.Value() == "active", nil
}

// serviceFiles are what is to be removed with the service: what install has made, or has
// written into the daemon's file, and this version's program.
func (r *installRun) serviceFiles() (files []change, err error) {
	for path, is := range map[string]func([]byte) bool{
		installedUnit: func([]byte) bool { return true },
		r.binary:      func(program []byte) bool { return bytes.Equal(program, r.program) },
	} {
		file, err := changed(path, nil, 0)
		if err != nil {
			return nil, err
		}
		if file.before != nil && is(file.before) {
			files = append(files, file)
		}
	}
	config, err := changed(r.daemonFile(), nil, 0)
	if err != nil {
		return nil, err
	}
	if !ours(config.before) {
		config.after = withoutTakenOver(config.before)
	}
	if !config.none() {
		files = append(files, config)
	}
	slices.SortFunc(files, func(a, b change) int { return strings.Compare(a.path, b.path) })
	return files, nil
}

// removeService stops the daemon and has systemd forget it.
func (r *installRun) removeService(ctx context.Context) error {
	files, err := r.serviceFiles()
	if err != nil {
		return err
	}
	if exists(installedUnit) {
		conn, err := dbus.NewWithContext(ctx)
		if err != nil {
			return fmt.Errorf("systemd cannot be asked to stop the daemon: %w", err)
		}
		defer conn.Close()
		if err := job(ctx, conn.StopUnitContext, unitName); err != nil {
			return err
		}
		if _, err := conn.DisableUnitFilesContext(ctx, []string{unitName}, false); err != nil {
			return err
		}
		defer func() { _ = conn.ReloadContext(ctx) }()
	}
	if err := r.write(files); err != nil {
		return err
	}
	_ = os.Remove(filepath.Dir(defaultConfigFile)) // if there is nothing in it
	if r.did && exists(r.binary) {
		r.say(r.binary + " stays: it is another version's program")
	}
	return nil
}
