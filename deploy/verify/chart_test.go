// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package verify

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/kubernetes/pkg/apis/apps"
	"k8s.io/kubernetes/pkg/apis/core"
	"k8s.io/kubernetes/pkg/apis/node"
	"k8s.io/kubernetes/pkg/apis/rbac"
	"k8s.io/kubernetes/pkg/apis/storage"
)

const (
	chart  = "../chart/artifact-snapshotter"
	tools  = "../../integration/tools/bin"
	binary = "../../bin/artifact-snapshotter"
	image  = "image: {repository: registry.example.com/artifact-snapshotter}\n"

	// snapshotter are the values for the snapshotter alone.
	snapshotter = "frontends: {csi: false, nri: false, snapshotter: true}"
)

// helm returns helm with arguments, which leaves nothing in the user's home.
func helm(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	command := exec.Command(filepath.Join(tools, "helm"), args...)
	command.Env = append(os.Environ(), "HELM_CACHE_HOME="+t.TempDir(), "HELM_CONFIG_HOME="+t.TempDir(), "HELM_DATA_HOME="+t.TempDir())
	return command
}

// render returns what the chart makes of values, a YAML document, beside those of
// files, as the API server would have it.
func render(t *testing.T, values string, files ...string) ([]runtime.Object, error) {
	t.Helper()
	args := []string{"template", "artifact-snapshotter", chart, "--namespace=kube-system"}
	for _, file := range files {
		args = append(args, "--values="+filepath.Join(chart, file))
	}
	command := helm(t, append(args, "--values=-")...)
	command.Stdin = strings.NewReader(values)
	var stderr strings.Builder
	command.Stderr = &stderr
	manifest, err := command.Output()
	if err != nil {
		return nil, fmt.Errorf("%w: %s", err, stderr.String())
	}
	return decode(manifest)
}

// mustRender renders values with an image.
func mustRender(t *testing.T, values string) []runtime.Object {
	t.Helper()
	objects, err := render(t, image+values)
	if err != nil {
		t.Fatal(err)
	}
	return objects
}

// TestChart: what holds for all values.
func TestChart(t *testing.T) {
	for _, test := range []struct {
		name, values string
		files        []string
		classes      int // RuntimeClasses
		drivers      int // CSIDrivers
	}{
		{name: "defaults", drivers: 1},
		{name: "k3s", files: []string{"values-k3s.yaml"}, drivers: 1},
		{name: "RKE2", files: []string{"values-rke2.yaml"}, drivers: 1},
		{name: "CRI-O", files: []string{"values-crio.yaml"}, drivers: 1},
		{name: "CSI alone", values: "frontends: {nri: false}", drivers: 1},
		{name: "NRI alone", values: "frontends: {csi: false}"},
		{name: "NRI and CSI with other values", values: `{config: {log_level: debug, nri: {index: "10", on_error: passthrough}, csi: {connections: 32, gc_max_age: 720h}}, kubeletRoot: /data/kubelet}`, drivers: 1},
		{name: "all", values: "frontends: {snapshotter: true}", classes: 1, drivers: 1},
		{name: "all, systemd", values: "{frontends: {snapshotter: true}, daemon: systemd, scope: node}", drivers: 1},
		{name: "uninstall beside CSI", values: "{frontends: {snapshotter: true}, uninstall: true}", drivers: 1},
		{name: "the snapshotter", values: snapshotter, classes: 1},
		{name: "a disk for containerd", values: snapshotter + "\nroot: /var/lib/containerd/artifact-snapshotter", classes: 1},
		{name: "other paths", values: "{" + snapshotter + ", root: /data/models, state: /run/models, runtimeHandler: models, containerd: {root: /data/containerd, socket: /run/containerd.sock, config: /data/containerd.toml}}", classes: 1},
		{name: "state beside root", values: snapshotter + "\nstate: /var/lib/artifact-state", classes: 1},
		{name: "a class of somebody else", values: snapshotter + "\nruntimeClass: {create: false}"},
		{name: "some nodes", values: "{" + snapshotter + ", nodeSelector: {pool: gpu}, tolerations: [{key: gpu, operator: Exists, effect: NoSchedule}]}", classes: 1},
		{name: "metrics on a port", values: snapshotter + "\n" + `metrics: {address: "127.0.0.1:9477"}`, classes: 1},
		{name: "metrics on a socket", values: snapshotter + "\nmetrics: {address: unix:///run/artifact-snapshotter/metrics.sock}", classes: 1},
		{name: "everything else", values: "{" + snapshotter + ", config: {log_level: debug, decompression_memory: 1024, namespaces: [k8s.io, models], overlayfs: {mount_options: [volatile], slow_chown: true}}, env: [{name: A, value: b}], resources: {limits: {memory: 1Gi}}, maxUnavailable: 10%, priorityClassName: system-cluster-critical}", classes: 1},
		{name: "a digest and a secret", values: snapshotter + "\nimage: {digest: 'sha256:" + strings.Repeat("0a", 32) + "', repository: registry.example.com/a, pullPolicy: Always, pullSecrets: [{name: s}]}", classes: 1},
		{name: "systemd", values: snapshotter + "\ndaemon: systemd", classes: 1},
		{name: "the node", values: "{" + snapshotter + ", scope: node, daemon: systemd}"},
		{name: "roots apart, systemd", values: "{" + snapshotter + ", daemon: systemd, root: /data/models}", classes: 1},
		{name: "uninstall", values: snapshotter + "\nuninstall: true"},
		{name: "uninstall, systemd", values: "{" + snapshotter + ", uninstall: true, daemon: systemd, scope: node}"},
		{name: "startup taint", values: "{" + snapshotter + ", startupTaint: {remove: true}, tolerations: [{key: gpu, operator: Exists}]}", classes: 1},
		{name: "startup taint, the node", values: "{" + snapshotter + ", startupTaint: {remove: true}, scope: node, daemon: systemd}"},
		{name: "startup taint, by default", values: "startupTaint: {remove: true}", drivers: 1},
	} {
		t.Run(test.name, func(t *testing.T) {
			values := test.values
			if !strings.Contains(values, "image:") {
				values = inject(values)
			}
			objects, err := render(t, values, test.files...)
			if err != nil {
				t.Fatal(err)
			}
			classes, drivers := 0, 0
			for _, object := range objects {
				if err := validate(object); err != nil {
					t.Errorf("the API server would refuse the %T: %v", object, err)
				}
				switch object.(type) {
				case *node.RuntimeClass:
					classes++
				case *storage.CSIDriver:
					drivers++
				}
			}
			if classes != test.classes || drivers != test.drivers {
				t.Errorf("got %d RuntimeClasses and %d CSIDrivers, want %d and %d", classes, drivers, test.classes, test.drivers)
			}
			set := one[*apps.DaemonSet](t, objects)
			checkSet(t, set)
			checkMounts(t, &set.Spec.Template.Spec)
			config := one[*core.ConfigMap](t, objects).Data["config.toml"]
			checkCommands(t, &set.Spec.Template.Spec, config)
			checkPaths(t, &set.Spec.Template.Spec, config)
		})
	}
}

// inject adds the image to values, which are one line of YAML.
func inject(values string) string {
	if rest, ok := strings.CutPrefix(values, "{"); ok {
		return "{" + strings.TrimSpace(image) + ", " + rest
	}
	return image + values
}

// containers are all of a pod.
func containers(spec *core.PodSpec) []core.Container {
	return slices.Concat(spec.InitContainers, spec.Containers)
}

func checkSet(t *testing.T, set *apps.DaemonSet) {
	t.Helper()
	spec := &set.Spec.Template.Spec
	if spec.AutomountServiceAccountToken == nil || *spec.AutomountServiceAccountToken {
		t.Error("the pod has a token of its service account")
	}
	if set.Spec.UpdateStrategy.RollingUpdate.MaxSurge.IntValue() != 0 {
		t.Error("an update runs two daemons on one node")
	}
	if set.Spec.Template.Annotations["checksum/config"] == "" {
		t.Error("another configuration does not restart the daemon")
	}
	if spec.NodeSelector["kubernetes.io/os"] != "linux" {
		t.Errorf("it runs on nodes of %q", spec.NodeSelector)
	}
	if terms := spec.Affinity.PodAntiAffinity.RequiredDuringSchedulingIgnoredDuringExecution; len(terms) != 1 ||
		terms[0].NamespaceSelector == nil || terms[0].LabelSelector.MatchLabels["app.kubernetes.io/name"] != set.Spec.Template.Labels["app.kubernetes.io/name"] {
		t.Errorf("two releases run on one node: %v", terms)
	}
	if spec.HostIPC {
		t.Error("the pod has the host's IPC namespace")
	}
	for _, container := range containers(spec) {
		security := container.SecurityContext
		if container.TerminationMessagePolicy != core.TerminationMessageFallbackToLogsOnError {
			t.Errorf("%s: kubectl describe pod does not show why it failed", container.Name)
		}
		if security.ReadOnlyRootFilesystem == nil || !*security.ReadOnlyRootFilesystem {
			t.Errorf("%s: its root filesystem is writable", container.Name)
		}
		if len(container.Command) != 0 {
			t.Errorf("%s: replaces the entry point of the image: %q", container.Name, container.Command)
		}
		if container.Name == "daemon" {
			continue
		}
		if security.Privileged != nil && *security.Privileged || *security.AllowPrivilegeEscalation {
			t.Errorf("%s is privileged", container.Name)
		}
		if !slices.Equal(security.Capabilities.Drop, []core.Capability{"ALL"}) || slices.Contains(security.Capabilities.Add, "SYS_ADMIN") {
			t.Errorf("%s has more capabilities than it needs: %v", container.Name, security.Capabilities)
		}
	}
}

// checkMounts: the host sees the daemon's mounts, those in its state directory and in
// kubelet's and no other, and nothing keeps a mount of the host that the host wants to be rid of.
func checkMounts(t *testing.T, spec *core.PodSpec) {
	t.Helper()
	paths := map[string]string{}
	for _, volume := range spec.Volumes {
		if volume.HostPath != nil {
			paths[volume.Name] = volume.HostPath.Path
		}
	}
	for _, container := range containers(spec) {
		for _, mount := range container.VolumeMounts {
			path, ok := paths[mount.Name]
			if !ok {
				continue
			}
			want := core.MountPropagationHostToContainer
			if (mount.Name == "state" || mount.Name == "kubelet") && container.Name == "daemon" {
				want = core.MountPropagationBidirectional
			}
			if mount.MountPropagation == nil || *mount.MountPropagation != want {
				t.Errorf("%s: %s is not mounted with %s", container.Name, path, want)
			}
			if inside := map[string]string{"/": "/host", "/etc": "/host/etc"}[path]; mount.MountPath != path && mount.MountPath != inside {
				t.Errorf("%s: %s is at %s", container.Name, path, mount.MountPath)
			}
		}
	}
}

// checkPaths: what the daemon is told to use is there in its container, and root and
// content_root are in one mount: between two, hard links are refused.
func checkPaths(t *testing.T, spec *core.PodSpec, config string) {
	t.Helper()
	i := slices.IndexFunc(containers(spec), func(c core.Container) bool { return c.Name == "daemon" })
	if i < 0 {
		return
	}
	// The mount that has path: the deepest one, as for the kernel.
	mount := func(path string) (found core.VolumeMount) {
		for _, mount := range containers(spec)[i].VolumeMounts {
			if strings.HasPrefix(path+"/", mount.MountPath+"/") && len(mount.MountPath) > len(found.MountPath) {
				found = mount
			}
		}
		return found
	}
	root, content, state := mount(value(t, config, "root")), mount(value(t, config, "content_root")), mount(value(t, config, "state"))
	if root.Name != "root" || root.Name != content.Name || root.ReadOnly {
		t.Errorf("root is in the mount %+v, content_root in %+v", root, content)
	}
	if state.Name != "state" || state.ReadOnly {
		t.Errorf("state is in the mount %+v", state)
	}
	if socket := mount(value(t, config, "containerd_address")); socket.Name != "containerd" {
		t.Errorf("containerd's socket is in the mount %+v", socket)
	}
	if strings.Contains(config, "[nri]\nenabled = true") {
		if socket := mount("/var/run/nri/nri.sock"); socket.Name != "nri" {
			t.Errorf("NRI's socket is in the mount %+v", socket)
		}
	}
	if strings.Contains(config, "[csi]\nenabled = true") {
		if kubelet := mount(value(t, config, "kubelet_root")); kubelet.Name != "kubelet" || kubelet.ReadOnly {
			t.Errorf("kubelet's directory is in the mount %+v", kubelet)
		}
		if hosts := mount(value(t, config, "hosts_dir")); hosts.Name != "etc" {
			t.Errorf("the registries' configuration is in the mount %+v", hosts)
		}
	}
}

// value returns a string of a configuration file of the daemon.
func value(t *testing.T, config, key string) string {
	t.Helper()
	for line := range strings.Lines(config) {
		if value, ok := strings.CutPrefix(strings.TrimSpace(line), key+" = "); ok {
			return strings.Trim(value, `"`)
		}
	}
	t.Fatalf("no %s in:\n%s", key, config)
	return ""
}

// checkCommands: the program takes the flags and the configuration.
func checkCommands(t *testing.T, spec *core.PodSpec, config string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "config.toml")
	if err := os.WriteFile(path, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	if output, err := exec.Command(binary, "config", "containerd", "--config", path).CombinedOutput(); err != nil {
		t.Errorf("the daemon does not take the configuration: %s\n%s", output, config)
	}
	for _, container := range containers(spec) {
		commands := [][]string{container.Args}
		for _, probe := range []*core.Probe{container.StartupProbe, container.LivenessProbe, container.ReadinessProbe} {
			if probe != nil {
				commands = append(commands, probe.Exec.Command[1:])
			}
		}
		for _, args := range commands {
			if output, err := exec.Command(binary, append(slices.Clone(args), "--help")...).CombinedOutput(); err != nil {
				t.Errorf("%s: the program does not take %q: %s", container.Name, args, output)
			}
		}
	}
}

// TestChartOfAPod and those below: what depends on values.
func TestChartOfAPod(t *testing.T) {
	objects := mustRender(t, snapshotter+"\nnodeSelector: {pool: gpu}")
	spec := one[*apps.DaemonSet](t, objects).Spec.Template.Spec
	daemon := spec.Containers[0]
	if len(spec.Containers) != 1 || daemon.Name != "daemon" || !*daemon.SecurityContext.Privileged {
		t.Errorf("the daemon is not the one container, privileged: %+v", spec.Containers)
	}
	if daemon.LivenessProbe == nil || daemon.StartupProbe == nil {
		t.Error("kubelet does not see when the daemon is stuck")
	}
	install := spec.InitContainers[0]
	if len(spec.InitContainers) != 1 || install.Args[0] != "install" || !slices.Contains(install.Args, "--no-service") {
		t.Errorf("the install of a pod: %q", install.Args)
	}
	if help, err := exec.Command(binary, "install", "--help").Output(); err != nil || !strings.Contains(string(help), `(default: "runtime-handler")`) || !slices.Contains(install.Args, "--scope=runtime-handler") {
		t.Errorf("the program and the chart have different scopes by default: %q, %v, and\n%s", install.Args, err, help)
	}
	if spec.HostNetwork {
		t.Error("the pod has the host's network for nothing")
	}
	class := one[*node.RuntimeClass](t, objects)
	if class.Scheduling == nil || class.Scheduling.NodeSelector["pool"] != "gpu" {
		t.Errorf("pods with models go to nodes without the snapshotter: %+v", class.Scheduling)
	}
	if !slices.Contains(install.Args, "--runtime-handler="+class.Handler) {
		t.Errorf("the class has another handler (%s) than install makes: %q", class.Handler, install.Args)
	}
}

func TestChartOfSystemd(t *testing.T) {
	spec := one[*apps.DaemonSet](t, mustRender(t, snapshotter+"\ndaemon: systemd\nscope: node")).Spec.Template.Spec
	install := spec.InitContainers[0].Args
	if len(spec.InitContainers) != 1 || install[0] != "install" || slices.Contains(install, "--no-service") || !slices.Contains(install, "--scope=node") {
		t.Errorf("the service is not installed for the node: %q", install)
	}
	checkStay(t, &spec)
	if spec.Containers[0].ReadinessProbe == nil {
		t.Error("the pod is ready without the daemon")
	}
}

// TestChartThatChangesNoNode: the default neither installs anything nor sees the host's files
// outside of the directories that it needs.
func TestChartThatChangesNoNode(t *testing.T) {
	spec := one[*apps.DaemonSet](t, mustRender(t, "")).Spec.Template.Spec
	daemon := spec.Containers[0]
	if len(spec.InitContainers) != 0 || len(spec.Containers) != 1 || daemon.Name != "daemon" {
		t.Errorf("the daemon is not the one container: %+v", containers(&spec))
	}
	if spec.HostPID || !spec.HostNetwork || spec.DNSPolicy != core.DNSDefault {
		t.Errorf("host PID %t, host network %t, DNS %s", spec.HostPID, spec.HostNetwork, spec.DNSPolicy)
	}
	if probe := daemon.ReadinessProbe; probe == nil || !slices.Contains(probe.Exec.Command, "--csi") {
		t.Error("the pod is ready before kubelet has registered the driver")
	}
	for _, volume := range spec.Volumes {
		if volume.HostPath != nil && volume.HostPath.Path == "/" {
			t.Error("the pod has the host's root")
		}
	}
	for _, mount := range daemon.VolumeMounts {
		if mount.Name == "etc" && !mount.ReadOnly {
			t.Error("the daemon can write to the host's /etc")
		}
	}
}

// TestChartOfAStartupTaint: one container has the token, and the token may do one thing.
func TestChartOfAStartupTaint(t *testing.T) {
	for _, values := range []string{snapshotter + "\n", snapshotter + "\ndaemon: systemd\nscope: node\n", ""} {
		values += "tolerations: []\nstartupTaint: {remove: true}"
		objects := mustRender(t, values)
		spec := one[*apps.DaemonSet](t, objects).Spec.Template.Spec
		if *spec.AutomountServiceAccountToken {
			t.Errorf("%s: every container gets a token", values)
		}
		for _, c := range containers(&spec) {
			has := slices.ContainsFunc(c.VolumeMounts, func(m core.VolumeMount) bool { return m.Name == "token" })
			if has != (c.Name == "stay") {
				t.Errorf("%s: the container %s has the token: %v", values, c.Name, has)
			}
			if has && c.SecurityContext.Privileged != nil {
				t.Errorf("%s: the container with the token is privileged", values)
			}
		}
		if !slices.ContainsFunc(spec.Tolerations, func(t core.Toleration) bool {
			return t.Key == "artifact-snapshotter.dev/agent-not-ready" && t.Operator == core.TolerationOpExists && t.Effect == ""
		}) {
			t.Errorf("%s: the daemon waits for itself: %v", values, spec.Tolerations)
		}
		rules := one[*rbac.ClusterRole](t, objects).Rules
		if len(rules) != 1 || !slices.Equal(rules[0].Resources, []string{"nodes"}) || !slices.Equal(rules[0].Verbs, []string{"get", "patch"}) {
			t.Errorf("%s: the token may do %v", values, rules)
		}
		for _, off := range []string{"\nuninstall: true", ""} {
			if off != "" && !strings.Contains(values, "snapshotter: true") {
				continue
			}
			if off == "" {
				values = strings.Replace(values, "remove: true", "remove: false", 1)
			}
			for _, object := range mustRender(t, values+off) {
				switch object.(type) {
				case *rbac.ClusterRole, *rbac.ClusterRoleBinding, *core.ServiceAccount:
					t.Errorf("%s%s: there is a %T", values, off, object)
				}
			}
		}
	}
}

// checkStay: what runs for good can do nothing to the host.
func checkStay(t *testing.T, spec *core.PodSpec) {
	t.Helper()
	stay := spec.Containers[0]
	if len(spec.Containers) != 1 || !slices.Equal(stay.Args, []string{"pause"}) {
		t.Errorf("the pod does not stay: %q", stay.Args)
	}
	if security := stay.SecurityContext; *security.AllowPrivilegeEscalation || !slices.Equal(security.Capabilities.Drop, []core.Capability{"ALL"}) || security.Capabilities.Add != nil || security.Privileged != nil {
		t.Errorf("it has rights: %+v", security)
	}
	for _, mount := range stay.VolumeMounts {
		if mount.Name != "state" || !mount.ReadOnly {
			t.Errorf("it has %s of the host", mount.MountPath)
		}
	}
}

// TestChartOfUninstall: the daemon goes on until nothing uses it.
func TestChartOfUninstall(t *testing.T) {
	spec := one[*apps.DaemonSet](t, mustRender(t, snapshotter+"\nuninstall: true")).Spec.Template.Spec
	if len(spec.InitContainers) != 2 {
		t.Fatalf("got %d init containers, want 2", len(spec.InitContainers))
	}
	daemon, uninstall := spec.InitContainers[0], spec.InitContainers[1]
	if daemon.Name != "daemon" || daemon.RestartPolicy == nil || *daemon.RestartPolicy != core.ContainerRestartPolicyAlways {
		t.Errorf("no daemon beside uninstall: %+v", daemon)
	}
	if daemon.StartupProbe != nil {
		t.Error("a daemon that does not start hinders uninstall")
	}
	if uninstall.Args[0] != "uninstall" {
		t.Errorf("%s: %q", uninstall.Name, uninstall.Args)
	}
	checkStay(t, &spec)
}

func TestChartOfMetrics(t *testing.T) {
	for address, hostNetwork := range map[string]bool{"127.0.0.1:9477": true, "'[::1]:9477'": true, "unix:///run/artifact-snapshotter/m.sock": false} {
		objects := mustRender(t, snapshotter+"\nmetrics: {address: "+address+"}")
		if got := one[*apps.DaemonSet](t, objects).Spec.Template.Spec.HostNetwork; got != hostNetwork {
			t.Errorf("%s: host network %t, want %t", address, got, hostNetwork)
		}
		if got := value(t, one[*core.ConfigMap](t, objects).Data["config.toml"], "metrics_address"); got != strings.Trim(address, "'") {
			t.Errorf("the daemon serves metrics at %s, want %s", got, address)
		}
	}
}
