// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package verify

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// TestRelease: two copies of the source in different directories give the same bytes, and what
// users get of them works.
func TestRelease(t *testing.T) {
	if testing.Short() {
		t.Skip("NOT TESTED with -short: make release")
	}
	run := func(dir, name string, args ...string) string {
		t.Helper()
		command := exec.Command(name, args...)
		command.Dir = dir
		command.Env = append(os.Environ(), "SOURCE_DATE_EPOCH=1700000000")
		output, err := command.CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v\n%s", name, err, output)
		}
		return string(output)
	}
	var releases []map[string][]byte
	var dir string
	for _, parent := range []string{"one", "another/place"} {
		source := filepath.Join(t.TempDir(), parent)
		if err := os.MkdirAll(source, 0o755); err != nil {
			t.Fatal(err)
		}
		run("../..", "sh", "-c", `tar --exclude=./bin --exclude=./.git --exclude='./integration/tools/bin*' -cf - . | tar -C "$1" -xf -`, "sh", source)
		run(source, "make", "release", "VERSION=v9.8.7")
		dir = filepath.Join(source, "bin", "release")
		release := map[string][]byte{}
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			if release[e.Name()], err = os.ReadFile(filepath.Join(dir, e.Name())); err != nil {
				t.Fatal(err)
			}
		}
		releases = append(releases, release)
	}
	want := []string{
		"SHA256SUMS", "artifact-snapshotter-chart-9.8.7.tgz", "artifact-snapshotter-v9.8.7-image.tar",
		"artifact-snapshotter-v9.8.7-linux-amd64.cdx.json", "artifact-snapshotter-v9.8.7-linux-amd64.tar.gz",
		"artifact-snapshotter-v9.8.7-linux-arm64.cdx.json", "artifact-snapshotter-v9.8.7-linux-arm64.tar.gz",
	}
	for _, name := range want {
		one, other := releases[0][name], releases[1][name]
		if len(one) == 0 || !bytes.Equal(one, other) {
			t.Errorf("%s has %d bytes (%x), and %d (%x) from another directory", name, len(one), sha256.Sum256(one), len(other), sha256.Sum256(other))
		}
	}
	if len(releases[0]) != len(want) {
		t.Errorf("a release has %d files, want %d", len(releases[0]), len(want))
	}
	run(dir, "sha256sum", "--check", "--strict", "SHA256SUMS")
	run(dir, "tar", "-xzf", "artifact-snapshotter-v9.8.7-linux-amd64.tar.gz")
	program := filepath.Join(dir, "artifact-snapshotter-v9.8.7-linux-amd64", "artifact-snapshotter")
	if said := run(dir, program, "version"); !strings.Contains(said, " v9.8.7 ") {
		t.Errorf("the program says %q", said)
	}
	if out, err := exec.Command("file", "-b", program).Output(); err == nil && !bytes.Contains(out, []byte("statically linked")) {
		t.Errorf("the program is no static one: %s", out)
	}
	if bill := releases[0]["artifact-snapshotter-v9.8.7-linux-arm64.cdx.json"]; !bytes.Contains(bill, []byte(`"pkg:golang/github.com/containerd/containerd/v2@`)) {
		t.Errorf("the bill of materials does not have containerd: %.300s", bill)
	}
	output, err := helm(t, "template", filepath.Join(dir, "artifact-snapshotter-chart-9.8.7.tgz"), "--set", "image.repository=registry.example.com/a").Output()
	if err != nil || !strings.Contains(string(output), "image: registry.example.com/a:9.8.7\n") {
		t.Errorf("the chart has another image: %v", err)
	}
	if names := strings.Fields(run(dir, "tar", "-tf", "artifact-snapshotter-v9.8.7-image.tar")); !slices.Contains(names, "image/oci-layout") {
		t.Errorf("the image is %s", fmt.Sprint(names))
	}
}
