// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/treelist"
)

// The daemon as an NRI plugin of CRI-O.

// crioForms are the forms of which CRI-O mounts at least one layer. It does not mount
// layers without a title or a ModelPack path, and then NRI sees no mount.
var crioForms = []pack.Form{pack.Raw, pack.Tar, pack.TarGzip, pack.TarZstd, pack.Generic}

// crioNode starts a node with CRI-O and the daemon, or skips the test.
func crioNode(t *testing.T, o node.Options) *node.Node {
	t.Helper()
	o.CRIO = true
	return startOrSkip(t, o)
}

// wantMounts checks that the container has exactly one mount at each volume.
func wantMounts(t *testing.T, pod *node.Pod, container string, volumes ...string) {
	t.Helper()
	out, err := pod.Exec(container, node.Guest, "mountinfo")
	check(t, err)
	for _, volume := range volumes {
		if got := countMounts(out, volume); got != 1 {
			t.Errorf("%s has %d mounts in container %s, want one:\n%s", volume, got, container, out)
		}
	}
}

func TestCRIOMountsAModelAsItWasPacked(t *testing.T) {
	n := crioNode(t, node.Options{})
	src := writeModel(t)
	for _, form := range crioForms {
		t.Run(string(form), func(t *testing.T) {
			tag := strings.ReplaceAll(string(form), "+", "-")
			d := pushModel(t, n, src, form, tag)
			for _, ref := range []string{n.Registry + "/models/tiny:" + tag, n.Registry + "/models/tiny@" + d.String()} {
				_, err := n.Pull(ref)
				check(t, err)
				pod, err := n.RunPod(node.PodSpec{Volumes: []node.Volume{{Image: ref, Path: "/model"}}})
				check(t, err)
				wantVolume(t, pod, "main", "/model", wantTree(t, src, form))
				wantMounts(t, pod, "main", "/model")
				check(t, pod.Remove())
			}
		})
	}
}

// The artifact has raw layers, tars and compressed tars. CRI-O does not mount the layers
// without a name, but the volume has their files too.
func TestCRIOMountsAMixtureOfLayers(t *testing.T) {
	n := crioNode(t, node.Options{})
	layers, want := mixture(t)
	ref := push(t, n, "mixture", layers...)
	pod, err := n.RunPod(node.PodSpec{Volumes: []node.Volume{{Image: ref, Path: "/model"}}})
	check(t, err)
	wantVolume(t, pod, "main", "/model", want)
	wantMounts(t, pod, "main", "/model")
	check(t, pod.Remove())
}

func TestCRIOMountsAnIndexOfThisPlatform(t *testing.T) {
	n := crioNode(t, node.Options{})
	src := writeModel(t)
	ref := pulledIndex(t, n, src)
	pod, err := n.RunPod(node.PodSpec{Volumes: []node.Volume{{Image: ref, Path: "/model"}}})
	check(t, err)
	wantVolume(t, pod, "main", "/model", wantTree(t, src, pack.Raw))
	check(t, pod.Remove())
}

func TestCRIOVolumesOfSeveralContainersShareOneMount(t *testing.T) {
	n := crioNode(t, node.Options{})
	src, other := writeModel(t), writeModel(t, "README.md")
	ref := pulled(t, n, src, pack.Raw)
	tarred := pulled(t, n, other, pack.TarGzip)
	spec := node.PodSpec{
		Volumes: []node.Volume{{Image: ref, Path: "/model"}},
		Containers: []node.Container{
			{Name: "a", Volumes: []node.Volume{{Image: ref, Path: "/again"}, {Image: tarred, Path: "/other"}}},
			{Name: "b", Volumes: []node.Volume{{Image: tarred, Path: "/deep/down/other"}}},
		},
	}
	var pods []*node.Pod
	for range 2 {
		pod, err := n.RunPod(spec)
		check(t, err)
		pods = append(pods, pod)
	}
	wantAll := func(pod *node.Pod) {
		t.Helper()
		for _, v := range []struct {
			container, path string
			want            []treelist.Entry
		}{
			{"a", "/model", wantTree(t, src, pack.Raw)}, {"a", "/again", wantTree(t, src, pack.Raw)}, {"a", "/other", wantTree(t, other, pack.TarGzip)},
			{"b", "/model", wantTree(t, src, pack.Raw)}, {"b", "/deep/down/other", wantTree(t, other, pack.TarGzip)},
		} {
			wantVolume(t, pod, v.container, v.path, v.want)
			wantMounts(t, pod, v.container, v.path)
		}
	}
	wantAll(pods[0])
	wantAll(pods[1])
	mounts, err := node.Mounts(n.DaemonState)
	check(t, err)
	if len(mounts) != 2 {
		t.Errorf("the daemon's mounts are %q, want one for each artifact", mounts)
	}
	check(t, pods[0].Remove())
	wantAll(pods[1])
	check(t, pods[1].Remove())
	waitFor(t, "removal of the daemon's mounts", func() bool {
		mounts, err := node.Mounts(n.DaemonState)
		return err == nil && len(mounts) == 0
	})
}

func TestCRIOVolumeCannotBeWritten(t *testing.T) {
	n := crioNode(t, node.Options{})
	for _, form := range []pack.Form{pack.Raw, pack.TarZstd} {
		pod, err := n.RunPod(node.PodSpec{Volumes: []node.Volume{{Image: pulled(t, n, writeModel(t), form), Path: "/model"}}})
		check(t, err)
		for _, path := range []string{"/model/config.json", "/model/new", "/model/src/__init__.py"} {
			out, err := pod.Exec("main", node.Guest, "write", path)
			check(t, err)
			if out != "EROFS\n" {
				t.Errorf("%s: writing %s: %q, want EROFS", form, path, out)
			}
		}
		var st unix.Statfs_t
		check(t, unix.Statfs(filepath.Join("/proc", pid(t, n, pod), "root/model"), &st))
		if want := int64(unix.ST_RDONLY | unix.ST_NOSUID | unix.ST_NODEV); st.Flags&want != want {
			t.Errorf("%s: the flags of the mount are %#x, want %#x to be set", form, st.Flags, want)
		}
		check(t, pod.Remove())
	}
}

func TestCRIOSubPath(t *testing.T) {
	n := crioNode(t, node.Options{})
	src := writeModel(t)
	for _, form := range []pack.Form{pack.Raw, pack.TarGzip} {
		ref := pulled(t, n, src, form)
		pod, err := n.RunPod(node.PodSpec{Volumes: []node.Volume{
			{Image: ref, Path: "/model"},
			{Image: ref, Path: "/tokenizer", SubPath: "tokenizer"},
			{Image: ref, Path: "/deep", SubPath: "tokenizer/deep"},
		}})
		check(t, err)
		want := wantTree(t, src, form)
		wantVolume(t, pod, "main", "/model", want)
		wantVolume(t, pod, "main", "/tokenizer", below(want, "tokenizer/"))
		wantVolume(t, pod, "main", "/deep", below(want, "tokenizer/deep/"))
		wantMounts(t, pod, "main", "/model", "/tokenizer", "/deep")
		check(t, pod.Remove())
	}
}

func TestCRIOPodsWithDifferentUserNamespacesShareAnArtifact(t *testing.T) {
	n := crioNode(t, node.Options{})
	src := writeOwnedModel(t)
	for _, form := range []pack.Form{pack.Raw, pack.TarGzip} {
		volumes := []node.Volume{{Image: pulled(t, n, src, form), Path: "/model"}}
		plain := wantTree(t, src, form)
		var pods []*node.Pod
		for _, spec := range []node.PodSpec{
			{Volumes: volumes},
			{Volumes: volumes, OwnNetwork: true, UserNamespace: true},
			{Volumes: volumes, OwnNetwork: true, UserNamespace: true, HostID: otherBase},
		} {
			pod, err := n.RunPod(spec)
			check(t, err)
			pods = append(pods, pod)
		}
		wantVolume(t, pods[0], "main", "/model", plain)
		for _, pod := range pods[1:] {
			wantVolume(t, pod, "main", "/model", mapped(plain))
		}
		for _, pod := range pods {
			wantMounts(t, pod, "main", "/model")
			check(t, pod.Remove())
		}
	}
}

// Other mounts of the pod, in a volume and around it, stay unchanged.
func TestCRIOOtherMountsStay(t *testing.T) {
	n := crioNode(t, node.Options{})
	src, host := writeModel(t), t.TempDir()
	check(t, os.WriteFile(filepath.Join(host, "file"), []byte("of the host"), 0o644))
	check(t, os.Mkdir(filepath.Join(host, "model"), 0o755))
	ref := pulled(t, n, src, pack.Raw)
	pod, err := n.RunPod(node.PodSpec{Volumes: []node.Volume{
		{HostPath: host, Path: "/model/tokenizer/deep"},
		{Image: ref, Path: "/model"},
		{HostPath: host, Path: "/host"},
		{Image: ref, Path: "/host/model"},
	}})
	check(t, err)
	mounted, err := treelist.List(host)
	check(t, err)
	wantVolume(t, pod, "main", "/model/tokenizer/deep", mounted)
	want := wantTree(t, src, pack.Raw)
	wantVolume(t, pod, "main", "/host/model", want)
	got, err := pod.Tree("main", "/model")
	check(t, err)
	outside := func(entries []treelist.Entry) []treelist.Entry {
		return slices.DeleteFunc(slices.Clone(entries), func(e treelist.Entry) bool { return strings.HasPrefix(e.Path, "tokenizer/deep") })
	}
	if diff := treelist.Diff(outside(want), outside(got)); diff != "" {
		t.Errorf("the volume differs from the source:\n%s", diff)
	}
	check(t, pod.Remove())
}

// CRI-O itself mounts container images.
func TestCRIOOrdinaryImagesAreNotTouched(t *testing.T) {
	n := crioNode(t, node.Options{})
	src := writeModel(t)
	layer, err := pack.TarDir(src)
	check(t, err)
	image, err := pack.Image(ocispec.ImageConfig{}, true, layer)
	check(t, err)
	_, err = image.Push(t.Context(), n.Registry, "images/tiny", "latest")
	check(t, err)
	ref := n.Registry + "/images/tiny:latest"
	_, err = n.Pull(ref)
	check(t, err)
	pod, err := n.RunPod(node.PodSpec{Volumes: []node.Volume{{Image: ref, Path: "/image"}}})
	check(t, err)
	want, err := treelist.List(src)
	check(t, err)
	wantVolume(t, pod, "main", "/image", want)
	check(t, pod.Remove())
	_, err = n.Crictl("rmi", ref) // otherwise CRI-O keeps it mounted
	check(t, err)
}
