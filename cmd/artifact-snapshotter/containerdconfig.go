// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"iter"
	"maps"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/cmd/containerd/server/config"
	"github.com/containerd/containerd/v2/defaults"
	containerd "github.com/containerd/containerd/v2/version"
	"github.com/containerd/platforms"
	containerdplugin "github.com/containerd/plugin"

	"github.com/artifact-snapshotter/artifact-snapshotter/snapshot"
)

// The plugins of containerd whose configuration counts, and the CRI plugin that
// configuration version 2 had in place of the first two.
const (
	criImages  = "io.containerd.cri.v1.images"
	criRuntime = "io.containerd.cri.v1.runtime"
	criBefore3 = "io.containerd.grpc.v1.cri"
	transfer   = "io.containerd.transfer.v1.local"
	overlayfs  = "io.containerd.snapshotter.v1.overlayfs"
)

// runtimeConfig is what doctor reads of containerd's configuration.
type runtimeConfig struct {
	proxies map[string]config.ProxyPlugin
	images  struct {
		Snapshotter string `toml:"snapshotter"`
	}
	runtime struct {
		Containerd struct {
			Default  string `toml:"default_runtime_name"`
			Runtimes map[string]struct {
				Snapshotter string `toml:"snapshotter"`
			} `toml:"runtimes"`
		} `toml:"containerd"`
	}
	transfer struct {
		CheckPlatform bool          `toml:"check_platform_supported"`
		Unpack        []unpackEntry `toml:"unpack_config"`
	}
	// overlayfs are the options of containerd's own snapshotter.
	overlayfs struct {
		snapshot.Overlayfs
		Root string `toml:"root_path"`
	}
	// entries are those of Unpack as they were written; nil if Unpack is containerd's
	// default, which any entry replaces.
	entries []any
	// tables are those of the runtime handlers as they were written.
	tables map[string]any
}

// unpackEntry is an entry of unpack_config.
type unpackEntry struct {
	Platform    string `toml:"platform"`
	Snapshotter string `toml:"snapshotter"`
	Differ      string `toml:"differ"`
	ConfigType  string `toml:"config_type"`
	Optional    bool   `toml:"optional"`
}

// readRuntimeConfig reads files and what they import, with containerd's own code: the
// second as if the first imported it last. Without one it is containerd's default.
func readRuntimeConfig(ctx context.Context, paths ...string) (*runtimeConfig, error) {
	loaded := config.Config{Version: containerd.ConfigVersion}
	migrations := func() iter.Seq[containerdplugin.Registration] {
		return slices.Values([]containerdplugin.Registration{{ConfigMigration: migrateCRI}})
	}
	for _, path := range paths {
		if err := config.LoadConfigWithPlugins(ctx, path, migrations, &loaded); err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
	}
	read := &runtimeConfig{proxies: loaded.ProxyPlugins}
	for id, into := range map[string]any{criImages: &read.images, criRuntime: &read.runtime, transfer: &read.transfer, overlayfs: &read.overlayfs} {
		if _, err := loaded.Decode(ctx, id, into); err != nil {
			return nil, fmt.Errorf("%s: %s: %w", strings.Join(paths, ", "), id, err)
		}
	}
	if read.images.Snapshotter == "" {
		read.images.Snapshotter = defaults.DefaultSnapshotter
	}
	if read.runtime.Containerd.Default == "" {
		read.runtime.Containerd.Default = "runc" // DefaultRuntimeConfig in internal/cri/config
	}
	local, _ := loaded.Plugins[transfer].(map[string]any)
	read.entries, _ = local["unpack_config"].([]any)
	cri, _ := loaded.Plugins[criRuntime].(map[string]any)
	ofRuntimes, _ := cri["containerd"].(map[string]any)
	read.tables, _ = ofRuntimes["runtimes"].(map[string]any)
	if read.transfer.Unpack == nil { // containerd's defaultUnpackConfig
		read.transfer.Unpack = []unpackEntry{{Platform: platforms.DefaultString(), Snapshotter: defaults.DefaultSnapshotter, Differ: defaults.DefaultDiffer}}
	}
	return read, nil
}

// migrateCRI does for the snapshotters what containerd's CRI plugins do for all of
// their configuration (configMigration in plugins/cri/images and plugins/cri/runtime).
func migrateCRI(_ context.Context, _ int, all map[string]any) error {
	cri, _ := all[criBefore3].(map[string]any)
	before, ok := cri["containerd"].(map[string]any)
	if !ok {
		return nil
	}
	if _, ok := before["runtimes"]; !ok { // then containerd ignores the snapshotter, too
		return nil
	}
	if snapshotter, ok := before["snapshotter"]; ok {
		table(all, criImages)["snapshotter"] = snapshotter
	}
	after := table(table(all, criRuntime), "containerd")
	for _, key := range []string{"runtimes", "default_runtime_name"} {
		if _, ok := after[key]; !ok && before[key] != nil {
			after[key] = before[key]
		}
	}
	return nil
}

// table is the table of a name in another one, made if it is not there.
func table(in map[string]any, name string) map[string]any {
	t, ok := in[name].(map[string]any)
	if !ok {
		t = map[string]any{}
		in[name] = t
	}
	return t
}

// handlers are the runtime handlers with the snapshotter, in order.
func (c *runtimeConfig) handlers() []string {
	names := []string{}
	for _, name := range slices.Sorted(maps.Keys(c.runtime.Containerd.Runtimes)) {
		if c.runtime.Containerd.Runtimes[name].Snapshotter == proxyName {
			names = append(names, name)
		}
	}
	return names
}

// otherHandlers are the runtime handlers that name another snapshotter, which beats
// that of the node, and what they name.
func (c *runtimeConfig) otherHandlers() map[string]string {
	others := map[string]string{}
	for name, runtime := range c.runtime.Containerd.Runtimes {
		if runtime.Snapshotter != "" && runtime.Snapshotter != proxyName {
			others[name] = runtime.Snapshotter
		}
	}
	return others
}

// somePod says whether a runtime handler has the snapshotter, be it from the node.
func (c *runtimeConfig) somePod() bool {
	if c.images.Snapshotter != proxyName {
		return len(c.handlers()) > 0
	}
	others, runtimes := c.otherHandlers(), c.runtime.Containerd.Runtimes
	return others[c.runtime.Containerd.Default] == "" || len(others) < len(runtimes)
}

// unpacks are the snapshotters for which containerd pulls the images of this
// platform, in order, and late are those of them for which it takes an entry that is
// for artifacts alone (config_type), so that it unpacks an ordinary image when it
// creates a container. Only the first entry that matches counts (getSupportedPlatform
// in core/transfer/local/pull.go).
func (c *runtimeConfig) unpacks() (snapshotters, late []string) {
	snapshotters, late = []string{}, []string{}
	for _, entry := range c.transfer.Unpack {
		platform, err := platforms.Parse(entry.Platform)
		if err != nil || len(platform.OSFeatures) > 0 || slices.Contains(snapshotters, entry.Snapshotter) ||
			c.transfer.CheckPlatform && !platforms.Only(platform).Match(platforms.DefaultSpec()) {
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
