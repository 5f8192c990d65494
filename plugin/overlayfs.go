// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package plugin

import (
	"slices"

	"github.com/containerd/containerd/v2/plugins/snapshots/overlay"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay/overlayutils"
)

// Overlayfs are the options of containerd's own overlayfs snapshotter, under its keys
// (Config in plugins/snapshots/overlay/plugin): the snapshots of images and containers are
// made by the same code. Its root_path is Config.Root here.
type Overlayfs struct {
	MountOptions  []string `toml:"mount_options"`
	UpperdirLabel bool     `toml:"upperdir_label"`
	SyncRemove    bool     `toml:"sync_remove"`
	// SlowChown lets containerd copy the layers of an image, and change the owners of all
	// files, for a pod with a user namespace, where the kernel cannot map them.
	SlowChown bool `toml:"slow_chown"`
}

// Equal reports whether both say the same.
func (o Overlayfs) Equal(other Overlayfs) bool {
	return slices.Equal(o.MountOptions, other.MountOptions) &&
		o.UpperdirLabel == other.UpperdirLabel && o.SyncRemove == other.SyncRemove && o.SlowChown == other.SlowChown
}

// With adds the options that other has and o has not.
func (o Overlayfs) With(other Overlayfs) Overlayfs {
	o.MountOptions = slices.Clone(o.MountOptions)
	for _, option := range other.MountOptions {
		if !slices.Contains(o.MountOptions, option) {
			o.MountOptions = append(o.MountOptions, option)
		}
	}
	o.UpperdirLabel = o.UpperdirLabel || other.UpperdirLabel
	o.SyncRemove = o.SyncRemove || other.SyncRemove
	o.SlowChown = o.SlowChown || other.SlowChown
	return o
}

// options are those of the snapshotter. SlowChown is none: see Capabilities.
func (o Overlayfs) options() (all []overlay.Opt) {
	if len(o.MountOptions) > 0 {
		all = append(all, overlay.WithMountOptions(o.MountOptions))
	}
	if o.UpperdirLabel {
		all = append(all, overlay.WithUpperdirLabel)
	}
	if !o.SyncRemove {
		all = append(all, overlay.AsynchronousRemove)
	}
	return all
}

// What a snapshotter does for a pod with a user namespace (resolveSnapshotOptions in
// containerd's client/snapshotter_opts_unix.go). A snapshotter that has neither capability
// is given layers that containerd has copied to change their owners.
const (
	// RemapIDs is of one that honours the labels with the ID maps of the pod.
	RemapIDs = "remap-ids"
	// OnlyRemapIDs makes containerd refuse the pod where it would have to copy.
	OnlyRemapIDs = "only-remap-ids"
)

// MapsOwners reports whether the kernel can map the owners of overlayfs's layers, which
// Linux can since 5.19. On an older one it tries, and needs CAP_SYS_ADMIN and another
// process in a user namespace for that: the daemon may not.
func MapsOwners() bool {
	ok, err := overlayutils.SupportsIDMappedMounts()
	return err == nil && ok
}

// Capabilities are those to tell containerd of, as its own overlayfs has them.
func (o Overlayfs) Capabilities(mapsOwners bool) []string {
	switch {
	case mapsOwners:
		return []string{RemapIDs}
	case o.SlowChown:
		return []string{}
	default:
		return []string{OnlyRemapIDs}
	}
}
