// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"golang.org/x/sys/unix"
)

// The options of all mounts of an artifact are in this file. There are three kinds of mounts:
//
//   - an EROFS image, if the tree has one (erofsOptions),
//   - an overlay of the image or of files, if files are redirected to blobs (overlayMount), and
//   - bind mounts (Bind): of a tree of files, and of the shared mount into each pod.
//
// What every mount has is in everyMount. An option of a file system, such as the label of
// SELinux, is one of an EROFS and an overlay. A bind mount cannot change it.

// everyMount are options of every mount, and attributes are the same for fsmount(2).
var everyMount = []string{"ro", "nosuid", "nodev"}

const attributes = unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV

// erofsOptions returns the options of the file system of an EROFS image. Its attributes are
// those of every mount.
func erofsOptions(r Mode) []string {
	if r == EROFS {
		return []string{"ro", "directio"}
	}
	return []string{"ro"}
}

// overlayMount returns an overlay of lower whose files take their content from data, a
// data-only lower layer (Documentation/filesystems/overlayfs.rst, "Data-only lower layers",
// Linux 6.5). Two paths are much shorter than the page that mount(2) allows for options.
func overlayMount(lower, data string) mount.Mount {
	return mount.Mount{Type: "overlay", Source: "overlay", Options: slices.Concat(everyMount, []string{
		"lowerdir=" + escapeOverlay.Replace(lower) + "::" + escapeOverlay.Replace(data),
		"metacopy=on", "redirect_dir=follow", "index=off", "nfs_export=off",
	})}
}

// escapeOverlay escapes the characters that have a meaning in the value of lowerdir=
// (fs/overlayfs/params.c: ovl_next_opt, ovl_parse_param_split_lowerdirs).
var escapeOverlay = strings.NewReplacer(`\`, `\\`, `:`, `\:`, `,`, `\,`)

// Bind returns the bind mount of source, which is the shared mount of a tree or a directory
// in it. Every front end mounts an artifact into a pod by this.
func Bind(source string) mount.Mount {
	return mount.Mount{Type: "bind", Source: source, Options: slices.Concat([]string{"bind"}, everyMount)}
}
