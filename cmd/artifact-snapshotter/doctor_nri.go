// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"github.com/artifact-snapshotter/artifact-snapshotter/daemon"
	"github.com/artifact-snapshotter/artifact-snapshotter/unpack"
)

// withNRI says whether the daemon needs nothing of containerd's configuration.
func withNRI(p patient) bool { return p.NRI.Enabled }

// withoutContainerd says whether the node is one of CRI-O's alone. Without a store of CRI-O's
// it is a containerd whose socket is elsewhere.
func withoutContainerd(p patient) bool {
	_, err := os.Stat(p.ContainerdAddress)
	return p.NRI.Enabled && len(p.BlobRoots) > 0 && errors.Is(err, fs.ErrNotExist)
}

// nriFacts are the facts of checkNRI.
type nriFacts struct {
	Socket    string         `json:"socket"`
	Connected bool           `json:"connected"`
	BlobRoots []unpack.Place `json:"blob_roots,omitempty"`
}

// checkNRI asks the daemon whether a runtime has taken its plugin, and looks for the
// directories from which CRI-O mounts artifacts.
func checkNRI(ctx context.Context, p patient) finding {
	facts := nriFacts{Socket: p.NRI.Socket}
	found := finding{}
	var text strings.Builder
	_, serr := os.Stat(p.NRI.Socket)
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	err := daemon.HealthOf(ctx, p.SocketAddress(), daemon.HealthNRI)
	switch {
	case errors.Is(serr, fs.ErrNotExist):
		fmt.Fprintf(&text, "there is no socket %s\n", p.NRI.Socket)
		found.advise("start the runtime, with NRI enabled, or set nri.socket to where it has NRI's socket", "the runtime finds the plugin")
	case err != nil:
		found.Unknown = err.Error()
		text.WriteString("no runtime is known to have the plugin\n")
		found.advise("start the daemon with --nri, and look at its log", "the runtime has the plugin")
	default:
		facts.Connected = true
		fmt.Fprintf(&text, "the runtime at %s has the plugin\n", p.NRI.Socket)
	}
	for _, dir := range p.BlobRoots {
		place, err := unpack.Locate(dir)
		if err != nil {
			return failed(err)
		}
		facts.BlobRoots = append(facts.BlobRoots, place)
		fmt.Fprintf(&text, "CRI-O's artifacts are in %s\n", there(place))
		if root, err := unpack.Locate(p.Root); err == nil && root.Device != place.Device {
			found.advise(fmt.Sprintf("move root to the filesystem of %s (%s, mounted at %s)", dir, place.Device, place.Mount), "models take no second copy on the disk")
		}
	}
	found.Facts, found.text = facts, text.String()
	return found
}
