// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package plugin

import (
	"cmp"
	"context"
	"errors"
	"fmt"

	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/containerd/plugin"
	"github.com/containerd/plugin/registry"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func init() {
	registry.Register(&plugin.Registration{
		Type: plugins.SnapshotPlugin,
		ID:   "artifact",
		// For the export of its root, see fromContainerd.
		Requires: []plugin.Type{plugins.ContentPlugin},
		Config:   compiledIn(),
		InitFn:   initInContainerd,
	})
	registry.Register(&plugin.Registration{
		Type:     plugins.DiffPlugin,
		ID:       "artifact",
		Requires: []plugin.Type{plugins.SnapshotPlugin},
		InitFn:   initDiffer,
	})
}

// differ unpacks, and compares nothing: nobody writes to an artifact.
type differ struct{ diff.Applier }

// Compare implements diff.Comparer; it is errdefs.ErrNotImplemented.
func (differ) Compare(context.Context, []mount.Mount, []mount.Mount, ...diff.Opt) (ocispec.Descriptor, error) {
	return ocispec.Descriptor{}, fmt.Errorf("artifacts have no differences that could be packed: %w", errdefs.ErrNotImplemented)
}

// initDiffer returns the differ of the snapshotter that is compiled in. It names no
// platform: containerd uses it where its configuration names it, and for nothing
// else.
func initDiffer(ic *plugin.InitContext) (any, error) {
	snapshotter, err := ic.GetByID(plugins.SnapshotPlugin, "artifact")
	if err != nil {
		return nil, fmt.Errorf("no snapshotter to unpack artifacts for: %v: %w", err, plugin.ErrSkipPlugin)
	}
	applier, ok := snapshotter.(diff.Applier)
	if !ok {
		return nil, fmt.Errorf("snapshotter artifact is a %T: %w", snapshotter, errdefs.ErrFailedPrecondition)
	}
	return differ{applier}, nil
}

// compiledIn is the default configuration without the directories and addresses,
// which are containerd's unless its configuration says otherwise.
func compiledIn() *Config {
	c := Default()
	c.Root, c.State, c.ContentRoot, c.ContainerdAddress, c.LogLevel, c.NRI = "", "", "", "", "", NRI{}
	return &c
}

// initInContainerd opens the snapshotter in a containerd that it is compiled into.
func initInContainerd(ic *plugin.InitContext) (any, error) {
	cfg, err := fromContainerd(ic)
	if err != nil {
		return nil, err
	}
	ic.Meta.Platforms = append(ic.Meta.Platforms, platforms.DefaultSpec())
	ic.Meta.Capabilities = append(ic.Meta.Capabilities, cfg.Overlayfs.Capabilities(MapsOwners())...)
	ic.Meta.Exports[plugins.SnapshotterRootDir] = cfg.Root
	return Open(ic.Context, cfg)
}

// fromContainerd completes the configuration with what containerd knows.
func fromContainerd(ic *plugin.InitContext) (Config, error) {
	config, ok := ic.Config.(*Config)
	if !ok {
		return Config{}, fmt.Errorf("artifact snapshotter: configuration is a %T: %w", ic.Config, errdefs.ErrInvalidArgument)
	}
	if config.Address != "" || config.LogLevel != "" || config.MetricsAddress != "" || config.NRI != (NRI{}) {
		return Config{}, fmt.Errorf("artifact snapshotter: address, log_level, metrics_address and nri are the daemon's, and containerd has its own, remove them: %w",
			errdefs.ErrInvalidArgument)
	}
	cfg := *config
	cfg.Root = cmp.Or(cfg.Root, ic.Properties[plugins.PropertyRootDir])
	cfg.State = cmp.Or(cfg.State, ic.Properties[plugins.PropertyStateDir])
	cfg.ContainerdAddress = cmp.Or(cfg.ContainerdAddress, ic.Properties[plugins.PropertyGRPCAddress])
	if cfg.ContentRoot == "" {
		store := ic.Plugins().Get(plugins.ContentPlugin, "content")
		if store == nil {
			return Config{}, errors.New("artifact snapshotter: containerd runs without its own content store: set content_root")
		}
		cfg.ContentRoot = store.Meta.Exports["root"]
	}
	return cfg, nil
}
