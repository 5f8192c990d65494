// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"archive/tar"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	containerdsnapshots "github.com/containerd/containerd/v2/core/snapshots"
	modelspec "github.com/modelpack/model-spec/specs-go/v1"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/treelist"
)

// The platforms for which containerd's own unpacker unpacks artifacts.
const (
	dockerPlatform    = "linux(+docker-model)"
	modelPackPlatform = "linux(+modelpack)"
)

// pullNatively makes containerd pull ref and unpack it for a snapshotter. Without a
// platform it uses the node's.
func pullNatively(n *node.Node, snapshotter, platform, ref string) error {
	args := []string{"images", "pull", "--plain-http", "--snapshotter", snapshotter}
	if platform != "" {
		args = append(args, "--platform", platform)
	}
	_, err := n.Ctr(append(args, ref)...)
	return err
}

// native is an artifact that containerd has pulled and unpacked.
type native struct {
	ref      string
	manifest ocispec.Manifest
	chain    []string // its snapshots, the lowest first
}

// mustPullNatively pushes and pulls a, and checks that the snapshots of its config exist.
func mustPullNatively(t *testing.T, n *node.Node, a *pack.Artifact, snapshotter, platform, tag string) (got native) {
	t.Helper()
	d, err := a.Push(t.Context(), n.Registry, "models/native", tag)
	check(t, err)
	got.ref = n.Registry + "/models/native:" + tag
	check(t, pullNatively(n, snapshotter, platform, got.ref))
	collect(t, connect(t, n)) // removes what only the pull's lease retained
	text, err := os.ReadFile(blobPath(n, d.Encoded()))
	check(t, err)
	check(t, json.Unmarshal(text, &got.manifest))
	text, err = os.ReadFile(blobPath(n, got.manifest.Config.Digest.Encoded()))
	check(t, err)
	var config ocispec.Image
	check(t, json.Unmarshal(text, &config))
	all := snapshotsIn(t, n, snapshotter)
	for _, id := range identity.ChainIDs(config.RootFS.DiffIDs) {
		if all[id.String()] != "Committed" {
			t.Fatalf("there is no snapshot %s: %v", id, all)
		}
		got.chain = append(got.chain, id.String())
	}
	if len(got.chain) != len(a.Layers) {
		t.Fatalf("%d snapshots for %d layers", len(got.chain), len(a.Layers))
	}
	return got
}

// last returns the snapshot of all layers.
func (n native) last() string { return n.chain[len(n.chain)-1] }

// atTheEpoch sets the times of directories that no layer describes to 1970, because the
// differ does not see the config.
func atTheEpoch(entries []treelist.Entry) []treelist.Entry {
	for i := range entries {
		if entries[i].Type == "dir" {
			entries[i].ModTime = 0
		}
	}
	return entries
}

// tarred returns an artifact with Docker's config type, with the content of dir as one tar.
// The compression is "", "gzip" or "zstd".
func tarred(t *testing.T, dir, compression string) *pack.Artifact {
	t.Helper()
	data, err := pack.TarDir(dir)
	check(t, err)
	l := pack.Layer{MediaType: "application/vnd.docker.ai.dir.tar", Data: data}
	if compression != "" {
		l.MediaType, l.DiffID = ocispec.MediaTypeImageLayer+"+"+compression, digest.FromBytes(data)
		if l.Data, err = pack.Gzip(data); compression == "zstd" {
			l.Data, err = pack.Zstd(data)
		}
		check(t, err)
	}
	return &pack.Artifact{ConfigType: pack.DockerConfigType, Layers: []pack.Layer{l}}
}

// retainedFiles returns the files of the daemon's snapshots by inode.
func retainedFiles(t *testing.T, n *node.Node) map[uint64]string {
	t.Helper()
	files := map[uint64]string{}
	root := filepath.Join(n.DaemonRoot, "overlayfs", "snapshots")
	check(t, filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			files[stat(t, path).Ino] = path
		}
		return err
	}))
	return files
}

// layers returns the retained layers of the daemon's snapshots.
func layers(t *testing.T, n *node.Node) []string {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(n.DaemonRoot, "overlayfs", "snapshots", "*", "layer*"))
	check(t, err)
	return found
}

// nativeNode starts a node whose containerd unpacks artifacts itself. Before 2.3 containerd
// does not know the platforms for it; then nativeNode checks the error and returns nil.
func nativeNode(t *testing.T, o node.Options) *node.Node {
	t.Helper()
	minor, err := node.Minor()
	check(t, err)
	if minor >= 3 {
		return node.ForTest(t, o)
	}
	n := node.ForTest(t, node.Options{})
	older(t, n, 3, "no platforms by which containerd's own unpacker is asked for artifacts")
	err = pullNatively(n, "artifact", dockerPlatform, n.GuestImage)
	if err == nil || !strings.Contains(err.Error(), "+docker-model") {
		t.Errorf("got %v, want an error about the platform %s", err, dockerPlatform)
	}
	return nil
}

func TestContainerdUnpacksADockerModel(t *testing.T) {
	n := nativeNode(t, node.Options{NativeUnpack: true})
	if n == nil {
		return
	}
	before := daemonUsage(t, n)
	src := writeModel(t)
	model, err := pack.Model(src, pack.Options{Form: pack.Docker})
	check(t, err)
	got := mustPullNatively(t, n, model, "artifact", dockerPlatform, "raw")
	want, err := treelist.List(src)
	check(t, err)
	wantSnapshot(t, n, got.last(), atTheEpoch(want))

	// The first snapshot has the first layer.
	target := viewed(t, n, got.chain[0])
	entries, err := treelist.List(target)
	check(t, err)
	if len(entries) != 1 || entries[0].Path != "README.md" {
		t.Errorf("the first snapshot has %v", entries)
	}

	// No byte is copied.
	files := retainedFiles(t, n)
	for _, l := range got.manifest.Layers {
		blob := stat(t, blobPath(n, l.Digest.Encoded()))
		if l.Size > 0 && files[blob.Ino] == "" {
			t.Errorf("the blob %s was copied", l.Digest)
		}
	}
	check(t, mount.Unmount(target, 0))
	_, err = n.Ctr("snapshots", "--snapshotter", "artifact", "rm", "held "+got.chain[0])
	check(t, err)
	wantGone(t, n, got, before)
}

// viewed mounts a view of a snapshot, protected from garbage collection, and returns its
// mount point.
func viewed(t *testing.T, n *node.Node, name string) string {
	t.Helper()
	c := connect(t, n)
	mounts, err := c.SnapshotService("artifact").View(c.Context(t.Context()), "held "+name, name,
		containerdsnapshots.WithLabels(map[string]string{"containerd.io/gc.root": "test"}))
	check(t, err)
	target := t.TempDir()
	check(t, mount.All(mounts, target))
	t.Cleanup(func() { check(t, mount.UnmountAll(target, 0)) })
	return target
}

// wantGone deletes an image and waits until nothing of it is left.
func wantGone(t *testing.T, n *node.Node, image native, before usage) {
	t.Helper()
	removeImage(t, n, image.ref)
	left := snapshotsIn(t, n, "artifact")
	for _, name := range image.chain {
		if left[name] != "" {
			t.Errorf("the snapshot %s was not removed", name)
		}
	}
	waitFor(t, "removal of the layers", func() bool {
		after := daemonUsage(t, n)
		return len(layers(t, n)) == 0 && len(after.files) <= len(before.files) && len(after.mounts) <= len(before.mounts)
	})
	for _, l := range image.manifest.Layers {
		if _, err := os.Stat(blobPath(n, l.Digest.Encoded())); l.Size > 0 && !os.IsNotExist(err) {
			t.Errorf("the blob %s was not removed: %v", l.Digest, err)
		}
	}
}

func TestContainerdUnpacksTars(t *testing.T) {
	n := nativeNode(t, node.Options{NativeUnpack: true})
	if n == nil {
		return
	}
	before := daemonUsage(t, n)
	src := writeModel(t)
	check(t, os.Symlink("config.json", filepath.Join(src, "link")))
	want, err := treelist.List(src)
	check(t, err)
	for _, compression := range []string{"", "gzip", "zstd"} {
		t.Run("tar "+compression, func(t *testing.T) {
			got := mustPullNatively(t, n, tarred(t, src, compression), "artifact", dockerPlatform, "tar"+compression)
			wantSnapshot(t, n, got.last(), want)
			wantGone(t, n, got, before)
		})
	}
	t.Run("all of them", func(t *testing.T) {
		a := tarred(t, src, "")
		for i, compression := range []string{"gzip", "zstd"} {
			dir := t.TempDir()
			check(t, os.WriteFile(filepath.Join(dir, "config.json"), []byte(compression), 0o600))
			check(t, os.WriteFile(filepath.Join(dir, fmt.Sprint("more", i)), []byte(compression), 0o600))
			a.Layers = append(a.Layers, tarred(t, dir, compression).Layers...)
		}
		target := viewed(t, n, mustPullNatively(t, n, a, "artifact", dockerPlatform, "all").last())
		for name, want := range map[string]string{"config.json": "zstd", "more0": "gzip", "more1": "zstd"} {
			if got, err := os.ReadFile(filepath.Join(target, name)); err != nil || string(got) != want {
				t.Errorf("%s reads %q, %v", name, got, err)
			}
		}
		check(t, mount.Unmount(target, 0))
	})
}

func TestContainerdUnpacksAModelPackWithARootFS(t *testing.T) {
	n := nativeNode(t, node.Options{NativeUnpack: true})
	if n == nil {
		return
	}
	src := writeModel(t)
	model, err := pack.Model(src, pack.Options{Form: pack.TarGzip, Scratch: t.TempDir()})
	check(t, err)
	var ids []digest.Digest
	for _, l := range model.Layers {
		ids = append(ids, l.DiffID)
	}
	model.Config, err = json.Marshal(struct {
		modelspec.Model
		RootFS ocispec.RootFS `json:"rootfs"`
	}{
		modelspec.Model{Descriptor: modelspec.ModelDescriptor{CreatedAt: &pack.Created}, ModelFS: modelspec.ModelFS{Type: "layers", DiffIDs: ids}},
		ocispec.RootFS{Type: "layers", DiffIDs: ids},
	})
	check(t, err)
	got := mustPullNatively(t, n, model, "artifact", modelPackPlatform, "both")
	want, err := treelist.List(src)
	check(t, err)
	wantSnapshot(t, n, got.last(), atTheEpoch(want))
}

// This configuration of containerd does not change any other pull.
func TestNativeUnpackingDoesNotChangeOtherPulls(t *testing.T) {
	t.Parallel()
	n := nativeNode(t, node.Options{NativeUnpack: true})
	if n == nil {
		return
	}
	src := writeModel(t)
	ref := pulled(t, n, src, pack.TarZstd)
	pod, err := n.RunPod(node.PodSpec{Volumes: []node.Volume{{Image: ref, Path: "/model"}}})
	check(t, err)
	wantVolume(t, pod, "main", "/model", wantTree(t, src, pack.TarZstd))
	check(t, pod.Remove())

	want, err := treelist.List(src)
	check(t, err)
	layer, err := pack.TarDir(src)
	check(t, err)
	image, err := pack.Image(ocispec.ImageConfig{}, true, layer)
	check(t, err)
	got := mustPullNatively(t, n, image, "artifact", "linux", "image")
	wantSnapshot(t, n, got.last(), want)
	for _, platform := range []string{dockerPlatform, modelPackPlatform} {
		check(t, pullNatively(n, "artifact", platform, got.ref))
	}
	model, err := pack.Model(src, pack.Options{Form: pack.Docker})
	check(t, err)
	_, err = model.Push(t.Context(), n.Registry, "models/native", "docker")
	check(t, err)
	ref = n.Registry + "/models/native:docker"
	_, err = n.Pull(ref)
	check(t, err)
	if found := layers(t, n); len(found) > 0 {
		t.Errorf("CRI's pull unpacked the artifact: %v", found)
	}
}

// An image volume is mounted from the manifest, whose config has the creation time.
func TestAnImageVolumeOfAnArtifactThatContainerdUnpacked(t *testing.T) {
	n := nativeNode(t, node.Options{NativeUnpack: true})
	if n == nil {
		return
	}
	src := writeModel(t)
	var a *pack.Artifact
	for _, name := range []string{"scripts/run.sh", "tokenizer/deep/er/copy.txt"} {
		b, err := os.ReadFile(filepath.Join(src, name))
		check(t, err)
		archive, err := pack.TarOf(pack.Member{Header: tar.Header{Name: name, Mode: 0o644, ModTime: pack.Created, Typeflag: tar.TypeReg}, Data: b})
		check(t, err)
		// The unpacker of the client counts only these media types as layers.
		l := pack.Layer{MediaType: ocispec.MediaTypeImageLayer, Data: archive}
		if a == nil {
			a = &pack.Artifact{ConfigType: pack.DockerConfigType}
		}
		a.Layers = append(a.Layers, l)
	}
	ref := mustPullNatively(t, n, a, "artifact", dockerPlatform, "volume").ref
	check(t, waitForImage(t, n, ref))
	pod, err := n.RunPod(node.PodSpec{Volumes: []node.Volume{{Image: ref, Path: "/model"}}})
	check(t, err)
	entries, err := pod.Tree("main", "/model")
	check(t, err)
	files := 0
	for _, e := range entries {
		if !time.Unix(0, e.ModTime).Equal(pack.Created) {
			t.Errorf("%s has the time %v", e.Path, time.Unix(0, e.ModTime))
		}
		if e.Type == "file" {
			files++
		}
	}
	if files != 2 {
		t.Errorf("the volume has %v, want two files", entries)
	}
	check(t, pod.Remove())
}

// waitForImage waits until CRI knows an image that ctr pulled.
func waitForImage(t *testing.T, n *node.Node, ref string) (err error) {
	t.Helper()
	waitFor(t, "CRI to know the image", func() bool {
		_, err = n.Crictl("inspecti", ref)
		return err == nil
	})
	return err
}

func TestAFailedUnpackOfContainerdLeavesNothing(t *testing.T) {
	n := nativeNode(t, node.Options{NativeUnpack: true})
	if n == nil {
		return
	}
	before, snapshots := daemonUsage(t, n), snapshotsIn(t, n, "artifact")
	src := writeModel(t)
	hostile, err := pack.TarOf(pack.Member{Header: tar.Header{Name: "../../etc/passwd", Mode: 0o644}, Data: []byte("x")})
	check(t, err)
	ok := tarred(t, src, "gzip").Layers[0]
	wrong := ok
	wrong.DiffID = digest.FromString("another")
	device, err := pack.TarOf(pack.Member{Header: tar.Header{Name: "null", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 3}})
	check(t, err)
	for name, test := range map[string]struct {
		layer pack.Layer
		want  string
	}{
		"wrong DiffID": {wrong, "wrong diff id"},
		"dot dot":      {pack.Layer{MediaType: "application/vnd.docker.ai.dir.tar", Data: hostile}, `"../../etc/passwd"`},
		"a device":     {pack.Layer{MediaType: "application/vnd.docker.ai.dir.tar", Data: device}, "character device"},
	} {
		t.Run(name, func(t *testing.T) {
			first := pack.Layer{MediaType: "application/vnd.docker.ai.license", Data: []byte("a license, " + name), Annotations: map[string]string{modelspec.AnnotationFilepath: "LICENSE"}}
			a := &pack.Artifact{ConfigType: pack.DockerConfigType, Layers: []pack.Layer{first, test.layer}}
			tag := strings.ReplaceAll(name, " ", "-")
			_, err := a.Push(t.Context(), n.Registry, "models/native", tag)
			check(t, err)
			err = pullNatively(n, "artifact", dockerPlatform, n.Registry+"/models/native:"+tag)
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("the pull ended with %v, want an error with %q", err, test.want)
			}
			collect(t, connect(t, n))
			waitFor(t, "everything to be removed", func() bool {
				after := daemonUsage(t, n)
				return len(snapshotsIn(t, n, "artifact")) == len(snapshots) && len(layers(t, n)) == 0 &&
					len(after.files) <= len(before.files) && len(after.mounts) <= len(before.mounts)
			})
		})
	}
}

func TestViewsOfAChainSurviveRestartsAndAReboot(t *testing.T) {
	n := nativeNode(t, node.Options{NativeUnpack: true})
	if n == nil {
		return
	}
	src := writeModel(t)
	name := mustPullNatively(t, n, tarred(t, src, "gzip"), "artifact", dockerPlatform, "views").last()
	want, err := treelist.List(src)
	check(t, err)
	target := viewed(t, n, name)
	shows := func(when, dir string) {
		t.Helper()
		got, err := treelist.List(dir)
		check(t, err)
		if diff := treelist.Diff(want, got); diff != "" {
			t.Errorf("%s: the view differs:\n%s", when, diff)
		}
	}
	check(t, n.KillDaemon())
	shows("while the daemon is down", target)
	check(t, n.StartDaemon())
	check(t, n.RestartContainerd())
	shows("after restarts", target)
	wantSnapshot(t, n, name, want)

	// Simulate a reboot.
	check(t, n.StopDaemon())
	check(t, mount.Unmount(target, 0))
	check(t, mount.UnmountRecursive(n.DaemonState, unix.MNT_DETACH))
	check(t, os.WriteFile(filepath.Join(n.DaemonRoot, "boot"), []byte("another"), 0o600))
	check(t, n.StartDaemon())
	waitForDaemon(t, n)
	commands, err := n.Ctr("snapshots", "--snapshotter", "artifact", "mounts", target, "held "+name)
	check(t, err)
	_, err = n.Tool("sh", "-e", "-c", commands)
	check(t, err)
	shows("after a reboot", target)
	check(t, mount.Unmount(target, 0))
	wantSnapshot(t, n, name, want)
}

// The name of a snapshot that `unpack` makes is not a chain ID. So containerd unpacks an
// image with the same first layers independently.
func TestContainerdUnpacksIndependentlyOfUnpack(t *testing.T) {
	n := nativeNode(t, node.Options{NativeUnpack: true})
	if n == nil {
		return
	}
	before := daemonUsage(t, n)
	src := writeModel(t)
	a := tarred(t, src, "")
	_, err := a.Push(t.Context(), n.Registry, "models/native", "below")
	check(t, err)
	below := n.Registry + "/models/native:below"
	check(t, pullNatively(n, "artifact", "linux", below))
	name := unpack(t, n, below)

	dir := t.TempDir()
	check(t, os.WriteFile(filepath.Join(dir, "config.json"), []byte("of the upper one"), 0o600))
	a.Layers = append(a.Layers, tarred(t, dir, "").Layers...)
	above := mustPullNatively(t, n, a, "artifact", dockerPlatform, "above")
	if slices.Contains(above.chain, name) {
		t.Errorf("containerd's chain %v contains the snapshot %s of unpack", above.chain, name)
	}
	want, err := treelist.List(src)
	check(t, err)
	wantSnapshot(t, n, name, want)
	removeImage(t, n, below)
	target := viewed(t, n, above.last())
	for name, want := range map[string]string{"config.json": "of the upper one", "scripts/run.sh": "#!/bin/sh\nexec python3 -m src\n"} {
		if got, err := os.ReadFile(filepath.Join(target, name)); err != nil || string(got) != want {
			t.Errorf("%s reads %q, %v", name, got, err)
		}
	}
	check(t, mount.Unmount(target, 0))
	_, err = n.Ctr("snapshots", "--snapshotter", "artifact", "rm", "held "+above.last())
	check(t, err)
	wantGone(t, n, above, before)
}

func TestADifferThatIsKilledLeavesNothing(t *testing.T) {
	n := nativeNode(t, node.Options{NativeUnpack: true, DaemonConfig: "decompress_on_pull = false\n"})
	if n == nil {
		return
	}
	before := daemonUsage(t, n)
	dir := t.TempDir()
	check(t, os.WriteFile(filepath.Join(dir, "weights"), make([]byte, 60<<20), 0o600))
	a := tarred(t, dir, "gzip")
	_, err := a.Push(t.Context(), n.Registry, "models/native", "killed")
	check(t, err)
	pulled := make(chan error, 1)
	go func() { pulled <- pullNatively(n, "artifact", dockerPlatform, n.Registry+"/models/native:killed") }()
	waitFor(t, "start of the differ", func() bool { return len(layers(t, n)) > 0 })
	check(t, n.KillDaemon())
	check(t, n.StartDaemon())
	if err := <-pulled; err == nil {
		t.Fatal("the pull succeeded although the daemon was killed")
	}
	waitForDaemon(t, n)
	want, err := treelist.List(dir)
	check(t, err)
	got := mustPullNatively(t, n, a, "artifact", dockerPlatform, "killed")
	wantSnapshot(t, n, got.last(), want)
	// containerd could not remove the snapshot of the first attempt while the daemon was
	// down. It removes it in the next garbage collection.
	wantGone(t, n, got, before)
}
