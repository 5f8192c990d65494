// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/artifact-snapshotter/artifact-snapshotter/daemon"
	"github.com/artifact-snapshotter/artifact-snapshotter/internal/containerdconfig"
	"github.com/artifact-snapshotter/artifact-snapshotter/unpack"
)

// withoutContainerd reports whether the daemon needs no containerd: the only runtime of the node
// is CRI-O, or it is a CSI driver alone. A node with NRI and without a store of CRI-O has a
// containerd on another socket.
func withoutContainerd(n Node) bool {
	_, err := os.Stat(n.ContainerdAddress)
	return errors.Is(err, fs.ErrNotExist) && (n.NRI.Enabled && len(n.BlobRoots) > 0 || !n.NRI.Enabled && n.CSI.Enabled)
}

// withoutSnapshotter reports whether the daemon has another front end, and nobody has told
// containerd of the snapshotter.
func withoutSnapshotter(n Node) bool {
	if !n.NRI.Enabled && !n.CSI.Enabled {
		return false
	}
	drop, err := containerdconfig.FindDropIn(n.ContainerdConfig)
	if err != nil {
		return false
	}
	_, err = os.Stat(drop.Path)
	return errors.Is(err, fs.ErrNotExist)
}

// NRIFacts are the facts about NRI.
type NRIFacts struct {
	Socket    string            `json:"socket"`
	Connected bool              `json:"connected"`
	BlobRoots []unpack.Location `json:"blob_roots,omitempty"`
}

// checkNRI asks the daemon whether a runtime has connected to its plugin, and looks for
// the directories from which CRI-O mounts artifacts.
func checkNRI(ctx context.Context, n Node) (found Finding) {
	facts := NRIFacts{Socket: n.NRI.Socket}
	_, missing := os.Stat(n.NRI.Socket)
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	err := daemon.HealthOfNRI(ctx, n.SocketAddress())
	switch {
	case errors.Is(missing, fs.ErrNotExist):
		found.sayf("there is no socket %s", n.NRI.Socket)
		found.advise("start the runtime with NRI enabled, or set nri.socket to its NRI socket", "the plugin can connect")
	case err != nil:
		found.blame(ctx, n, err)
		found.sayf("the plugin is not known to be connected to a runtime")
		found.advise("start the daemon with --nri, and read its log", "the plugin connects to the runtime")
	default:
		facts.Connected = true
		found.sayf("the plugin is connected to the runtime at %s", n.NRI.Socket)
	}
	for _, dir := range n.BlobRoots {
		place, err := unpack.Locate(dir)
		if err != nil {
			return failed(err)
		}
		facts.BlobRoots = append(facts.BlobRoots, place)
		found.sayf("CRI-O's artifacts are in %s", pathOf(place))
		if root, err := unpack.Locate(n.Root); err == nil && root.Device != place.Device {
			found.advise(fmt.Sprintf("move root to the filesystem of %s (%s, mounted at %s)", dir, place.Device, place.Mount), "models need no second copy on disk")
		}
	}
	found.Facts = facts
	return found
}
