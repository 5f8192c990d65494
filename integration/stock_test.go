// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/treelist"
)

// The behaviour of stock containerd is the baseline. If one of these tests fails with a new
// containerd, the reason for the snapshotter, or the interface that it uses, has changed.

// noSubPaths is a limitation of containerd 2.1.
const noSubPaths = "no sub paths: the container gets the whole volume"

// writeModel returns a directory with the model of pack.WriteModel, without the named
// files.
func writeModel(t *testing.T, without ...string) string {
	t.Helper()
	dir := t.TempDir()
	check(t, pack.WriteModel(dir))
	for _, name := range without {
		check(t, os.Remove(filepath.Join(dir, name)))
	}
	return dir
}

func TestStockContainerdMountsAnEmptyDirectoryForAModel(t *testing.T) {
	n := node.ForTest(t, node.Options{Stock: true})
	// Stock containerd cannot fetch the blob of an empty file.
	model, err := pack.Model(writeModel(t, "src/__init__.py"), pack.Options{})
	check(t, err)
	digest, err := model.Push(t.Context(), n.Registry, "models/tiny", "raw")
	check(t, err)

	ref := n.Registry + "/models/tiny:raw"
	_, err = n.Pull(ref)
	check(t, err)
	if _, err := os.Stat(filepath.Join(n.ContentRoot, "blobs", "sha256", digest.Encoded())); err != nil {
		t.Errorf("the manifest is not in containerd's blob directory: %v", err)
	}
	pod, err := n.RunPod(node.PodSpec{Volumes: []node.Volume{{Image: ref, Path: "/model"}}})
	check(t, err)
	entries, err := pod.Tree("main", "/model")
	check(t, err)
	if len(entries) != 0 {
		t.Errorf("the volume has %d entries, want none: %v", len(entries), entries)
	}
	mounts, err := pod.Exec("main", node.Guest, "mountinfo")
	check(t, err)
	if !strings.Contains(mounts, " /model ") {
		t.Errorf("/model is not a mount:\n%s", mounts)
	}
	check(t, pod.Remove())
}

func TestStockContainerdRefusesAModelWithAnEmptyFile(t *testing.T) {
	n := node.ForTest(t, node.Options{Stock: true})
	model, err := pack.Model(writeModel(t), pack.Options{})
	check(t, err)
	_, err = model.Push(t.Context(), n.Registry, "models/tiny", "raw")
	check(t, err)
	if _, err = n.Pull(n.Registry + "/models/tiny:raw"); err == nil || !strings.Contains(err.Error(), "size of zero") {
		t.Errorf("pull: %v, want an error about a size of zero", err)
	}
}

func TestStockContainerdMountsAnOrdinaryImage(t *testing.T) {
	src := writeModel(t)
	check(t, os.Symlink("config.json", filepath.Join(src, "link")))
	want, err := treelist.List(src)
	check(t, err)
	layer, err := pack.TarDir(src)
	check(t, err)
	n := node.ForTest(t, node.Options{Stock: true})
	for _, tt := range []struct {
		name       string
		compressed bool
	}{{"tar", false}, {"tar+gzip", true}} {
		t.Run(tt.name, func(t *testing.T) {
			image, err := pack.Image(ocispec.ImageConfig{}, tt.compressed, layer)
			check(t, err)
			repo := "images/" + strings.ReplaceAll(tt.name, "+", "-")
			digest, err := image.Push(t.Context(), n.Registry, repo, "")
			check(t, err)
			ref := n.Registry + "/" + repo + "@" + digest.String()
			_, err = n.Pull(ref)
			check(t, err)
			pod, err := n.RunPod(node.PodSpec{Volumes: []node.Volume{{Image: ref, Path: "/image"}, {Image: ref, Path: "/sub", SubPath: "tokenizer"}}})
			check(t, err)
			got, err := pod.Tree("main", "/image")
			check(t, err)
			if diff := treelist.Diff(want, got); diff != "" {
				t.Errorf("the volume differs from the source:\n%s", diff)
			}
			sub, err := pod.Tree("main", "/sub")
			check(t, err)
			wantSub, err := treelist.List(filepath.Join(src, "tokenizer"))
			check(t, err)
			if older(t, n, 2, noSubPaths) {
				wantSub = want
			}
			if diff := treelist.Diff(wantSub, sub); diff != "" {
				t.Errorf("the sub path differs from the source:\n%s", diff)
			}
			out, err := pod.Exec("main", node.Guest, "write", "/image/README.md")
			check(t, err)
			if out != "EROFS\n" {
				t.Errorf("writing to the volume: %q, want EROFS", out)
			}
			check(t, pod.Remove())
		})
	}
}

// The tests below check the test harness itself.

func TestPodSurvivesContainerd(t *testing.T) {
	n := node.ForTest(t, node.Options{Stock: true})
	pod, err := n.RunPod(node.PodSpec{Containers: []node.Container{
		{Name: "reader", Args: []string{"loop", node.Guest}},
		{Name: "idle"},
	}})
	check(t, err)
	for _, restart := range []struct {
		name string
		stop func() error
	}{{"SIGTERM", n.StopContainerd}, {"SIGKILL", n.KillContainerd}} {
		t.Run(restart.name, func(t *testing.T) {
			check(t, restart.stop())
			before := count(t, pod) // containerd writes the log, so the count does not change
			if _, err := n.Crictl("version"); err == nil {
				t.Error("containerd still answers")
			}
			check(t, n.StartContainerd())
			waitFor(t, "another read", func() bool { return count(t, pod) > before })
			out, err := pod.Exec("idle", node.Guest, "write", "/file")
			check(t, err)
			if out != "written\n" {
				t.Errorf("writing to the root filesystem: %q, want written", out)
			}
		})
	}
	check(t, pod.Remove())
}

// count returns how often the container "reader" has read its file.
func count(t *testing.T, pod *node.Pod) int {
	t.Helper()
	lines, err := pod.Log("reader")
	check(t, err)
	if len(lines) == 0 {
		return 0
	}
	last := lines[len(lines)-1]
	n, err := strconv.Atoi(last)
	if err != nil {
		t.Fatalf("the reader's last line is %q", last)
	}
	return n
}

// waitFor polls until the condition holds, for at most three minutes.
func waitFor(t *testing.T, what string, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(3 * time.Minute); !done(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("timed out while waiting for %s", what)
		}
	}
}

func TestPodThatCannotBeCreatedIsRemovedAndSaysWhy(t *testing.T) {
	n := node.ForTest(t, node.Options{Stock: true})
	_, err := n.RunPod(node.PodSpec{Volumes: []node.Volume{{Image: n.Registry + "/no/such:image", Path: "/model"}}})
	want := "code = NotFound desc = failed to mount image volume: ImageVolumeMountFailed: failed to resolve image"
	if n.Minor < 2 { // it has no reason for kubelet
		want = strings.Replace(want, "ImageVolumeMountFailed: ", "", 1)
	}
	if err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("got %v, want an error about the image", err)
	}
	pods, err := n.Crictl("pods", "--quiet")
	check(t, err)
	if pods != "" {
		t.Errorf("the pods %s were not removed", pods)
	}
}

func TestPodWithANetworkOfItsOwn(t *testing.T) {
	n := node.ForTest(t, node.Options{Stock: true})
	pod, err := n.RunPod(node.PodSpec{OwnNetwork: true})
	check(t, err)
	status, err := n.Crictl("inspectp", "--output", "go-template", "--template", "{{.status.network.ip}}", pod.ID)
	check(t, err)
	if !strings.HasPrefix(status, "10.253.") {
		t.Errorf("the pod's address is %q, want one of 10.253.0.0/16", status)
	}
	check(t, pod.Remove())
}

func TestPodWithAUserNamespace(t *testing.T) {
	src := writeModel(t)
	layer, err := pack.TarDir(src)
	check(t, err)
	image, err := pack.Image(ocispec.ImageConfig{}, false, layer)
	check(t, err)
	n := node.ForTest(t, node.Options{Stock: true})
	_, err = image.Push(t.Context(), n.Registry, "images/tiny", "latest")
	check(t, err)
	ref := n.Registry + "/images/tiny:latest"
	_, err = n.Pull(ref)
	check(t, err)
	pod, err := n.RunPod(node.PodSpec{OwnNetwork: true, UserNamespace: true, Volumes: []node.Volume{{Image: ref, Path: "/image"}}})
	check(t, err)
	pid, err := n.Crictl("inspect", "--output", "go-template", "--template", "{{.info.pid}}", pod.Containers["main"])
	check(t, err)
	ids, err := os.ReadFile(filepath.Join("/proc", strings.TrimSpace(pid), "uid_map"))
	check(t, err)
	if want := []string{"0", strconv.Itoa(node.UserNamespaceBase), "65536"}; !slices.Equal(strings.Fields(string(ids)), want) {
		t.Errorf("uid_map is %q, want %q", ids, want)
	}
	want, err := treelist.List(src)
	check(t, err)
	got, err := pod.Tree("main", "/image")
	check(t, err)
	if diff := treelist.Diff(want, got); diff != "" {
		t.Errorf("the volume differs from the source:\n%s", diff)
	}
	check(t, pod.Remove())
}

func TestStopRemovesEverything(t *testing.T) {
	n, err := node.Start(t.Context(), node.Options{Stock: true})
	check(t, err)
	_, err = n.RunPod(node.PodSpec{OwnNetwork: true})
	check(t, err)
	check(t, n.KillContainerd())
	check(t, n.Stop())
	if _, err := os.Stat(n.Dir); !os.IsNotExist(err) {
		t.Errorf("%s: %v, want ErrNotExist", n.Dir, err)
	}
}

func TestStopReportsLeftovers(t *testing.T) {
	t.Parallel()
	n, err := node.Start(t.Context(), node.Options{Stock: true})
	check(t, err)
	mounted := filepath.Join(n.Dir, "a b\\c\"d")
	check(t, os.Mkdir(mounted, 0o755))
	check(t, unix.Mount("tmpfs", mounted, "tmpfs", 0, ""))
	if mounts, err := node.Mounts(n.Dir); err != nil || !slices.Contains(mounts, mounted) {
		t.Errorf("mounts are %q, %v, want %q among them", mounts, err, mounted)
	}
	// A container that CRI does not know, in the control group of the pods.
	_, err = n.Ctr("run", "--detach", "--null-io", "--net-host", "--runc-root", filepath.Join(n.Dir, "runc"),
		"--cgroup", "/"+filepath.Base(n.Dir)+"/left", n.GuestImage, "left")
	check(t, err)
	err = n.Stop()
	if err == nil {
		t.Fatal("Stop reported nothing")
	}
	for _, want := range []string{"mount " + mounted, "containerd-shim-runc-v2 -namespace k8s.io -id left", "in the control group"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("the error does not contain %q: %v", want, err)
		}
	}
	if processes, err := node.Processes(n.Dir); err != nil || len(processes) > 0 {
		t.Errorf("remaining processes: %v, %v", processes, err)
	}
	if mounts, err := node.Mounts(n.Dir); err != nil || len(mounts) > 0 {
		t.Errorf("remaining mounts: %q, %v", mounts, err)
	}
}
