// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// Killed at any instant, containerd can start with what is there, and the next run
// does the rest.
func TestInstallIsKilledHalfWay(t *testing.T) {
	t.Parallel()
	t.Run("imports", func(t *testing.T) { killInstalls(t, "version = 3\nroot = '/data'\n") })
	// The folder is there with the drop-in or not at all: else nobody would know whose it is.
	t.Run("a folder", func(t *testing.T) {
		killInstalls(t, "version = 3\nimports = ['/etc/containerd/conf.d/*.toml']\n")
	})
}

// killInstalls kills install and uninstall again and again in a containerd's folder with
// that configuration file.
func killInstalls(t *testing.T, config string) {
	t.Helper()
	e := newEtc(t, config)
	folder := filepath.Join(e.dir, "conf.d")
	before := files(t, e.dir)
	e.run(t, "install")
	installed := files(t, e.dir)
	e.run(t, "uninstall")
	wantSame(t, e.dir, before)

	began := time.Now()
	e.run(t, "install")
	takes := time.Since(began)
	e.run(t, "uninstall")
	partly := 0
	const kills = 60
	for i := range kills {
		for _, step := range []struct {
			do    string
			after map[string]string
		}{{"install", installed}, {"uninstall", before}} {
			cmd := e.command(step.do)
			check(t, cmd.Start())
			timer := time.AfterFunc(takes*time.Duration(i)/kills, func() { _ = cmd.Process.Signal(syscall.SIGKILL) })
			_ = cmd.Wait()
			timer.Stop()
			now := files(t, e.dir)
			if !same(now, before) && !same(now, installed) {
				partly++
			}
			if _, ok := now[folder+"/"]; ok && step.do == "install" && now[filepath.Join(folder, "artifact-snapshotter.toml")] == "" {
				t.Error("the folder was made without the drop-in")
			}
			e.dump(t)
			e.run(t, step.do)
			if step.do == "uninstall" {
				_ = os.Remove(folder) // empty, if it was killed just before that
			}
			wantSame(t, e.dir, step.after)
		}
	}
	t.Logf("killed %d times, %d of them half-way", 2*kills, partly)
	if partly == 0 && !strings.Contains(config, "imports") { // else there is one step alone
		t.Error("none of the kills was half-way")
	}
}

func same(a, b map[string]string) bool {
	if len(a) != len(b) {
		return false
	}
	for path, text := range a {
		if got, ok := b[path]; !ok || got != text {
			return false
		}
	}
	return true
}
