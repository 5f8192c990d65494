// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package service

import (
	"strings"
	"testing"
)

func TestValidateNamesEverythingThatIsWrong(t *testing.T) {
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
		"a bad namespace":           {func(c *Config) { c.Namespaces = []string{"a/b"} }, []string{"namespaces", "a/b"}},
		"root is state":             {func(c *Config) { c.State = c.Root + "/" }, []string{"root and state are both"}},
		"root is content root":      {func(c *Config) { c.Root = c.ContentRoot }, []string{"root", "content_root", "within"}},
		"root inside content root":  {func(c *Config) { c.Root = c.ContentRoot + "/x/../blobs" }, []string{"within"}},
		"content root inside root":  {func(c *Config) { c.ContentRoot = c.Root + "/content" }, []string{"within"}},
		"a long containerd address": {func(c *Config) { c.ContainerdAddress = long }, []string{"containerd_address", long, "107"}},
		"everything at once": {
			func(c *Config) { *c = Config{} },
			[]string{"root", "state", "content_root", "containerd_address", "raw_mode", "tar_mode", "decompression_memory"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := Default()
			test.change(&cfg)
			err := cfg.Validate()
			if err == nil {
				t.Fatalf("no error, want one with %q", test.want)
			}
			for _, word := range test.want {
				if !strings.Contains(err.Error(), word) {
					t.Errorf("error %q does not say %q", err, word)
				}
			}
		})
	}
	t.Run("directories with a common prefix in their names are not within each other", func(t *testing.T) {
		cfg := Default()
		cfg.Root = cfg.ContentRoot + "-artifacts"
		if err := cfg.Validate(); err != nil {
			t.Error(err)
		}
	})
	t.Run("the longest path of a socket", func(t *testing.T) {
		cfg := Default()
		cfg.ContainerdAddress = long[:maxSocketPath]
		if err := cfg.Validate(); err != nil {
			t.Error(err)
		}
	})
}
