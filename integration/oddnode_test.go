// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	modelspec "github.com/modelpack/model-spec/specs-go/v1"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/treelist"
)

// Nodes with problems: something is missing or full, or a file system cannot do what others
// can.

// daemonLog returns the whole log of the daemon.
func daemonLog(t *testing.T, n *node.Node) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(n.Dir, "logs", "daemon"))
	check(t, err)
	return string(text)
}

// pulledManifest returns the manifest that ref refers to, and its digest.
func pulledManifest(t *testing.T, n *node.Node, ref string) (ocispec.Manifest, digest.Digest) {
	t.Helper()
	hex := manifestOf(t, n, ref)
	text, err := os.ReadFile(blobPath(n, hex))
	check(t, err)
	var m ocispec.Manifest
	check(t, json.Unmarshal(text, &m))
	return m, digest.NewDigestFromEncoded(digest.SHA256, hex)
}

// blobPath returns the path of a blob in containerd's content store.
func blobPath(n *node.Node, hex string) string {
	return filepath.Join(n.ContentRoot, "blobs", "sha256", hex)
}

func stat(t *testing.T, path string) (st unix.Stat_t) {
	t.Helper()
	if err := unix.Lstat(path, &st); err != nil {
		t.Fatalf("lstat %s: %v", path, err)
	}
	return st
}

func TestAMissingBlobIsNamed(t *testing.T) {
	t.Parallel()
	// A layer that was unpacked during the pull does not need its blob any more.
	n := node.ForTest(t, node.Options{DaemonConfig: "decompress_on_pull = false"})
	const weights = 2 // the index of its layer
	layer := func(m ocispec.Manifest, _ digest.Digest) digest.Digest { return m.Layers[weights].Digest }
	for _, tt := range []struct {
		name string
		form pack.Form
		blob func(ocispec.Manifest, digest.Digest) digest.Digest
		want string // "" means that containerd detects it first
	}{
		{"raw layer", pack.Raw, layer, "layer 2 (application/vnd.cncf.model.weight.v1.raw, sha256:%s, \"model-00001.safetensors\"): its blob is not in "},
		{"tar layer", pack.TarZstd, layer, "layer 2 (application/vnd.cncf.model.weight.v1.tar+zstd, sha256:%s): its blob is not in "},
		{"config", pack.Raw, func(m ocispec.Manifest, _ digest.Digest) digest.Digest { return m.Config.Digest }, ""},
		{"manifest", pack.Raw, func(_ ocispec.Manifest, d digest.Digest) digest.Digest { return d }, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			before := daemonUsage(t, n)
			src := writeModel(t)
			ref := pulled(t, n, src, tt.form)
			missing := tt.blob(pulledManifest(t, n, ref)).Encoded()
			check(t, os.Remove(blobPath(n, missing)))
			pod, err := n.RunSandbox(node.PodSpec{Volumes: []node.Volume{{Image: ref, Path: "/model"}}})
			check(t, err)
			if tt.want == "" {
				wantRefused(t, pod, ref, "blob sha256:"+missing+" expected at "+blobPath(n, missing)+": blob not found")
			} else {
				wantRefused(t, pod, ref, fmt.Sprintf(tt.want, missing)+n.ContentRoot, "delete the image and pull it again")
			}
			wantUsage(t, n, before)
			// The recommended action works.
			_, err = n.Crictl("rmi", ref)
			check(t, err)
			pulled(t, n, src, tt.form)
			check(t, pod.Start(node.Container{}))
			wantVolume(t, pod, "main", "/model", wantTree(t, src, tt.form))
			check(t, pod.Remove())
			_, err = n.Crictl("rmi", ref)
			check(t, err)
			wantUsage(t, n, before)
		})
	}
}

func TestAWrongContentRootIsReported(t *testing.T) {
	wrong := filepath.Join(t.TempDir(), "content")
	n := node.ForTest(t, node.Options{DaemonFlags: []string{"--content-root", wrong}})
	src := writeModel(t)
	ref := pulled(t, n, src, pack.Raw)
	pod, err := n.RunSandbox(node.PodSpec{Volumes: []node.Volume{{Image: ref, Path: "/model"}}})
	check(t, err)
	hint := "check that this is the runtime's content root"
	wantRefused(t, pod, ref, "no blob sha256:"+manifestOf(t, n, ref)+" in "+wrong, hint)
	check(t, os.MkdirAll(filepath.Join(wrong, "blobs", "sha256"), 0o755))
	wantRefused(t, pod, ref, wrong, hint)
	check(t, os.RemoveAll(wrong))
	check(t, os.WriteFile(wrong, nil, 0o644))
	wantRefused(t, pod, ref, wrong, hint)
	// After the correction nothing must be restarted.
	check(t, os.Remove(wrong))
	check(t, os.Symlink(n.ContentRoot, wrong))
	check(t, pod.Start(node.Container{}))
	wantVolume(t, pod, "main", "/model", wantTree(t, src, pack.Raw))
	check(t, pod.Remove())
}

func TestAFullDiskIsReportedAndLeavesNothing(t *testing.T) {
	t.Parallel()
	root := mounted(t, "tmpfs", "size=16m")
	resize := func(size string) {
		// An unmounted volume may use its space for another moment; the size must not be
		// smaller.
		waitFor(t, "the disk to have "+size, func() bool {
			err := unix.Mount("", root, "", unix.MS_REMOUNT|unix.MS_NOSUID|unix.MS_NODEV, "size="+size)
			if !errors.Is(err, unix.EINVAL) {
				check(t, err)
			}
			return err == nil
		})
	}
	n := node.ForTest(t, node.Options{DaemonRoot: root})
	const advice = "free space on the file system of the snapshotter's root and try again"

	files := func(count, size int) (members []pack.Member) {
		for i := range count {
			members = append(members, pack.Member{Header: tar.Header{Name: fmt.Sprintf("file-%d", i), Mode: 0o644}, Data: bytes.Repeat([]byte{byte('a' + i)}, size)})
		}
		return members
	}
	asRaw := func(members []pack.Member) (layers []pack.Layer) {
		for _, m := range members {
			layers = append(layers, pack.Layer{MediaType: modelspec.MediaTypeModelWeightRaw, Data: m.Data, Annotations: map[string]string{modelspec.AnnotationFilepath: m.Name}})
		}
		return layers
	}
	asTar := func(members []pack.Member) []pack.Layer {
		data, err := pack.TarOf(members...)
		check(t, err)
		return []pack.Layer{{MediaType: modelspec.MediaTypeModelWeight, Data: data}}
	}
	zipped := func(layers []pack.Layer) []pack.Layer {
		return []pack.Layer{tarLayer(t, modelspec.MediaTypeModelWeightGzip, layers[0].Data)}
	}
	large := files(1, 20<<20)
	for i, tt := range []struct {
		name   string
		layers []pack.Layer
		want   []string
	}{
		// The content root is on another file system, so blobs are copied.
		{"a large file in a tar", asTar(large), []string{"layer 0 (application/vnd.cncf.model.weight.v1.tar,", fmt.Sprintf("%d bytes are needed and ", len(asTar(large)[0].Data))}},
		{"small files in a tar", asTar(files(25, 900<<10)), []string{"layer 0 (application/vnd.cncf.model.weight.v1.tar,"}},
		{"a large file in a compressed tar", zipped(asTar(large)), []string{"layer 0 (application/vnd.cncf.model.weight.v1.tar+gzip,"}},
		{"a large raw file", asRaw(large), []string{"layer 0 (application/vnd.cncf.model.weight.v1.raw,", `"file-0"`, "20971520 bytes are needed and "}},
		{"raw files", asRaw(files(4, 5<<20)), []string{"(application/vnd.cncf.model.weight.v1.raw,", "5242880 bytes are needed and "}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			before := daemonUsage(t, n)
			model := pack.Artifact{ArtifactType: modelspec.ArtifactTypeModelManifest, Layers: tt.layers}
			repo := fmt.Sprintf("large/%d", i)
			_, err := model.Push(t.Context(), n.Registry, repo, "latest")
			check(t, err)
			ref := n.Registry + "/" + repo + ":latest"
			_, err = n.Pull(ref)
			check(t, err)
			pod, err := n.RunSandbox(node.PodSpec{Volumes: []node.Volume{{Image: ref, Path: "/model"}}})
			check(t, err)
			// The number of free bytes in the message may differ.
			for range 2 {
				wantNoStart(t, pod, append(tt.want, "no space left on device", advice)...)
				wantUsage(t, n, before)
			}
			if i > 0 {
				check(t, pod.Remove())
				return
			}
			// The recommended action works.
			resize("64m")
			defer resize("16m")
			check(t, pod.Start(node.Container{}))
			wantVolume(t, pod, "main", "/model", []treelist.Entry{{Path: "file-0", Type: "file", Mode: 0o644, Size: 20 << 20, SHA256: digest.FromBytes(large[0].Data).Encoded()}})
			check(t, pod.Remove())
			_, err = n.Crictl("rmi", ref)
			check(t, err)
			wantUsage(t, n, before)
		})
	}
	// An artifact that fits is still mounted.
	src := writeModel(t)
	ref := pulled(t, n, src, pack.TarGzip)
	pod, err := n.RunPod(node.PodSpec{Volumes: []node.Volume{{Image: ref, Path: "/model"}}})
	check(t, err)
	wantVolume(t, pod, "main", "/model", wantTree(t, src, pack.TarGzip))
	check(t, pod.Remove())
}

func TestBlobsOfAnotherFilesystemAreCopiedOnce(t *testing.T) {
	root := ext4.mounted(t)
	n := node.ForTest(t, node.Options{DaemonRoot: root})
	before := daemonUsage(t, n)
	var pods []*node.Pod
	var refs []string
	trees := map[string]map[string]bool{} // the refs that use a blob, by its hex digest
	for tag, without := range map[string][]string{"all": nil, "less": {"README.md"}} {
		src := writeModel(t, without...)
		pushModel(t, n, src, pack.Raw, tag)
		ref := n.Registry + "/models/tiny:" + tag
		_, err := n.Pull(ref)
		check(t, err)
		pod, err := n.RunPod(node.PodSpec{Volumes: []node.Volume{{Image: ref, Path: "/model"}}})
		check(t, err)
		wantVolume(t, pod, "main", "/model", wantTree(t, src, pack.Raw))
		pods, refs = append(pods, pod), append(refs, ref)
		manifest, _ := pulledManifest(t, n, ref)
		for _, l := range manifest.Layers {
			if l.Size > 0 {
				if trees[l.Digest.Encoded()] == nil {
					trees[l.Digest.Encoded()] = map[string]bool{}
				}
				trees[l.Digest.Encoded()][ref] = true
			}
		}
	}
	copies, err := os.ReadDir(filepath.Join(root, "blobs/sha256"))
	check(t, err)
	if len(copies) != len(trees) {
		t.Errorf("%d copies of %d blobs, want one each", len(copies), len(trees))
	}
	retained, err := filepath.Glob(filepath.Join(root, "trees", "*", "data", "*"))
	check(t, err)
	links := map[uint64]int{} // links in trees, by inode
	for _, path := range retained {
		links[stat(t, path).Ino]++
	}
	if len(links) != len(trees) {
		t.Errorf("the trees retain %d files for %d blobs, want one each", len(links), len(trees))
	}
	for hex, users := range trees {
		st := stat(t, filepath.Join(root, "blobs/sha256", hex))
		if links[st.Ino] != len(users) || st.Nlink != uint64(len(users)+1) {
			t.Errorf("the copy of %s has %d links, %d of them in trees, want one in each of %d", hex, st.Nlink, links[st.Ino], len(users))
		}
	}
	// A warning tells the user that the bytes are stored twice.
	if !slices.ContainsFunc(strings.Split(daemonLog(t, n), "\n"), func(line string) bool {
		return strings.Contains(line, "level=warning") && strings.Contains(line, n.ContentRoot) && strings.Contains(line, "cop")
	}) {
		t.Errorf("the daemon's log has no warning that blobs of %s are copied", n.ContentRoot)
	}
	for i, pod := range pods {
		check(t, pod.Remove())
		_, err := n.Crictl("rmi", refs[i])
		check(t, err)
	}
	wantUsage(t, n, before)
}

func TestTheModeLinkMountsTheBlobsThemselves(t *testing.T) {
	n := node.ForTest(t, node.Options{DaemonConfig: `raw_mode = "link"`})
	src := writeModel(t)
	ref := pulled(t, n, src, pack.Raw)
	want := wantTree(t, src, pack.Raw)
	blobs := map[string]unix.Stat_t{}
	for i := range want {
		if e := &want[i]; e.Type == "file" && e.Size > 0 {
			st := stat(t, blobPath(n, e.SHA256))
			blobs[e.Path] = st
			e.Mode, e.UID, e.GID, e.ModTime = 0o444, 0, 0, st.Mtim.Nano()
		}
	}
	pod, err := n.RunPod(node.PodSpec{Volumes: []node.Volume{{Image: ref, Path: "/model"}}})
	check(t, err)
	wantVolume(t, pod, "main", "/model", want)
	mounts, err := node.Mounts(n.DaemonState)
	check(t, err)
	if len(mounts) != 1 {
		t.Fatalf("the daemon's mounts are %q, want one", mounts)
	}
	for path, blob := range blobs {
		if st := stat(t, filepath.Join(mounts[0], path)); st.Ino != blob.Ino || st.Dev != blob.Dev {
			t.Errorf("%s is a copy, want the runtime's blob", path)
		}
	}
	out, err := pod.Exec("main", node.Guest, "write", "/model/config.json")
	check(t, err)
	if out != "EROFS\n" {
		t.Errorf("writing: %q, want EROFS", out)
	}
	check(t, pod.Remove())
	for path, blob := range blobs {
		hex := want[slices.IndexFunc(want, func(e treelist.Entry) bool { return e.Path == path })].SHA256
		if st := stat(t, blobPath(n, hex)); st.Mode != blob.Mode || st.Uid != blob.Uid || st.Mtim != blob.Mtim {
			t.Errorf("the attributes of the blob of %s changed", path)
		}
	}
}

func TestTheModeCopyHasAllAttributes(t *testing.T) {
	n := node.ForTest(t, node.Options{DaemonConfig: `raw_mode = "copy"`})
	before := daemonUsage(t, n)
	src := writeModel(t)
	ref := pulled(t, n, src, pack.Raw)
	want := wantTree(t, src, pack.Raw)
	pod, err := n.RunPod(node.PodSpec{Volumes: []node.Volume{{Image: ref, Path: "/model"}}})
	check(t, err)
	wantVolume(t, pod, "main", "/model", want)
	for _, e := range want {
		if e.Type == "file" && e.Size > 0 {
			if st := stat(t, blobPath(n, e.SHA256)); st.Nlink != 1 {
				t.Errorf("the blob of %s has %d links, want one", e.Path, st.Nlink)
			}
		}
	}
	check(t, pod.Remove())
	_, err = n.Crictl("rmi", ref)
	check(t, err)
	wantUsage(t, n, before)
}

// A ramfs has no extended attributes, which the mode overlay needs, and does not report its
// free space.
func TestAFilesystemWithoutExtendedAttributes(t *testing.T) {
	t.Run("a forced mode that cannot work is an error at the start", func(t *testing.T) {
		root := mounted(t, "ramfs", "")
		n, err := node.Start(t.Context(), node.Options{DaemonRoot: root, DaemonConfig: `raw_mode = "overlay"`})
		if err == nil {
			check(t, n.Stop())
			t.Fatal("the daemon started")
		}
		for _, want := range []string{"daemon ended (exit status 1) before it was ready", `mode "overlay" does not work in ` + root, "trusted.overlay.metacopy", "operation not supported"} {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("the error does not contain %q: %v", want, err)
			}
		}
	})
	t.Run("auto chooses the next mode and logs the reason", func(t *testing.T) {
		root := mounted(t, "ramfs", "")
		n := node.ForTest(t, node.Options{DaemonRoot: root})
		log := strings.ReplaceAll(daemonLog(t, n), `\`, "") // quotes are escaped once or twice
		for _, want := range []string{"level=warning", "raw=link", "layers are laid out by a fallback mode", `mode "overlay" does not work in ` + root} {
			if !strings.Contains(log, want) {
				t.Errorf("the daemon's log does not contain %q: %s", want, log)
			}
		}
		src := writeModel(t)
		ref := pulled(t, n, src, pack.Raw)
		pod, err := n.RunPod(node.PodSpec{Volumes: []node.Volume{{Image: ref, Path: "/model"}}})
		check(t, err)
		got, err := pod.Tree("main", "/model")
		check(t, err)
		want := wantTree(t, src, pack.Raw)
		for _, entries := range [][]treelist.Entry{want, got} {
			for i := range entries { // this mode does not preserve attributes
				entries[i].Mode, entries[i].UID, entries[i].GID, entries[i].ModTime = 0, 0, 0, 0
			}
		}
		if diff := treelist.Diff(want, got); diff != "" {
			t.Errorf("the volume differs from the source:\n%s", diff)
		}
		check(t, pod.Remove())
	})
}

func TestOneTreeForPodsThatStartAtOnce(t *testing.T) {
	t.Parallel()
	n := node.ForTest(t, node.Options{})
	src := writeModel(t)
	ref := pulled(t, n, src, pack.TarZstd)
	pods := make([]*node.Pod, 20)
	var sandboxes, starts errgroup.Group
	for i := range pods {
		sandboxes.Go(func() (err error) {
			pods[i], err = n.RunSandbox(node.PodSpec{Volumes: []node.Volume{{Image: ref, Path: "/model"}}})
			return err
		})
	}
	check(t, sandboxes.Wait())
	for _, pod := range pods {
		starts.Go(func() error { return pod.Start(node.Container{}) })
	}
	check(t, starts.Wait())
	want := wantTree(t, src, pack.TarZstd)
	for _, pod := range pods {
		wantVolume(t, pod, "main", "/model", want)
	}
	if built := strings.Count(daemonLog(t, n), "building the tree"); built != 1 {
		t.Errorf("the tree was built %d times, want once", built)
	}
	trees, err := os.ReadDir(filepath.Join(n.DaemonRoot, "trees"))
	check(t, err)
	mounts, err := node.Mounts(n.DaemonState)
	check(t, err)
	if len(trees) != 1 || len(mounts) != 1 {
		t.Errorf("the trees are %v, the mounts %q, want one each", trees, mounts)
	}
	var removals errgroup.Group
	for _, pod := range pods {
		removals.Go(pod.Remove)
	}
	check(t, removals.Wait())
	waitFor(t, "removal of the mount", func() bool {
		mounts, err := node.Mounts(n.DaemonState)
		return err == nil && len(mounts) == 0
	})
}

func TestASecondDaemonIsRefused(t *testing.T) {
	n := node.ForTest(t, node.Options{})
	src := writeModel(t)
	ref := pulled(t, n, src, pack.Raw)
	pod, err := n.RunPod(node.PodSpec{Volumes: []node.Volume{{Image: ref, Path: "/model"}}})
	check(t, err)
	socket, other := filepath.Join(n.Dir, "daemon.sock"), t.TempDir()
	for _, tt := range []struct{ name, root, address, want string }{
		{"on the root", n.DaemonRoot, filepath.Join(other, "sock"), "root " + n.DaemonRoot + " belongs to another running artifact-snapshotter; stop it, or choose another root"},
		{"on the socket", filepath.Join(other, "root"), socket, "another server answers on " + socket + "; stop it, or choose another address"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			out, err := exec.CommandContext(t.Context(), fmt.Sprintf("/proc/%d/exe", n.DaemonPID()), "serve",
				"--root", tt.root, "--state", filepath.Join(other, "state"), "--address", tt.address,
				"--content-root", n.ContentRoot, "--containerd-address", n.Address).CombinedOutput()
			if err == nil || !strings.Contains(string(out), tt.want) {
				t.Errorf("%v: %s, want an error with %q", err, out, tt.want)
			}
			// The first daemon is not affected.
			wantVolume(t, pod, "main", "/model", wantTree(t, src, pack.Raw))
			next, err := n.RunPod(node.PodSpec{Volumes: []node.Volume{{Image: ref, Path: "/model"}}})
			check(t, err)
			check(t, next.Remove())
		})
	}
	check(t, pod.Remove())
}
