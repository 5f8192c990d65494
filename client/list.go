// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package client

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
	"github.com/artifact-snapshotter/artifact-snapshotter/blobs"
	"github.com/artifact-snapshotter/artifact-snapshotter/images"
	"github.com/artifact-snapshotter/artifact-snapshotter/snapshot"
	"github.com/artifact-snapshotter/artifact-snapshotter/store"
	"github.com/artifact-snapshotter/artifact-snapshotter/unpack"
)

// Pod is a pod with an artifact as an image volume.
type Pod struct {
	// Namespace and Name are those of Kubernetes. They are empty if the labels of the
	// sandbox do not have them.
	Namespace, Name string
	// Sandbox is the ID of the pod's sandbox.
	Sandbox string
}

// Use says who uses an artifact on this node.
type Use struct {
	Pods []Pod
	// Targets are the targets of [Client.Mount], mounted or not.
	Targets []string
	// Views are the keys of all other active snapshots and views of the artifact.
	Views []string
	// Containers are the IDs of the containers whose image is the artifact.
	Containers []string
	// Snapshots are the names of the committed snapshots, which by themselves do not mean
	// that the artifact is in use.
	Snapshots []string
}

// InUse reports whether the artifact is in use.
func (u Use) InUse() bool { return len(u.Pods)+len(u.Targets)+len(u.Views)+len(u.Containers) > 0 }

// String lists the first users.
func (u Use) String() string {
	var all []string
	for _, p := range u.Pods {
		if p.Name == "" {
			p.Name, p.Namespace = p.Sandbox, "sandbox"
		}
		all = append(all, fmt.Sprintf("the pod %s/%s", p.Namespace, p.Name))
	}
	for _, target := range u.Targets {
		all = append(all, "the mount "+target)
	}
	for _, view := range u.Views {
		all = append(all, "the snapshot "+view)
	}
	for _, id := range u.Containers {
		all = append(all, "the container "+id)
	}
	if more := len(all) - maxUsers; more > 0 {
		all = append(all[:maxUsers], fmt.Sprintf("%d more", more))
	}
	return strings.Join(all, ", ")
}

// Uses returns, by manifest, who uses the artifacts. An artifact that is neither in use nor
// unpacked is not in the result. The caller passes all artifacts of the namespace. Uses asks
// every snapshotter, since any of them may have mounted an artifact; if one does not answer,
// that is an error.
func (c *Client) Uses(ctx context.Context, all []images.Image) (map[digest.Digest]*Use, error) {
	ctx = c.Context(ctx)
	u := newUses(all)
	others, err := c.IntrospectionService().Plugins(ctx, fmt.Sprintf("type==%q", plugins.SnapshotPlugin))
	if err != nil {
		return nil, fmt.Errorf("list the snapshotters of containerd: %w", err)
	}
	names := []string{c.Snapshotter}
	for _, p := range others.Plugins {
		if p.InitErr == nil && p.ID != c.Snapshotter {
			names = append(names, p.ID)
		}
	}
	for _, name := range names {
		ours := name == c.Snapshotter
		err := c.SnapshotService(name).Walk(ctx, func(_ context.Context, i snapshots.Info) error {
			u.add(i, ours)
			return nil
		})
		if err != nil && ours {
			return nil, c.explain(err)
		}
		if err != nil {
			return nil, fmt.Errorf("list the snapshots of snapshotter %q, which may have mounted artifacts: %w", name, err)
		}
	}
	running, err := c.ContainerService().List(ctx)
	if err != nil {
		return nil, fmt.Errorf("list the containers of namespace %s: %w", c.Namespace, err)
	}
	labels := map[string]map[string]string{}
	for _, container := range running {
		labels[container.ID] = container.Labels
		u.addContainer(container)
	}
	for _, use := range u.byManifest {
		for i, pod := range use.Pods {
			// A sandbox that has just been removed, or is no container, has no labels.
			l := labels[pod.Sandbox]
			use.Pods[i].Namespace, use.Pods[i].Name = l[labelPodNamespace], l[labelPodName]
		}
		slices.SortFunc(use.Pods, func(a, b Pod) int {
			return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name), cmp.Compare(a.Sandbox, b.Sandbox))
		})
		slices.Sort(use.Targets)
	}
	return u.byManifest, nil
}

// uses collects who uses artifacts.
type uses struct {
	byManifest map[digest.Digest]*Use
	// targets and chains have the manifests by the encoded digests of images, and by the
	// chain IDs of layers.
	targets, chains map[string][]digest.Digest
	// names has the manifests by the names of images.
	names map[string]digest.Digest
}

func newUses(all []images.Image) uses {
	u := uses{map[digest.Digest]*Use{}, map[string][]digest.Digest{}, map[string][]digest.Digest{}, map[string]digest.Digest{}}
	for _, image := range all {
		manifest := image.Manifest
		u.targets[image.Target.Digest.Encoded()] = append(u.targets[image.Target.Digest.Encoded()], manifest)
		chain := image.ChainID().String()
		u.chains[chain] = append(u.chains[chain], manifest)
		u.names[image.Name] = manifest
	}
	return u
}

// add records a snapshot. ours is set if it is one of the client's snapshotter.
func (u uses) add(i snapshots.Info, ours bool) {
	volume, sub, ok := store.ParseVolume(i.Name)
	isVolume := ok && sub == ""
	var of []digest.Digest
	switch label := i.Labels[snapshot.LabelArtifact]; {
	case label != "":
		of = []digest.Digest{digest.Digest(label)}
	case i.Kind == snapshots.KindCommitted:
		of = u.chains[i.Name] // by containerd's own unpacker
	case isVolume:
		of = u.targets[volume.Hex]
	default:
		of = u.chains[i.Parent]
	}
	target, mounted := snapshot.ParseMountKey(i.Name)
	for _, manifest := range slices.Compact(slices.Sorted(slices.Values(of))) {
		use := u.of(manifest)
		switch {
		case i.Kind == snapshots.KindCommitted:
			if ours {
				use.Snapshots = append(use.Snapshots, i.Name)
			}
		case isVolume: // every container of a pod has one
			if pod := (Pod{Sandbox: volume.Sandbox}); !slices.Contains(use.Pods, pod) {
				use.Pods = append(use.Pods, pod)
			}
		case mounted:
			use.Targets = append(use.Targets, target)
		default:
			use.Views = append(use.Views, i.Name)
		}
	}
}

// addContainer records a container whose image is an artifact, whatever its root file system
// is.
func (u uses) addContainer(container containers.Container) {
	if manifest, ok := u.names[container.Image]; ok {
		use := u.of(manifest)
		use.Containers = append(use.Containers, container.ID)
	}
}

// of returns the use of an artifact.
func (u uses) of(manifest digest.Digest) *Use {
	if u.byManifest[manifest] == nil {
		u.byManifest[manifest] = &Use{}
	}
	return u.byManifest[manifest]
}

// Chain returns the name of the snapshot that containerd's own unpacker has made of the
// artifact's layers (docs/native-unpack.md), or "" if there is none.
func (c *Client) Chain(ctx context.Context, image images.Image) (string, error) {
	name := image.Artifact.ChainID().String()
	there, err := c.SnapshotService(c.Snapshotter).Stat(c.Context(ctx), name)
	switch {
	case errdefs.IsNotFound(err) || err == nil && there.Labels[snapshot.LabelLayers] == "":
		return "", nil
	case err != nil:
		return "", c.explain(err)
	}
	return name, nil
}

// Size returns the size of an artifact's layers in bytes. Layers with the same blob count
// once.
func Size(a *artifact.Artifact) (size int64) {
	for _, blob := range blobsOf(a) {
		size += blob
	}
	return size
}

// TotalSize is Size of all the artifacts: a blob that several have counts once.
func TotalSize(all []Unused) (size int64) {
	blobs := map[digest.Digest]int64{}
	for _, u := range all {
		maps.Copy(blobs, blobsOf(u.Artifact))
	}
	for _, blob := range blobs {
		size += blob
	}
	return size
}

// blobsOf returns the sizes of the layers' blobs.
func blobsOf(a *artifact.Artifact) map[digest.Digest]int64 {
	sizes := map[digest.Digest]int64{}
	for _, l := range a.Layers {
		sizes[l.Descriptor.Digest] = l.Descriptor.Size
	}
	return sizes
}

// Layout says how the daemon has laid out an artifact.
type Layout struct {
	// Raw and Tar are the modes of its raw and its tar layers. A mode is empty if the
	// artifact has no such layer.
	Raw, Tar unpack.Mode
	// Shared is how many bytes of its blobs are in containerd's own files, without a copy.
	Shared int64
}

// LayoutOf looks for the artifact's tree in the root of the daemon. If there is none,
// because nobody has asked for the artifact since the last reboot, the error is
// fs.ErrNotExist.
func LayoutOf(ctx context.Context, a *artifact.Artifact, root string, content blobs.Source) (Layout, error) {
	tree, err := unpack.Load(store.TreeDir(root, a.Manifest.Digest))
	if err != nil {
		return Layout{}, err
	}
	var l Layout
	for _, layer := range a.Layers {
		if layer.Format == artifact.FormatTarOrRaw { // otherwise the manifest says it
			layer, _ = unpack.Settle(ctx, layer, content)
		}
		switch layer.Format {
		case artifact.FormatTar:
			l.Tar = tree.Modes.Tar
		case artifact.FormatRaw:
			l.Raw = tree.Modes.Raw
		default:
		}
	}
	l.Shared, err = tree.Shared(content, a.Layers)
	return l, err
}
