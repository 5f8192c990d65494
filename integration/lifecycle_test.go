// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
)

const weights = "/model/model-00001.safetensors"

// reading is a pod whose container "reader" reads the weights continuously, and ends if
// they change.
func reading(ref string) node.PodSpec {
	return node.PodSpec{
		Volumes:    []node.Volume{{Image: ref, Path: "/model"}},
		Containers: []node.Container{{Name: "reader", Args: []string{"loop", weights}}, {Name: "main"}},
	}
}

// wantReading waits until the reader has read the weights once more.
func wantReading(t *testing.T, pod *node.Pod) {
	t.Helper()
	before := count(t, pod)
	waitFor(t, "another read by the pod", func() bool { return count(t, pod) > before })
}

func TestAPodGoesOnReadingWhenTheDaemonOrContainerdEnds(t *testing.T) {
	t.Parallel()
	n := node.ForTest(t, node.Options{})
	src := writeModel(t)
	for _, form := range []pack.Form{pack.Raw, pack.TarGzip} {
		ref := pulled(t, n, src, form)
		want := wantTree(t, src, form)
		pod, err := n.RunPod(reading(ref))
		check(t, err)
		for _, c := range []struct {
			name       string
			end, start func() error
		}{
			{"daemon, SIGTERM", n.StopDaemon, n.StartDaemon},
			{"daemon, SIGKILL", n.KillDaemon, n.StartDaemon},
			{"containerd, SIGTERM", n.StopContainerd, n.StartContainerd},
			{"containerd, SIGKILL", n.KillContainerd, n.StartContainerd},
		} {
			t.Run(string(form)+", "+c.name, func(t *testing.T) {
				check(t, c.end())
				if strings.HasPrefix(c.name, "daemon") {
					wantReading(t, pod) // containerd is running, which writes the log
				}
				check(t, c.start())
				waitForDaemon(t, n)
				wantReading(t, pod)
				wantVolume(t, pod, "main", "/model", want)
				next, err := n.RunPod(node.PodSpec{Volumes: []node.Volume{{Image: ref, Path: "/model"}}})
				check(t, err)
				wantVolume(t, next, "main", "/model", want)
				check(t, next.Remove())
				wantReading(t, pod)
			})
		}
		check(t, pod.Remove())
	}
}

// usage is what the daemon has on disk and mounted.
type usage struct {
	files  []string // below its root, without the database and the overlayfs snapshots
	mounts []string
}

func daemonUsage(t *testing.T, n *node.Node) (u usage) {
	t.Helper()
	check(t, filepath.WalkDir(filepath.Join(n.DaemonRoot, "trees"), func(path string, _ fs.DirEntry, err error) error {
		u.files = append(u.files, path)
		if os.IsNotExist(err) {
			return nil
		}
		return err
	}))
	// The contents that trees share; their directories remain.
	shared, err := filepath.Glob(filepath.Join(n.DaemonRoot, "blobs", "*", "*"))
	check(t, err)
	u.files = append(u.files, shared...)
	u.mounts, err = node.Mounts(n.DaemonState)
	check(t, err)
	return u
}

// wantUsage waits until the daemon's usage is as before.
func wantUsage(t *testing.T, n *node.Node, want usage) {
	t.Helper()
	waitFor(t, fmt.Sprintf("the daemon's usage to be %v", want), func() bool {
		got := daemonUsage(t, n)
		return slices.Equal(got.files, want.files) && slices.Equal(got.mounts, want.mounts)
	})
}

func TestADeletedImageIsRetainedUntilItsPodEnds(t *testing.T) {
	n := node.ForTest(t, node.Options{})
	src := writeModel(t)
	before := daemonUsage(t, n)
	for _, form := range []pack.Form{pack.Raw, pack.TarGzip} {
		t.Run(string(form), func(t *testing.T) {
			ref := pulled(t, n, src, form)
			d := manifestOf(t, n, ref)
			pod, err := n.RunPod(reading(ref))
			check(t, err)
			_, err = n.Crictl("rmi", ref)
			check(t, err)
			// containerd's garbage collector removes the blobs.
			waitFor(t, "containerd to delete the manifest", func() bool {
				_, err := os.Stat(filepath.Join(n.ContentRoot, "blobs", "sha256", d))
				return os.IsNotExist(err)
			})
			wantReading(t, pod)
			wantVolume(t, pod, "main", "/model", wantTree(t, src, form))
			check(t, pod.Remove())
			wantUsage(t, n, before)
		})
	}
}

// manifestOf returns the hex digest of the manifest that ref refers to.
func manifestOf(t *testing.T, n *node.Node, ref string) string {
	t.Helper()
	out, err := n.Crictl("inspecti", "--output", "go-template", "--template", "{{index .status.repoDigests 0}}", ref)
	check(t, err)
	_, hex, ok := strings.Cut(strings.TrimSpace(out), "@sha256:")
	if !ok {
		t.Fatalf("the digest of %s is %q", ref, out)
	}
	return hex
}

func TestAnUnusedModelIsRemovedWithItsImage(t *testing.T) {
	n := node.ForTest(t, node.Options{})
	before := daemonUsage(t, n)
	ref := pulled(t, n, writeModel(t), pack.Raw)
	pod, err := n.RunPod(node.PodSpec{Volumes: []node.Volume{{Image: ref, Path: "/model"}}})
	check(t, err)
	check(t, pod.Remove())
	_, err = n.Crictl("rmi", ref)
	check(t, err)
	wantUsage(t, n, before)
}

func TestAHundredPodsInTurnLeaveNothing(t *testing.T) {
	n := node.ForTest(t, node.Options{})
	src := writeModel(t)
	ref := pulled(t, n, src, pack.Raw)
	spec := node.PodSpec{Volumes: []node.Volume{{Image: ref, Path: "/model"}}}
	run := func() {
		pod, err := n.RunPod(spec)
		check(t, err)
		check(t, pod.Remove())
	}
	// goroutines counts the daemon's goroutines by ending it, and restarts it. It runs a
	// pod so that the daemon has connected to containerd.
	goroutines := func() int {
		g, err := n.QuitDaemon()
		check(t, err)
		check(t, n.StartDaemon())
		waitForDaemon(t, n)
		run()
		return g
	}
	run()
	goroutines()
	idle := daemonUsage(t, n) // the tree stays for the next pod
	idle.mounts = nil
	wantUsage(t, n, idle)
	before := goroutines()
	wantUsage(t, n, idle)
	waitForWatch(t, n)
	files := openFiles(t, n)
	for range 100 {
		run()
	}
	wantUsage(t, n, idle)
	waitFor(t, fmt.Sprintf("the daemon to have no more than %d open files", files), func() bool {
		return openFiles(t, n) <= files
	})
	// Some goroutines belong to connections and vary. A leak would be a hundred.
	if after := goroutines(); after > before+5 {
		t.Errorf("the daemon has %d goroutines, want about %d", after, before)
	}
	mounts, err := node.Mounts(n.State)
	check(t, err)
	if len(mounts) != 0 {
		t.Errorf("containerd has not removed the mounts %q", mounts)
	}
}

func openFiles(t *testing.T, n *node.Node) int {
	t.Helper()
	files, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", n.DaemonPID()))
	check(t, err)
	return len(files)
}

// waitForWatch waits until the daemon watches the blobs that arrive, which it begins after it
// has said that it is ready. It keeps a file open for that.
func waitForWatch(t *testing.T, n *node.Node) {
	t.Helper()
	waitFor(t, "the daemon to watch the blobs that arrive", func() bool {
		files, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", n.DaemonPID()))
		check(t, err)
		return slices.ContainsFunc(files, func(file string) bool {
			target, _ := os.Readlink(file)
			return target == "anon_inode:inotify"
		})
	})
}

// waitForDaemon waits until containerd has reconnected to the daemon, with a backoff of
// some seconds. kubelet would retry instead.
func waitForDaemon(t *testing.T, n *node.Node) {
	t.Helper()
	waitFor(t, "containerd to reach the daemon", func() bool {
		_, err := n.Ctr("snapshots", "--snapshotter", "artifact", "ls")
		return err == nil
	})
}

// A tree consists of a few kilobytes and hard links to the runtime's blobs.
func TestNoByteOfARawModelIsCopied(t *testing.T) {
	n := node.ForTest(t, node.Options{})
	ref := pulled(t, n, writeModel(t), pack.Raw)
	pod, err := n.RunPod(node.PodSpec{Volumes: []node.Volume{{Image: ref, Path: "/model"}}})
	check(t, err)
	blobs := inodes(t, filepath.Join(n.ContentRoot, "blobs"))
	shared, own := 0, int64(0)
	for inode, bytes := range inodes(t, filepath.Join(n.DaemonRoot, "trees")) {
		if _, ok := blobs[inode]; ok {
			shared++
		} else {
			own += bytes
		}
	}
	if shared < 5 { // there are more layers, but some are equal
		t.Errorf("the tree shares %d blobs with containerd", shared)
	}
	if own > 256<<10 {
		t.Errorf("the tree uses %d bytes of its own", own)
	}
	check(t, pod.Remove())
}

// inodes returns the disk usage of each inode below dir.
func inodes(t *testing.T, dir string) map[uint64]int64 {
	t.Helper()
	found := map[uint64]int64{}
	check(t, filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		found[st.Ino] = st.Blocks * 512
		return nil
	}))
	return found
}
