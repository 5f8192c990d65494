// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"archive/tar"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/platforms"
	modelspec "github.com/modelpack/model-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/treelist"
	layout "github.com/artifact-snapshotter/artifact-snapshotter/unpack"
)

// pair is the placement of the daemon's root and containerd's content, with the expected
// layout.
type pair struct {
	root, content fileSystem // equal names: one file system, unless apart says otherwise
	apart         layout.Boundary
	tar           layout.Mode      // of tar layers; the mode of raw layers is always overlay
	by            layout.Retention // how root retains blobs
	short         bool             // also part of a short run
}

var pairs = []pair{
	{root: ext4, content: ext4, tar: layout.EROFS, by: layout.Linked},
	{root: ext4Small, content: ext4Small, tar: layout.EROFS, by: layout.Linked},
	{root: xfs, content: xfs, tar: layout.EROFS, by: layout.Linked},
	{root: xfsUnlinked, content: xfsUnlinked, tar: layout.EROFS, by: layout.Linked, short: true},
	{root: btrfs, content: btrfs, tar: layout.EROFS, by: layout.Linked},
	{root: tmpfs, content: tmpfs, tar: layout.EROFSLoop, by: layout.Linked},
	{root: overlayOnExt4, content: overlayOnExt4, tar: layout.EROFSLoop, by: layout.Linked},

	{root: btrfs, content: btrfs, apart: layout.SubvolumeBoundary, tar: layout.EROFS, by: layout.Reflinked, short: true},
	{root: xfs, content: xfs, apart: layout.MountBoundary, tar: layout.EROFS, by: layout.Reflinked},
	{root: xfsUnlinked, content: xfsUnlinked, apart: layout.MountBoundary, tar: layout.EROFS, by: layout.Copied},

	{root: ext4, content: xfs, tar: layout.EROFS, by: layout.Copied},
	{root: xfs, content: btrfs, tar: layout.EROFS, by: layout.Copied},
	{root: btrfs, content: xfs, tar: layout.EROFS, by: layout.Copied},
	{root: tmpfs, content: ext4, tar: layout.EROFSLoop, by: layout.Copied, short: true},
	{root: ext4, content: overlayOnExt4, tar: layout.EROFS, by: layout.Copied},
	{root: overlayOnExt4, content: ext4, tar: layout.EROFSLoop, by: layout.Copied},
}

// cells returns the names of the file systems for the table of docs/support.md.
func (p pair) cells() (root, content string) {
	switch {
	case p.root.name != p.content.name:
		return p.root.name, p.content.name
	case p.apart == layout.SubvolumeBoundary:
		return p.root.name, "another subvolume of it"
	case p.apart == layout.MountBoundary:
		return p.root.name, "the same, mounted twice"
	default:
		return p.root.name, "the same"
	}
}

// byNRI reports whether image volumes must be mounted by NRI: the overlayfs snapshotter in
// the daemon's root cannot serve root file systems, because overlayfs does not accept an
// overlay as its upper layer.
func (p pair) byNRI() bool { return p.root.fsType == "overlay" }

// nativeImages reports whether containerd's overlayfs has the same problem, so that
// containerd must use its native snapshotter, which copies the image for each container.
func (p pair) nativeImages() bool { return p.byNRI() && p.content.fsType == "overlay" }

// userns reports whether pods can have user namespaces. The kernel does not ID-map an
// overlay, but runc must ID-map files that containerd keeps for a pod, such as its
// hostname.
func (p pair) userns() bool { return p.content.fsType != "overlay" }

func (p pair) dirs(t *testing.T) (root, content string) {
	t.Helper()
	disk := p.root.mounted(t)
	root, content = filepath.Join(disk, "daemon"), filepath.Join(disk, "containerd")
	switch {
	case p.content.name != p.root.name:
		content = filepath.Join(p.content.mounted(t), "containerd")
	case p.apart == layout.SubvolumeBoundary:
		if out, err := exec.Command("btrfs", "subvolume", "create", content).CombinedOutput(); err != nil {
			t.Fatalf("btrfs: %v: %s", err, out)
		}
	case p.apart == layout.MountBoundary:
		twice := shortDir(t)
		check(t, unix.Mount(disk, twice, "", unix.MS_BIND, ""))
		unmountLater(t, twice)
		content = filepath.Join(twice, "containerd")
	}
	return root, content
}

func (p pair) node(t *testing.T) (n *node.Node, socket string) {
	t.Helper()
	o := node.Options{NRI: p.byNRI()}
	o.DaemonRoot, o.ContainerdRoot = p.dirs(t)
	if p.nativeImages() {
		o.ContainerdConfig = "[plugins.'io.containerd.cri.v1.images']\n  snapshotter = 'native'\n" +
			"[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]\n  platform = '" + platforms.DefaultString() + "'\n  snapshotter = 'native'\n"
	}
	return metered(t, o)
}

// restart starts the daemon again.
func (p pair) restart(t *testing.T, n *node.Node) {
	t.Helper()
	check(t, n.StartDaemon())
	if p.byNRI() {
		check(t, n.WaitForNRI())
	} else {
		waitForDaemon(t, n)
	}
}

// anything pulls artifacts of all forms, and returns volumes and their expected content.
func anything(t *testing.T, n *node.Node) (volumes []node.Volume, want [][]treelist.Entry) {
	t.Helper()
	src := writeOwnedModel(t)
	for i, form := range []pack.Form{pack.Raw, pack.Tar, pack.TarGzip, pack.TarZstd} {
		volumes = append(volumes, node.Volume{Image: pulled(t, n, src, form), Path: fmt.Sprintf("/model-%d", i)})
		want = append(want, wantTree(t, src, form))
	}
	layers, entries := mixture(t)
	volumes = append(volumes, node.Volume{Image: push(t, n, "mixture", layers...), Path: "/mixture"})
	return volumes, append(want, entries)
}

const largeSize = 64 << 20

// outcome is a row of the table.
type outcome struct {
	pair
	raw, tar string             // the chosen modes
	grown    map[string]int64   // growth of root's disk in bytes for the two large artifacts, by format
	counted  map[string]float64 // content_bytes_total by method
}

func TestVolumesAreTheSameOnAnyFileSystem(t *testing.T) {
	long := os.Getenv("ARTIFACT_SNAPSHOTTER_LONG") != ""
	var rows []outcome
	for _, p := range pairs {
		if !long && !p.short {
			continue
		}
		root, content := p.cells()
		t.Run(root+", content on "+content, func(t *testing.T) {
			o := p.prove(t, long)
			rows = append(rows, o)
		})
	}
	suites := map[string]string{} // by root
	if long {
		suites = runSuites(t)
	}
	t.Logf("the table of docs/support.md:\n%s", table(rows, suites))
}

func (p pair) prove(t *testing.T, everyMode bool) outcome {
	n, socket := p.node(t)
	o := outcome{pair: p, grown: map[string]int64{}, counted: map[string]float64{}}
	files, used := filesBelow(t, n.DaemonRoot), usedBytes(t, n.DaemonRoot)
	mounts, err := node.Mounts(n.DaemonState)
	check(t, err)

	var pods []*node.Pod
	var images []string
	run := func(volumes []node.Volume, userns bool) *node.Pod {
		t.Helper()
		pod, err := n.RunPod(node.PodSpec{OwnNetwork: userns, UserNamespace: userns, Volumes: volumes})
		check(t, err)
		pods = append(pods, pod)
		return pod
	}
	// Measure the disk space that a large file needs when it is mounted, in addition to its
	// blob.
	weights := random(largeSize, "weights")
	raw := rawLayer("weights", weights)
	for format, layer := range map[string]pack.Layer{
		"raw": raw,
		"tar": tarLayer(t, modelspec.MediaTypeModelWeight, archiveOf(t, pack.Member{Header: tar.Header{Name: "weights", Mode: 0o644}, Data: weights})),
	} {
		ref := push(t, n, "large-"+format, layer)
		images = append(images, ref)
		already := usedBytes(t, n.DaemonRoot)
		pod := run([]node.Volume{{Image: ref, Path: "/model"}}, false)
		o.grown[format] = usedBytes(t, n.DaemonRoot) - already
		entries, err := pod.Tree("main", "/model")
		check(t, err)
		if len(entries) != 1 || entries[0].SHA256 != fileEntry("", weights).SHA256 {
			t.Errorf("the large %s file is mounted as %+v", format, entries)
		}
		least, most := int64(-1<<20), int64(1<<20)
		if p.nativeImages() {
			most = 8 << 20 // the pod's own image
		}
		if p.by == layout.Copied {
			least, most = largeSize, largeSize+8<<20
		}
		if g := o.grown[format]; g < least || g > most {
			t.Errorf("mounting a %s file of %d bytes took %d bytes of root's disk, want %d to %d", format, largeSize, g, least, most)
		}
	}

	volumes, want := anything(t, n)
	for _, v := range volumes {
		images = append(images, v.Image)
	}
	wantAll := func(pod *node.Pod, userns bool) {
		t.Helper()
		for i, v := range volumes {
			entries := want[i]
			if userns {
				entries = mapped(entries)
			}
			wantVolume(t, pod, "main", v.Path, entries)
		}
	}
	first := run(volumes, false)
	wantAll(first, false)
	var owned *node.Pod
	if p.userns() {
		owned = run(volumes, true)
		wantAll(owned, true)
	}
	counted := series(t, socket)
	wantAll(run(volumes, false), false)
	for _, how := range layout.Retentions {
		key := fmt.Sprintf("content_bytes_total{method=%q}", how)
		o.counted[string(how)] = counted[key]
		if now := series(t, socket)[key]; now != counted[key] {
			t.Errorf("after another pod %s is %f, want %f as before", key, now, counted[key])
		}
	}
	p.wantCounted(t, o.counted)
	o.raw, o.tar = modesOf(t, counted)
	if o.raw != string(layout.Overlay) || o.tar != string(p.tar) {
		t.Errorf("the modes are %s and %s, want %s and %s", o.raw, o.tar, layout.Overlay, p.tar)
	}
	p.wantAdvice(t, n)

	check(t, n.KillDaemon())
	wantAll(first, false)
	p.restart(t, n)
	wantAll(first, false)
	if owned != nil {
		wantAll(owned, true)
	}
	wantAll(run(volumes, false), false)

	for _, pod := range pods {
		check(t, pod.Remove())
	}
	for _, image := range images {
		_, err := n.Crictl("rmi", image)
		check(t, err)
	}
	p.wantNothingLeft(t, n, files, mounts, used)
	if everyMode && p.root.name == p.content.name && p.apart == "" {
		p.everyMode(t, n)
		p.wantNothingLeft(t, n, files, mounts, used)
	}
	return o
}

// wantCounted checks the metrics about how the daemon got the two large files and the small
// ones.
func (p pair) wantCounted(t *testing.T, counted map[string]float64) {
	t.Helper()
	// Sparse members are always copied: about 4 KiB in each of the two trees.
	const sparse = 32 << 10
	for how, bounds := range map[layout.Retention][2]float64{
		layout.Copied:    {1, sparse},
		layout.Reflinked: {0, 0},
	} {
		if how == p.by {
			bounds = [2]float64{2 * largeSize, 3 * largeSize}
		}
		if n := counted[string(how)]; n < bounds[0] || n > bounds[1] {
			t.Errorf("%.0f bytes by the method %s, want %.0f to %.0f", n, how, bounds[0], bounds[1])
		}
	}
}

// modesOf returns the modes of the trees.
func modesOf(t *testing.T, series map[string]float64) (raw, tar string) {
	t.Helper()
	for key, count := range series {
		if !strings.HasPrefix(key, "trees{") || count == 0 {
			continue
		}
		if raw != "" {
			t.Errorf("the trees have different modes: %q", key)
		}
		_, err := fmt.Sscanf(strings.ReplaceAll(key, ",", " "), "trees{raw=%q tar=%q}", &raw, &tar)
		check(t, err)
	}
	return raw, tar
}

// wantAdvice checks the advice of doctor: what another file system would improve, and
// nothing if there is nothing to improve.
func (p pair) wantAdvice(t *testing.T, n *node.Node) {
	t.Helper()
	_, text := doctor(t, n)
	for advice, wanted := range map[string]bool{
		"advice: move root to ext4, xfs or btrfs: tars take no loop devices": p.tar == layout.EROFSLoop,
		"whose own root filesystem overlayfs cannot have on an overlay":      p.byNRI(),
		"blobs are linked into root, without a copy":                         p.by == layout.Linked,
		"are reflinked into root, without a copy":                            p.by == layout.Reflinked,
		"are copied into root":                                               p.by == layout.Copied,
	} {
		if strings.Contains(text, advice) != wanted {
			t.Errorf("doctor prints %q: %v, want %v, in\n%s", advice, !wanted, wanted, text)
		}
	}
}

// wantNothingLeft waits until the daemon has the same files and mounts as at the beginning
// and no loop device. Its disk must be as full as before, except for the growth of
// databases and directories.
func (p pair) wantNothingLeft(t *testing.T, n *node.Node, files, mounts []string, used int64) {
	t.Helper()
	const slack = 4 << 20
	eventually(t, func() string {
		now := filesBelow(t, n.DaemonRoot)
		mounted, err := node.Mounts(n.DaemonState)
		check(t, err)
		devices := loopDevicesIn(t, n.DaemonRoot)
		if slices.Equal(now, files) && slices.Equal(mounted, mounts) && len(devices) == 0 {
			return ""
		}
		return fmt.Sprintf("the daemon has the files %q, the mounts %q and the loop devices %q, want the files %q and the mounts %q", now, mounted, devices, files, mounts)
	})
	var grown int64
	waitFor(t, "the disk to be as full as before", func() bool {
		grown = usedBytes(t, n.DaemonRoot) - used
		return grown < slack
	})
	t.Logf("root's disk grew by %d bytes", grown)
}

// filesBelow returns everything below dir except directories, in lexical order.
func filesBelow(t *testing.T, dir string) (names []string) {
	t.Helper()
	check(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if os.IsNotExist(err) {
			return nil // removed in the meantime
		}
		if err == nil && !d.IsDir() {
			names = append(names, path)
		}
		return err
	}))
	return names
}
