// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

//go:build amd64

package crash

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// broken is a daemon with a deliberate durability bug.
type broken struct {
	name  string
	edits []edit
	// scenario is where the daemon is killed; "" means a power cut instead.
	scenario string
}

// edit replaces lines of a source file.
type edit struct{ pkg, file, old, new string }

const module = "github.com/artifact-snapshotter/artifact-snapshotter/"

var brokens = []broken{
	{"its database does not sync", []edit{
		{module + "snapshot", "snapshot.go", `storage.NewMetaStore(filepath.Join(root, "metadata.db"))`,
			`storage.NewMetaStore(filepath.Join(root, "metadata.db"), func(o *bbolt.Options) error { o.NoSync = true; return nil })`},
		{module + "snapshot", "snapshot.go", `import (`, "import (\n\t\"go.etcd.io/bbolt\"\n"},
	}, ""},
	{"layers that a snapshot retains are not synced", []edit{
		{module + "unpack/differ", "retained.go", "errors.Join(f.Sync(), f.Close())", "f.Close()"},
	}, ""},
	{"trees survive a reboot", []edit{
		{module + "store", "open.go", "rebooted := !bytes.Equal(boot, last)", "rebooted := !bytes.Equal(boot, last) && len(last) == 0"},
	}, ""},
	{"a tree is published before it is complete", []edit{
		{module + "store", "build.go", "if t, err = build(dir); err != nil {", "dir = s.path(id)\n\tif t, err = build(dir); err != nil {"},
		{module + "store", "build.go", "if err := s.moveToTrash(s.path(id)); err != nil && !errors.Is(err, os.ErrNotExist) {", "if err := error(nil); err != nil && !errors.Is(err, os.ErrNotExist) {"},
		{module + "store", "build.go", "if err := t.Rename(s.path(id)); err != nil {", "if err := error(nil); err != nil {"},
		{module + "unpack", "unpack.go", "if err := guard(build); err != nil {", "t.Image, t.Redirects = true, true\n\tif err := errors.Join(t.save(), guard(build)); err != nil {"},
	}, "mount tar+gzip"},
	{"shared blobs are never removed", []edit{
		{module + "store", "gc.go", "return linkCount(p) == 1", "return false && linkCount(p) == 1"},
	}, "unmount one that shares a compressed layer, and delete it"},
	{"mounts below trees stay after a crash", []edit{
		{module + "store", "open.go", "mount.UnmountRecursive(s.trees, unix.MNT_DETACH); err != nil", "error(nil); err != nil"},
	}, "start after a kill in the middle of a mount"},
}

// build builds the daemon with the edits.
func (b broken) build(dir string) (program string, err error) {
	var overlay struct{ Replace map[string]string }
	overlay.Replace = map[string]string{}
	for _, e := range b.edits {
		out, err := exec.Command("go", "list", "-f", "{{.Dir}}", e.pkg).Output()
		if err != nil {
			return "", fmt.Errorf("go list %s: %w", e.pkg, err)
		}
		file := filepath.Join(strings.TrimSpace(string(out)), e.file)
		edited, again := overlay.Replace[file]
		if !again {
			edited = filepath.Join(dir, fmt.Sprint(len(overlay.Replace), ".go"))
			overlay.Replace[file] = edited
		}
		from := file
		if again {
			from = edited
		}
		text, err := os.ReadFile(from)
		if err != nil {
			return "", err
		}
		if !bytes.Contains(text, []byte(e.old)) {
			return "", fmt.Errorf("%q was not found in %s", e.old, file)
		}
		if err := os.WriteFile(edited, bytes.ReplaceAll(text, []byte(e.old), []byte(e.new)), 0o644); err != nil {
			return "", err
		}
	}
	text, err := json.Marshal(overlay)
	if err != nil {
		return "", err
	}
	program = filepath.Join(dir, "artifact-snapshotter")
	if err := os.WriteFile(filepath.Join(dir, "overlay.json"), text, 0o644); err != nil {
		return "", err
	}
	build := exec.Command("go", "build", "-overlay", filepath.Join(dir, "overlay.json"), "-o", program, module+"cmd/artifact-snapshotter")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build: %w\n%s", err, out)
	}
	return program, nil
}

func TestTheCrashTestsDetectABrokenDaemon(t *testing.T) {
	if !long {
		t.Skip("set ARTIFACT_SNAPSHOTTER_LONG to build broken daemons")
	}
	containerd, m := startContainerd(t), packModels(t)
	for _, b := range brokens {
		t.Run(b.name, func(t *testing.T) {
			program, err := b.build(t.TempDir())
			check(t, err)
			lost := campaign{shortDir(t), program, containerd}.losses(t, b.scenario, m)
			if len(lost) == 0 {
				t.Fatal("no test noticed it")
			}
			first, _, _ := strings.Cut(lost[0].Error(), "\n")
			t.Logf("noticed in %d runs: %s", len(lost), first)
		})
	}
}

// losses returns the failures in a selection of crashes of this daemon, which works without
// crashes.
func (c campaign) losses(t *testing.T, name string, m *models) []error {
	t.Helper()
	all := scenarios(m)
	_, err := c.listed(all[:1])
	check(t, err)
	if name == "" {
		done, err := c.powerCut(m, 40)
		check(t, err)
		return done.lost
	}
	i := slices.IndexFunc(all, func(s *scenario) bool { return s.name == name })
	points, err := c.listed(all[i : i+1])
	if err != nil { // one of the earlier steps crashes
		return []error{err}
	}
	return c.killed(choose(all[i:i+1], points)).lost
}
