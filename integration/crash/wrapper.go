// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

//go:build amd64

package crash

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Wrapper is a program to start instead of the daemon. It starts the daemon traced; each
// ends when the other one ends.
type Wrapper struct {
	// Path is the wrapper's path.
	Path string
	dir  string
}

// wrapping is the environment variable with the directory of the control files.
const wrapping = "ARTIFACT_SNAPSHOTTER_TEST_WRAP"

// The control files.
const (
	orderFile  = "order"  // the number of an operation; removed when the daemon is armed
	pidFile    = "pid"    // the wrapper's process ID
	killedFile = "killed" // the operation at which the daemon was killed
)

// NewWrapper creates a wrapper for the program in dir.
func NewWrapper(dir, program string) (*Wrapper, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	w := &Wrapper{Path: filepath.Join(dir, "wrapper"), dir: dir}
	script := fmt.Sprintf("#!/bin/sh\nif [ \"$1\" != serve ]; then exec '%s' \"$@\"; fi\n%s='%s' exec '%s' '%s' \"$@\"\n", program, wrapping, dir, self, program)
	return w, os.WriteFile(w.Path, []byte(script), 0o755)
}

// Arm kills the daemon at its nth operation from now.
func (w *Wrapper) Arm(nth int) error {
	order := filepath.Join(w.dir, orderFile)
	text, err := os.ReadFile(filepath.Join(w.dir, pidFile))
	if err != nil {
		return err
	}
	pid, err := strconv.Atoi(string(text))
	if err != nil {
		return err
	}
	if err := errors.Join(os.RemoveAll(filepath.Join(w.dir, killedFile)), os.WriteFile(order, []byte(strconv.Itoa(nth)), 0o600)); err != nil {
		return err
	}
	if err := syscall.Kill(pid, syscall.SIGUSR1); err != nil {
		return err
	}
	for limit := time.Now().Add(2 * time.Minute); time.Now().Before(limit); {
		if _, err := os.Stat(order); errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		time.Sleep(5 * time.Millisecond)
	}
	return errors.New("the wrapper did not read its orders")
}

// Killed returns the operation at which the daemon was killed since Arm, or false.
func (w *Wrapper) Killed() (at string, ok bool) {
	text, err := os.ReadFile(filepath.Join(w.dir, killedFile))
	return string(text), err == nil
}

// wrap is the wrapper's main function.
func wrap(dir string, args []string) error {
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, syscall.SIGUSR1, syscall.SIGTERM, syscall.SIGINT, syscall.SIGQUIT)
	env := slices.DeleteFunc(os.Environ(), func(v string) bool { return strings.HasPrefix(v, wrapping+"=") })
	var dirs []string
	for i, arg := range args {
		if arg == "--root" || arg == "--state" {
			dirs = append(dirs, args[i+1])
		}
	}
	p, err := Program{Args: args, Env: env, Log: os.Stderr, Dirs: dirs}.Start()
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, pidFile), []byte(strconv.Itoa(os.Getpid())), 0o600); err != nil {
		return err
	}
	for {
		select {
		case s := <-signals:
			if s != syscall.SIGUSR1 {
				if err := p.Signal(s.(syscall.Signal)); err != nil {
					return err
				}
				continue
			}
			order := filepath.Join(dir, orderFile)
			text, err := os.ReadFile(order)
			if err != nil {
				return err
			}
			nth, err := strconv.Atoi(string(text))
			if err != nil {
				return err
			}
			p.Arm(&Op{Nth: nth}, false)
			if err := os.Remove(order); err != nil {
				return err
			}
		case <-p.Done():
			if at := p.Killed(); at != nil {
				return os.WriteFile(filepath.Join(dir, killedFile), []byte(at.String()), 0o600)
			}
			if !p.Status().Exited() || p.Status().ExitStatus() != 0 {
				return fmt.Errorf("the daemon ended with %v", p.Status())
			}
			return nil
		}
	}
}
