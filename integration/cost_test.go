// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"archive/tar"
	"encoding/json"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	modelspec "github.com/modelpack/model-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
)

// The resources that a model takes, as kubelet and the kernel account for them.

// pageCache returns the bytes of page cache that are charged to the memory control group of
// the container "main".
func pageCache(t *testing.T, n *node.Node, pod *node.Pod) int64 {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("/proc", pid(t, n, pod), "cgroup"))
	check(t, err)
	group := ""
	for line := range strings.Lines(string(text)) { // "4:memory:/path" in version 1, "0::/path" in version 2
		fields := strings.SplitN(strings.TrimSpace(line), ":", 3)
		switch {
		case fields[1] == "memory":
			group = filepath.Join("/sys/fs/cgroup/memory", fields[2])
		case fields[0] == "0" && group == "":
			group = filepath.Join("/sys/fs/cgroup", fields[2])
		}
	}
	stats, err := os.ReadFile(filepath.Join(group, "memory.stat"))
	check(t, err)
	for line := range strings.Lines(string(stats)) {
		if name, value, _ := strings.Cut(strings.TrimSpace(line), " "); name == "cache" || name == "file" {
			bytes, err := strconv.ParseInt(value, 10, 64)
			check(t, err)
			return bytes
		}
	}
	t.Fatalf("%s/memory.stat has no page cache: %s", group, stats)
	return 0
}

// dropCache drops the pages of the model's layers from the page cache.
func dropCache(t *testing.T, n *node.Node, ref string) {
	t.Helper()
	manifest, _ := pulledManifest(t, n, ref)
	for _, layer := range manifest.Layers {
		f, err := os.Open(blobPath(n, layer.Digest.Encoded()))
		check(t, err)
		check(t, f.Sync()) // only clean pages can be dropped
		check(t, unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED))
		check(t, f.Close())
	}
}

func TestPageCacheIsChargedToTheFirstReader(t *testing.T) {
	const size = 64 << 20
	n := node.ForTest(t, node.Options{})
	wantCharged := func(t *testing.T, pod *node.Pod, which string, want int64) {
		t.Helper()
		before := pageCache(t, n, pod)
		_, err := pod.Tree("main", "/model")
		check(t, err)
		charged := pageCache(t, n, pod) - before
		if charged < want-size/16 || charged > want+size/4 {
			t.Errorf("%s is charged for %d bytes of page cache, want %d", which, charged, want)
		}
	}
	run := func(t *testing.T, ref string) *node.Pod {
		t.Helper()
		pod, err := n.RunPod(node.PodSpec{Volumes: []node.Volume{{Image: ref, Path: "/model"}}})
		check(t, err)
		return pod
	}
	t.Run("raw", func(t *testing.T) {
		ref := push(t, n, "cache-raw", pack.Layer{MediaType: modelspec.MediaTypeModelWeightRaw, Data: random(size, "page cache")})
		pod, first, second := run(t, ref), run(t, ref), run(t, ref)
		wantCharged(t, pod, "the first pod after the pull, whose pages are charged to containerd,", 0)
		dropCache(t, n, ref)
		wantCharged(t, first, "the first reader", size)
		wantCharged(t, second, "the second reader", 0)
	})
	t.Run("tar", func(t *testing.T) { // the pages of the archive are not those of the file in it
		ref := push(t, n, "cache-tar", tarLayer(t, modelspec.MediaTypeModelWeight, archiveOf(t,
			pack.Member{Header: tar.Header{Name: "tarred", Mode: 0o644}, Data: random(size, "page cache of a tar")})))
		first, second := run(t, ref), run(t, ref)
		wantCharged(t, first, "the first reader", size)
		wantCharged(t, second, "the second reader", 0)
	})

	// The memory limit of a container does not limit the size of its model.
	ref := n.Registry + "/tars/cache-raw:latest"
	dropCache(t, n, ref)
	pod, err := n.RunPod(node.PodSpec{
		Volumes:    []node.Volume{{Image: ref, Path: "/model"}},
		Containers: []node.Container{{MemoryLimit: size / 2}},
	})
	check(t, err)
	for range 2 {
		_, err = pod.Tree("main", "/model")
		check(t, err)
	}
	if charged := pageCache(t, n, pod); charged > size/2 {
		t.Errorf("a container with a limit of %d bytes is charged for %d", size/2, charged)
	}
}

// kubelet gets the disk usage of the snapshots. The bytes of models are in the content
// store; they count as used space of the file system.
func TestImageFilesystemUsage(t *testing.T) {
	n := node.ForTest(t, node.Options{ContainerdConfig: "[plugins.'io.containerd.cri.v1.images']\n  stats_collect_period = 1\n"})
	type usage struct {
		UsedBytes struct{ Value string }
		FsID      struct{ Mountpoint string }
	}
	used := func() (bytes int64, mountpoint string) {
		t.Helper()
		out, err := n.Crictl("imagefsinfo")
		check(t, err)
		var info struct {
			Status struct{ ImageFilesystems []usage }
		}
		check(t, json.Unmarshal([]byte(out), &info))
		if len(info.Status.ImageFilesystems) != 1 {
			t.Fatalf("want one image file system: %s", out)
		}
		fs := info.Status.ImageFilesystems[0]
		bytes, err = strconv.ParseInt(fs.UsedBytes.Value, 10, 64)
		check(t, err)
		return bytes, fs.FsID.Mountpoint
	}
	const size = 16 << 20
	ref := push(t, n, "counted", pack.Layer{MediaType: modelspec.MediaTypeModelWeightRaw, Data: random(size, "counted")})
	_, err := n.RunPod(node.PodSpec{Volumes: []node.Volume{{Image: ref, Path: "/model"}}})
	check(t, err)
	waitFor(t, "the statistics of the pod's root file system", func() bool { bytes, _ := used(); return bytes > 0 })
	bytes, mountpoint := used()
	if bytes >= size {
		t.Errorf("the image file system uses %d bytes, want less than the model's %d bytes", bytes, size)
	}
	if mountpoint != n.DaemonRoot {
		t.Errorf("the mount point of the image file system is %s, want the daemon's root %s", mountpoint, n.DaemonRoot)
	}
	out, err := n.Crictl("inspecti", "--output", "go-template", "--template", "{{.status.size}}", ref)
	check(t, err)
	if reported, err := strconv.ParseInt(strings.TrimSpace(out), 10, 64); err != nil || reported < size {
		t.Errorf("CRI says that the model has %q bytes (%v), want %d", out, err, size)
	}
}
