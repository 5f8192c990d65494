// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"archive/tar"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/treelist"
)

// Pods with `hostUsers: false`.

// otherBase is the first host ID of the second user namespace.
const otherBase = 400000

// writeOwnedModel is writeModel with additional files, whose owners are at and beyond the
// end of a pod's map of 65536 IDs.
func writeOwnedModel(t *testing.T) string {
	t.Helper()
	src := writeModel(t)
	for name, owner := range map[string][2]int{
		"last.txt":    {65535, 65535},
		"outside.txt": {70000, 70001},
		"half.txt":    {1234, 70001},
	} {
		path := filepath.Join(src, name)
		check(t, os.WriteFile(path, []byte(name), 0o644))
		check(t, os.Chown(path, owner[0], owner[1]))
		check(t, os.Chtimes(path, pack.Created, pack.Created))
	}
	return src
}

// mapped returns a listing as a pod with a user namespace sees it: owners without an ID in
// the map have the overflow ID (user_namespaces(7)).
func mapped(entries []treelist.Entry) []treelist.Entry {
	entries = slices.Clone(entries)
	for i := range entries {
		for _, id := range []*uint32{&entries[i].UID, &entries[i].GID} {
			if *id > 65535 {
				*id = 65534
			}
		}
	}
	return entries
}

// trees returns the names of the trees of a manifest.
func trees(t *testing.T, n *node.Node, manifest string) []string {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(n.DaemonRoot, "trees", "sha256-"+manifest+"*"))
	check(t, err)
	for i := range found {
		found[i] = filepath.Base(found[i])
	}
	return found
}

// pid returns the host's process ID of the pod's container.
func pid(t *testing.T, n *node.Node, pod *node.Pod) string {
	t.Helper()
	out, err := n.Crictl("inspect", "--output", "go-template", "--template", "{{.info.pid}}", pod.Containers["main"])
	check(t, err)
	return strings.TrimSpace(out)
}

func TestPodsWithDifferentUserNamespacesShareAnArtifact(t *testing.T) {
	t.Parallel()
	n := node.ForTest(t, node.Options{})
	src := writeOwnedModel(t)
	before := daemonUsage(t, n)
	// run runs a pod of two containers, or of one if the runtime does not support two.
	run := func(spec *node.PodSpec) *node.Pod {
		t.Helper()
		alone := spec.UserNamespace && older(t, n, 2, "one container of a pod with a user namespace can mount a volume, and no other")
		if alone {
			spec.Containers = spec.Containers[:1]
		}
		pod, err := n.RunPod(*spec)
		check(t, err)
		if alone {
			// The runtime maps the owners again, or tries to: an overlay cannot be
			// ID-mapped.
			err := pod.Start(node.Container{Name: "main"})
			if err == nil {
				_, err = pod.Tree("main", "/model")
			}
			if err == nil || !strings.Contains(err.Error(), "MOUNT_ATTR_IDMAP") && !strings.Contains(err.Error(), "permission denied") {
				t.Errorf("got %v, want an error for the second container", err)
			}
			pod.Containers["main"] = pod.Containers["reader"]
		}
		return pod
	}
	for _, form := range []pack.Form{pack.Raw, pack.Tar, pack.TarGzip, pack.Legacy} {
		t.Run(string(form), func(t *testing.T) {
			ref := pulled(t, n, src, form)
			manifest := manifestOf(t, n, ref)
			type namespace struct {
				spec node.PodSpec
				base uint32
				want []treelist.Entry
				pod  *node.Pod
				tree string
			}
			plain := wantTree(t, src, form)
			namespaces := []*namespace{
				{spec: node.PodSpec{}, want: plain},
				{spec: node.PodSpec{OwnNetwork: true, UserNamespace: true}, base: node.UserNamespaceBase, want: mapped(plain)},
				{spec: node.PodSpec{OwnNetwork: true, UserNamespace: true, HostID: otherBase}, base: otherBase, want: mapped(plain)},
			}
			for _, ns := range namespaces {
				var known []string
				if ns.base > 0 { // the tree without a map may exist since the pull
					known = trees(t, n, manifest)
				}
				reader := reading(ref)
				ns.spec.Volumes, ns.spec.Containers = reader.Volumes, reader.Containers
				ns.pod = run(&ns.spec)
				fresh := slices.DeleteFunc(trees(t, n, manifest), func(name string) bool { return slices.Contains(known, name) })
				if len(fresh) != 1 {
					t.Fatalf("the pod created the trees %q, want one", fresh)
				}
				ns.tree = fresh[0]
			}
			wantAll := func(namespaces []*namespace) {
				t.Helper()
				for _, ns := range namespaces {
					wantVolume(t, ns.pod, "main", "/model", ns.want)
					out, err := ns.pod.Exec("main", node.Guest, "write", "/model/README.md")
					check(t, err)
					if out != "EROFS\n" {
						t.Errorf("writing to the volume: %q, want EROFS", out)
					}
				}
			}
			wantAll(namespaces)
			for _, ns := range namespaces {
				// The owners on the host: a file whose owner has no ID in the pod belongs
				// to the host's overflow ID.
				outside := [2]uint32{70000, 70001}
				if ns.base > 0 {
					outside = [2]uint32{65534, 65534}
				}
				for name, want := range map[string][2]uint32{
					"config.json": {ns.base, ns.base},
					"last.txt":    {ns.base + 65535, ns.base + 65535},
					"half.txt":    {ns.base + 1234, outside[1]},
					"outside.txt": outside,
				} {
					st := stat(t, filepath.Join("/proc", pid(t, n, ns.pod), "root/model", name))
					if got := [2]uint32{st.Uid, st.Gid}; got != want {
						t.Errorf("base %d: on the host %s is owned by %d, want %d", ns.base, name, got, want)
					}
				}
				if form == pack.Raw || form == pack.Legacy {
					wantOnlyMetadata(t, n, ns.tree)
				}
			}

			// A new daemon knows the trees of the previous one.
			check(t, n.KillDaemon())
			check(t, n.StartDaemon())
			waitForDaemon(t, n)
			wantAll(namespaces)
			for _, ns := range namespaces {
				wantReading(t, ns.pod)
				next := run(&ns.spec)
				wantVolume(t, next, "main", "/model", ns.want)
				check(t, next.Remove())
			}
			if got := trees(t, n, manifest); len(got) != len(namespaces) {
				t.Errorf("after a restart the trees are %q, want %d", got, len(namespaces))
			}

			// After the deletion of the image, each tree is removed with its last pod.
			_, err := n.Crictl("rmi", ref)
			check(t, err)
			waitFor(t, "containerd to delete the manifest", func() bool {
				_, err := os.Stat(blobPath(n, manifest))
				return os.IsNotExist(err)
			})
			for _, i := range []int{1, 0, 2} { // not in the order of creation
				ns := namespaces[i]
				check(t, ns.pod.Remove())
				ns.pod = nil
				waitFor(t, "tree "+ns.tree+" to go", func() bool { return !slices.Contains(trees(t, n, manifest), ns.tree) })
				var left []*namespace
				for _, ns := range namespaces {
					if ns.pod != nil {
						left = append(left, ns)
						wantReading(t, ns.pod)
					}
				}
				wantAll(left)
				if got := trees(t, n, manifest); len(got) != len(left) {
					t.Errorf("with %d pods the trees are %q", len(left), got)
				}
			}
			wantUsage(t, n, before)
		})
	}
}

// wantOnlyMetadata checks that all data of a tree are hard links to containerd's blobs.
func wantOnlyMetadata(t *testing.T, n *node.Node, tree string) {
	t.Helper()
	blobs := inodes(t, filepath.Join(n.ContentRoot, "blobs"))
	shared, own := int64(0), int64(0)
	for inode, bytes := range inodes(t, filepath.Join(n.DaemonRoot, "trees", tree)) {
		if _, ok := blobs[inode]; ok {
			shared += bytes
		} else {
			own += bytes
		}
	}
	t.Logf("tree %s shares %d bytes with containerd and has %d of its own", tree, shared, own)
	if shared < 3<<20 {
		t.Errorf("tree %s shares %d bytes with containerd, want at least the weights", tree, shared)
	}
	if own > 256<<10 {
		t.Errorf("tree %s uses %d bytes of its own", tree, own)
	}
}

// The root file system is an overlayfs over layers that the kernel ID-maps ("remap-ids"),
// so nothing is copied to change owners.
func TestTheRootFileSystemOfAPodWithAUserNamespace(t *testing.T) {
	n := node.ForTest(t, node.Options{})
	file := func(name string, mode int64, uid int) pack.Member {
		return pack.Member{Header: tar.Header{Name: name, Mode: mode, Uid: uid, Gid: uid}, Data: []byte(name)}
	}
	dir := file("files/", 0o755, 0)
	dir.Data, dir.Typeflag = nil, tar.TypeDir
	ref, layer := guestImage(t, n, "owned", dir,
		file("files/root", 0o600, 0), file("files/user", 0o644, 1000), file("files/outside", 0o644, 70000))
	_, err := n.Pull(ref)
	check(t, err)
	committed := func() (keys []string) {
		for key, kind := range snapshotsIn(t, n, "artifact") {
			if kind == "Committed" {
				keys = append(keys, key)
			}
		}
		slices.Sort(keys)
		return keys
	}
	layers := committed()
	if !slices.Contains(layers, layer.String()) {
		t.Fatalf("the image was not unpacked; committed snapshots: %q", layers)
	}
	bases := []uint32{0, node.UserNamespaceBase, otherBase}
	// Without ID mapping containerd would commit a copy of the layers for each map
	// (client/snapshotter_opts_unix.go). Garbage collection removes it after the pod.
	wantRootOwners(t, n, ref, bases, true, func() {
		if got := committed(); !slices.Equal(got, layers) {
			t.Errorf("the layers were copied to change owners: committed snapshots: %q, want %q", got, layers)
		}
	})

	// Simulate a kernel without ID-mapped overlays: containerd refuses such a pod,
	tell := func(capabilities string) {
		t.Helper()
		file := filepath.Join(n.Dir, "containerd.d", "10-snapshotter.toml")
		text, err := os.ReadFile(file)
		check(t, err)
		check(t, os.WriteFile(file, regexp.MustCompile(`capabilities = .*`).ReplaceAll(text, []byte("capabilities = "+capabilities)), 0o644))
		check(t, n.RestartContainerd())
	}
	tell(`["only-remap-ids"]`)
	pod, err := n.RunPod(node.PodSpec{OwnNetwork: true, UserNamespace: true, Containers: []node.Container{{Image: ref}}})
	if err == nil || !strings.Contains(err.Error(), "configure `slow_chown`") {
		t.Errorf("the pod was not refused: %v", err)
	}
	if err == nil {
		check(t, pod.Remove())
	}
	// or, with slow_chown, copies the layers and changes the owners of all files. The
	// kernel must not map them again.
	tell(`[]`)
	ref, _ = guestImage(t, n, "inside", dir, file("files/root", 0o600, 0), file("files/user", 0o644, 1000)) // containerd refuses to copy owners beyond the map
	_, err = n.Pull(ref)
	check(t, err)
	layers = committed()
	wantRootOwners(t, n, ref, bases, false, func() {
		if got := committed(); len(got) <= len(layers) {
			t.Errorf("the layers were not copied to change owners; committed snapshots: %q", got)
		}
	})
}

// wantRootOwners runs a pod of the image for each base, 0 meaning no user namespace, and
// checks the owners of the files in its root file system. outside means that one file has
// an owner beyond the map. While the pods run, running is called.
func wantRootOwners(t *testing.T, n *node.Node, ref string, bases []uint32, outside bool, running func()) {
	t.Helper()
	var pods []*node.Pod
	for _, base := range bases {
		pod, err := n.RunPod(node.PodSpec{OwnNetwork: true, UserNamespace: base > 0, HostID: base, Containers: []node.Container{{Image: ref}}})
		check(t, err)
		pods = append(pods, pod)
	}
	for i, pod := range pods {
		wantWritable(t, pod, "/files/new")
		wantWritable(t, pod, "/files/root") // copied up from the layer
		owners := map[string]uint32{"root": 0, "user": 1000, "new": 0}
		switch {
		case outside && bases[i] > 0:
			owners["outside"] = 65534
		case outside:
			owners["outside"] = 70000
		}
		entries, err := pod.Tree("main", "/files")
		check(t, err)
		if len(entries) != len(owners) {
			t.Errorf("base %d: /files has %d entries, want %d", bases[i], len(entries), len(owners))
		}
		for _, e := range entries {
			if want := owners[e.Path]; e.UID != want || e.GID != want {
				t.Errorf("base %d: /files/%s is owned by %d:%d, want %d", bases[i], e.Path, e.UID, e.GID, want)
			}
		}
		for _, name := range []string{"new", "root"} { // on the host
			if st := stat(t, filepath.Join("/proc", pid(t, n, pod), "root/files", name)); st.Uid != bases[i] || st.Gid != bases[i] {
				t.Errorf("on the host /files/%s is owned by %d:%d, want %d", name, st.Uid, st.Gid, bases[i])
			}
		}
	}
	running()
	for _, pod := range pods {
		check(t, pod.Remove())
	}
}
