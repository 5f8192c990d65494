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

// If it is killed at any time, containerd can start with the files as they are, and the
// next run completes the work.
func TestInstallSurvivesAKill(t *testing.T) {
	t.Parallel()
	t.Run("imports", func(t *testing.T) { killInstalls(t, "version = 3\nroot = '/data'\n") })
	// The folder must never exist without the drop-in, because uninstall could not know who
	// created it.
	t.Run("a folder", func(t *testing.T) {
		killInstalls(t, "version = 3\nimports = ['/etc/containerd/conf.d/*.toml']\n")
	})
}

// killInstalls kills install and uninstall again and again, with this configuration file of
// containerd.
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
	killed, partly := 0, 0
	const kills = 60
	// On a machine that has become busier every kill may be too early, so the delays grow
	// until one is half-way. With imports there is only one step.
	once := strings.Contains(config, "imports")
	for i := 0; i < kills || partly == 0 && !once && i < 10*kills; i++ {
		for _, step := range []struct {
			do    string
			after map[string]string
		}{{"install", installed}, {"uninstall", before}} {
			cmd := e.command(step.do)
			check(t, cmd.Start())
			timer := time.AfterFunc(takes*time.Duration(i%kills)/kills*time.Duration(1+i/kills), func() { _ = cmd.Process.Signal(syscall.SIGKILL) })
			_ = cmd.Wait()
			timer.Stop()
			killed++
			now := files(t, e.dir)
			if !same(now, before) && !same(now, installed) {
				partly++
			}
			if _, ok := now[folder+"/"]; ok && step.do == "install" && now[filepath.Join(folder, "artifact-snapshotter.toml")] == "" {
				t.Error("the folder exists without the drop-in")
			}
			e.dump(t)
			e.run(t, step.do)
			if step.do == "uninstall" {
				_ = os.Remove(folder) // empty, if it was killed just before removing it
			}
			wantSame(t, e.dir, step.after)
		}
	}
	t.Logf("killed %d times, %d times half-way", killed, partly)
	if partly == 0 && !once {
		t.Error("no kill was half-way")
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
