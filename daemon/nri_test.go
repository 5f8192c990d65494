// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

// On a node with CRI-O there is no containerd, and the runtime may start later.
func TestWithNRIAMissingContainerdIsNotReported(t *testing.T) {
	cfg := testConfig(t)
	if err := os.RemoveAll(cfg.ContentRoot); err != nil {
		t.Fatal(err)
	}
	cfg.NRI.Enabled = true
	cfg.NRI.Socket = filepath.Join(cfg.State, "nri.sock")
	cfg.BlobRoots = []string{filepath.Join(filepath.Dir(cfg.Root), "storage/artifacts")}
	m := newMetrics("")
	s, err := open(t.Context(), cfg, m, hooks{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if isExported(t, m, "containerd_connected") {
		t.Error("the metrics report a containerd")
	}
	l, err := net.Listen("unix", cfg.ContainerdAddress)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for deadline := time.Now().Add(2 * time.Minute); !isExported(t, m, "containerd_connected"); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("a containerd that started later is not watched")
		}
	}
}

func isExported(t *testing.T, m *metrics, name string) bool {
	t.Helper()
	families, err := m.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() == prefix+"_"+name {
			return true
		}
	}
	return false
}

func TestHealthSaysWhetherARuntimeAcceptedThePlugin(t *testing.T) {
	for enabled, is := range map[bool]func(error) bool{true: errdefs.IsUnavailable, false: errdefs.IsNotFound} {
		cfg := testConfig(t)
		cfg.NRI.Enabled = enabled
		cfg.NRI.Socket = filepath.Join(cfg.State, "nri.sock")
		stop := serve(t, cfg)
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
		defer cancel()
		if err := Health(ctx, cfg.SocketAddress()); err != nil {
			t.Error(err)
		}
		if err := HealthOfNRI(ctx, cfg.SocketAddress()); !is(err) {
			t.Errorf("enabled: %v, health: %v", enabled, err)
		}
		if err := stop(); err != nil {
			t.Error(err)
		}
	}
}

// Containers that were created while NRI was enabled still need their volumes.
func TestRecordsOfNRIAreReadWhenItIsDisabled(t *testing.T) {
	cfg := testConfig(t)
	records := filepath.Join(cfg.Root, "nri")
	if err := os.MkdirAll(records, 0o700); err != nil {
		t.Fatal(err)
	}
	torn := filepath.Join(records, "torn.json")
	if err := os.WriteFile(torn, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := open(t.Context(), cfg, newMetrics(""), hooks{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if _, err := os.Stat(torn); !os.IsNotExist(err) {
		t.Error("the records were not read")
	}
}
