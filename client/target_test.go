// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package client

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestTargetsAreResolved(t *testing.T) {
	dir, err := filepath.EvalSymlinks(t.TempDir())
	must(t, err)
	t.Chdir(dir)
	must(t, os.MkdirAll("real/empty", 0o755))
	must(t, os.Symlink("real", "link"))
	must(t, os.Symlink("nothing", "dangling"))
	for target, want := range map[string]string{
		"real/empty":   "real/empty",
		"link/empty/":  "real/empty",
		"link/new":     "real/new",
		"./link/../x/": "x",
		"dangling":     "dangling",
	} {
		got, err := resolve(target)
		if err != nil || got != filepath.Join(dir, want) {
			t.Errorf("%q is resolved to %q (%v), want %q", target, got, err, want)
		}
	}
	for _, target := range []string{"", "no/new", "dangling/new"} {
		if got, err := resolve(target); err == nil {
			t.Errorf("%q is resolved to %q", target, got)
		}
	}
}

func TestTargetsMustBeEmptyDirectories(t *testing.T) {
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	must(t, os.MkdirAll(path("full/child"), 0o755))
	must(t, os.Mkdir(path("empty"), 0o755))
	must(t, os.WriteFile(path("file"), nil, 0o600))
	must(t, os.Symlink("nothing", path("dangling")))
	for name, want := range map[string]struct {
		made bool
		err  string
	}{
		"new":      {true, ""},
		"empty":    {false, ""},
		"full":     {false, "not empty"},
		"file":     {false, "not a directory"},
		"dangling": {false, "no such file"},
	} {
		made, dir, err := makeTarget(path(name))
		if err == nil {
			if _, _, err := makeTarget(path(name)); !errdefs.IsUnavailable(err) {
				t.Errorf("%s is a target for two: %v", name, err)
			}
			must(t, dir.Close())
		}
		if made != want.made || (err == nil) != (want.err == "") || err != nil && !strings.Contains(err.Error(), want.err) {
			t.Errorf("%s: made %t, %v; want %+v", name, made, err, want)
		}
	}
	if made, _, err := makeTarget("/proc"); made || err == nil || !strings.Contains(err.Error(), "mount point") {
		t.Errorf("/proc: made %t, %v; want that it is a mount point", made, err)
	}
}
