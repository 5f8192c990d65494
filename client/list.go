// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package client

import (
	"cmp"
	"context"
	"fmt"
	"slices"

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

// Pod is a pod that has an artifact as an image volume.
type Pod struct {
	// Namespace and Name are Kubernetes'; empty if the sandbox does not tell.
	Namespace, Name string
	// Sandbox is the ID of its sandbox.
	Sandbox string
}

// Use is who uses an artifact on this node.
type Use struct {
	Pods []Pod
	// Targets are those of [Client.Mount], mounted or not.
	Targets []string
	// Views are the keys of all other snapshots that show the artifact.
	Views []string
	// Containers are the IDs of those whose image it is.
	Containers []string
	// Snapshots are the committed ones, which make no use of it by themselves.
	Snapshots []string
}

// InUse reports whether anybody uses the artifact.
func (u Use) InUse() bool { return len(u.Pods)+len(u.Targets)+len(u.Views)+len(u.Containers) > 0 }

// Uses returns who uses which of the artifacts, by their manifests; an artifact that
// is neither in use nor unpacked is not in it. All images of the namespace must be
// given. Every snapshotter counts, for an artifact may be shown by another one, too,
// and one that cannot be asked is an error.
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
			return nil, fmt.Errorf("list the snapshots of snapshotter %q, which may show artifacts: %w", name, err)
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
			// A sandbox that has just gone, or is not a container, is its ID.
			l := labels[pod.Sandbox]
			use.Pods[i].Namespace, use.Pods[i].Name = l["io.kubernetes.pod.namespace"], l["io.kubernetes.pod.name"]
		}
		slices.SortFunc(use.Pods, func(a, b Pod) int {
			return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name), cmp.Compare(a.Sandbox, b.Sandbox))
		})
		slices.Sort(use.Targets)
	}
	return u.byManifest, nil
}

// uses makes uses of snapshots.
type uses struct {
	byManifest map[digest.Digest]*Use
	// targets and chains lead from the encoded digests of images, and from the
	// chain IDs of layers, to the manifests that they may be of.
	targets, chains map[string][]digest.Digest
	// names are those of the images.
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

// add counts a snapshot, which is of the client's own snapshotter or not.
func (u uses) add(i snapshots.Info, ours bool) {
	volume, sub, ok := store.ParseVolume(i.Name)
	isVolume := ok && sub == ""
	var of []digest.Digest
	switch label := i.Labels[snapshot.LabelArtifact]; {
	case label != "":
		of = []digest.Digest{digest.Digest(label)}
	case i.Kind == snapshots.KindCommitted:
		of = u.chains[i.Name] // containerd's own unpacker has made it
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
		case isVolume: // each container of a pod has one
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

// addContainer counts a container whose image is an artifact, though it may have a
// root filesystem from elsewhere, or none.
func (u uses) addContainer(container containers.Container) {
	if manifest, ok := u.names[container.Image]; ok {
		use := u.of(manifest)
		use.Containers = append(use.Containers, container.ID)
	}
}

// of is the use of an artifact.
func (u uses) of(manifest digest.Digest) *Use {
	if u.byManifest[manifest] == nil {
		u.byManifest[manifest] = &Use{}
	}
	return u.byManifest[manifest]
}

// Chain returns the name of the snapshot that containerd's own unpacker has made of
// the artifact's layers (docs/native-unpack.md), or "" if there is none.
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

// Size is the bytes of the blobs of an artifact's layers, each blob once.
func Size(a *artifact.Artifact) (size int64) {
	for _, blob := range blobsOf(a) {
		size += blob
	}
	return size
}

// blobs are the blobs of the layers, with their sizes.
func blobsOf(a *artifact.Artifact) map[digest.Digest]int64 {
	sizes := map[digest.Digest]int64{}
	for _, l := range a.Layers {
		sizes[l.Descriptor.Digest] = l.Descriptor.Size
	}
	return sizes
}

// Layout is how the daemon has laid an artifact out.
type Layout struct {
	// Raw and Tar are the modes that its raw and its tar layers have, empty if it
	// has none of the kind.
	Raw, Tar unpack.Mode
	// Shared is how many bytes of its blobs are containerd's very files, which
	// no copy was made of.
	Shared int64
}

// LayoutOf looks into the root of the daemon for the artifact's Tree. One that is
// not there, since nobody has asked for it since the last reboot, is
// fs.ErrNotExist.
func LayoutOf(ctx context.Context, a *artifact.Artifact, root string, content blobs.Source) (Layout, error) {
	tree, err := unpack.Load(store.TreeDir(root, a.Manifest.Digest))
	if err != nil {
		return Layout{}, err
	}
	var l Layout
	for _, layer := range a.Layers {
		if layer.Format == artifact.FormatTarOrRaw { // of the others the manifest says enough
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
