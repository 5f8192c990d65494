// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
)

// machineOverlayfs are options for containerd's own overlayfs.
const machineOverlayfs = `
[plugins.'io.containerd.snapshotter.v1.overlayfs']
  mount_options = ['volatile', 'redirect_dir=on']
  upperdir_label = true
`

// With the snapshotter of the node, root file systems keep the options that they had.
func TestInstallTakesOverTheOptionsOfOverlayfs(t *testing.T) {
	t.Parallel()
	n := node.ForTest(t, node.Options{Systemd: true})
	etc := filepath.Join(n.Dir, "machine", "etc")
	main := filepath.Join(etc, "containerd", "config.toml")
	text, err := os.ReadFile(main)
	check(t, err)
	writeFile(t, main, string(text)+machineOverlayfs, 0o644)
	program := filepath.Join(n.Dir, "artifact-snapshotter")
	copyBinary(t, n, program)
	ours := filepath.Join(etc, "artifact-snapshotter", "config.toml")

	for name, test := range map[string]struct {
		file string // the daemon's file; "" means none
		want string // the beginning of the file after install
	}{
		"none": {"", "# Written by `artifact-snapshotter install`, which undoes edits; `artifact-snapshotter uninstall` removes it.\n"},
		"an administrator's, without a last newline": {"log_level = 'debug'\n[nri]\nenabled = false", "log_level = 'debug'\n[nri]\nenabled = false"},
	} {
		t.Run(name, func(t *testing.T) {
			check(t, os.RemoveAll(filepath.Dir(ours))) // of the other case
			check(t, os.Mkdir(filepath.Dir(ours), 0o755))
			if test.file != "" {
				writeFile(t, ours, test.file, 0o640)
			}
			before := files(t, etc)
			preview := run(t, n, program, "install", "--scope", "node", "--dry-run")
			if !strings.Contains(preview, "+mount_options = ['volatile', 'redirect_dir=on']\n") {
				t.Errorf("the dry run printed\n%s", preview)
			}
			wantSame(t, etc, before)
			t.Log(run(t, n, program, "install", "--scope", "node"))
			waitForCRI(t, n)
			got := files(t, etc)[ours]
			if head, ok := strings.CutPrefix(got, test.want+"\n# From containerd's configuration"); !ok || !strings.Contains(head, "\n[overlayfs]\nmount_options = ['volatile', 'redirect_dir=on']\nupperdir_label = true\n") {
				t.Errorf("the daemon's file is\n%s", got)
			}
			installed := files(t, etc)
			if said := run(t, n, program, "install", "--scope", "node"); said != "nothing to do" {
				t.Errorf("the second install printed %q", said)
			}
			wantSame(t, etc, installed)

			pod, err := n.RunPod(node.PodSpec{})
			check(t, err)
			options := rootOptions(t, n, pod)
			for _, want := range []string{"volatile", "redirect_dir=on", "upperdir=/var/lib/artifact-snapshotter/overlayfs/"} {
				if !strings.Contains(options, want) {
					t.Errorf("the root file system has the options %s, want %s among them", options, want)
				}
			}
			info, err := n.Ctr("snapshots", "--snapshotter", "artifact", "info", pod.Containers["main"])
			check(t, err)
			if !strings.Contains(info, `"containerd.io/snapshot/overlay.upperdir": "/var/lib/artifact-snapshotter/overlayfs/snapshots/`) {
				t.Errorf("the snapshot of the container is %s", info)
			}
			check(t, pod.Remove())
			if said := run(t, n, program, "uninstall", "--dry-run"); !strings.Contains(said, map[bool]string{true: "would remove ", false: "would change "}[test.file == ""]+"/etc/artifact-snapshotter/config.toml") {
				t.Errorf("the dry run of uninstall printed\n%s", said)
			}
			t.Log(run(t, n, program, "uninstall"))
			waitForCRI(t, n)
			delete(before, filepath.Dir(ours)+"/") // it is removed with the file
			if test.file != "" {
				before[filepath.Dir(ours)+"/"] = ""
			}
			wantSame(t, etc, before)
		})
	}
	t.Run("an administrator who has set other options", func(t *testing.T) {
		check(t, os.MkdirAll(filepath.Dir(ours), 0o755))
		writeFile(t, ours, "[overlayfs]\nmount_options = ['redirect_dir=on']\n", 0o644)
		preview := run(t, n, program, "install", "--scope", "node", "--dry-run")
		if strings.Contains(preview, "+++ /etc/artifact-snapshotter/config.toml") || !strings.Contains(preview, "unless that is intended, write this into /etc/artifact-snapshotter/config.toml") ||
			!strings.Contains(preview, "    mount_options = ['redirect_dir=on', 'volatile']\n") {
			t.Errorf("the dry run printed\n%s", preview)
		}
	})
}

// rootOptions returns the kernel's options of the overlay that is the root of a pod's
// container.
func rootOptions(t *testing.T, n *node.Node, pod *node.Pod) string {
	t.Helper()
	mounts, err := os.ReadFile(filepath.Join("/proc", pid(t, n, pod), "mountinfo"))
	if err != nil { // the process ID is valid only in the machine
		mounts = []byte(run(t, n, "cat", filepath.Join("/proc", pid(t, n, pod), "mountinfo")))
	}
	for line := range strings.Lines(string(mounts)) {
		// proc_pid_mountinfo(5): the fifth field is the mount point.
		if fields := strings.Fields(line); len(fields) > 4 && fields[4] == "/" {
			return fields[len(fields)-1]
		}
	}
	t.Fatalf("no root among the mounts\n%s", mounts)
	return ""
}
