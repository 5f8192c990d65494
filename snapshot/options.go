// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package snapshot

import (
	"slices"

	"github.com/containerd/containerd/v2/plugins/snapshots/overlay"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay/overlayutils"
)

// Overlayfs has the options of containerd's own overlayfs snapshotter, by the same keys
// (Config in plugins/snapshots/overlay/plugin), since the same code makes the snapshots of
// images and containers here.
type Overlayfs struct {
	MountOptions  []string `toml:"mount_options"`
	UpperdirLabel bool     `toml:"upperdir_label"`
	SyncRemove    bool     `toml:"sync_remove"`
	// SlowChown lets containerd copy the layers of an image and change the owners of all
	// files for a pod with a user namespace, where the kernel cannot map the owners.
	SlowChown bool `toml:"slow_chown"`
}

// Equal reports whether all options are equal.
func (o Overlayfs) Equal(other Overlayfs) bool {
	return slices.Equal(o.MountOptions, other.MountOptions) &&
		o.UpperdirLabel == other.UpperdirLabel && o.SyncRemove == other.SyncRemove && o.SlowChown == other.SlowChown
}

// With returns o with the options of other added.
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

// Options returns the options for New. SlowChown is not among them: see Capabilities.
func (o Overlayfs) Options() (all []overlay.Opt) {
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

// The capabilities by which a snapshotter tells containerd how it serves pods with a user
// namespace (resolveSnapshotOptions in containerd's client/snapshotter_opts_unix.go). Without
// either, containerd copies the layers and changes their owners.
const (
	// RemapIDs says that the snapshotter applies the labels with the ID maps of the pod.
	RemapIDs = "remap-ids"
	// OnlyRemapIDs makes containerd refuse the pod instead of copying.
	OnlyRemapIDs = "only-remap-ids"
)

// MapsOwners reports whether the kernel can map the owners of overlayfs's layers, as Linux
// can since 5.19. On an older kernel containerd's check mounts one, which needs CAP_SYS_ADMIN
// and a process in another user namespace: call it in a process that may do so, which the
// confined daemon may not.
func MapsOwners() bool {
	ok, err := overlayutils.SupportsIDMappedMounts()
	return err == nil && ok
}

// Capabilities returns the capabilities to announce to containerd, as its own overlayfs
// snapshotter does.
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
