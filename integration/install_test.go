// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/artifact-snapshotter/artifact-snapshotter/deploy"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
)

// files returns the contents of all files below dir. A directory has the content "".
func files(t *testing.T, dir string) map[string]string {
	t.Helper()
	all := map[string]string{}
	check(t, filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			all[path+"/"] = ""
			return nil
		}
		if d.Type() == os.ModeSymlink {
			target, err := os.Readlink(path)
			all[path] = "-> " + target
			return err
		}
		if !d.Type().IsRegular() {
			all[path] = d.Type().String()
			return nil
		}
		text, err := os.ReadFile(path)
		all[path] = string(text)
		return err
	}))
	return all
}

func wantSame(t *testing.T, dir string, want map[string]string) {
	t.Helper()
	got := files(t, dir)
	for path, text := range want {
		if got[path] != text {
			t.Errorf("%s is %q, want %q", path, got[path], text)
		}
	}
	for path := range got {
		if _, ok := want[path]; !ok {
			t.Errorf("unexpected file %s", path)
		}
	}
}

// These are the commands of the README: from an unconfigured containerd to a pod that
// mounts a model, and back.
func TestInstallAndUninstall(t *testing.T) {
	t.Parallel()
	for _, test := range []struct{ name, flags, handler string }{
		{"the node", "--scope node", ""},
		{"a runtime handler", "--runtime-handler models", "models"},
	} {
		t.Run(test.name, func(t *testing.T) {
			n := node.ForTest(t, node.Options{Systemd: true})
			etc := filepath.Join(n.Dir, "machine", "etc")
			before := files(t, etc)
			program := filepath.Join(n.Dir, "artifact-snapshotter")
			copyBinary(t, n, program)
			flags := strings.Fields(test.flags)
			command := func(args ...string) []string { return append([]string{program}, append(args, flags...)...) }
			started := func() string { return property(t, n, "containerd", "ExecMainStartTimestampMonotonic") }

			at := started()
			preview := run(t, n, command("install", "--dry-run")...)
			for _, want := range []string{"+++ /etc/containerd/config.toml", "+imports = [\"/etc/containerd/conf.d/artifact-snapshotter.toml\"]", "+  [proxy_plugins.artifact]", "would restart containerd.service"} {
				if !strings.Contains(preview, want) {
					t.Errorf("the output of the dry run does not contain %q:\n%s", want, preview)
				}
			}
			wantSame(t, etc, before)

			t.Log(run(t, n, command("install")...))
			if started() == at {
				t.Error("containerd was not restarted")
			}
			at = started()
			waitForCRI(t, n)
			waitForEmptyBlob(t, n)
			src := writeModel(t)
			ref := pulled(t, n, src, pack.Raw)
			pod, err := n.RunPod(node.PodSpec{RuntimeHandler: test.handler, Volumes: []node.Volume{{Image: ref, Path: "/model"}}})
			check(t, err)
			wantVolume(t, pod, "main", "/model", wantTree(t, src, pack.Raw))

			installed := files(t, etc)
			if said := run(t, n, command("install")...); said != "nothing to do" {
				t.Errorf("the second install printed %q", said)
			}
			wantSame(t, etc, installed)
			if started() != at {
				t.Error("the second install restarted containerd")
			}

			// This is the state after a kill between writing the program and starting it.
			daemon := property(t, n, unitName, "MainPID")
			check(t, os.Chtimes(machineFile(n, deploy.UnitBinary), time.Time{}, time.Now()))
			if said := run(t, n, command("install")...); said != "started artifact-snapshotter.service" || property(t, n, unitName, "MainPID") == daemon {
				t.Errorf("with a newer program install printed %q", said)
			}
			if started() != at {
				t.Error("install restarted containerd although only the daemon needed it")
			}
			run(t, n, "systemctl", "stop", "containerd")
			if said, err := n.Run(command("uninstall")...); err == nil || !strings.Contains(said+err.Error(), "no containerd answers") {
				t.Errorf("uninstall without containerd: %q, %v", said, err)
			}
			run(t, n, "systemctl", "start", "containerd")
			waitForCRI(t, n)
			wantSame(t, etc, installed)

			// A dry run waits for nothing, as it changes nothing.
			dry := append([]string{"timeout", "--signal=KILL", "60"}, command("uninstall", "--dry-run", "--wait")...)
			if said, err := n.Run(dry...); err == nil || !strings.Contains(said+err.Error(), "drain the node") {
				t.Errorf("a dry run of uninstall with a running pod: %q, %v", said, err)
			}
			wantSame(t, etc, installed)

			// The running pod keeps the snapshotter; new pods get the previous one.
			for range 2 {
				if said, err := n.Run(command("uninstall")...); err == nil || !strings.Contains(said+err.Error(), "drain the node") {
					t.Errorf("uninstall with a running pod: %q, %v", said, err)
				}
				waitForCRI(t, n)
			}
			wantVolume(t, pod, "main", "/model", wantTree(t, src, pack.Raw))
			if test.handler != "" {
				wantSame(t, etc, installed)
			}
			other, err := n.RunPod(node.PodSpec{})
			check(t, err)
			if got := containersOf(t, n, "artifact"); got != 2 { // the first pod's container and its sandbox
				t.Errorf("%d containers use the snapshotter, want 2", got)
			}
			check(t, other.Remove())
			check(t, pod.Remove())
			t.Log(run(t, n, command("uninstall")...))
			waitForCRI(t, n)
			wantSame(t, etc, before)
			if _, err := os.Stat(machineFile(n, deploy.UnitBinary)); !os.IsNotExist(err) {
				t.Errorf("the program was not removed: %v", err)
			}
			at = started()
			if said := run(t, n, command("uninstall")...); said != "nothing to do" {
				t.Errorf("the second uninstall printed %q", said)
			}
			if started() != at {
				t.Error("the second uninstall restarted containerd")
			}
			if mounts := run(t, n, "cat", "/proc/self/mountinfo"); strings.Contains(mounts, "/run/artifact-snapshotter/mounts/") {
				t.Errorf("the daemon's mounts were not removed:\n%s", mounts)
			}
			pod, err = n.RunPod(node.PodSpec{})
			check(t, err)
			check(t, pod.Remove())

			// containerd has forgotten the snapshots, so a new installation with an empty
			// root works.
			check(t, os.RemoveAll(n.DaemonRoot))
			run(t, n, command("install")...)
			waitForCRI(t, n)
			pod, err = n.RunPod(node.PodSpec{RuntimeHandler: test.handler, Volumes: []node.Volume{{Image: ref, Path: "/model"}}})
			check(t, err)
			wantVolume(t, pod, "main", "/model", wantTree(t, src, pack.Raw))
			check(t, pod.Remove())
			run(t, n, command("uninstall")...)
		})
	}
}

// containersOf counts the containers that use a snapshotter.
func containersOf(t *testing.T, n *node.Node, snapshotter string) (count int) {
	t.Helper()
	ids, err := n.Ctr("containers", "ls", "-q")
	check(t, err)
	for _, id := range strings.Fields(ids) {
		info, err := n.Ctr("containers", "info", id)
		check(t, err)
		if strings.Contains(info, fmt.Sprintf("\"Snapshotter\": %q", snapshotter)) {
			count++
		}
	}
	return count
}
