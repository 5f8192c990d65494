// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package nri

import (
	"context"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/containerd/nri/pkg/api"
	"github.com/opencontainers/go-digest"

	"github.com/artifact-snapshotter/artifact-snapshotter/blobs"
	"github.com/artifact-snapshotter/artifact-snapshotter/store"
)

// crio and containerd are the names by which the runtimes introduce themselves.
const (
	crio       = "cri-o"
	containerd = "containerd"
)

// criNamespace is the namespace in which containerd has CRI's images.
const criNamespace = "k8s.io"

// blobPath is the path of a blob in a directory of blobs.
var blobPath = regexp.MustCompile(`^(/.*)/blobs/(sha256|sha384|sha512)/([0-9a-f]+)$`)

// volume is an image volume that a container mounts, of an artifact or of an image.
type volume struct {
	// Volume is the request to the store. Its Refused is why the volume is not to be
	// mounted; without a Target, whatever it is.
	store.Volume
	// destination is its path in the container, and remove those of the runtime's
	// mounts that are beside the one at destination.
	destination string
	remove      []string
	options     []string // of the runtime's mount
	source      string   // of the runtime's mount; "" if there are several
	// sub is a path in the volume, which is mounted instead of it.
	sub string
}

// find returns the image volumes among the mounts of a container.
func (p *Plugin) find(ctx context.Context, runtime string, pod *api.PodSandbox, c *api.Container) []volume {
	var volumes []volume
	var binds []bind
	for _, m := range c.GetMounts() {
		if !isBind(m) {
			continue
		}
		if v, ok := inContainerd(m, pod.GetId()); ok {
			volumes = append(volumes, v)
		} else if b, ok := p.inCRIO(m, runtime); ok {
			binds = append(binds, b)
		}
	}
	if len(binds) > 0 {
		volumes = append(volumes, p.crioVolumes(ctx, pod, c, binds)...)
	}
	return volumes
}

func isBind(m *api.Mount) bool {
	return m.GetType() == "bind" || slices.Contains(m.GetOptions(), "bind") || slices.Contains(m.GetOptions(), "rbind")
}

// inContainerd is the image volume that containerd has mounted for the sandbox; false
// if the mount is none.
func inContainerd(m *api.Mount, sandbox string) (volume, bool) {
	v, sub, ok := store.ParseVolume(path.Clean(m.GetSource()))
	if !ok || v.Sandbox != sandbox {
		return volume{}, false
	}
	v.Namespace = criNamespace
	return volume{Volume: v, destination: m.GetDestination(), options: m.GetOptions(), source: m.GetSource(), sub: sub}, true
}

// directory is containerd's own of the whole volume.
func (v volume) directory() string { return strings.TrimSuffix(path.Clean(v.source), "/"+v.sub) }

// inCRIO is the bind of a blob from one of CRI-O's artifact stores; false if the mount is
// none. A store that is not in the configuration is one all the same, which is said
// later: what CRI-O mounts from there is as wrong as from any other.
func (p *Plugin) inCRIO(m *api.Mount, runtime string) (bind, bool) {
	found := blobPath.FindStringSubmatch(path.Clean(m.GetSource()))
	if found == nil {
		return bind{}, false
	}
	blob := digest.NewDigestFromEncoded(digest.Algorithm(found[2]), found[3])
	if blob.Validate() != nil {
		return bind{}, false
	}
	b := bind{destination: m.GetDestination(), source: m.GetSource(), blob: blob, options: m.GetOptions()}
	dir := blobs.Dir(found[1])
	b.known = slices.ContainsFunc(p.Layouts, func(layout blobs.Dir) bool { return sameDir(layout, dir) })
	return b, b.known || runtime == crio && path.Base(found[1]) == "artifacts"
}

// sameDir reports whether two paths are of one directory: one may go by a symlink.
func sameDir(a, b blobs.Dir) bool {
	if path.Clean(string(a)) == path.Clean(string(b)) {
		return true
	}
	pa, aerr := filepath.EvalSymlinks(string(a))
	pb, berr := filepath.EvalSymlinks(string(b))
	return aerr == nil && berr == nil && pa == pb
}

// options of the runtime's mount that ours has, too, are all but these.
var notKept = []string{"bind", "rbind", "ro", "rw", "suid", "nosuid", "dev", "nodev", "idmap", "ridmap", api.SELinuxRelabel}

// mount is the mount that shows source in the place of the volume.
func (v volume) mount(source string) *api.Mount {
	options := []string{"bind", "ro", "nosuid", "nodev"}
	for _, o := range v.options {
		if !slices.Contains(notKept, o) && !slices.Contains(options, o) {
			options = append(options, o)
		}
	}
	return &api.Mount{Type: "bind", Source: source, Destination: v.destination, Options: options}
}
