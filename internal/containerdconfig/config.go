// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

// Package containerdconfig reads containerd's configuration as containerd itself does, and
// knows what the snapshotter needs of it: what to write, and into which file. It writes no
// file and gives no advice; packages install and doctor do.
package containerdconfig

import (
	"cmp"
	"context"
	"fmt"
	"iter"
	"maps"
	"path/filepath"
	"slices"
	"strings"

	introspection "github.com/containerd/containerd/api/services/introspection/v1"
	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/cmd/containerd/server/config"
	"github.com/containerd/containerd/v2/defaults"
	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/containerd/v2/version"
	"github.com/containerd/platforms"
	containerdplugin "github.com/containerd/plugin"
	"github.com/pelletier/go-toml/v2"

	"github.com/artifact-snapshotter/artifact-snapshotter/snapshot"
)

// The names of the daemon's proxy plugins in containerd.
const (
	Snapshotter = "artifact"
	Differ      = "artifact-diff"
)

// The plugins of containerd whose configuration matters.
const (
	CRIImages  = "io.containerd.cri.v1.images"
	CRIRuntime = "io.containerd.cri.v1.runtime"
	// CRIVersion2 is the plugin that configuration version 2 used for both.
	CRIVersion2 = "io.containerd.grpc.v1.cri"
	Transfer    = "io.containerd.transfer.v1.local"
	overlayfs   = "io.containerd.snapshotter.v1.overlayfs"
)

// Config is the part of containerd's configuration that concerns snapshotters.
type Config struct {
	// ContentRoot is where containerd has its blobs, unless it is started with --root.
	ContentRoot string
	// Proxies are the proxy plugins by name.
	Proxies map[string]config.ProxyPlugin
	// NodeSnapshotter serves the pods whose runtime handler names no snapshotter.
	NodeSnapshotter string
	// DefaultHandler is the runtime handler of pods without a RuntimeClass.
	DefaultHandler string
	// Runtimes are the tables of the runtime handlers, as they are written.
	Runtimes map[string]any
	// Overlayfs has the options of containerd's own snapshotter.
	Overlayfs snapshot.Overlayfs
	// Unpack is unpack_config; containerd's default if the files have none.
	Unpack []UnpackEntry

	checkPlatform bool
	// snapshotters are those that runtime handlers name.
	snapshotters map[string]string
	// written is Unpack as it is written, nil if the files have none.
	written []any
}

// UnpackEntry is an entry of unpack_config.
type UnpackEntry struct {
	Platform    string `toml:"platform"`
	Snapshotter string `toml:"snapshotter"`
	Differ      string `toml:"differ"`
	ConfigType  string `toml:"config_type"`
	Optional    bool   `toml:"optional"`
}

// Read reads files and what they import with containerd's own code. The second file is
// read as if the first imported it last. No files give containerd's default.
func Read(ctx context.Context, paths ...string) (*Config, error) {
	loaded := config.Config{Version: version.ConfigVersion}
	migrations := func() iter.Seq[containerdplugin.Registration] {
		return slices.Values([]containerdplugin.Registration{{ConfigMigration: migrateCRI}})
	}
	for _, path := range paths {
		if err := config.LoadConfigWithPlugins(ctx, path, migrations, &loaded); err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
	}
	var images struct {
		Snapshotter string `toml:"snapshotter"`
	}
	var runtime struct {
		Containerd struct {
			Default  string `toml:"default_runtime_name"`
			Runtimes map[string]struct {
				Snapshotter string `toml:"snapshotter"`
			} `toml:"runtimes"`
		} `toml:"containerd"`
	}
	var unpack struct {
		CheckPlatform bool          `toml:"check_platform_supported"`
		Unpack        []UnpackEntry `toml:"unpack_config"`
	}
	var own struct {
		snapshot.Overlayfs
		Root string `toml:"root_path"`
	}
	for id, into := range map[string]any{CRIImages: &images, CRIRuntime: &runtime, Transfer: &unpack, overlayfs: &own} {
		if _, err := loaded.Decode(ctx, id, into); err != nil {
			return nil, fmt.Errorf("%s: %s: %w", strings.Join(paths, ", "), id, err)
		}
	}
	read := &Config{
		ContentRoot:     filepath.Join(cmp.Or(loaded.Root, defaults.DefaultRootDir), string(plugins.ContentPlugin)+".content"),
		Proxies:         loaded.ProxyPlugins,
		NodeSnapshotter: images.Snapshotter,
		DefaultHandler:  runtime.Containerd.Default,
		Overlayfs:       own.Overlayfs,
		Unpack:          unpack.Unpack,
		checkPlatform:   unpack.CheckPlatform,
		snapshotters:    map[string]string{},
	}
	if read.NodeSnapshotter == "" {
		read.NodeSnapshotter = defaults.DefaultSnapshotter
	}
	if read.DefaultHandler == "" {
		read.DefaultHandler = "runc" // DefaultRuntimeConfig in internal/cri/config
	}
	if read.Unpack == nil { // defaultUnpackConfig in plugins/transfer
		read.Unpack = []UnpackEntry{{Platform: platforms.DefaultString(), Snapshotter: defaults.DefaultSnapshotter, Differ: defaults.DefaultDiffer}}
	}
	for handler, options := range runtime.Containerd.Runtimes {
		read.snapshotters[handler] = options.Snapshotter
	}
	cri, _ := loaded.Plugins[CRIRuntime].(map[string]any)
	handlers, _ := cri["containerd"].(map[string]any)
	read.Runtimes, _ = handlers["runtimes"].(map[string]any)
	transfer, _ := loaded.Plugins[Transfer].(map[string]any)
	read.written, _ = transfer["unpack_config"].([]any)
	return read, nil
}

// migrateCRI migrates what concerns snapshotters as containerd's CRI plugins do
// (configMigration in plugins/cri/images and plugins/cri/runtime).
func migrateCRI(_ context.Context, _ int, all map[string]any) error {
	cri, _ := all[CRIVersion2].(map[string]any)
	before, ok := cri["containerd"].(map[string]any)
	if !ok {
		return nil
	}
	if _, ok := before["runtimes"]; !ok { // containerd ignores the snapshotter, too
		return nil
	}
	if snapshotter, ok := before["snapshotter"]; ok {
		Table(all, CRIImages)["snapshotter"] = snapshotter
	}
	after := Table(all, CRIRuntime, "containerd")
	for _, key := range []string{"runtimes", "default_runtime_name"} {
		if _, ok := after[key]; !ok && before[key] != nil {
			after[key] = before[key]
		}
	}
	return nil
}

// Table returns the table below in that has these keys. It adds the tables that are
// missing.
func Table(in map[string]any, keys ...string) map[string]any {
	for _, key := range keys {
		t, ok := in[key].(map[string]any)
		if !ok {
			t = map[string]any{}
			in[key] = t
		}
		in = t
	}
	return in
}

// Handlers are the runtime handlers that name our snapshotter, sorted.
func (c *Config) Handlers() []string {
	names := []string{}
	for _, handler := range slices.Sorted(maps.Keys(c.snapshotters)) {
		if c.snapshotters[handler] == Snapshotter {
			names = append(names, handler)
		}
	}
	return names
}

// OtherHandlers are the runtime handlers that name another snapshotter, which takes
// precedence over that of the node, with its name.
func (c *Config) OtherHandlers() map[string]string {
	others := map[string]string{}
	for handler, snapshotter := range c.snapshotters {
		if snapshotter != "" && snapshotter != Snapshotter {
			others[handler] = snapshotter
		}
	}
	return others
}

// ServesPods reports whether any runtime handler uses our snapshotter, by name or as that
// of the node.
func (c *Config) ServesPods() bool {
	if c.NodeSnapshotter != Snapshotter {
		return len(c.Handlers()) > 0
	}
	others := c.OtherHandlers()
	return others[c.DefaultHandler] == "" || len(others) < len(c.snapshotters)
}

// Unpacks returns the snapshotters for which containerd pulls images of this platform,
// sorted. For those in late the entry that it takes is for artifacts alone (config_type),
// so that it unpacks a container image only when it creates a container. The first entry
// that matches counts (getSupportedPlatform in core/transfer/local/pull.go).
func (c *Config) Unpacks() (snapshotters, late []string) {
	snapshotters, late = []string{}, []string{}
	for _, entry := range c.Unpack {
		platform, err := platforms.Parse(entry.Platform)
		if err != nil || len(platform.OSFeatures) > 0 || slices.Contains(snapshotters, entry.Snapshotter) ||
			c.checkPlatform && !platforms.Only(platform).Match(platforms.DefaultSpec()) {
			continue
		}
		snapshotters = append(snapshotters, entry.Snapshotter)
		if entry.ConfigType != "" {
			late = append(late, entry.Snapshotter)
		}
	}
	slices.Sort(snapshotters)
	slices.Sort(late)
	return snapshotters, late
}

// CompleteUnpack returns unpack_config with the entries of needed (see [Needs.Tables])
// whose snapshotters it lacks. All entries are in it, since the list of an imported file
// replaces the others.
func (c *Config) CompleteUnpack(needed map[string]any) []any {
	unpacks, _ := c.Unpacks()
	entries := slices.Clone(c.written)
	for _, entry := range Table(needed, "plugins", Transfer)["unpack_config"].([]any) {
		if c.written == nil || !slices.Contains(unpacks, entry.(map[string]any)["snapshotter"].(string)) {
			entries = append(entries, entry)
		}
	}
	return entries
}

// Loaded asks a running containerd for a plugin. It returns nil if there is none.
func Loaded(ctx context.Context, c *containerd.Client, kind containerdplugin.Type, id string) (*introspection.Plugin, error) {
	found, err := c.IntrospectionService().Plugins(ctx, fmt.Sprintf("type==%s,id==%s", kind, id))
	if err != nil || len(found.Plugins) == 0 {
		return nil, err
	}
	return found.Plugins[0], nil
}

// CompiledIn stands for the address of a plugin that is part of containerd.
const CompiledIn = "compiled in"

// LoadedAddress is the socket of a proxy plugin that a running containerd has, [CompiledIn]
// if it needs none, and "" if there is no such plugin.
func LoadedAddress(ctx context.Context, c *containerd.Client, kind containerdplugin.Type, id string) (string, error) {
	found, err := Loaded(ctx, c, kind, id)
	if err != nil || found == nil {
		return "", err
	}
	if address := Socket(found.Exports["address"]); address != "" {
		return address, nil
	}
	return CompiledIn, nil
}

// Socket is the path of a proxy plugin's address.
func Socket(address string) string { return strings.TrimPrefix(address, "unix://") }

// OverlayfsTable is the table of the daemon's configuration file for o.
func OverlayfsTable(o snapshot.Overlayfs) (string, error) {
	if o.MountOptions == nil {
		o.MountOptions = []string{}
	}
	text, err := toml.Marshal(map[string]any{"overlayfs": o})
	return string(text), err
}
