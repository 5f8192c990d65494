// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package install

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

// unitName is the name of the daemon's unit.
var unitName = filepath.Base(installedUnit)

// restartTimeout is how long a restart of a service may take, and how long containerd may
// take to answer after it.
const restartTimeout = 2 * time.Minute

// hasSystemd is sd_booted(3).
func hasSystemd() bool { return exists("/run/systemd/system") }

// job has systemd do something with a unit, and waits for it.
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
			return fmt.Errorf("the job of %[2]s ended with %[1]q; see journalctl -u %[2]s: %w", result, unit, errdefs.ErrUnavailable)
		}
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%s takes too long; see journalctl -u %[1]s: %[2]w", unit, ctx.Err())
	}
}

// startService starts the daemon, or restarts it if it was started before its files were
// last changed, by this run or by a killed one.
func (r *run) startService(ctx context.Context) error {
	conn, err := dbus.NewWithContext(ctx)
	if err != nil {
		return fmt.Errorf("cannot ask systemd to start the daemon: %w", err)
	}
	defer conn.Close()
	if err := conn.ReloadContext(ctx); err != nil {
		return err
	}
	if _, links, err := conn.EnableUnitFilesContext(ctx, []string{unitName}, false, false); err != nil {
		return fmt.Errorf("enable %s: %w", unitName, err)
	} else if len(links) > 0 {
		r.reportf("enabled %s", unitName)
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
	r.reportf("started %s", unitName)
	return nil
}

// serviceIsCurrent reports whether the daemon runs and has read its files as they are.
func (r *run) serviceIsCurrent(ctx context.Context, conn *dbus.Conn) (bool, error) {
	state, err := conn.GetUnitPropertyContext(ctx, unitName, "ActiveState")
	if err != nil {
		return false, err
	}
	started, err := conn.GetServicePropertyContext(ctx, unitName, "ExecMainStartTimestamp") // microseconds
	if err != nil {
		return false, err
	}
	at, _ := started.Value.Value().(uint64)
	for _, path := range []string{r.Binary, installedUnit, r.daemonFile()} {
		if fi, err := os.Stat(path); err == nil && fi.ModTime().After(time.UnixMicro(int64(at))) {
			return false, nil
		}
	}
	return state.Value.Value() == "active", nil
}

// serviceFiles are the changes that remove the service: of files that install has made or
// written into, and of the program if it is of this version.
func (r *run) serviceFiles() (files []change, err error) {
	for path, is := range map[string]func([]byte) bool{
		installedUnit: func([]byte) bool { return true },
		r.Binary:      func(program []byte) bool { return bytes.Equal(program, r.program) },
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
		config.after = withoutAdopted(config.before)
	}
	if !config.none() {
		files = append(files, config)
	}
	slices.SortFunc(files, func(a, b change) int { return strings.Compare(a.path, b.path) })
	return files, nil
}

// removeService stops the daemon and removes its service.
func (r *run) removeService(ctx context.Context) error {
	files, err := r.serviceFiles()
	if err != nil {
		return err
	}
	if r.DryRun {
		for _, file := range files {
			verb := "change"
			if file.after == nil {
				verb = "remove"
			}
			r.reportf("would %s %s", verb, file.path)
		}
		return nil
	}
	if exists(installedUnit) {
		conn, err := dbus.NewWithContext(ctx)
		if err != nil {
			return fmt.Errorf("cannot ask systemd to stop the daemon: %w", err)
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
	_ = os.Remove(filepath.Dir(ConfigFile)) // if it is empty
	if r.did && exists(r.Binary) {
		r.reportf("%s stays: it is another version of the program", r.Binary)
	}
	return nil
}
