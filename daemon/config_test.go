// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/pelletier/go-toml/v2"
)

func TestLoadFillsInTheDefaults(t *testing.T) {
	changed := Default()
	changed.State = "/run/other"
	changed.Namespaces = []string{"a", "b"}
	plugged := Default()
	plugged.NRI.Enabled = true
	none := Default()
	none.Namespaces = []string{}
	for name, test := range map[string]struct {
		file string
		want Config
	}{
		"the default file":            {DefaultFile, Default()},
		"an empty file":               {"", Default()},
		"a key of a table":            {"[nri]\nenabled = true\n", plugged},
		"keys replace their defaults": {"state = '/run/other'\nnamespaces = ['a', 'b']", changed},
		"an empty list":               {"namespaces = []", none},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := Load(write(t, test.file))
			if err != nil {
				t.Fatal(err)
			}
			if !reflect.DeepEqual(got, test.want) {
				t.Errorf("got  %+v\nwant %+v", got, test.want)
			}
		})
	}
}

// The default file documents the configuration, so it must have every key.
func TestDefaultFileHasEveryKeyWithItsDefault(t *testing.T) {
	text, err := toml.Marshal(Default())
	if err != nil {
		t.Fatal(err)
	}
	var file, config map[string]any
	if err := errors.Join(toml.Unmarshal([]byte(DefaultFile), &file), toml.Unmarshal(text, &config)); err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(file, config) {
		t.Errorf("default.toml has  %v\nthe defaults are %v", file, config)
	}
}

func TestLoadRefusesWhatItCannotRead(t *testing.T) {
	for name, test := range map[string]struct {
		file string
		want []string
	}{
		"every unknown key, with its line": {
			"root = '/r'\nrooot = '/r'\n\n[other]\nkey = 1\n",
			[]string{"rooot (line 2)", "other", "line 4"},
		},
		"a wrong type":      {"root = '/r'\nstate = 7\n", []string{"line 2", "State", "string"}},
		"invalid TOML":      {"root = '/r'\nstate\n", []string{"line 2"}},
		"a key given twice": {"root = '/r'\nroot = '/s'\n", []string{"line 2", "root"}},
	} {
		t.Run(name, func(t *testing.T) {
			path := write(t, test.file)
			_, err := Load(path)
			wantError(t, err, append(test.want, path)...)
			if strings.Contains(err.Error(), "\n") {
				t.Errorf("the error has several lines: %q", err)
			}
		})
	}
	t.Run("a missing file", func(t *testing.T) {
		if _, err := Load(filepath.Join(t.TempDir(), "none")); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("got %v, want fs.ErrNotExist", err)
		}
	})
}

func TestValidateNamesEverythingThatIsWrong(t *testing.T) {
	if err := Default().Validate(); err != nil {
		t.Errorf("the defaults: %v", err)
	}
	long := "/" + strings.Repeat("s", 107)
	for name, test := range map[string]struct {
		change func(*Config)
		want   []string
	}{
		"a relative address":       {func(c *Config) { c.Address = "a.sock" }, []string{"address", "absolute"}},
		"a relative NRI socket":    {func(c *Config) { c.NRI.Socket = "nri.sock" }, []string{"nri.socket", "absolute"}},
		"a short NRI index":        {func(c *Config) { c.NRI.Index = "5" }, []string{"nri.index", "two digits"}},
		"an NRI name with a space": {func(c *Config) { c.NRI.Name = "a b" }, []string{"nri.name"}},
		"an unknown on_error":      {func(c *Config) { c.NRI.OnError = "ignore" }, []string{"nri.on_error", `"fail"`, `"passthrough"`}},
		"an unknown log level":     {func(c *Config) { c.LogLevel = "loud" }, []string{`"loud"`, "debug"}},
		"a long address":           {func(c *Config) { c.Address = long }, []string{long, "108", "107"}},
		"a long state, no address": {func(c *Config) { c.State = long }, []string{long + "/artifact-snapshotter.sock", "107"}},
		"a relative kubelet_root":  {func(c *Config) { c.CSI.KubeletRoot = "kubelet" }, []string{"csi.kubelet_root", "absolute"}},
		"a long kubelet_root":      {func(c *Config) { c.CSI.KubeletRoot = long }, []string{"csi.kubelet_root", "107"}},
		"a relative hosts_dir":     {func(c *Config) { c.CSI.HostsDir = "certs.d" }, []string{"csi.hosts_dir", "absolute"}},
		"no downloads":             {func(c *Config) { c.CSI.Downloads = 0 }, []string{"csi.downloads 0", "64"}},
		"too many connections":     {func(c *Config) { c.CSI.Connections = 1000 }, []string{"csi.connections 1000", "256"}},
		"no time for a stall":      {func(c *Config) { c.CSI.StallTimeout = -1 }, []string{"csi.stall_timeout -1"}},
		"gc_low over gc_high":      {func(c *Config) { c.CSI.GCLow = 90 }, []string{"csi.gc_low 90", "csi.gc_high 85"}},
		"an age without a unit":    {func(c *Config) { c.CSI.GCMaxAge = "30" }, []string{"csi.gc_max_age", "720h"}},
		"everything at once": {
			func(c *Config) { *c = Config{} },
			[]string{"root", "raw_mode", "address", "nri.socket", "log_level", "csi.kubelet_root", "csi.pull_memory"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := Default()
			test.change(&cfg)
			wantError(t, cfg.Validate(), test.want...)
		})
	}
}

func write(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "config.toml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// wantError fails the test unless the error has all of the words.
func wantError(t *testing.T, err error, words ...string) {
	t.Helper()
	if err == nil {
		t.Fatalf("no error, want one with %q", words)
	}
	for _, word := range words {
		if !strings.Contains(err.Error(), word) {
			t.Errorf("error %q does not say %q", err, word)
		}
	}
}
