// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"path/filepath"
	"runtime"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
)

// variant is a way to bring a model into a pod.
type variant struct {
	name, title string
	forms       []pack.Form
	tag         string // the tag that it pulls
	options     node.Options
	pull        func(n *node.Node, ref string) error

	// volume returns the pod's volume; nil means a download alone.
	volume func(n *node.Node, ref string) node.Volume

	erofs bool // needs a recent mkfs.erofs

	// erofsGuest uses a test image with EROFS layers, because containerd 2.4.2 cannot
	// create a container whose root file system is a tar index: it looks up groups there
	// with a reader that requires the tar as a device.
	erofsGuest bool
}

// The names of variants that the tables and bounds refer to.
const (
	download = "fetch"
	criPull  = "pull"
	ours     = "artifact"
)

// target is the path of the model in containers.
const target = "/model"

var tars = forms[1:]

var variants = []variant{
	{
		name: download, title: "download only, `ctr content fetch`", forms: forms, tag: artifact,
		options: node.Options{Stock: true},
		pull: func(n *node.Node, ref string) error {
			// With --debug it prints no progress. Otherwise it polls the progress ten times
			// a second and waits for the next poll at the end.
			_, err := n.Ctr("--debug", "content", "fetch", "--plain-http", ref)
			return err
		},
	},
	{
		name: criPull, title: "download only, `crictl pull` on a stock node", forms: forms, tag: artifact,
		options: node.Options{Stock: true}, pull: pullImage,
	},
	{
		name: ours, title: "**this project**", forms: forms, tag: artifact,
		pull: pullImage, volume: imageVolume,
	},
	{
		name: "oras", title: "`oras pull`, hostPath", forms: forms[:1], tag: titled,
		options: node.Options{Stock: true},
		pull: func(n *node.Node, ref string) error {
			_, err := n.Tool("oras", "pull", "--plain-http", "--no-tty", "--output", pulled(n), ref)
			return err
		},
		volume: func(n *node.Node, _ string) node.Volume { return node.Volume{HostPath: pulled(n), Path: target} },
	},
	{
		name: "overlayfs", title: "image, overlayfs", forms: tars, tag: image,
		options: node.Options{Stock: true}, pull: pullImage, volume: imageVolume,
	},
	{
		name: "erofs", title: "image, erofs, converted", forms: tars, tag: image, erofs: true,
		options: node.Options{Stock: true, ContainerdConfig: erofsConfig(false)}, pull: pullImage, volume: imageVolume,
	},
	{
		name: "erofs-index", title: "image, erofs, tar index", forms: tars, tag: image, erofs: true,
		options: node.Options{Stock: true, ContainerdConfig: erofsConfig(true)}, pull: pullImage, volume: imageVolume, erofsGuest: true,
	},
	{
		name: "erofs-native", title: "image of EROFS layers, erofs", forms: forms[1:2], tag: erofsImage, erofs: true,
		options: node.Options{Stock: true, ContainerdConfig: erofsConfig(false)}, pull: pullImage, volume: imageVolume,
	},
}

func pullImage(n *node.Node, ref string) error {
	_, err := n.Pull(ref)
	return err
}

func imageVolume(_ *node.Node, ref string) node.Volume { return node.Volume{Image: ref, Path: target} }

// pulled is the target directory of oras.
func pulled(n *node.Node) string { return filepath.Join(n.Dir, "pulled") }

// erofsConfig configures containerd's erofs snapshotter and differ, with the options that
// its documentation recommends for speed, and with as many concurrent unpacks as
// processors.
func erofsConfig(tarIndex bool) string {
	return fmt.Sprintf(`
[plugins.'io.containerd.cri.v1.images']
  snapshotter = 'erofs'
[plugins.'io.containerd.differ.v1.erofs']
  mkfs_options = ['-T0', '--mkfs-time', '--sort=none']
  enable_tar_index = %t
[plugins.'io.containerd.service.v1.diff-service']
  default = ['erofs', 'walking']
[plugins.'io.containerd.transfer.v1.local']
  max_concurrent_unpacks = %d
[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
  platform = 'linux/%s'
  snapshotter = 'erofs'
  differ = 'erofs'
`, tarIndex, runtime.NumCPU(), runtime.GOARCH)
}
