// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"archive/tar"
	"context"
	"encoding/json"
	"errors"
	"maps"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	modelspec "github.com/modelpack/model-spec/specs-go/v1"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
	"github.com/artifact-snapshotter/artifact-snapshotter/client"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/treelist"
	"github.com/artifact-snapshotter/artifact-snapshotter/snapshot"
)

// connect returns a client of the node's containerd in CRI's namespace.
func connect(t *testing.T, n *node.Node) *client.Client {
	t.Helper()
	c, err := client.Connect(t.Context(), n.Address, "k8s.io", "artifact")
	check(t, err)
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// unpack runs `unpack` and returns the name of the snapshot.
func unpack(t *testing.T, n *node.Node, ref string) string {
	t.Helper()
	out, _, err := n.Artifact("unpack", ref)
	check(t, err)
	return strings.TrimSpace(out)
}

// artifactOf returns the artifact that containerd has under ref.
func artifactOf(t *testing.T, n *node.Node, ref string) *artifact.Artifact {
	t.Helper()
	image, err := connect(t, n).Image(t.Context(), ref)
	check(t, err)
	return image.Artifact
}

// snapshotName computes the expected name of the snapshot from the artifact's config and
// manifest.
func snapshotName(t *testing.T, n *node.Node, ref string) string {
	t.Helper()
	a := artifactOf(t, n, ref)
	text, err := os.ReadFile(blobPath(n, a.Config.Encoded()))
	check(t, err)
	var config modelspec.Model
	check(t, json.Unmarshal(text, &config))
	return digest.FromString("artifact " + identity.ChainID(config.ModelFS.DiffIDs).String() + " " + a.Manifest.Digest.String()).String()
}

// snapshotsOf returns the kinds of all snapshots of artifacts, by key.
func snapshotsOf(t *testing.T, n *node.Node) map[string]string {
	t.Helper()
	c, err := client.Connect(t.Context(), n.Address, "k8s.io", "artifact")
	check(t, err)
	defer c.Close()
	found := map[string]string{}
	check(t, c.SnapshotService("artifact").Walk(c.Context(t.Context()), func(_ context.Context, i snapshots.Info) error {
		if i.Labels[snapshot.LabelArtifact] != "" {
			found[i.Name] = i.Kind.String()
		}
		return nil
	}))
	return found
}

// wantSnapshot mounts a view of the snapshot with ctr and compares its content.
func wantSnapshot(t *testing.T, n *node.Node, name string, want []treelist.Entry) {
	t.Helper()
	target := t.TempDir()
	key := "view of " + name
	var commands string
	waitFor(t, "a view of "+name, func() bool {
		var err error
		commands, err = n.Ctr("snapshots", "--snapshotter", "artifact", "view", "--target", target, key, name)
		check(t, err)
		// Without this label a garbage collection may delete the view.
		_, err = n.Ctr("snapshots", "--snapshotter", "artifact", "label", key, "containerd.io/gc.root=test")
		return err == nil
	})
	out, err := exec.CommandContext(t.Context(), "sh", "-e", "-c", commands).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", commands, err, out)
	}
	got, err := treelist.List(target)
	check(t, errors.Join(err, mount.Unmount(target, 0)))
	if diff := treelist.Diff(want, got); diff != "" {
		t.Errorf("snapshot %s differs from the source:\n%s", name, diff)
	}
	_, err = n.Ctr("snapshots", "--snapshotter", "artifact", "rm", key)
	check(t, err)
}

// removeImage deletes all names of the image, the last one together with a garbage
// collection.
func removeImage(t *testing.T, n *node.Node, ref string) {
	t.Helper()
	c := connect(t, n)
	image, err := c.Image(t.Context(), ref)
	check(t, err)
	all, err := c.Images(t.Context())
	check(t, err)
	args := []string{"images", "rm", "--sync"}
	for _, i := range all {
		if i.Target.Digest == image.Target.Digest {
			args = append(args, i.Name)
		}
	}
	_, err = n.Ctr(args...)
	check(t, err)
}

// collect makes containerd collect garbage.
func collect(t *testing.T, c *client.Client) {
	t.Helper()
	ctx := c.Context(t.Context())
	lease, err := c.LeasesService().Create(ctx, leases.WithRandomID())
	check(t, err)
	check(t, c.LeasesService().Delete(ctx, lease, leases.SynchronousDelete))
}

func TestAnUnpackedArtifactIsASnapshotUntilItsImageIsDeleted(t *testing.T) {
	n := node.ForTest(t, node.Options{})
	src := writeModel(t)
	before := daemonUsage(t, n)
	for _, form := range []pack.Form{pack.Raw, pack.Tar, pack.TarGzip} {
		t.Run(string(form), func(t *testing.T) {
			pushModel(t, n, src, form, "ctr")
			ref := n.Registry + "/models/tiny:ctr"
			_, err := n.Ctr("images", "pull", "--plain-http", ref)
			check(t, err)
			name := unpack(t, n, ref)
			if want := snapshotName(t, n, ref); name != want {
				t.Errorf("the snapshot is %s, want %s", name, want)
			}
			if again := unpack(t, n, ref); again != name {
				t.Errorf("the second unpack returned %s, want %s", again, name)
			}
			manifest := artifactOf(t, n, ref).Manifest.Digest
			if byDigest := unpack(t, n, manifest.String()); byDigest != name {
				t.Errorf("unpack by digest returned %s, want %s", byDigest, name)
			}
			wantSnapshot(t, n, name, wantTree(t, src, form))

			out, _, err := n.Artifact("unpack", "--output", "json", ref)
			check(t, err)
			var printed map[string]string
			check(t, json.Unmarshal([]byte(out), &printed))
			if want := map[string]string{"reference": ref, "manifest": manifest.String(), "snapshot": name}; !maps.Equal(printed, want) {
				t.Errorf("printed %v, want %v", printed, want)
			}

			// Garbage collection deletes the snapshot only together with its image.
			c := connect(t, n)
			collect(t, c)
			if got, want := snapshotsOf(t, n), map[string]string{name: "Committed"}; !maps.Equal(got, want) {
				t.Errorf("the snapshots are %v, want %v", got, want)
			}
			if all, err := c.LeasesService().List(c.Context(t.Context())); err != nil || len(all) > 0 {
				t.Errorf("there are the leases %v, %v; want none", all, err)
			}
			removeImage(t, n, ref)
			if left := snapshotsOf(t, n); len(left) > 0 {
				t.Errorf("remaining snapshots: %v", left)
			}
			wantUsage(t, n, before)
		})
	}
}

// A pod keeps its content when the image is deleted. The snapshot of unpack affects neither
// the pod nor the deletion.
func TestAPodHasAnUnpackedArtifact(t *testing.T) {
	n := node.ForTest(t, node.Options{})
	src := writeModel(t)
	before := daemonUsage(t, n)
	ref := pulled(t, n, src, pack.TarZstd)
	name := unpack(t, n, ref)
	pod, err := n.RunPod(reading(ref))
	check(t, err)
	_, err = n.Crictl("rmi", ref)
	check(t, err)
	waitFor(t, "removal of the snapshot", func() bool { return snapshotsOf(t, n)[name] == "" })
	wantReading(t, pod)
	wantVolume(t, pod, "main", "/model", wantTree(t, src, pack.TarZstd))
	check(t, pod.Remove())
	wantUsage(t, n, before)
}

// A chain ID depends neither on file names nor on whether a layer belongs to an image.
func TestArtifactsWithTheSameChainIDHaveSnapshotsOfTheirOwn(t *testing.T) {
	n := node.ForTest(t, node.Options{})
	pulledAs := func(name string, layer pack.Layer) string {
		a := &pack.Artifact{ArtifactType: modelspec.ArtifactTypeModelManifest, Name: name, Layers: []pack.Layer{layer}}
		_, err := a.Push(t.Context(), n.Registry, "models/"+name, "latest")
		check(t, err)
		ref := n.Registry + "/models/" + name + ":latest"
		_, err = n.Pull(ref)
		check(t, err)
		return ref
	}
	content := []byte("the same bytes")
	expected := func(name string) []treelist.Entry {
		entry := fileEntry(name, content)
		entry.Mode, entry.UID, entry.GID, entry.ModTime = 0o640, 1234, 5678, 1612325106789000000 // the attributes of rawLayer
		return []treelist.Entry{entry}
	}

	one, two := pulledAs("one", rawLayer("one", content)), pulledAs("two", rawLayer("two", content))
	first, second := unpack(t, n, one), unpack(t, n, two)
	if want := snapshotName(t, n, one); first != want {
		t.Errorf("the first snapshot is %s, want %s", first, want)
	}
	if want := snapshotName(t, n, two); second != want {
		t.Errorf("the second snapshot is %s, want %s", second, want)
	}
	wantSnapshot(t, n, first, expected("one"))
	wantSnapshot(t, n, second, expected("two"))
	_, err := n.Crictl("rmi", one)
	check(t, err)
	waitFor(t, "removal of the first snapshot", func() bool { return snapshotsOf(t, n)[first] == "" })
	if again := unpack(t, n, two); again != second {
		t.Errorf("the second snapshot is now %s, want %s", again, second)
	}
	wantSnapshot(t, n, second, expected("two"))

	archive := archiveOf(t, file("in the layer"))
	image, err := pack.Image(ocispec.ImageConfig{}, false, archive)
	check(t, err)
	_, err = image.Push(t.Context(), n.Registry, "images/same", "latest")
	check(t, err)
	_, err = n.Pull(n.Registry + "/images/same:latest") // the pull unpacks it
	check(t, err)
	wantUnpacked(t, n, digest.FromBytes(archive), "artifact")
	three := pulledAs("three", tarLayer(t, modelspec.MediaTypeModelWeight, archive))
	third := unpack(t, n, three)
	if want := snapshotName(t, n, three); third != want {
		t.Errorf("the snapshot is %s, want %s", third, want)
	}
	wantSnapshot(t, n, third, []treelist.Entry{fileEntry("in the layer", []byte("in the layer"))})
}

func TestAnIndexIsUnpackedForThisPlatform(t *testing.T) {
	n := node.ForTest(t, node.Options{})
	src := writeModel(t)
	ref := pulledIndex(t, n, src)
	name := unpack(t, n, ref)
	if want := snapshotName(t, n, ref); name != want {
		t.Errorf("the snapshot is %s, want %s", name, want)
	}
	if again := unpack(t, n, artifactOf(t, n, ref).Manifest.Digest.String()); again != name {
		t.Errorf("unpack by the manifest's digest returned %s, want %s", again, name)
	}
	collect(t, connect(t, n))
	wantSnapshot(t, n, name, wantTree(t, src, pack.Raw))
	removeImage(t, n, ref)
	if left := snapshotsOf(t, n); len(left) > 0 {
		t.Errorf("remaining snapshots: %v", left)
	}
}

func TestArtifactsWithTheSameChainIDMayBeUnpackedAtOnce(t *testing.T) {
	n := node.ForTest(t, node.Options{})
	c := connect(t, n)
	var refs []string
	for _, name := range []string{"one", "two"} {
		refs = append(refs, push(t, n, name, rawLayer(name, []byte("the same bytes"))))
	}
	const times = 4
	names := make([][times]string, len(refs))
	var group errgroup.Group
	for i, ref := range refs {
		image, err := c.Image(t.Context(), ref)
		check(t, err)
		for j := range times {
			group.Go(func() (err error) {
				names[i][j], err = c.Unpack(t.Context(), image)
				return err
			})
		}
	}
	check(t, group.Wait())
	for i, ref := range refs {
		for _, name := range names[i] {
			if name != names[i][0] {
				t.Errorf("%s has the snapshots %q, want one", ref, names[i])
			}
		}
	}
	if names[0][0] == names[1][0] {
		t.Errorf("both have the snapshot %s", names[0][0])
	}
	if got := snapshotsOf(t, n); len(got) != 2 {
		t.Errorf("the snapshots are %v, want two", got)
	}
}

// containerd does not unpack the layers of an image whose chain ID is the name of a
// snapshot. So the snapshot of an artifact with the same layers must not have this name:
// otherwise a container would get the artifact, or an incomplete root.
func TestAnImageWithTheLayersOfAnUnpackedArtifactHasItsOwnRoot(t *testing.T) {
	n := node.ForTest(t, node.Options{})
	program, err := n.GuestProgram()
	check(t, err)
	archive := archiveOf(t, pack.Member{Header: tar.Header{Name: "guest", Mode: 0o755}, Data: program}, file("another layer than the test image's"))
	name := unpack(t, n, push(t, n, "first", tarLayer(t, modelspec.MediaTypeModelWeight, archive)))
	image, err := pack.Image(ocispec.ImageConfig{Entrypoint: []string{node.Guest}, Cmd: []string{"pause"}}, false, archive)
	check(t, err)
	_, err = image.Push(t.Context(), n.Registry, "images/second", "latest")
	check(t, err)
	ref := n.Registry + "/images/second:latest"
	_, err = n.Pull(ref)
	check(t, err)
	wantUnpacked(t, n, digest.FromBytes(archive), "artifact")

	pod, err := n.RunSandbox(node.PodSpec{})
	check(t, err)
	check(t, pod.Start(node.Container{Name: "main", Image: ref}))
	if got := snapshotsOf(t, n); len(got) != 1 || got[name] != "Committed" {
		t.Errorf("the snapshots of artifacts are %v, want %s alone", got, name)
	}
	check(t, pod.Remove())
}
