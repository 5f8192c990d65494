// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/internal/containerdtest"
	"github.com/artifact-snapshotter/artifact-snapshotter/service"
)

// testConfig returns a configuration without a containerd.
func testConfig(t *testing.T) Config {
	t.Helper()
	cfg := Default()
	cfg.Root, cfg.State, cfg.ContentRoot, cfg.ContainerdAddress = containerdtest.Dirs(t)
	return cfg
}

// serve runs Serve until stop is called, and stop returns what Serve returned.
func serve(t *testing.T, cfg Config) (stop func() error) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	result := make(chan error, 1)
	go func() { result <- Serve(ctx, cfg, "v0") }()
	ended := false
	stop = func() error {
		cancel()
		if ended {
			return nil
		}
		ended = true
		select {
		case err := <-result:
			return err
		case <-time.After(2 * stopTimeout):
			return errors.New("Serve does not return")
		}
	}
	t.Cleanup(func() {
		if err := stop(); err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	containerdtest.Eventually(t, "the server answers", func() error {
		conn, err := net.Dial("unix", cfg.SocketAddress())
		if err != nil {
			return err
		}
		return conn.Close()
	})
	return stop
}

func TestServeCreatesServesAndCleansUp(t *testing.T) {
	cfg := testConfig(t)
	stop := serve(t, cfg)

	info, err := os.Stat(cfg.SocketAddress())
	if err != nil {
		t.Fatal(err)
	}
	if got, want := info.Mode(), fs.ModeSocket|0o600; got != want {
		t.Errorf("the socket is %v, want %v", got, want)
	}
	for _, dir := range []string{cfg.Root, cfg.State} {
		info, err := os.Stat(dir)
		if err != nil {
			t.Fatal(err)
		}
		if got := info.Mode().Perm(); got != service.DirMode {
			t.Errorf("%s is %v, want %v", dir, got, fs.FileMode(service.DirMode))
		}
	}

	ctx := namespaces.WithNamespace(t.Context(), "k8s.io")
	snapshotter := containerdtest.DialSnapshotter(t, cfg.SocketAddress())
	mounts, err := snapshotter.Prepare(ctx, "key", "")
	if err != nil || len(mounts) != 1 {
		t.Fatalf("Prepare: %v, %v; want one mount", mounts, err)
	}
	if _, err := snapshotter.Stat(ctx, "none"); !errdefs.IsNotFound(err) {
		t.Errorf("Stat of a missing snapshot: %v, want errdefs.ErrNotFound", err)
	}
	if err := snapshotter.Remove(ctx, "key"); err != nil {
		t.Errorf("Remove: %v", err)
	}
	if err := snapshotter.(snapshots.Cleaner).Cleanup(ctx); err != nil {
		t.Errorf("Cleanup: %v", err)
	}

	if err := stop(); err != nil {
		t.Errorf("Serve: %v", err)
	}
	if _, err := os.Lstat(cfg.SocketAddress()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("after the end the socket is still there: %v", err)
	}
	// The lock of the root has been released.
	if err := serve(t, cfg)(); err != nil {
		t.Errorf("Serve again: %v", err)
	}
}

func TestSystemdIsToldWhenTheDaemonIsReadyAndStops(t *testing.T) {
	path := filepath.Join(t.TempDir(), "notify.sock")
	socket, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	t.Setenv("NOTIFY_SOCKET", path)
	if err := socket.SetReadDeadline(time.Now().Add(30 * time.Second)); err != nil {
		t.Fatal(err)
	}
	want := func(state string) {
		t.Helper()
		message := make([]byte, 64)
		n, err := socket.Read(message)
		if err != nil || string(message[:n]) != state {
			t.Errorf("systemd is told %q, %v; want %q", message[:n], err, state)
		}
	}
	stop := serve(t, testConfig(t))
	want("READY=1")
	if err := stop(); err != nil {
		t.Error(err)
	}
	want("STOPPING=1")
}

func TestASecondDaemonOnTheAddressIsRefused(t *testing.T) {
	cfg := testConfig(t)
	serve(t, cfg)
	second := testConfig(t)
	second.Address = cfg.SocketAddress()
	err := Serve(t.Context(), second, "v0")
	if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), second.Address) {
		t.Errorf("a second server on one address: %v, want errdefs.ErrFailedPrecondition with the address", err)
	}
	ctx := namespaces.WithNamespace(t.Context(), "k8s.io")
	if _, err := containerdtest.DialSnapshotter(t, cfg.SocketAddress()).Prepare(ctx, "key", ""); err != nil {
		t.Errorf("the first server does not answer any more: %v", err)
	}
}

func TestTheSocketOfAKilledDaemonIsReplaced(t *testing.T) {
	cfg := testConfig(t)
	if err := os.MkdirAll(cfg.State, 0o711); err != nil {
		t.Fatal(err)
	}
	// A killed server leaves a bound socket on which no process listens.
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: cfg.SocketAddress()}); err != nil {
		t.Fatal(err)
	}
	serve(t, cfg)
}

func TestAFileAtTheAddressIsNotReplaced(t *testing.T) {
	cfg := testConfig(t)
	cfg.Address = filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(cfg.Address, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Serve(t.Context(), cfg, "v0"); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), cfg.Address) {
		t.Errorf("a file at the address: %v, want errdefs.ErrFailedPrecondition with the address", err)
	}
	if text, err := os.ReadFile(cfg.Address); err != nil || string(text) != "precious" {
		t.Errorf("the file reads %q, %v", text, err)
	}
}

func TestAnInvalidConfigurationCreatesNothing(t *testing.T) {
	cfg := testConfig(t)
	cfg.RawMode = "stairs"
	wantError(t, Serve(t.Context(), cfg, "v0"), "stairs")
	if _, err := os.Stat(cfg.Root); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the root was created: %v", err)
	}
}
