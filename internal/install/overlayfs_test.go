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

// What install has written is kept up to date and taken away. As soon as there is anything
// else between its lines, all of it is an administrator's.
func TestOnlyWhatInstallHasWrittenIsTakenBack(t *testing.T) {
	volatile, index := snapshot.Overlayfs{MountOptions: []string{"volatile"}}, snapshot.Overlayfs{MountOptions: []string{"index=off"}}
	table, err := containerdconfig.OverlayfsTable(volatile)
	if err != nil {
		t.Fatal(err)
	}
	const own = "log_level = 'debug'\n"
	for name, test := range map[string]struct {
		between string
		kept    bool
	}{
		"what install wrote":            {table, false},
		"by an older version":           {"[overlayfs]\nmount_options = ['volatile']\n", false},
		"a comment":                     {"# We need this.\n" + table, true},
		"a comment behind a value":      {strings.Replace(table, "\nupperdir", " # our own\nupperdir", 1), true},
		"another table":                 {table + "[nri]\nenabled = true\n", true},
		"a key that nobody knows":       {table + "color = 'red'\n", true},
		"what is not TOML":              {table + "[[\n", true},
		"a # that is part of an option": {strings.Replace(table, "volatile", "a#b", 1), false},
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
			if kept := without == text; kept != test.kept {
				t.Errorf("kept: %t, want %t:\n%s", kept, test.kept, without)
			}
			if !test.kept && strings.Contains(without, "overlayfs") {
				t.Errorf("left is\n%s", without)
			}
			config, err := r.configChange(index)
			switch {
			case test.between == table+"[[\n":
				if err == nil {
					t.Error("what is not TOML is no error")
				}
			case err != nil:
				t.Error(err)
			case test.kept != config.none():
				t.Errorf("kept: %t, want %t:\n%s", config.none(), test.kept, config.after)
			case !test.kept && (strings.Contains(string(config.after), "volatile") || !strings.Contains(string(config.after), "index=off")):
				t.Errorf("it is now\n%s", config.after)
			}
			files, err := r.serviceFiles()
			if err != nil {
				t.Fatal(err)
			}
			for _, file := range files {
				if file.path == path && test.kept {
					t.Errorf("uninstall makes it\n%s", file.after)
				}
			}
		})
	}
}

func TestAnEmptyFileIsEmptyAgain(t *testing.T) {
	table, err := containerdconfig.OverlayfsTable(snapshot.Overlayfs{SyncRemove: true})
	if err != nil {
		t.Fatal(err)
	}
	if without := withoutAdopted([]byte(adoptedBegin + table + adoptedEnd)); without == nil || len(without) > 0 {
		t.Errorf("it is %q, of which nil is no file", without)
	}
}
