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
	"github.com/artifact-snapshotter/artifact-snapshotter/unpack"
)

// The names that the runtimes register with.
const (
	crio       = "cri-o"
	containerd = "containerd"
)

// criNamespace is containerd's namespace of the images of its CRI plugin.
const criNamespace = "k8s.io"

// blobPath matches the path of a blob in an OCI layout.
var blobPath = regexp.MustCompile(`^(/.*)/blobs/(sha256|sha384|sha512)/([0-9a-f]+)$`)

// volume is an image volume of a container. It may be that of an artifact or of an image.
type volume struct {
	// Volume is the request to the store.
	store.Volume
	// destination is the path of the volume in the container. remove lists the destinations
	// of the runtime's mounts that must be removed. A mount at destination itself is
	// replaced without that.
	destination string
	remove      []string
	options     []string // of the runtime's mount
	source      string   // of containerd's mount; "" with CRI-O
	// sub is the sub path that the pod asked for: the directory of the volume to mount.
	sub string
}

// find returns the image volumes among the mounts of a container. It includes volumes of
// images on containerd. A CRI-O artifact store that is not configured is found only if the
// runtime is CRI-O.
func (p *Plugin) find(ctx context.Context, runtime string, pod *api.PodSandbox, c *api.Container) []volume {
	var volumes []volume
	var binds []bind
	for _, m := range c.GetMounts() {
		if !isBind(m) {
			continue
		}
		if v, ok := containerdVolume(m, pod.GetId()); ok {
			volumes = append(volumes, v)
		} else if b, ok := p.crioBind(m, runtime); ok {
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

// containerdVolume returns the image volume that containerd has mounted for the sandbox. ok is
// false if the mount is not one.
func containerdVolume(m *api.Mount, sandbox string) (_ volume, ok bool) {
	v, sub, ok := store.ParseVolume(path.Clean(m.GetSource()))
	if !ok || v.Sandbox != sandbox {
		return volume{}, false
	}
	v.Namespace = criNamespace
	return volume{Volume: v, destination: m.GetDestination(), options: m.GetOptions(), source: m.GetSource(), sub: sub}, true
}

// directory returns containerd's own directory of the whole volume.
func (v *volume) directory() string { return strings.TrimSuffix(path.Clean(v.source), "/"+v.sub) }

// crioBind returns the bind mount of a blob from an artifact store of CRI-O. ok is false if the
// mount is not one. A store that is not configured counts, because what CRI-O mounts from it is
// wrong, too; the volume is then refused.
func (p *Plugin) crioBind(m *api.Mount, runtime string) (_ bind, ok bool) {
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

// sameDir reports whether two paths lead to the same directory; one may contain a symbolic link.
func sameDir(a, b blobs.Dir) bool {
	if path.Clean(string(a)) == path.Clean(string(b)) {
		return true
	}
	pa, aerr := filepath.EvalSymlinks(string(a))
	pb, berr := filepath.EvalSymlinks(string(b))
	return aerr == nil && berr == nil && pa == pb
}

// replacedOptions are the options of the runtime's mount that our mount does not take over: it
// is always a read-only bind, is never relabelled, and its tree has the right owners.
var replacedOptions = []string{"bind", "rbind", "ro", "rw", "suid", "nosuid", "dev", "nodev", "idmap", "ridmap", api.SELinuxRelabel}

// bindMount returns the mount of source that takes the place of the volume.
func (v *volume) bindMount(source string) *api.Mount {
	m := unpack.Bind(source)
	for _, o := range v.options {
		if !slices.Contains(replacedOptions, o) && !slices.Contains(m.Options, o) {
			m.Options = append(m.Options, o)
		}
	}
	return &api.Mount{Type: m.Type, Source: m.Source, Destination: v.destination, Options: m.Options}
}
