// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package node

import (
	"archive/tar"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
)

// Guest is the path of the test image's only program; see integration/guest
// for what it does.
const Guest = "/guest"

// findTools returns the directory of containerd and the other tools.
func findTools() (string, error) {
	dir := os.Getenv("ARTIFACT_SNAPSHOTTER_TOOLS")
	if dir == "" {
		repository, err := findRepository()
		if err != nil {
			return "", err
		}
		dir = filepath.Join(repository, "integration", "tools", "bin")
	}
	for _, tool := range []string{"containerd", "containerd-shim-runc-v2", "runc", "crictl", "ctr", "registry"} {
		if _, err := os.Stat(filepath.Join(dir, tool)); err != nil {
			return "", fmt.Errorf("the test tool %s is missing: run `make tools`, or set ARTIFACT_SNAPSHOTTER_TOOLS to the directory that has it: %w", tool, err)
		}
	}
	return filepath.Abs(dir)
}

// findDaemon returns the path of the daemon's binary.
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

// findRepository looks from this source file, or from the working directory if
// the source is not where it was compiled, for the directory of go.mod.
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

// pushGuest builds the guest and pushes it as the test image.
func (n *Node) pushGuest() error {
	repository, err := findRepository()
	if err != nil {
		return err
	}
	build := exec.CommandContext(n.ctx, "go", "build", "-trimpath", "-ldflags=-s -w", "-o", n.path("guest"), "./integration/guest")
	build.Dir = repository
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("go build ./integration/guest: %w\n%s", err, out)
	}
	program, err := os.ReadFile(n.path("guest"))
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
	_, err = image.Push(n.ctx, n.Registry, "test/guest", "latest")
	return err
}
