// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"fmt"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/treelist"
)

// requiredPlugins makes containerd create no container without the plugin.
const requiredPlugins = `[plugins.'io.containerd.nri.v1.nri'.default_validator]
  enable = true
  required_plugins = ['artifact-snapshotter']
`

const notPresent = `required plugin "artifact-snapshotter" not present`

func TestByNRIAPluginThatHangs(t *testing.T) {
	t.Parallel()
	for name, config := range map[string]string{"not required": "", "required": requiredPlugins} {
		t.Run(name, func(t *testing.T) {
			n := node.ForTest(t, node.Options{NRI: true, ContainerdConfig: config})
			if config != "" && older(t, n, 2, "no required plugins") {
				return
			}
			testAPluginThatHangs(t, n, config != "", func(t *testing.T, pod *node.Pod, _ []treelist.Entry) {
				t.Helper()
				wantVolume(t, pod, "main", "/model", nil)
			})
		})
	}
}

func TestCRIOWithAPluginThatHangs(t *testing.T) {
	for name, config := range map[string]string{"not required": "", "required": crioRequired} {
		t.Run(name, func(t *testing.T) {
			testAPluginThatHangs(t, crioNode(t, node.Options{CRIOConfig: config}), config != "", wantAsCRIOMounts)
		})
	}
}

// testAPluginThatHangs stops the daemon with SIGSTOP. A runtime that implements NRI's
// failure policy creates no container then. Other runtimes continue without the plugin, the
// first time even if it is required: NRI's validator runs after the plugins and counts the
// plugins that were present before. The plugin registers again by itself.
func testAPluginThatHangs(t *testing.T, n *node.Node, required bool, wantOwn func(*testing.T, *node.Pod, []treelist.Entry)) {
	src := writeModel(t)
	spec := node.PodSpec{Volumes: []node.Volume{{Image: pulled(t, n, src, pack.Raw), Path: "/model"}}}
	want := wantTree(t, src, pack.Raw)
	knows := knowsFailurePolicy(t, n)
	t.Logf("the runtime implements the failure policy: %v", knows)
	running, err := n.RunPod(spec)
	check(t, err)

	check(t, syscall.Kill(n.DaemonPID(), syscall.SIGSTOP))
	t.Cleanup(func() { _ = syscall.Kill(n.DaemonPID(), syscall.SIGCONT) })
	var without []*node.Pod
	for i := range 2 {
		pod, err := n.RunPod(spec)
		refusal := ""
		switch {
		case knows:
			refusal = "plugin 50-artifact-snapshotter failed to handle CreateContainer request"
		case required && i > 0:
			refusal = notPresent
		}
		switch {
		case refusal == "":
			check(t, err)
			wantOwn(t, pod, want)
			without = append(without, pod)
		case err == nil || !strings.Contains(answer(t, err), refusal):
			t.Errorf("pod %d: got %v, want %s", i, err, refusal)
		}
	}
	check(t, running.Remove()) // ending a pod must not wait for the plugin
	check(t, syscall.Kill(n.DaemonPID(), syscall.SIGCONT))

	waitFor(t, "another registration of the plugin", func() bool {
		pod, err := n.RunPod(spec)
		if err != nil {
			return false
		}
		entries, err := pod.Tree("main", "/model")
		check(t, err)
		check(t, pod.Remove())
		return treelist.Diff(want, entries) == ""
	})
	for _, pod := range without {
		waitFor(t, "a log line about pod "+pod.ID, func() bool {
			for line := range strings.Lines(daemonLog(t, n)) {
				if strings.Contains(line, "a container was created without the NRI plugin") && strings.Contains(line, "sandbox="+pod.ID) {
					return true
				}
			}
			return false
		})
		check(t, pod.Remove())
	}
	_, err = n.Crictl("rmp", "--force", "--all") // the refused pods
	check(t, err)
	wantRecords(t, n, 0)
}

var nriVersion = regexp.MustCompile(`mounting artifacts for a runtime by NRI.* nri_version="?(\S+?)"?\s`)

// knowsFailurePolicy reports whether the runtime's NRI is version 0.12.5 or later,
// according to the daemon's log.
func knowsFailurePolicy(t *testing.T, n *node.Node) bool {
	t.Helper()
	found := nriVersion.FindStringSubmatch(daemonLog(t, n))
	if found == nil {
		t.Fatal("the daemon's log does not have the runtime's NRI version")
	}
	var major, minor, patch int
	if _, err := fmt.Sscanf(found[1], "v%d.%d.%d", &major, &minor, &patch); err != nil {
		t.Fatalf("version %q: %v", found[1], err)
	}
	return major > 0 || minor > 12 || minor == 12 && patch >= 5
}
