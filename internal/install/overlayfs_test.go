// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package install

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/artifact-snapshotter/artifact-snapshotter/daemon"
	"github.com/artifact-snapshotter/artifact-snapshotter/internal/containerdconfig"
	"github.com/artifact-snapshotter/artifact-snapshotter/snapshot"
)

// Install updates, and uninstall removes, what install has written. If anything else is
// between its lines, all of it belongs to an administrator.
func TestOnlyWhatInstallHasWrittenChanges(t *testing.T) {
	volatile, index := snapshot.Overlayfs{MountOptions: []string{"volatile"}}, snapshot.Overlayfs{MountOptions: []string{"index=off"}}
	table, err := containerdconfig.OverlayfsTable(volatile)
	if err != nil {
		t.Fatal(err)
	}
	const own = "log_level = 'debug'\n"
	for name, test := range map[string]struct {
		between string
		stays   bool
	}{
		"what install wrote":       {table, false},
		"by an older version":      {"[overlayfs]\nmount_options = ['volatile']\n", false},
		"a comment":                {"# We need this.\n" + table, true},
		"a comment behind a value": {strings.Replace(table, "\nupperdir", " # our own\nupperdir", 1), true},
		"another table":            {table + "[nri]\nenabled = true\n", true},
		"an unknown key":           {table + "color = 'red'\n", true},
		"invalid TOML":             {table + "[[\n", true},
		"a # in an option":         {strings.Replace(table, "volatile", "a#b", 1), false},
	} {
		t.Run(name, func(t *testing.T) {
			text := own + adoptedBegin + test.between + adoptedEnd + "[nri]\nindex = '10'\n"
			if test.between == table+"[nri]\nenabled = true\n" {
				text = own + adoptedBegin + test.between + adoptedEnd
			}
			path := filepath.Join(t.TempDir(), "config.toml")
			if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			r := &run{Options: Options{Daemon: daemon.Default(), Binary: "/nowhere"}, configFile: path}
			without := string(withoutAdopted([]byte(text)))
			if stays := without == text; stays != test.stays {
				t.Errorf("stays: %t, want %t:\n%s", stays, test.stays, without)
			}
			if !test.stays && strings.Contains(without, "overlayfs") {
				t.Errorf("left is\n%s", without)
			}
			config, err := r.configChange(index)
			switch {
			case test.between == table+"[[\n":
				if err == nil {
					t.Error("invalid TOML is no error")
				}
			case err != nil:
				t.Error(err)
			case test.stays != config.none():
				t.Errorf("stays: %t, want %t:\n%s", config.none(), test.stays, config.after)
			case !test.stays && (strings.Contains(string(config.after), "volatile") || !strings.Contains(string(config.after), "index=off")):
				t.Errorf("it is now\n%s", config.after)
			}
			files, err := r.serviceFiles()
			if err != nil {
				t.Fatal(err)
			}
			for _, file := range files {
				if file.path == path && test.stays {
					t.Errorf("uninstall makes it\n%s", file.after)
				}
			}
		})
	}
}

func TestAnEmptyConfigFileStaysAFile(t *testing.T) {
	table, err := containerdconfig.OverlayfsTable(snapshot.Overlayfs{SyncRemove: true})
	if err != nil {
		t.Fatal(err)
	}
	if without := withoutAdopted([]byte(adoptedBegin + table + adoptedEnd)); without == nil || len(without) > 0 {
		t.Errorf("it is %q, and nil would remove the file", without)
	}
}
