// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package client

import (
	"reflect"
	"slices"
	"testing"

	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
	"github.com/artifact-snapshotter/artifact-snapshotter/images"
	"github.com/artifact-snapshotter/artifact-snapshotter/snapshot"
)

func TestContainersUseTheirImages(t *testing.T) {
	image := func(name, manifest string) (i images.Image) {
		i.Name = name
		i.Target.Digest = digest.FromString(manifest)
		i.Manifest = i.Target.Digest
		return i
	}
	u := newUses([]images.Image{image("r/a:v1", "a"), image("r/a:v2", "a"), image("r/b:v1", "b")})
	for id, name := range map[string]string{"one": "r/a:v2", "two": "ordinary", "three": ""} {
		u.addContainer(containers.Container{ID: id, Image: name})
	}
	use := u.byManifest[digest.FromString("a")]
	if len(u.byManifest) != 1 || use == nil || !use.InUse() || !slices.Equal(use.Containers, []string{"one"}) {
		t.Errorf("%+v", u.byManifest)
	}
}

func TestUsesAreFound(t *testing.T) {
	image := func(name string, index bool) (i images.Image) {
		layer := artifact.Layer{Descriptor: ocispec.Descriptor{Digest: digest.FromString(name)}}
		i.Manifest = digest.FromString("manifest of " + name)
		i.Artifact = &artifact.Artifact{Layers: []artifact.Layer{layer}}
		i.Target.Digest = i.Manifest
		if index {
			i.Target.Digest = digest.FromString("index of " + name)
		}
		return i
	}
	a, b := image("a", false), image("b", true)
	manifest := func(i images.Image) digest.Digest { return i.Manifest }
	label := func(i images.Image) map[string]string {
		return map[string]string{snapshot.LabelArtifact: manifest(i).String()}
	}
	volume := func(sandbox string, i images.Image) string {
		return "/run/containerd/io.containerd.grpc.v1.cri/image-volumes/" + sandbox + "/" + i.Target.Digest.Encoded()
	}
	for name, c := range map[string]struct {
		info  snapshots.Info
		ours  bool
		of    images.Image
		want  Use
		inUse bool
	}{
		"a pod":                         {snapshots.Info{Name: volume("pod", a), Labels: label(a), Kind: snapshots.KindActive}, true, a, Use{Pods: []Pod{{Sandbox: "pod"}}}, true},
		"a pod with an index":           {snapshots.Info{Name: volume("pod", b), Labels: label(b), Kind: snapshots.KindActive}, true, b, Use{Pods: []Pod{{Sandbox: "pod"}}}, true},
		"a pod by another snapshotter":  {snapshots.Info{Name: volume("pod", b), Kind: snapshots.KindActive, Parent: "something"}, false, b, Use{Pods: []Pod{{Sandbox: "pod"}}}, true},
		"a mount":                       {snapshots.Info{Name: snapshot.MountKey("/mnt/a"), Labels: label(a), Kind: snapshots.KindView}, true, a, Use{Targets: []string{"/mnt/a"}}, true},
		"a view":                        {snapshots.Info{Name: "mine", Labels: label(a), Kind: snapshots.KindView, Parent: "any"}, true, a, Use{Views: []string{"mine"}}, true},
		"a view of unpacked layers":     {snapshots.Info{Name: "mine", Kind: snapshots.KindView, Parent: a.Artifact.ChainID().String()}, false, a, Use{Views: []string{"mine"}}, true},
		"unpacked":                      {snapshots.Info{Name: "x", Labels: label(a), Kind: snapshots.KindCommitted}, true, a, Use{Snapshots: []string{"x"}}, false},
		"unpacked by containerd":        {snapshots.Info{Name: a.Artifact.ChainID().String(), Kind: snapshots.KindCommitted}, true, a, Use{Snapshots: []string{a.Artifact.ChainID().String()}}, false},
		"unpacked for somebody else":    {snapshots.Info{Name: a.Artifact.ChainID().String(), Kind: snapshots.KindCommitted}, false, a, Use{}, false},
		"an ordinary container":         {snapshots.Info{Name: "container", Kind: snapshots.KindActive, Parent: "sha256:image"}, true, a, Use{}, false},
		"an ordinary image as a volume": {snapshots.Info{Name: volume("pod", image("other", false)), Kind: snapshots.KindActive}, true, a, Use{}, false},
	} {
		u := newUses([]images.Image{a, b})
		u.add(c.info, c.ours)
		got := Use{}
		if use := u.byManifest[manifest(c.of)]; use != nil {
			got = *use
		}
		if !reflect.DeepEqual(got, c.want) || got.InUse() != c.inUse {
			t.Errorf("%s: %+v, in use %t; want %+v, %t", name, got, got.InUse(), c.want, c.inUse)
		}
	}
}
