// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
)

// diagnosis is the result of one of doctor's checks.
type diagnosis struct {
	Problem string         `json:"problem"`
	Unknown string         `json:"unknown"`
	Facts   map[string]any `json:"facts"`
	Advice  []struct {
		Do    string `json:"do"`
		Gain  string `json:"gain"`
		Lines string `json:"lines"`
	} `json:"advice"`
}

// healthy reports whether there is nothing to do.
func (d diagnosis) healthy() bool { return d.Problem == "" && d.Unknown == "" && len(d.Advice) == 0 }

// doctor runs doctor on the node. It returns the results of the checks about containerd,
// and the text output.
func doctor(t *testing.T, n *node.Node, flags ...string) (found map[string]diagnosis, text string) {
	t.Helper()
	args := append([]string{
		"doctor", "--root", n.DaemonRoot, "--state", n.DaemonState, "--address", filepath.Join(n.Dir, "daemon.sock"),
		"--content-root", n.ContentRoot, "--containerd-address", n.Address, "--containerd-config", filepath.Join(n.Dir, "containerd.toml"),
	}, flags...)
	text, _, textErr := n.Artifact(args...)
	out, _, err := n.Artifact(append(args, "--output", "json")...)
	if (err == nil) != (textErr == nil) {
		t.Errorf("the text output ends with %v, the JSON output with %v", textErr, err)
	}
	var all map[string]json.RawMessage
	check(t, json.Unmarshal([]byte(out), &all))
	found = map[string]diagnosis{}
	var problems []string
	for _, name := range []string{"containerd", "socket", "containerd_config", "empty_blob", "shared_configs"} {
		var d diagnosis
		if name == "shared_configs" { // its facts are a list
			var list struct {
				diagnosis
				Facts []map[string]any `json:"facts"`
			}
			check(t, json.Unmarshal(all[name], &list))
			d = list.diagnosis
			d.Facts = map[string]any{"list": list.Facts}
		} else {
			check(t, json.Unmarshal(all[name], &d))
		}
		found[name] = d
		if d.Problem != "" {
			problems = append(problems, name)
			if !strings.Contains(text, "problem: "+d.Problem+"\n") {
				t.Errorf("the text does not contain %q", d.Problem)
			}
		}
		for _, a := range d.Advice {
			if !strings.Contains(text, "advice: "+a.Do+": "+a.Gain+"\n") {
				t.Errorf("the text does not contain %q", a.Do)
			}
		}
	}
	if (err != nil) != (len(problems) > 0) {
		t.Errorf("with the problems %q it ends with %v", problems, err)
	}
	return found, text
}

func TestDoctorFindsNoProblemOnAGoodNode(t *testing.T) {
	for name, scope := range map[string]bool{"node": false, "runtime handler": true} {
		t.Run(name, func(t *testing.T) {
			n := node.ForTest(t, node.Options{HandlerScope: scope})
			pulled(t, n, writeModel(t), pack.Raw)
			namespaces, err := n.Ctr("namespaces", "ls")
			check(t, err)
			snapshots := snapshotsIn(t, n, "artifact")
			found, text := doctor(t, n)
			for check, d := range found {
				if check == "containerd" && n.Minor < 2 {
					if d.Problem != "" || len(d.Advice) != 1 || !strings.Contains(d.Advice[0].Do, "upgrade") {
						t.Errorf("%s: %+v", check, d)
					}
				} else if !d.healthy() {
					t.Errorf("%s: %+v", check, d)
				}
			}
			if f := found["containerd"].Facts; f["content_root"] != n.ContentRoot || !strings.Contains(f["version"].(string), "2.") {
				t.Errorf("containerd: %v", f)
			}
			if f := found["socket"].Facts; f["answers"] != true || f["reached_by_containerd"] != true {
				t.Errorf("socket: %v", f)
			}
			socket := filepath.Join(n.Dir, "daemon.sock")
			f := found["containerd_config"].Facts
			if s := f["snapshotter"].(map[string]any); s["configured"] != socket || s["loaded"] != socket {
				t.Errorf("the snapshotter is %v", s)
			}
			want := "all pods of the node use the snapshotter"
			if scope {
				want = "pods of these runtime handlers use the snapshotter: artifact; all others use overlayfs"
			}
			if !strings.Contains(text, want+"\n") {
				t.Errorf("%q is not in\n%s", want, text)
			}
			if present := found["empty_blob"].Facts["present"].([]any); len(present) != 1 || present[0] != "k8s.io" {
				t.Errorf("the empty blob is in %v", present)
			}

			// It leaves nothing behind.
			after, err := n.Ctr("namespaces", "ls")
			check(t, err)
			if after != namespaces || len(snapshotsIn(t, n, "artifact")) != len(snapshots) {
				t.Errorf("namespaces %q, before %q; snapshots %v, before %v", after, namespaces, snapshotsIn(t, n, "artifact"), snapshots)
			}
		})
	}
}

// The lines that doctor prints are enough to configure a containerd that does not know the
// snapshotter.
func TestDoctorsLinesConfigureContainerd(t *testing.T) {
	n := node.ForTest(t, node.Options{Stock: true})
	found, _ := doctor(t, n)
	config := found["containerd_config"]
	for _, want := range []string{"does not have the snapshotter", "no pod uses the snapshotter"} {
		if !strings.Contains(config.Problem, want) {
			t.Errorf("the problem is %q, want %q", config.Problem, want)
		}
	}
	if s := found["socket"]; s.Problem != "" || !strings.Contains(s.Unknown, "no daemon answers") {
		t.Errorf("without a daemon the socket is %+v", s)
	}
	// The node's main file imports everything in containerd.d.
	file := filepath.Join(n.Dir, "containerd.d", "artifact-snapshotter.toml")
	if len(config.Advice) != 1 || !strings.HasPrefix(config.Advice[0].Do, "write this into "+file+",") {
		t.Fatalf("the advice is %+v, want lines for %s alone", config.Advice, file)
	}
	check(t, os.WriteFile(file, []byte(config.Advice[0].Lines), 0o600))

	check(t, n.StartDaemon())
	found, _ = doctor(t, n)
	config = found["containerd_config"]
	if want := "has not read this configuration"; !strings.Contains(config.Problem, want) || len(config.Advice) == 0 || config.Advice[0].Do != "restart containerd" {
		t.Errorf("%+v, want the problem that containerd %s", config, want)
	}
	if s := found["socket"]; s.Problem != "" || s.Facts["answers"] != true || s.Facts["reached_by_containerd"] != nil {
		t.Errorf("before the restart the socket is %+v", s)
	}

	check(t, n.RestartContainerd())
	waitFor(t, "a node without problems", func() bool {
		found, _ = doctor(t, n)
		return found["containerd"].Problem == "" && !slices.ContainsFunc([]string{"socket", "containerd_config", "empty_blob", "shared_configs"},
			func(check string) bool { return !found[check].healthy() })
	})
	src := writeModel(t)
	ref := pulled(t, n, src, pack.Raw)
	pod, err := n.RunPod(node.PodSpec{Volumes: []node.Volume{{Image: ref, Path: "/model"}}})
	check(t, err)
	wantVolume(t, pod, "main", "/model", wantTree(t, src, pack.Raw))
	check(t, pod.Remove())
}

func TestDoctorFindsEachProblemOfANode(t *testing.T) {
	t.Parallel()
	n := node.ForTest(t, node.Options{})

	// The content root of another runtime.
	other := t.TempDir()
	found, _ := doctor(t, n, "--content-root", other)
	if d := found["containerd"]; !strings.Contains(d.Problem, n.ContentRoot) || !strings.Contains(d.Problem, other) ||
		len(d.Advice) == 0 || !strings.Contains(d.Advice[len(d.Advice)-1].Do, n.ContentRoot) {
		t.Errorf("with another content root: %+v", d)
	}

	// A daemon with another socket.
	elsewhere := filepath.Join(other, "a.sock")
	found, _ = doctor(t, n, "--address", elsewhere)
	if d := found["containerd_config"]; !strings.Contains(d.Problem, "containerd expects the daemon at "+filepath.Join(n.Dir, "daemon.sock")) {
		t.Errorf("with another address: %+v", d)
	}
	if d := found["socket"]; d.Problem != "" || !strings.Contains(d.Unknown, elsewhere) {
		t.Errorf("with another address: %+v", d)
	}
	found, _ = doctor(t, n, "--address", n.Address)
	if d := found["socket"]; !strings.Contains(d.Problem, "it is not a snapshotter") {
		t.Errorf("with the address of containerd: %+v", d)
	}

	// A missing configuration file.
	found, _ = doctor(t, n, "--containerd-config", filepath.Join(other, "none.toml"))
	if d := found["containerd_config"]; d.Problem != "" || !strings.Contains(d.Unknown, "none.toml") {
		t.Errorf("with another configuration file: %+v", d)
	}

	// The empty blob is deleted. The daemon would pre-create it again after some minutes.
	_, err := n.Ctr("content", "rm", digest.FromBytes(nil).String())
	check(t, err)
	found, _ = doctor(t, n)
	if d := found["empty_blob"]; d.Problem != "" || len(d.Advice) != 1 || !strings.HasSuffix(d.Advice[0].Gain, "k8s.io") {
		t.Errorf("without the empty blob: %+v", d)
	}

	// Two artifacts with one config, and a third one with its own.
	for _, name := range []string{"one", "two", "three"} {
		config := []byte("{}")
		if name == "three" {
			config = []byte(`{"own": true}`)
		}
		a := pack.Artifact{ConfigType: ocispec.MediaTypeEmptyJSON, Config: config, ArtifactType: "application/vnd.example",
			Layers: []pack.Layer{{MediaType: "text/plain", Data: []byte(name), Annotations: map[string]string{ocispec.AnnotationTitle: name}}}}
		_, err := a.Push(t.Context(), n.Registry, "files/"+name, "v1")
		check(t, err)
		_, err = n.Pull(n.Registry + "/files/" + name + ":v1")
		check(t, err)
	}
	found, text := doctor(t, n)
	d := found["shared_configs"]
	if list := d.Facts["list"].([]map[string]any); d.Problem != "" || len(d.Advice) != 1 || len(list) != 1 ||
		list[0]["namespace"] != "k8s.io" || list[0]["config"] != digest.FromString("{}").String() {
		t.Errorf("with artifacts that share a config: %+v", d)
	}
	for name, want := range map[string]bool{"/files/one:v1": true, "/files/two:v1": true, "/files/three:v1": false} {
		if strings.Contains(text, n.Registry+name) != want {
			t.Errorf("%s is in the text: %t, want %t:\n%s", name, !want, want, text)
		}
	}

	// First without the daemon, then without containerd: neither is a problem of the
	// daemon.
	check(t, n.StopDaemon())
	found, _ = doctor(t, n)
	if d := found["socket"]; d.Problem != "" || !strings.Contains(d.Unknown, "no daemon answers") || len(d.Advice) != 1 {
		t.Errorf("without the daemon: %+v", d)
	}
	check(t, n.StopContainerd())
	found, _ = doctor(t, n)
	for check, d := range found {
		if d.Problem != "" || d.Unknown == "" {
			t.Errorf("without containerd %s: %+v", check, d)
		}
	}
	check(t, n.StartDaemon())
	found, _ = doctor(t, n)
	if d := found["socket"]; d.Problem != "" || d.Facts["answers"] != true || !strings.Contains(d.Unknown, "whether containerd reaches it") {
		t.Errorf("without containerd: socket %+v", d)
	}
	check(t, n.StartContainerd())
	found, _ = doctor(t, n)
	if d := found["socket"]; !d.healthy() {
		t.Errorf("with both running again: %+v", d)
	}
}

// A front end that is configured and not at work is a problem, and without the snapshotter
// containerd need not know of it.
func TestDoctorOfOtherFrontEnds(t *testing.T) {
	t.Parallel()
	examine := func(t *testing.T, n *node.Node, config string, flags ...string) (found map[string]diagnosis, err error) {
		t.Helper()
		out, _, err := n.Artifact(append([]string{
			"doctor", "--output", "json", "--config", config, "--address", filepath.Join(n.Dir, "daemon.sock"),
			"--containerd-config", filepath.Join(n.Dir, "containerd.toml"),
		}, flags...)...)
		var all map[string]json.RawMessage
		check(t, json.Unmarshal([]byte(out), &all))
		found = map[string]diagnosis{}
		for _, name := range []string{"containerd_config", "nri", "csi"} {
			if text, ok := all[name]; ok {
				var d diagnosis
				check(t, json.Unmarshal(text, &d))
				found[name] = d
			}
		}
		return found, err
	}
	t.Run("NRI", func(t *testing.T) {
		n := node.ForTest(t, node.Options{NRI: true})
		check(t, n.WaitForNRI())
		config := filepath.Join(n.Dir, "daemon.toml")
		found, err := examine(t, n, config)
		check(t, err)
		if !found["nri"].healthy() || found["nri"].Facts["connected"] != true {
			t.Errorf("doctor finds of NRI %+v", found["nri"])
		}
		if d, ok := found["containerd_config"]; ok {
			t.Errorf("without the snapshotter, doctor finds of containerd's configuration %+v", d)
		}
		found, err = examine(t, n, config, "--csi")
		if want := "serves no CSI driver"; err == nil || !strings.Contains(found["csi"].Problem, want) {
			t.Errorf("doctor ends with %v and finds of CSI %+v, want the problem %q", err, found["csi"], want)
		}
	})
	t.Run("no NRI", func(t *testing.T) {
		n := node.ForTest(t, node.Options{})
		text, err := os.ReadFile(filepath.Join(n.Dir, "daemon.toml"))
		check(t, err)
		config := filepath.Join(t.TempDir(), "daemon.toml")
		check(t, os.WriteFile(config, fmt.Appendf(text, "\n[nri]\nenabled = true\nsocket = '%s'\n", filepath.Join(n.Dir, "nri.sock")), 0o644))
		found, err := examine(t, n, config)
		if want := "runs no NRI plugin"; err == nil || !strings.Contains(found["nri"].Problem, want) {
			t.Errorf("doctor ends with %v and finds of NRI %+v, want the problem %q", err, found["nri"], want)
		}
		check(t, n.StopDaemon())
		found, err = examine(t, n, config, "--csi")
		check(t, err)
		for _, name := range []string{"nri", "csi"} {
			if d := found[name]; d.Problem != "" || d.Unknown == "" {
				t.Errorf("without a daemon, doctor finds of %s %+v", name, d)
			}
		}
	})
}
