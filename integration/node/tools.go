// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package node

import (
	"archive/tar"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
)

// Guest is the path of the test image's only program; see integration/guest.
const Guest = "/guest"

// findTools returns the directories of the tools and of containerd, ctr and the shim,
// which ARTIFACT_SNAPSHOTTER_CONTAINERD overrides.
func findTools() (tools, containerd string, err error) {
	dir := os.Getenv("ARTIFACT_SNAPSHOTTER_TOOLS")
	if dir == "" {
		repository, err := findRepository()
		if err != nil {
			return "", "", err
		}
		dir = filepath.Join(repository, "integration", "tools", "bin")
	}
	if tools, err = filepath.Abs(dir); err != nil {
		return "", "", err
	}
	if containerd, err = filepath.Abs(cmp.Or(os.Getenv("ARTIFACT_SNAPSHOTTER_CONTAINERD"), tools)); err != nil {
		return "", "", err
	}
	for _, tool := range []string{
		filepath.Join(containerd, "containerd"), filepath.Join(containerd, "containerd-shim-runc-v2"), filepath.Join(containerd, "ctr"),
		filepath.Join(tools, "runc"), filepath.Join(tools, "crictl"), filepath.Join(tools, "registry"),
	} {
		if _, err := os.Stat(tool); err != nil {
			return "", "", fmt.Errorf("a test tool is missing: run `make tools`, or set ARTIFACT_SNAPSHOTTER_TOOLS to the directory that has it: %w", err)
		}
	}
	return tools, containerd, nil
}

// Minor returns the minor version of the nodes' containerd, 2.Minor.
func Minor() (minor int, err error) {
	_, dir, err := findTools()
	if err != nil {
		return 0, err
	}
	out, err := exec.Command(filepath.Join(dir, "containerd"), "--version").Output()
	if err != nil {
		return 0, fmt.Errorf("containerd --version: %w", err)
	}
	// "containerd github.com/containerd/containerd/v2 2.4.2+unknown"
	fields := append(strings.Fields(string(out)), "", "", "")
	if _, err := fmt.Sscanf(strings.TrimPrefix(fields[2], "v"), "2.%d.", &minor); err != nil {
		return 0, fmt.Errorf("unexpected version of containerd: %q: %w", out, err)
	}
	return minor, nil
}

// findDaemon returns the path of the daemon's program.
func findDaemon() (string, error) {
	bin := os.Getenv("ARTIFACT_SNAPSHOTTER_BIN")
	if bin == "" {
		repository, err := findRepository()
		if err != nil {
			return "", err
		}
		bin = filepath.Join(repository, "bin", "artifact-snapshotter")
	}
	if _, err := os.Stat(bin); err != nil {
		return "", fmt.Errorf("artifact-snapshotter is missing: run `make build`, or set ARTIFACT_SNAPSHOTTER_BIN to its path: %w", err)
	}
	return filepath.Abs(bin)
}

// findRepository searches upwards for go.mod, from this source file or, if the sources have
// moved, from the working directory.
func findRepository() (string, error) {
	_, source, _, _ := runtime.Caller(0)
	wd, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for _, start := range []string{filepath.Dir(source), wd} {
		for dir := start; filepath.IsAbs(dir) && dir != "/"; dir = filepath.Dir(dir) {
			text, err := os.ReadFile(filepath.Join(dir, "go.mod"))
			if err == nil && strings.HasPrefix(string(text), "module github.com/artifact-snapshotter/artifact-snapshotter\n") {
				return dir, nil
			}
		}
	}
	return "", errors.New("the repository was not found: run this inside it, or set ARTIFACT_SNAPSHOTTER_TOOLS and ARTIFACT_SNAPSHOTTER_BIN")
}

// daemonBinary returns the path of the daemon's program. With RaceDaemon it builds it if the
// source has changed.
func (n *Node) daemonBinary() (string, error) {
	if !n.options.RaceDaemon {
		return findDaemon()
	}
	repository, err := findRepository()
	if err != nil {
		return "", err
	}
	// go build does not link a program again that is up to date.
	bin := filepath.Join(repository, "bin", "artifact-snapshotter-race")
	build := exec.CommandContext(n.ctx, "go", "build", "-race", "-o", bin, "./cmd/artifact-snapshotter")
	build.Dir = repository
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%s: %w\n%s", build, err, out)
	}
	return bin, nil
}

// GuestProgram returns the guest program. It is one of the tools where Go is not installed, and
// is built once for all nodes of the process otherwise.
func (n *Node) GuestProgram() ([]byte, error) { return guestProgram(n.tools) }

func guestProgram(tools string) ([]byte, error) {
	program, err := os.ReadFile(filepath.Join(tools, "guest"))
	if !errors.Is(err, os.ErrNotExist) {
		return program, err
	}
	return builtGuest()
}

var builtGuest = sync.OnceValues(func() ([]byte, error) {
	dir, err := os.MkdirTemp("", "guest-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	program := filepath.Join(dir, "guest")
	if err := BuildGuest(context.Background(), program); err != nil {
		return nil, err
	}
	return os.ReadFile(program)
})

// BuildGuest builds the guest program.
func BuildGuest(ctx context.Context, path string) error {
	repository, err := findRepository()
	if err != nil {
		return err
	}
	build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags=-s -w", "-o", path, "./integration/guest")
	build.Dir = repository
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("go build ./integration/guest: %w\n%s", err, out)
	}
	return nil
}

// guestName is the test image's name in a registry.
const guestName = "test/guest:latest"

// PushGuest pushes the test image, which has only the guest program, to the registry at host.
func PushGuest(ctx context.Context, host string) error {
	tools, _, err := findTools()
	if err != nil {
		return err
	}
	program, err := guestProgram(tools)
	if err != nil {
		return err
	}
	layer, err := pack.TarOf(pack.Member{Header: tar.Header{Name: "guest", Mode: 0o755}, Data: program})
	if err != nil {
		return err
	}
	image, err := pack.Image(ocispec.ImageConfig{Entrypoint: []string{Guest}, Cmd: []string{"pause"}}, false, layer)
	if err != nil {
		return err
	}
	repository, tag, _ := strings.Cut(guestName, ":")
	_, err = image.Push(ctx, host, repository, tag)
	return err
}

// Tools is the directory of the test tools.
func Tools() (string, error) {
	tools, _, err := findTools()
	return tools, err
}

// Repository is the root directory of this repository.
func Repository() (string, error) { return findRepository() }

// Program returns the path of the program under test.
func Program() (string, error) { return findDaemon() }

// Containerd returns the path of the nodes' containerd.
func Containerd() (string, error) {
	_, containerd, err := findTools()
	return filepath.Join(containerd, "containerd"), err
}
