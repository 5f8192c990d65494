// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/treelist"
)

// pushModel packs the files in src in a form and pushes them.
func pushModel(t *testing.T, n *node.Node, src string, form pack.Form, tag string) digest.Digest {
	t.Helper()
	model, err := pack.Model(src, pack.Options{Form: form, Scratch: t.TempDir()})
	check(t, err)
	d, err := model.Push(t.Context(), n.Registry, "models/tiny", tag)
	check(t, err)
	return d
}

// pulled pushes a model, pulls it and returns its reference.
func pulled(t *testing.T, n *node.Node, src string, form pack.Form) string {
	t.Helper()
	tag := strings.ReplaceAll(string(form), "+", "-")
	pushModel(t, n, src, form, tag)
	ref := n.Registry + "/models/tiny:" + tag
	_, err := n.Pull(ref)
	check(t, err)
	return ref
}

// wantTree returns the expected volume of the files in src, packed in a form.
func wantTree(t *testing.T, src string, form pack.Form) []treelist.Entry {
	t.Helper()
	entries, err := treelist.List(src)
	check(t, err)
	created := pack.Created.UnixNano()
	if form == pack.Generic {
		created = 0 // the empty config has no time
	}
	for i := range entries {
		e := &entries[i]
		switch {
		case e.Type == "dir": // no layer describes it
			e.ModTime = created
		case form == pack.Generic: // no annotation describes it
			e.Mode, e.UID, e.GID, e.ModTime = 0o644, 0, 0, created
		}
	}
	return entries
}

func wantVolume(t *testing.T, pod *node.Pod, container, path string, want []treelist.Entry) {
	t.Helper()
	got, err := pod.Tree(container, path)
	check(t, err)
	if diff := treelist.Diff(want, got); diff != "" {
		t.Errorf("%s in container %s differs from the source:\n%s", path, container, diff)
	}
}

var allForms = []pack.Form{pack.Raw, pack.Tar, pack.TarGzip, pack.TarZstd, pack.Legacy, pack.LegacyTar, pack.Generic}

func TestAModelIsMountedAsItWasPacked(t *testing.T) {
	t.Parallel()
	n := node.ForTest(t, node.Options{})
	src := writeModel(t)
	for _, form := range allForms {
		t.Run(string(form), func(t *testing.T) {
			d := pushModel(t, n, src, form, strings.ReplaceAll(string(form), "+", "-"))
			want := wantTree(t, src, form)
			for _, ref := range []string{
				n.Registry + "/models/tiny:" + strings.ReplaceAll(string(form), "+", "-"),
				n.Registry + "/models/tiny@" + d.String(),
			} {
				_, err := n.Pull(ref)
				check(t, err)
				pod, err := n.RunPod(node.PodSpec{Volumes: []node.Volume{{Image: ref, Path: "/model"}}})
				check(t, err)
				wantVolume(t, pod, "main", "/model", want)
				check(t, pod.Remove())
			}
		})
	}
}

// pulledIndex pulls an index with the model of src for this platform and another model for
// another platform.
func pulledIndex(t *testing.T, n *node.Node, src string) (ref string) {
	t.Helper()
	model, err := pack.Model(src, pack.Options{})
	check(t, err)
	other, err := pack.Model(writeModel(t, "README.md"), pack.Options{})
	check(t, err)
	here := platforms.DefaultSpec()
	index := pack.Index{Manifests: []pack.IndexEntry{
		{Artifact: other, Platform: &ocispec.Platform{OS: "linux", Architecture: "s390x"}},
		{Artifact: model, Platform: &here},
	}}
	_, err = index.Push(t.Context(), n.Registry, "models/index", "latest")
	check(t, err)
	ref = n.Registry + "/models/index:latest"
	_, err = n.Pull(ref)
	check(t, err)
	return ref
}

func TestAnIndexIsResolvedToThisPlatform(t *testing.T) {
	n := node.ForTest(t, node.Options{})
	src := writeModel(t)
	ref := pulledIndex(t, n, src)
	pod, err := n.RunPod(node.PodSpec{Volumes: []node.Volume{{Image: ref, Path: "/model"}}})
	check(t, err)
	wantVolume(t, pod, "main", "/model", wantTree(t, src, pack.Raw))
	check(t, pod.Remove())
}

func TestTwoContainersAndTwoPodsShareOneMount(t *testing.T) {
	n := node.ForTest(t, node.Options{})
	src := writeModel(t)
	ref := pulled(t, n, src, pack.Raw)
	want := wantTree(t, src, pack.Raw)
	spec := node.PodSpec{
		Volumes:    []node.Volume{{Image: ref, Path: "/model"}},
		Containers: []node.Container{{Name: "a"}, {Name: "b"}},
	}
	first, err := n.RunPod(spec)
	check(t, err)
	second, err := n.RunPod(spec)
	check(t, err)
	for _, pod := range []*node.Pod{first, second} {
		for _, c := range []string{"a", "b"} {
			wantVolume(t, pod, c, "/model", want)
		}
	}
	mounts, err := node.Mounts(n.DaemonState)
	check(t, err)
	if len(mounts) != 1 {
		t.Errorf("the daemon's mounts are %q, want one for all containers", mounts)
	}
	check(t, first.Remove())
	wantVolume(t, second, "a", "/model", want)
	check(t, second.Remove())
}

func TestASubPathAndTwoVolumesOfOneModel(t *testing.T) {
	n := node.ForTest(t, node.Options{})
	src := writeModel(t)
	for _, form := range []pack.Form{pack.Raw, pack.TarGzip} {
		ref := pulled(t, n, src, form)
		pod, err := n.RunPod(node.PodSpec{Volumes: []node.Volume{
			{Image: ref, Path: "/model"},
			{Image: ref, Path: "/deep", SubPath: "tokenizer/deep"},
		}})
		check(t, err)
		want := wantTree(t, src, form)
		wantVolume(t, pod, "main", "/model", want)
		var deep []treelist.Entry
		for _, e := range want {
			if rest, ok := strings.CutPrefix(e.Path, "tokenizer/deep/"); ok {
				e.Path = rest
				deep = append(deep, e)
			}
		}
		if older(t, n, 2, noSubPaths) {
			deep = want
		}
		wantVolume(t, pod, "main", "/deep", deep)
		check(t, pod.Remove())
	}
}

func TestAVolumeCannotBeWritten(t *testing.T) {
	n := node.ForTest(t, node.Options{})
	for _, form := range []pack.Form{pack.Raw, pack.TarZstd} {
		ref := pulled(t, n, writeModel(t), form)
		pod, err := n.RunPod(node.PodSpec{Volumes: []node.Volume{{Image: ref, Path: "/model"}}})
		check(t, err)
		for _, path := range []string{"/model/config.json", "/model/new", "/model/src/__init__.py"} {
			out, err := pod.Exec("main", node.Guest, "write", path)
			check(t, err)
			if out != "EROFS\n" {
				t.Errorf("%s: writing %s: %q, want EROFS", form, path, out)
			}
		}
		// The daemon's mount and containerd's bind mount of it. The OCI runtime makes the
		// mounts inside the container.
		var mounts []string
		for _, dir := range []string{n.DaemonState, filepath.Join(n.State, "io.containerd.grpc.v1.cri", "image-volumes")} {
			found, err := node.Mounts(dir)
			check(t, err)
			mounts = append(mounts, found...)
		}
		if len(mounts) != 2 {
			t.Errorf("%s: the mounts are %q, want one of the daemon and one of containerd", form, mounts)
		}
		for _, mount := range mounts {
			var st unix.Statfs_t
			check(t, unix.Statfs(mount, &st))
			if want := int64(unix.ST_RDONLY | unix.ST_NOSUID | unix.ST_NODEV); st.Flags&want != want {
				t.Errorf("%s: the flags of mount %s are %#x, want %#x to be set", form, mount, st.Flags, want)
			}
		}
		check(t, pod.Remove())
		waitFor(t, "removal of the daemon's mount", func() bool {
			mounts, err := node.Mounts(n.DaemonState)
			return err == nil && len(mounts) == 0
		})
	}
}

func TestOrdinaryImagesAreServedAsByOverlayfs(t *testing.T) {
	n := node.ForTest(t, node.Options{})
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
	out, err := pod.Exec("main", node.Guest, "write", "/in the root file system")
	check(t, err)
	if out != "written\n" {
		t.Errorf("writing to the root file system: %q", out)
	}
	check(t, pod.Remove())
}

func TestAPodWithAUserNamespaceSeesItsOwnOwners(t *testing.T) {
	n := node.ForTest(t, node.Options{})
	src := writeModel(t)
	for _, form := range []pack.Form{pack.Raw, pack.TarGzip} {
		ref := pulled(t, n, src, form)
		volumes := []node.Volume{{Image: ref, Path: "/model"}}
		plain, err := n.RunPod(node.PodSpec{Volumes: volumes})
		check(t, err)
		mapped, err := n.RunPod(node.PodSpec{OwnNetwork: true, UserNamespace: true, Volumes: volumes})
		check(t, err)
		for _, pod := range []*node.Pod{plain, mapped} {
			wantVolume(t, pod, "main", "/model", wantTree(t, src, form))
		}
		check(t, plain.Remove())
		check(t, mapped.Remove())
	}
}

// After a tag has moved, the old pod keeps the old model and a new pod gets the new one.
func TestAMovedTag(t *testing.T) {
	n := node.ForTest(t, node.Options{})
	before := writeModel(t)
	ref := pulled(t, n, before, pack.Raw)
	volumes := []node.Volume{{Image: ref, Path: "/model"}}
	old, err := n.RunPod(node.PodSpec{Volumes: volumes})
	check(t, err)
	wantBefore := wantTree(t, before, pack.Raw)

	after := writeModel(t, "README.md")
	changed := filepath.Join(after, "config.json")
	check(t, os.WriteFile(changed, []byte("{}"), 0o600))
	check(t, os.Chtimes(changed, time.Time{}, pack.Created))
	pulled(t, n, after, pack.Raw)
	young, err := n.RunPod(node.PodSpec{Volumes: volumes})
	check(t, err)
	wantVolume(t, young, "main", "/model", wantTree(t, after, pack.Raw))
	wantVolume(t, old, "main", "/model", wantBefore)
	check(t, old.Remove())
	check(t, young.Remove())
}
