// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package plugin

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

func TestLoad(t *testing.T) {
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
		"the default file says the defaults": {DefaultFile, Default()},
		"an empty file":                      {"", Default()},
		"a table leaves its other keys":      {"[nri]\nenabled = true\n", plugged},
		"a key replaces its default":         {"state = '/run/other'\nnamespaces = ['a', 'b']", changed},
		"an empty list is empty":             {"namespaces = []", none},
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

// The default file is there to be read: it must say every key.
func TestDefaultFileHasEveryKey(t *testing.T) {
	top, tables, _ := strings.Cut(DefaultFile, "\n[overlayfs]\n")
	overlayfs, nri, _ := strings.Cut(tables, "\n[nri]\n")
	for _, table := range []struct {
		config reflect.Type
		file   string
	}{{reflect.TypeFor[Config](), top}, {reflect.TypeFor[Overlayfs](), "\n" + overlayfs}, {reflect.TypeFor[NRI](), "\n" + nri}} {
		for i := range table.config.NumField() {
			key, _, _ := strings.Cut(table.config.Field(i).Tag.Get("toml"), ",")
			kind := table.config.Field(i).Type.Kind() // an interface takes what is refused
			if !strings.Contains(table.file, "\n"+key+" = ") && kind != reflect.Struct && kind != reflect.Interface {
				t.Errorf("the default file has no %s", key)
			}
		}
	}
}

func TestLoadRefuses(t *testing.T) {
	for name, test := range map[string]struct {
		file string
		want []string
	}{
		"every unknown key, with its line": {
			"root = '/r'\nrooot = '/r'\n\n[other]\nkey = 1\n",
			[]string{"rooot (line 2)", "other", "line 4"},
		},
		"a wrong type":      {"root = '/r'\nstate = 7\n", []string{"line 2", "State", "string"}},
		"what is not TOML":  {"root = '/r'\nstate\n", []string{"line 2"}},
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

func TestValidate(t *testing.T) {
	if err := Default().Validate(); err != nil {
		t.Errorf("the defaults: %v", err)
	}
	long := "/" + strings.Repeat("s", maxSocketPath)
	for name, test := range map[string]struct {
		change func(*Config)
		want   []string
	}{
		"a relative root":           {func(c *Config) { c.Root = "r" }, []string{"root", `"r"`, "absolute"}},
		"an empty state":            {func(c *Config) { c.State = "" }, []string{"state", "absolute"}},
		"a relative content root":   {func(c *Config) { c.ContentRoot = "./c" }, []string{"content_root", "absolute"}},
		"a relative address":        {func(c *Config) { c.Address = "a.sock" }, []string{"address", "absolute"}},
		"a relative containerd":     {func(c *Config) { c.ContainerdAddress = "" }, []string{"containerd_address", "absolute"}},
		"an unknown mode":           {func(c *Config) { c.RawMode = "stairs" }, []string{"raw_mode", `"stairs"`, "auto", "overlay", "link", "copy"}},
		"a mode of raw layers":      {func(c *Config) { c.TarMode = "overlay" }, []string{"tar_mode", `"overlay"`, "auto", "erofs", "extract"}},
		"an empty mode":             {func(c *Config) { c.RawMode = "" }, []string{"raw_mode", "auto"}},
		"no memory":                 {func(c *Config) { c.DecompressionMemory = 0 }, []string{"decompression_memory 0"}},
		"memory beyond counting":    {func(c *Config) { c.DecompressionMemory = 1 << 50 }, []string{"decompression_memory"}},
		"a layer that must shrink":  {func(c *Config) { c.MaxExpansion = 0 }, []string{"max_expansion 0"}},
		"all space in reserve":      {func(c *Config) { c.ReservedSpace = 100 }, []string{"reserved_space 100"}},
		"a relative blob root":      {func(c *Config) { c.BlobRoots = []string{"/ok", "b"} }, []string{"blob_roots", `"b"`, "absolute"}},
		"a blob root inside root":   {func(c *Config) { c.BlobRoots = []string{c.Root + "/x"} }, []string{"blob_roots", "within"}},
		"a relative NRI socket":     {func(c *Config) { c.NRI.Socket = "nri.sock" }, []string{"nri.socket", "absolute"}},
		"a short NRI index":         {func(c *Config) { c.NRI.Index = "5" }, []string{"nri.index", "two digits"}},
		"an NRI name with a space":  {func(c *Config) { c.NRI.Name = "a b" }, []string{"nri.name"}},
		"an unknown way out":        {func(c *Config) { c.NRI.OnError = "ignore" }, []string{"nri.on_error", `"fail"`, `"passthrough"`}},
		"an unknown log level":      {func(c *Config) { c.LogLevel = "loud" }, []string{`"loud"`, "debug"}},
		"a bad namespace":           {func(c *Config) { c.Namespaces = []string{"a/b"} }, []string{"namespaces", "a/b"}},
		"root is content root":      {func(c *Config) { c.Root = c.ContentRoot }, []string{"root", "content_root", "within"}},
		"root inside content root":  {func(c *Config) { c.Root = c.ContentRoot + "/x/../blobs" }, []string{"within"}},
		"content root inside root":  {func(c *Config) { c.ContentRoot = c.Root + "/content" }, []string{"within"}},
		"a long address":            {func(c *Config) { c.Address = long }, []string{long, "108", "107"}},
		"a long state, no address":  {func(c *Config) { c.State = long }, []string{long + "/artifact-snapshotter.sock", "107"}},
		"a long containerd address": {func(c *Config) { c.ContainerdAddress = long }, []string{"containerd_address", long, "107"}},
		"everything at once": {
			func(c *Config) { *c = Config{} },
			[]string{"root", "state", "content_root", "containerd_address", "raw_mode", "tar_mode", "decompression_memory", "log_level"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := Default()
			test.change(&cfg)
			wantError(t, cfg.Validate(), test.want...)
		})
	}
	t.Run("neighbours are not within each other", func(t *testing.T) {
		cfg := Default()
		cfg.Root = cfg.ContentRoot + "-artifacts"
		if err := cfg.Validate(); err != nil {
			t.Error(err)
		}
	})
	t.Run("the longest address", func(t *testing.T) {
		cfg := Default()
		cfg.Address = long[:maxSocketPath]
		if err := cfg.Validate(); err != nil {
			t.Error(err)
		}
	})
}

func write(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "config.toml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// wantError fails the test unless err says all of the words.
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
