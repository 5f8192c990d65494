// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package process

import (
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// A program that ends without Release closes the pipe.
func TestAKeeperEndsWhatAProgramLeft(t *testing.T) {
	for name, released := range map[string]bool{"ended": false, "released": true} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "kept")
			if err := os.Mkdir(dir, 0o755); err != nil {
				t.Fatal(err)
			}
			keeper, err := Keep(dir)
			if err != nil {
				t.Fatal(err)
			}
			start := func(dir string) *Process {
				p, err := Start(t.Context(), Options{Name: "sleep", Args: []string{"sleep", "600"}, Env: []string{"LOGS=" + dir + "/logs"}, Log: filepath.Join(t.TempDir(), "log")})
				if err != nil {
					t.Fatal(err)
				}
				return p
			}
			ours, other := start(dir), start(dir+"-not")
			t.Cleanup(func() {
				if err := ours.Stop(syscall.SIGKILL); err != nil {
					t.Error(err)
				}
				if err := other.Stop(syscall.SIGKILL); err != nil {
					t.Error(err)
				}
			})
			if released {
				err = keeper.Release()
			} else if err = keeper.stdin.Close(); err == nil {
				err = keeper.cmd.Wait()
			}
			if err != nil {
				t.Fatal(err)
			}
			if !released {
				select {
				case <-ours.done:
				case <-time.After(time.Minute):
				}
			}
			if ours.Running() != released {
				t.Errorf("released %t: the process runs: %t", released, ours.Running())
			}
			if !other.Running() {
				t.Error("a process of something else has ended")
			}
			if _, err := os.Stat(dir); (err == nil) != released {
				t.Errorf("released %t: the directory: %v", released, err)
			}
		})
	}
}
