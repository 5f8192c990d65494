// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/treelist"
)

// The modes, best first.
var (
	rawModes = []string{"overlay", "link", "copy"}
	tarModes = []string{"erofs", "erofs-loop", "erofs-buffered", "extract"}
)

// comparison is doctor's result for the modes of a format.
type comparison struct {
	Facts struct {
		Taken string `json:"taken"`
		Modes []struct {
			Mode   string `json:"mode"`
			Works  bool   `json:"works"`
			Reason string `json:"reason"`
			Remedy string `json:"remedy"`
			Error  string `json:"error"`
		} `json:"modes"`
	} `json:"facts"`
}

// modesOfTheKernel returns the modes that must work here: all of them, except in the
// machines of integration/kernels, which lists them in the variable.
func modesOfTheKernel(all []string) (have []string) {
	modes, named := os.LookupEnv("ARTIFACT_SNAPSHOTTER_MODES")
	for _, r := range all {
		if !named || slices.Contains(strings.Split(modes, ","), r) {
			have = append(have, r)
		}
	}
	return have
}

// TestEveryModeOfTheKernel checks image volumes in each mode that the kernel supports and
// in the mode that the daemon chooses, with and without a user namespace.
// integration/kernels parses its log lines "kernel: …".
func TestEveryModeOfTheKernel(t *testing.T) {
	raws, tars := modesOfTheKernel(rawModes), modesOfTheKernel(tarModes)
	n := node.ForTest(t, node.Options{})
	var uname unix.Utsname
	check(t, unix.Uname(&uname))
	t.Logf("kernel: release=%s", unix.ByteSliceToString(uname.Release[:]))

	var found struct {
		Raw comparison `json:"raw_layers"`
		Tar comparison `json:"tar_layers"`
	}
	out, _, _ := n.Artifact("doctor", "--output", "json", "--root", n.DaemonRoot, "--state", n.DaemonState, "--address", filepath.Join(n.Dir, "daemon.sock"),
		"--content-root", n.ContentRoot, "--containerd-address", n.Address, "--containerd-config", filepath.Join(n.Dir, "containerd.toml"))
	check(t, json.Unmarshal([]byte(out), &found))
	for format, tried := range map[string]comparison{"raw": found.Raw, "tar": found.Tar} {
		t.Logf("kernel: chosen %s=%s", format, tried.Facts.Taken)
		if len(tried.Facts.Modes) == 0 {
			t.Errorf("doctor tried no mode for %s layers: %s", format, out)
		}
		want := slices.Concat(raws, tars)
		for _, trial := range tried.Facts.Modes {
			if trial.Works != slices.Contains(want, trial.Mode) {
				t.Errorf("the mode %s works: %t (%s), want %t", trial.Mode, trial.Works, trial.Error, !trial.Works)
			}
			if trial.Works {
				t.Logf("kernel: mode %s", trial.Mode)
				continue
			}
			t.Logf("kernel: no mode %s: %s", trial.Mode, trial.Reason)
			t.Log(trial.Error)
			if !strings.Contains(trial.Reason, "older than Linux 6.") || !strings.Contains(trial.Remedy, "run Linux 6.") {
				t.Errorf("the mode %s does not work; unexpected reason %q or remedy %q", trial.Mode, trial.Reason, trial.Remedy)
			}
			err := restartWith(t, n, fmt.Sprintf("%s_mode = %q", format, trial.Mode))
			if log := strings.ReplaceAll(daemonLog(t, n), `\`, ""); err == nil || !strings.Contains(log, fmt.Sprintf("mode %q does not work in %s", trial.Mode, n.DaemonRoot)) {
				t.Errorf("the daemon started in the mode %s, or did not log why it could not: %v", trial.Mode, err)
			}
		}
	}
	if found.Raw.Facts.Taken != raws[0] || found.Tar.Facts.Taken != tars[0] {
		t.Errorf("the daemon chooses %s and %s, want %s and %s", found.Raw.Facts.Taken, found.Tar.Facts.Taken, raws[0], tars[0])
	}

	src := writeModel(t)
	model, zipped := pulled(t, n, src, pack.Raw), pulled(t, n, src, pack.TarGzip)
	layers, mixed := mixture(t)
	mixtureRef := push(t, n, "mixture", layers...)
	idmaps := !errors.Is(unix.MountSetattr(-1, "", 0, &unix.MountAttr{}), unix.ENOSYS)
	type pair struct{ raw, tar string }
	pairs := []pair{{"auto", "auto"}}
	for _, raw := range raws[1:] {
		pairs = append(pairs, pair{raw, "extract"})
	}
	for _, tar := range tars {
		pairs = append(pairs, pair{raws[0], tar})
	}
	for _, pair := range pairs {
		t.Run(pair.raw+" and "+pair.tar, func(t *testing.T) {
			check(t, restartWith(t, n, fmt.Sprintf("raw_mode = %q\ntar_mode = %q", pair.raw, pair.tar)))
			spec := node.PodSpec{Volumes: []node.Volume{{Image: model, Path: "/raw"}, {Image: zipped, Path: "/zipped"}, {Image: mixtureRef, Path: "/mixture"}}}
			for _, mapped := range []bool{false, true} {
				spec.UserNamespace, spec.OwnNetwork = mapped, mapped
				pod, err := n.RunPod(spec)
				for err != nil && strings.Contains(err.Error(), "is still being unpacked") { // kubelet would try again too
					pod, err = n.RunPod(spec)
				}
				if mapped && !idmaps {
					if err == nil || !strings.Contains(err.Error(), "MOUNT_ATTR_IDMAP") {
						t.Errorf("a pod with a user namespace on a kernel without idmapped mounts: %v", err)
					}
					t.Log("kernel: no user namespaces: runc needs idmapped mounts, of Linux 5.12")
					continue
				}
				check(t, err)
				for path, want := range map[string][]treelist.Entry{"/raw": wantTree(t, src, pack.Raw), "/zipped": wantTree(t, src, pack.TarGzip), "/mixture": mixed} {
					got, err := pod.Tree("main", path)
					check(t, err)
					if pair.raw == "link" || pair.raw == "auto" && raws[0] == "link" { // with this mode files have the attributes of the blobs
						want, got = withoutAttributes(want), withoutAttributes(got)
					}
					if diff := treelist.Diff(want, got); diff != "" {
						t.Errorf("%s in a pod (with a user namespace: %t) differs:\n%s", path, mapped, diff)
					}
				}
				wantModes(t, n, pair.raw, pair.tar, raws[0], tars[0])
				check(t, pod.Remove())
				if !t.Failed() {
					t.Logf("kernel: volumes raw=%s tar=%s user-namespace=%t", pair.raw, pair.tar, mapped)
				}
			}
			waitFor(t, "removal of the daemon's mounts", func() bool {
				mounts, err := node.Mounts(n.DaemonState)
				return err == nil && len(mounts) == 0
			})
		})
	}
	check(t, restartWith(t, n, ""))
}

// wantModes checks the modes of all trees; "auto" means the best modes.
func wantModes(t *testing.T, n *node.Node, raw, tar, bestRaw, bestTar string) {
	t.Helper()
	if raw == "auto" {
		raw, tar = bestRaw, bestTar
	}
	files, err := filepath.Glob(filepath.Join(n.DaemonRoot, "trees", "*", "tree.json"))
	check(t, err)
	if len(files) == 0 {
		t.Error("there are no trees")
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		check(t, err)
		var tree struct {
			Modes struct{ Raw, Tar string }
		}
		check(t, json.Unmarshal(text, &tree))
		if tree.Modes.Raw != raw || tree.Modes.Tar != tar {
			t.Errorf("%s has the modes %s and %s, want %s and %s", file, tree.Modes.Raw, tree.Modes.Tar, raw, tar)
		}
	}
}

// restartWith restarts the daemon with a configuration file. containerd reconnects with a
// growing delay.
func restartWith(t *testing.T, n *node.Node, config string) error {
	t.Helper()
	check(t, n.StopDaemon())
	check(t, os.WriteFile(filepath.Join(n.Dir, "daemon.toml"), []byte(config), 0o644))
	if err := n.StartDaemon(); err != nil {
		return err
	}
	waitFor(t, "containerd to reach the daemon", func() bool {
		_, err := n.Ctr("snapshots", "--snapshotter", "artifact", "ls")
		return err == nil
	})
	return nil
}

// withoutAttributes returns a listing of names, sizes and contents only.
func withoutAttributes(entries []treelist.Entry) []treelist.Entry {
	entries = slices.Clone(entries)
	for i := range entries {
		e := &entries[i]
		*e = treelist.Entry{Path: e.Path, Type: e.Type, Size: e.Size, SHA256: e.SHA256, Target: e.Target}
	}
	return entries
}
