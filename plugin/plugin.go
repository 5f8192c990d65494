// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

// Package plugin registers the snapshotter "artifact", and a differ of the same name, in a
// containerd that is compiled with
//
//	import _ "github.com/artifact-snapshotter/artifact-snapshotter/plugin"
//
// They are configured in the table [plugins.'io.containerd.snapshotter.v1.artifact'] of
// containerd's configuration file, with the keys of service.Config. Directories and
// addresses are containerd's unless the table sets them. Metrics, traces, NRI and CSI are not
// part of it: they are in package daemon, the process of its own.
package plugin

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/containerd/plugin"
	"github.com/containerd/plugin/registry"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/artifact-snapshotter/artifact-snapshotter/service"
	"github.com/artifact-snapshotter/artifact-snapshotter/snapshot"
	"github.com/artifact-snapshotter/artifact-snapshotter/store"
)

func init() {
	registry.Register(&plugin.Registration{
		Type: plugins.SnapshotPlugin,
		ID:   "artifact",
		// It exports its root, see fromContainerd.
		Requires: []plugin.Type{plugins.ContentPlugin},
		Config:   defaultConfig(),
		InitFn:   initSnapshotter,
	})
	registry.Register(&plugin.Registration{
		Type:     plugins.DiffPlugin,
		ID:       "artifact",
		Requires: []plugin.Type{plugins.SnapshotPlugin},
		InitFn:   initDiffer,
	})
}

// defaultConfig is the default configuration without directories and addresses: empty ones
// are containerd's.
func defaultConfig() *service.Config {
	c := service.Default()
	c.Root, c.State, c.ContentRoot, c.ContainerdAddress = "", "", "", ""
	return &c
}

func initSnapshotter(ic *plugin.InitContext) (any, error) {
	cfg, err := fromContainerd(ic)
	if err != nil {
		return nil, fmt.Errorf("artifact snapshotter: %w", err)
	}
	if err := refuseRecords(cfg.Root); err != nil {
		return nil, err
	}
	ic.Meta.Platforms = append(ic.Meta.Platforms, platforms.DefaultSpec())
	ic.Meta.Capabilities = append(ic.Meta.Capabilities, cfg.Overlayfs.Capabilities(snapshot.MapsOwners())...)
	ic.Meta.Exports[plugins.SnapshotterRootDir] = cfg.Root
	s, err := service.Open(ic.Context, cfg, store.Observer{})
	if err != nil {
		return nil, err
	}
	s.Start(ic.Context, false)
	return s, nil
}

// fromContainerd completes the configuration with containerd's directories and address.
func fromContainerd(ic *plugin.InitContext) (service.Config, error) {
	config, ok := ic.Config.(*service.Config)
	if !ok {
		return service.Config{}, fmt.Errorf("the configuration is a %T: %w", ic.Config, errdefs.ErrInvalidArgument)
	}
	cfg := *config
	cfg.Root = cmp.Or(cfg.Root, ic.Properties[plugins.PropertyRootDir])
	cfg.State = cmp.Or(cfg.State, ic.Properties[plugins.PropertyStateDir])
	cfg.ContainerdAddress = cmp.Or(cfg.ContainerdAddress, ic.Properties[plugins.PropertyGRPCAddress])
	if cfg.ContentRoot == "" {
		content := ic.Plugins().Get(plugins.ContentPlugin, "content")
		if content == nil {
			return service.Config{}, errors.New("containerd runs without its own content store: set content_root")
		}
		cfg.ContentRoot = content.Meta.Exports["root"]
	}
	return cfg, nil
}

// refuseRecords refuses the root of a daemon whose NRI plugin recorded containers there.
// Nothing in containerd reads these records, so garbage collection would remove the volumes
// of the containers.
func refuseRecords(root string) error {
	records, err := filepath.Glob(filepath.Join(root, "nri", "*.json"))
	if err != nil || len(records) == 0 {
		return err
	}
	return fmt.Errorf("artifact snapshotter: %s records containers whose volumes an artifact-snapshotter daemon mounted through NRI: choose another root, or drain the node and remove the directory: %w",
		filepath.Dir(records[0]), errdefs.ErrFailedPrecondition)
}

// differ unpacks artifacts. It compares nothing, since artifacts are never written to.
type differ struct{ diff.Applier }

// Compare implements diff.Comparer; it is errdefs.ErrNotImplemented.
func (differ) Compare(context.Context, []mount.Mount, []mount.Mount, ...diff.Opt) (ocispec.Descriptor, error) {
	return ocispec.Descriptor{}, fmt.Errorf("a snapshot of an artifact is read-only, so there are no changes to compare: %w", errdefs.ErrNotImplemented)
}

// initDiffer returns the differ of the compiled-in snapshotter. It names no platform, so
// that containerd uses it only where its configuration says so.
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
