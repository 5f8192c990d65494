// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package service

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"os"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"

	"github.com/artifact-snapshotter/artifact-snapshotter/internal/containerdtest"
	"github.com/artifact-snapshotter/artifact-snapshotter/store"
)

// testConfig returns a configuration without a containerd.
func testConfig(t *testing.T) Config {
	t.Helper()
	cfg := Default()
	cfg.Root, cfg.State, cfg.ContentRoot, cfg.ContainerdAddress = containerdtest.Dirs(t)
	return cfg
}

func open(t *testing.T, cfg Config) *Service {
	t.Helper()
	s, err := Open(t.Context(), cfg, store.Observer{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func TestARootAndAStateDirectoryBelongToOneService(t *testing.T) {
	cfg := testConfig(t)
	first := open(t, cfg)
	for shared, change := range map[string]func(*Config){
		cfg.Root:  func(c *Config) { c.State += "2" },
		cfg.State: func(c *Config) { c.Root += "2" },
	} {
		second := cfg
		change(&second)
		_, err := Open(t.Context(), second, store.Observer{})
		if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), shared) {
			t.Errorf("a second service on %s: %v, want errdefs.ErrFailedPrecondition with the directory", shared, err)
		}
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	open(t, cfg) // the locks have been released
}

func TestAnInvalidConfigurationCreatesNothing(t *testing.T) {
	cfg := testConfig(t)
	cfg.TarMode = "stairs"
	if _, err := Open(t.Context(), cfg, store.Observer{}); err == nil {
		t.Error("no error")
	}
	if _, err := os.Stat(cfg.Root); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the root was created: %v", err)
	}
}

func TestAServiceIsASnapshotterWithCleanup(t *testing.T) {
	s := open(t, testConfig(t))
	s.Start(t.Context(), false)
	ctx := namespaces.WithNamespace(t.Context(), "k8s.io")
	if mounts, err := s.Prepare(ctx, "key", ""); err != nil || len(mounts) != 1 {
		t.Errorf("Prepare: %v, %v; want one mount", mounts, err)
	}
	if err := s.Remove(ctx, "key"); err != nil {
		t.Error(err)
	}
	if err := s.Cleanup(ctx); err != nil {
		t.Error(err)
	}
}

func TestAnOptionalContainerdIsWatchedOnceItsSocketExists(t *testing.T) {
	cfg := testConfig(t)
	s := open(t, cfg)
	started, ended := make(chan struct{}), make(chan struct{})
	s.Start(t.Context(), true, func(ctx context.Context) {
		close(started)
		<-ctx.Done()
		close(ended)
	})
	<-started
	if s.Watcher().Running() {
		t.Error("a containerd without a socket is watched")
	}
	l, err := net.Listen("unix", cfg.ContainerdAddress)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	containerdtest.Eventually(t, "containerd is watched", func() error {
		if !s.Watcher().Running() {
			return errors.New("it is not")
		}
		return nil
	})
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	select {
	case <-ended:
	default:
		t.Error("Close did not wait for the front end")
	}
}
