// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package verify

import (
	"encoding/json"
	"maps"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	chartv2 "helm.sh/helm/v4/pkg/chart/v2"
	"sigs.k8s.io/yaml"
)

// TestValuesRefused: values that cannot work are refused, with the reason, before
// anything is in the cluster.
func TestValuesRefused(t *testing.T) {
	for _, test := range []struct{ name, values, want string }{
		{"no image", "scope: runtime-handler", "image.repository is required: push the image of `make image`"},
		{"no front end", "frontends: {csi: false, nri: false}", "at least one of csi, nri and snapshotter must be true"},
		{"a scope of nothing", "scope: node", "scope: node is for frontends.snapshotter, which is false"},
		{"a service without the snapshotter", "daemon: systemd", "daemon: systemd needs frontends.snapshotter"},
		{"nothing to uninstall", "uninstall: true", "uninstall is for frontends.snapshotter"},
		{"an unknown front end", "frontends: {cri: true}", "additional properties 'cri' not allowed"},
		{"artifacts of CRI-O elsewhere", "blobRoots: [/data/artifacts]", "have no directory in common but /"},
		{"a pod for the node", "frontends: {snapshotter: true}\nscope: node", "scope: node needs daemon: systemd: after a reboot the daemon's own pod could not start"},
		{"nothing in common", "root: /data/models", "root (/data/models), containerd.root (/var/lib/containerd) and blobRoots have no directory in common but /"},
		{"half a name in common", "root: /var2/lib/containerd", "have no directory in common but /"},
		{"state above root", "state: /var", "state (/var) must not contain root and the runtime's blobs (/var/lib)"},
		{"a hidden socket", "metrics: {address: unix:///run/metrics.sock}", "could not be seen outside of the daemon's container"},
		{"environment of a service", "frontends: {snapshotter: true}\ndaemon: systemd\nenv: [{name: A}]", "env is for daemon: pod"},
		{"an unknown value", "scpoe: node", "additional properties 'scpoe' not allowed"},
		{"an unknown value within", "containerd: {rot: /data}", "additional properties 'rot' not allowed"},
		{"an unknown scope", "scope: cluster", "value must be one of 'runtime-handler', 'node'"},
		{"an unknown daemon", "daemon: docker", "value must be one of 'pod', 'systemd'"},
		{"a word for a boolean", `uninstall: "yes"`, "got string, want boolean"},
		{"a relative path", "root: var/lib", "does not match pattern"},
		{"a path with ..", "root: /var/lib/../x", "does not match pattern"},
		{"a path that ends in /", "state: /run/x/", "does not match pattern"},
		{"a line in a path", `root: "/var/lib/x\ny"`, "does not match pattern"},
		{"a state too long for a socket", "state: /" + strings.Repeat("x", 80), "maxLength"},
		{"a public port", "metrics: {address: '0.0.0.0:9477'}", "does not match pattern"},
		{"a handler that is no name", "runtimeHandler: Artifact", "does not match pattern"},
		{"a digest that is none", "image: {repository: a, digest: 'sha256:1'}", "does not match pattern"},
		{"a key of the daemon with a value of its own", "config: {root: /x}", "additional properties 'root' not allowed"},
		{"an unknown key of the daemon", "config: {loglevel: debug}", "additional properties 'loglevel' not allowed"},
		{"an unknown mode", "config: {raw_mode: best}", "value must be one of"},
		{"more than all", "maxUnavailable: 101%", "does not match pattern"},
		{"no node at a time", "maxUnavailable: 0", "minimum: got 0, want 1"},
	} {
		t.Run(test.name, func(t *testing.T) {
			values := test.values
			if test.name != "no image" && !strings.Contains(values, "image:") {
				values = image + values
			}
			_, err := render(t, values)
			if err == nil {
				t.Fatal("it was rendered")
			}
			if !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %v, want %q", err, test.want)
			}
		})
	}
}

// TestValuesOfTheDaemon: config takes each key of the daemon that has no value of its
// own, and the chart has the daemon's defaults.
func TestValuesOfTheDaemon(t *testing.T) {
	output, err := exec.Command(binary, "config", "default").Output()
	if err != nil {
		t.Fatal(err)
	}
	// The keys of the tables nri and csi that have no value of their own.
	text, nri, nriFound := strings.Cut(string(output), "\n[nri]\n")
	nri, csi, csiFound := strings.Cut(nri, "\n[csi]\n")
	if !nriFound || !csiFound || strings.Contains(nri+csi, "\n[") {
		t.Errorf("the tables of the daemon's configuration are not [overlayfs], [nri] and [csi], in this order: %s", nri+csi)
	}
	text, overlayfs, _ := strings.Cut(text, "\n[overlayfs]\n")
	keys := func(text string) map[string]string {
		found := map[string]string{}
		for _, match := range regexp.MustCompile(`(?m)^(\w+) = (.*)$`).FindAllStringSubmatch(text, -1) {
			found[match[1]] = strings.Trim(match[2], `"`)
		}
		return found
	}
	defaults := keys(text)
	tables := map[string]map[string]string{"overlayfs": keys(overlayfs), "nri": keys(nri), "csi": keys(csi)}
	var values struct {
		Root, State string
		Containerd  struct{ Root, Socket string }
		Metrics     struct{ Address string }
		KubeletRoot string
	}
	if err := yaml.Unmarshal([]byte(read(t, filepath.Join(chart, "values.yaml"))), &values); err != nil {
		t.Fatal(err)
	}
	own := map[string]string{
		"root": values.Root, "state": values.State, "metrics_address": values.Metrics.Address, "address": "",
		"content_root":       values.Containerd.Root + "/io.containerd.content.v1.content",
		"containerd_address": values.Containerd.Socket,
	}
	for key, value := range own {
		if defaults[key] != value {
			t.Errorf("%s is %q in the chart, %q in the daemon", key, value, defaults[key])
		}
		delete(defaults, key)
	}
	delete(defaults, "blob_roots")
	if got, want := values.KubeletRoot, tables["csi"]["kubelet_root"]; got != want {
		t.Errorf("kubeletRoot is %q in the chart, %q in the daemon", got, want)
	}
	for table, own := range map[string][]string{"nri": {"enabled", "socket"}, "csi": {"enabled", "kubelet_root", "node_name", "hosts_dir", "docker_config"}} {
		for _, key := range own {
			if _, ok := tables[table][key]; !ok {
				t.Errorf("the daemon has no key %s.%s", table, key)
			}
			delete(tables[table], key)
		}
	}
	var schema struct {
		Properties struct {
			Config struct {
				Properties map[string]struct{ Properties map[string]any }
			}
		}
	}
	if err := json.Unmarshal([]byte(read(t, filepath.Join(chart, "values.schema.json"))), &schema); err != nil {
		t.Fatal(err)
	}
	config := schema.Properties.Config.Properties
	for table, want := range tables {
		defaults[table] = ""
		if got, want := slices.Sorted(maps.Keys(config[table].Properties)), slices.Sorted(maps.Keys(want)); !slices.Equal(got, want) {
			t.Errorf("config.%s takes %q, the daemon %q", table, got, want)
		}
	}
	if got, want := slices.Sorted(maps.Keys(config)), slices.Sorted(maps.Keys(defaults)); !slices.Equal(got, want) {
		t.Errorf("config takes %q, the daemon %q", got, want)
	}
}

// TestValuesDocumented: each value has a comment and is in the schema.
func TestValuesDocumented(t *testing.T) {
	content := read(t, filepath.Join(chart, "values.yaml"))
	var values map[string]any
	if err := yaml.UnmarshalStrict([]byte(content), &values); err != nil {
		t.Fatal(err)
	}
	var schema struct{ Properties map[string]any }
	if err := json.Unmarshal([]byte(read(t, filepath.Join(chart, "values.schema.json"))), &schema); err != nil {
		t.Fatal(err)
	}
	delete(schema.Properties, "global") // helm's own
	if got, want := slices.Sorted(maps.Keys(schema.Properties)), slices.Sorted(maps.Keys(values)); !slices.Equal(got, want) {
		t.Errorf("the schema has %q, values.yaml %q", got, want)
	}
}

// TestLint: what helm and chart-testing have to say.
func TestLint(t *testing.T) {
	files, err := filepath.Glob(filepath.Join(chart, "ci", "*-values.yaml"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no values to lint with: %v", err)
	}
	for _, file := range files {
		if output, err := helm(t, "lint", "--strict", chart, "--values", file).CombinedOutput(); err != nil {
			t.Errorf("helm lint with %s: %v\n%s", file, err, output)
		}
	}

	// The rules for YAML are those that come with chart-testing. Its schema of
	// Chart.yaml needs a Python program that Debian does not have: see TestMetadata.
	// There is no earlier version to compare with and nobody to be asked by name.
	module := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "github.com/helm/chart-testing/v3")
	module.Dir = "../../integration/tools/helm"
	directory, err := module.Output()
	if err != nil {
		t.Fatal(err)
	}
	ct := helm(t)
	ct.Path, err = filepath.Abs(filepath.Join(tools, "ct"))
	if err != nil {
		t.Fatal(err)
	}
	ct.Args = []string{"ct", "lint", "--charts", chart, "--lint-conf", filepath.Join(strings.TrimSpace(string(directory)), "etc", "lintconf.yaml"),
		"--helm-lint-extra-args=--strict",
		"--validate-chart-schema=false", "--validate-maintainers=false", "--check-version-increment=false"}
	binaries, err := filepath.Abs(tools)
	if err != nil {
		t.Fatal(err)
	}
	ct.Env = append(ct.Env, "PATH="+binaries+":"+pathOf(ct.Env))
	if output, err := ct.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, output)
	}
}

func pathOf(environment []string) string {
	for _, variable := range environment {
		if value, ok := strings.CutPrefix(variable, "PATH="); ok {
			return value
		}
	}
	return ""
}

// TestMetadata: Chart.yaml has nothing that helm does not know.
func TestMetadata(t *testing.T) {
	var metadata chartv2.Metadata
	if err := yaml.UnmarshalStrict([]byte(read(t, filepath.Join(chart, "Chart.yaml"))), &metadata); err != nil {
		t.Fatal(err)
	}
	if err := metadata.Validate(); err != nil {
		t.Error(err)
	}
}
