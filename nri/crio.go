// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package nri

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/containerd/nri/pkg/api"
	modelspec "github.com/modelpack/model-spec/specs-go/v1"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
	"github.com/artifact-snapshotter/artifact-snapshotter/store"
)

// CRI-O bind-mounts each layer of an artifact that has a name, to <path of the volume>/<name>,
// and lists these mounts in an annotation of the container (server/container_create_linux.go,
// mountArtifact). The functions in this file turn the mounts back into volumes: the annotation
// names the artifact, and the mounts must be exactly the layers of that artifact, or of one
// directory of it.

// volumesAnnotation is the annotation in which CRI-O lists the mounts of a container as JSON
// (internal/annotations). Every version that mounts artifacts, 1.33 and later, writes one entry
// for each mount of a layer, with the path of the volume and the digest of the manifest.
const volumesAnnotation = "io.kubernetes.cri-o.Volumes"

// crioMount is an entry of volumesAnnotation (ContainerVolume of CRI-O's internal/oci).
type crioMount struct {
	ContainerPath string `json:"container_path"` // the path of the volume, not of the layer
	HostPath      string `json:"host_path"`
	Image         struct {
		Image string `json:"image"` // the manifest's digest in hex; "" if the volume is not an image
	} `json:"image"`
}

// crioVolume is a volume that volumesAnnotation lists.
type crioVolume struct {
	path string // of the volume in the container
	hex  string // of the manifest's digest; "" if the volume is not an image
}

// contains reports whether CRI-O would mount a layer of the volume at the path destination.
func (v crioVolume) contains(destination string) bool {
	return strings.HasPrefix(destination, strings.TrimSuffix(v.path, "/")+"/")
}

// bind is a bind mount of a blob from an artifact store of CRI-O.
type bind struct {
	destination, source string // as the runtime has them
	blob                digest.Digest
	options             []string
	known               bool // the store is in blob_roots of the configuration
}

// place is where a blob is mounted.
type place struct {
	path string
	blob digest.Digest
}

// crioVolumes returns the volumes of artifacts that the binds belong to. The binds are replaced
// all together or not at all: if one of them cannot be explained, the only volume returned is
// one that is refused.
func (p *Plugin) crioVolumes(ctx context.Context, pod *api.PodSandbox, c *api.Container, binds []bind) []volume {
	volumes, err := p.matchCRIO(ctx, pod, c, binds)
	if err != nil {
		return []volume{{Volume: store.Volume{Refused: err}, destination: binds[0].destination}}
	}
	return volumes
}

// matchCRIO returns the volumes whose mounts are the binds, each bind in exactly one volume. It
// leaves out binds that the annotation lists for other volumes: those of an image that CRI-O
// mounts as an artifact, and those of a hostPath, say.
func (p *Plugin) matchCRIO(ctx context.Context, pod *api.PodSandbox, c *api.Container, binds []bind) (volumes []volume, err error) {
	// The pod must not choose the artifact. CRI-O copies the pod's annotations to the container
	// and then overwrites this one (SpecAddAnnotations in internal/factory/container), but only
	// the check makes sure. Comparing the mounts is not enough: CRI-O does not mount layers
	// without a name, so the mounts do not tell apart two artifacts that differ only in those.
	if _, forged := pod.GetAnnotations()[volumesAnnotation]; forged {
		return nil, fmt.Errorf("the pod has the annotation %s, which is reserved for CRI-O: remove it: %w", volumesAnnotation, errdefs.ErrInvalidArgument)
	}
	bySource, layers := listed(c.GetAnnotations()[volumesAnnotation], binds)
	binds = slices.DeleteFunc(slices.Clone(binds), func(b bind) bool {
		return slices.Contains(bySource[b.source], crioVolume{path: path.Clean(b.destination)})
	})
	at, mounted := map[place]int{}, map[string]int{} // indexes of binds; number of mounts at a path
	for i, b := range binds {
		if !b.known {
			return nil, fmt.Errorf("CRI-O mounts it from %s, which is not in blob_roots of the snapshotter's configuration: %w", b.source, errdefs.ErrFailedPrecondition)
		}
		at[place{path.Clean(b.destination), b.blob}] = i
	}
	for _, m := range c.GetMounts() {
		mounted[path.Clean(m.GetDestination())]++
	}
	explained := make([]bool, len(binds))
	images := map[crioVolume]bool{}
	for _, v := range slices.SortedFunc(maps.Keys(layers), crioVolume.compare) {
		found, explains, err := p.matchVolume(ctx, v, layers[v], at)
		if errors.Is(err, artifact.ErrNotArtifact) { // CRI-O mounts some images as artifacts
			images[v] = true
			continue
		}
		if err != nil {
			return nil, err
		}
		if mounted[v.path] > 0 {
			return nil, fmt.Errorf("something else is mounted at %s, which is the path of the volume: %w", v.path, errdefs.ErrInvalidArgument)
		}
		mounted[v.path]++
		for _, i := range explains {
			b := binds[i]
			switch n := mounted[path.Clean(b.destination)]; {
			case n > 1: // RemoveMount of runtime-tools, which NRI uses, removes only the first
				return nil, fmt.Errorf("CRI-O has %d mounts at %s, and NRI can remove only one: give each layer a name of its own: %w", n, b.destination, errdefs.ErrInvalidArgument)
			case explained[i]:
				return nil, fmt.Errorf("the layer that CRI-O mounts at %.255s belongs to two volumes: %w", b.destination, errdefs.ErrFailedPrecondition)
			}
			explained[i] = true
			found.remove, found.options = append(found.remove, b.destination), b.options
		}
		volumes = append(volumes, found)
	}
	for i, b := range binds {
		ofImage := func(v crioVolume) bool { return images[v] && v.contains(path.Clean(b.destination)) }
		if !explained[i] && !slices.ContainsFunc(bySource[b.source], ofImage) {
			return nil, fmt.Errorf("CRI-O mounts a layer at %.255s, but does not say in the annotation %s which artifact it belongs to (CRI-O 1.33 and later do): %w",
				b.destination, volumesAnnotation, errdefs.ErrNotFound)
		}
	}
	return volumes, nil
}

func (v crioVolume) compare(w crioVolume) int {
	return cmp.Or(cmp.Compare(v.path, w.path), cmp.Compare(v.hex, w.hex))
}

// listed returns which volumes the annotation lists for the source of each bind, and how many
// layers of each image it lists. An annotation that is not JSON lists nothing.
func listed(annotation string, binds []bind) (bySource map[string][]crioVolume, layers map[crioVolume]int) {
	var mounts []crioMount
	if json.Unmarshal([]byte(annotation), &mounts) != nil {
		return nil, nil
	}
	bySource, layers = map[string][]crioVolume{}, map[crioVolume]int{}
	for _, b := range binds {
		bySource[b.source] = nil
	}
	for _, m := range mounts {
		if _, ok := bySource[m.HostPath]; !ok {
			continue
		}
		v := crioVolume{path.Clean(m.ContainerPath), m.Image.Image}
		bySource[m.HostPath] = append(bySource[m.HostPath], v)
		if v.hex != "" {
			layers[v]++
		}
	}
	return bySource, layers
}

// matchVolume finds the directory of the artifact whose layers are mounted in v, and returns
// the indexes of their binds: CRI-O does not say which sub path the pod asked for. count is how
// many layers CRI-O has mounted. If the mounts fit several directories, or none, the error says
// so. It is artifact.ErrNotArtifact if the manifest is not an artifact's.
func (p *Plugin) matchVolume(ctx context.Context, v crioVolume, count int, at map[place]int) (volume, []int, error) {
	desc, err := p.Blobs.Find(v.hex)
	if err != nil {
		return volume{}, nil, err
	}
	a, err := artifact.Read(ctx, p.Blobs, desc)
	if err != nil {
		return volume{}, nil, err
	}
	layers, binds := map[string]int{}, map[string][]int{} // by the sub path that selects them
	for _, l := range a.Layers {
		name := crioName(l.Descriptor.Annotations)
		if ctx.Err() != nil {
			return volume{}, nil, errBusy
		}
		if len(name) > maxNameBytes {
			return volume{}, nil, fmt.Errorf("layer %s has a name of %d bytes, which no path may have: %w", l.Descriptor.Digest, len(name), errdefs.ErrInvalidArgument)
		}
		for sub, rest := range subPaths(name) {
			layers[sub]++
			if i, ok := at[place{path.Join(v.path, rest), l.Descriptor.Digest}]; ok {
				binds[sub] = append(binds[sub], i)
			}
		}
	}
	var fits []string
	for _, sub := range slices.Sorted(maps.Keys(layers)) {
		if layers[sub] == count && len(binds[sub]) == count {
			fits = append(fits, sub)
		}
	}
	switch len(fits) {
	case 0:
		return volume{}, nil, fmt.Errorf("what CRI-O mounts in %.255s is not exactly the named layers of artifact %s, or of a directory of it: remove the artifact and pull it again: %w",
			v.path, a.Manifest.Digest, errdefs.ErrNotFound)
	case 1:
		found := volume{Volume: store.Volume{Hex: a.Manifest.Digest.Encoded(), Target: a.Manifest}, destination: v.path, sub: fits[0]}
		return found, binds[found.sub], nil
	}
	return volume{}, nil, fmt.Errorf("what CRI-O mounts in %.255s may be the directory %.255q or %.255q of artifact %s: mount the whole artifact: %w",
		v.path, fits[0], fits[1], a.Manifest.Digest, errdefs.ErrFailedPrecondition)
}

// crioName is the path in the volume that CRI-O gives a layer with these annotations
// (internal/ociartifact/store.go, artifactName); "" if CRI-O does not mount the layer.
func crioName(annotations map[string]string) string {
	if name, ok := annotations[ocispec.AnnotationTitle]; ok {
		return name
	}
	return annotations[modelspec.AnnotationFilepath]
}

// subPaths yields every sub path of a volume with which CRI-O mounts a layer of that name, and
// the path at which it is then mounted in the volume. The sub path "" is the whole volume.
// CRI-O compares the name as it is with a clean sub path (server/container_create_linux.go,
// FilterMountPathsBySubPath), then joins the rest so that it cannot leave the volume.
func subPaths(name string) func(yield func(sub, rest string) bool) {
	inVolume := func(name string) string { return strings.TrimPrefix(path.Join("/", name), "/") }
	return func(yield func(sub, rest string) bool) {
		if name == "" || !yield("", inVolume(name)) {
			return
		}
		for i := range len(name) {
			if name[i] != '/' {
				continue
			}
			if sub := name[:i]; sub != "" && sub != "." && sub == path.Clean(sub) && !yield(sub, inVolume(name[i+1:])) {
				return
			}
		}
	}
}
