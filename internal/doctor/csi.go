// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"context"

	"github.com/artifact-snapshotter/artifact-snapshotter/csi"
	"github.com/artifact-snapshotter/artifact-snapshotter/daemon"
	"github.com/artifact-snapshotter/artifact-snapshotter/internal/plain"
)

// CSIFacts are the facts about CSI.
type CSIFacts struct {
	KubeletRoot string `json:"kubelet_root"`
	Registered  bool   `json:"registered"`
}

// checkCSI asks the daemon whether kubelet has registered its CSI driver.
func checkCSI(ctx context.Context, n Node) (found Finding) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	err := daemon.HealthOfCSI(ctx, n.SocketAddress())
	found.Facts = CSIFacts{KubeletRoot: n.CSI.KubeletRoot, Registered: err == nil}
	if err == nil {
		found.sayf("kubelet has registered the driver %s", csi.Name)
		return found
	}
	found.sayf("kubelet is not known to have registered the driver %s", csi.Name)
	found.blame(ctx, n, err)
	found.advise("start the daemon with --csi, set csi.kubelet_root to kubelet's --root-dir, and read the daemon's log", "kubelet registers the driver")
	return found
}

// blame adds the error of a front end as a problem if the daemon runs, and otherwise as unknown.
func (f *Finding) blame(ctx context.Context, n Node, err error) {
	if daemon.Health(ctx, n.SocketAddress()) == nil {
		f.problemf("%s", plain.Error(err))
		return
	}
	f.Unknown = plain.Error(err)
}
