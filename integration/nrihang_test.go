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

// requiredPlugins is what lets containerd create no container while the plugin is not there.
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

// testAPluginThatHangs stops the daemon. A runtime that knows NRI's failure policy creates
// no container meanwhile. Any other goes on without the plugin, and the first time it does
// so even if the plugin is required: NRI's validator, which is asked afterwards, counts in
// who was there before. The plugin comes back by itself.
func testAPluginThatHangs(t *testing.T, n *node.Node, required bool, wantOwn func(*testing.T, *node.Pod, []treelist.Entry)) {
	src := writeModel(t)
	spec := node.PodSpec{Volumes: []node.Volume{{Image: pulled(t, n, src, pack.Raw), Path: "/model"}}}
	want := wantTree(t, src, pack.Raw)
	knows := knowsFailurePolicy(t, n)
	t.Logf("the runtime knows the failure policy: %v", knows)
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
	check(t, running.Remove()) // no pod has to wait for the plugin to end
	check(t, syscall.Kill(n.DaemonPID(), syscall.SIGCONT))

	waitFor(t, "the plugin to be back", func() bool {
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
		waitFor(t, "the log to name pod "+pod.ID, func() bool {
			for line := range strings.Lines(daemonLog(t, n)) {
				if strings.Contains(line, "a container was created without the NRI plugin") && strings.Contains(line, "sandbox="+pod.ID) {
					return true
				}
			}
			return false
		})
		check(t, pod.Remove())
	}
	_, err = n.Crictl("rmp", "--force", "--all") // what was refused
	check(t, err)
	wantRecords(t, n, 0)
}

var nriVersion = regexp.MustCompile(`mounting artifacts for a runtime by NRI.* nri_version="?(\S+?)"?\s`)

// knowsFailurePolicy reports whether the runtime's NRI is 0.12.5 or later, by the daemon's
// log.
func knowsFailurePolicy(t *testing.T, n *node.Node) bool {
	t.Helper()
	found := nriVersion.FindStringSubmatch(daemonLog(t, n))
	if found == nil {
		t.Fatal("the daemon's log does not say which version of NRI the runtime has")
	}
	var major, minor, patch int
	if _, err := fmt.Sscanf(found[1], "v%d.%d.%d", &major, &minor, &patch); err != nil {
		t.Fatalf("version %q: %v", found[1], err)
	}
	return major > 0 || minor > 12 || minor == 12 && patch >= 5
}
