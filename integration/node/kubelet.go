// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package node

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// kubeletName is the Kubernetes node's name. An address needs no name server.
const kubeletName = "127.0.0.1"

// kubeletConfig is a KubeletConfiguration (kubelet.config.k8s.io/v1beta1) for a kubelet
// without a cluster that changes nothing outside the node's directory: no control group,
// mount, firewall rule or file.
func (n *Node) kubeletConfig(port int) map[string]any {
	return map[string]any{
		"apiVersion":                      "kubelet.config.k8s.io/v1beta1",
		"kind":                            "KubeletConfiguration",
		"containerRuntimeEndpoint":        "unix://" + n.Address,
		"staticPodPath":                   n.path("static-pods"),
		"podLogsDir":                      n.path("kubelet-logs"),
		"volumePluginDir":                 n.path("kubelet-plugins"),
		"address":                         "127.0.0.1",
		"enableServer":                    false,
		"readOnlyPort":                    port,
		"healthzPort":                     0,
		"authentication":                  map[string]any{"anonymous": map[string]any{"enabled": true}, "webhook": map[string]any{"enabled": false}},
		"authorization":                   map[string]any{"mode": "AlwaysAllow"},
		"failSwapOn":                      false,
		"failCgroupV1":                    false,
		"cgroupDriver":                    "cgroupfs",
		"cgroupsPerQOS":                   false,
		"enforceNodeAllocatable":          []string{},
		"oomScoreAdj":                     0,
		"makeIPTablesUtilChains":          false,
		"evictionHard":                    map[string]string{"imagefs.available": "0%", "nodefs.available": "0%", "nodefs.inodesFree": "0%", "imagefs.inodesFree": "0%", "memory.available": "1Mi"},
		"imageGCHighThresholdPercent":     100, // never; a test can override it
		"imageGCLowThresholdPercent":      99,
		"shutdownGracePeriod":             "0s",
		"shutdownGracePeriodCriticalPods": "0s",
	}
}

// kubeletScript starts kubelet in its own mount namespace. There, the kernel parameters
// that kubelet would set already have its values, and /var/log and /var/lib, where it
// always creates links and a directory, are empty. The namespace must not pin mounts of
// this node or of other tests: it learns of no unmount if the host's mounts are
// private. On a machine kubelet is a service instead: it has its own mounts and /var.
const kubeletScript = `#!/bin/sh
set -e
awk -v tmp='{{.Temporary}}/' -v needed='{{.Dir}}/ {{.Tools}}/ {{.Containerd}}/' '
	BEGIN { count = split(needed, dirs, " ") }
	index($5, tmp) == 1 {
		for (i = 1; i <= count; i++) if (index(dirs[i], $5 "/") == 1) next
		print $5
	}' /proc/self/mountinfo | tac | while read -r point; do
	umount -l "$point" || ! mountpoint -q "$point" # its owner may have unmounted it already
done
for parameter in vm/overcommit_memory=1 vm/panic_on_oom=0 kernel/panic=10 kernel/panic_on_oops=1 \
	kernel/keys/root_maxkeys=1000000 kernel/keys/root_maxbytes=25000000; do
	file='{{.Dir}}/sysctl/'"${parameter%=*}"
	mkdir -p "${file%/*}"
	echo "${parameter#*=}" > "$file"
	mount --bind "$file" "/proc/sys/${parameter%=*}"
done
mount -t tmpfs -o mode=755 tmpfs /var/log
mount -t tmpfs -o mode=755 tmpfs /var/lib
exec '{{.Tools}}/kubelet' --config '{{.Dir}}/kubelet.json' --root-dir '{{.Dir}}/kubelet' --cert-dir '{{.Dir}}/kubelet/pki' \
	--hostname-override ` + kubeletName + ` --v 2 "$@"
`

// runcScript removes OOM scores that are not permitted here, because kubelet lowers those
// of static pods. It also moves the pods' control groups to the one that Stop cleans up.
// Neither pattern can match inside a JSON string, because quotes are escaped there.
const runcScript = `#!/bin/sh
set -e
previous=
for argument; do
	case $previous in
	--bundle) spec=$argument/config.json ;;
	--process) spec=$argument ;;
	*) spec= ;;
	esac
	if [ -n "$spec" ]; then
		sed -i -e 's/,"oomScoreAdj":-\{0,1\}[0-9]*//' -e 's#"cgroupsPath":"/k8s.io/#"cgroupsPath":"/{{.Cgroup}}/#' "$spec"
	fi
	previous=$argument
done
exec '{{.Tools}}/runc' "$@"
`

// writeKubelet writes kubelet's files, before containerd starts.
func (n *Node) writeKubelet() error {
	if err := os.MkdirAll(n.path("static-pods"), 0o711); err != nil {
		return err
	}
	return errors.Join(
		n.writeFile("runc.sh", runcScript), os.Chmod(n.path("runc.sh"), 0o755),
		n.writeFile("kubelet.sh", kubeletScript),
	)
}

// StartKubelet starts kubelet and returns when it serves its pod list. The fields of
// config, a KubeletConfiguration or nil, override the node's. It needs Options.Kubelet.
func (n *Node) StartKubelet(config map[string]any) error {
	if _, err := os.Stat(filepath.Join(n.tools, "kubelet")); err != nil {
		return fmt.Errorf("kubelet is missing: run `make kubelet`: %w", err)
	}
	port, err := freePort()
	if err != nil {
		return err
	}
	all := n.kubeletConfig(port)
	maps.Copy(all, config)
	text, err := json.MarshalIndent(all, "", "  ")
	if err != nil {
		return err
	}
	if err := n.writeVerbatim("kubelet.json", string(text)); err != nil {
		return err
	}
	n.kubeletPods = fmt.Sprintf("http://127.0.0.1:%d/pods", port)
	if n.options.Systemd {
		if _, err := n.Run("systemctl", "enable", "--now", "kubelet"); err != nil {
			return err
		}
		return n.await("kubelet", func() error {
			_, err := n.StaticPods()
			return err
		})
	}
	command := append([]string{"unshare", "--mount", "--propagation", "slave", "sh", n.path("kubelet.sh")}, n.kubeletFlags...)
	n.kubelet, err = n.spawn("kubelet", command, false)
	if err != nil {
		return err
	}
	return n.await("kubelet", func() error {
		_, err := n.StaticPods()
		if ended := n.kubelet.Ended(); ended != nil {
			return ended
		}
		return err
	})
}

// freePort returns a free TCP port of the loopback interface.
func freePort() (int, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	port := l.Addr().(*net.TCPAddr).Port
	return port, l.Close()
}

// StopKubelet stops kubelet with SIGTERM and waits for it. Pods keep running.
func (n *Node) StopKubelet() error {
	if n.machine.Running() && n.options.Kubelet {
		_, err := n.Run("systemctl", "stop", "kubelet")
		return err
	}
	return n.kubelet.Stop(syscall.SIGTERM)
}

// RunStaticPod writes the manifest of a named static pod and does not wait. It replaces a
// pod of the same name. Only the containers' images must have been pulled. RuntimeHandler
// does not work, because it needs a cluster.
func (n *Node) RunStaticPod(spec PodSpec) error {
	if len(spec.Containers) == 0 {
		spec.Containers = []Container{{}}
	}
	var volumes, containers []map[string]any
	addVolume := func(v Volume) map[string]any {
		name := fmt.Sprintf("volume-%d", len(volumes))
		image := map[string]any{"reference": v.Image}
		if v.PullPolicy != "" {
			image["pullPolicy"] = v.PullPolicy
		}
		volumes = append(volumes, map[string]any{"name": name, "image": image})
		mount := map[string]any{"name": name, "mountPath": v.Path, "readOnly": true}
		if v.SubPath != "" {
			mount["subPath"] = v.SubPath
		}
		return mount
	}
	var shared []map[string]any
	for _, v := range spec.Volumes {
		shared = append(shared, addVolume(v))
	}
	if spec.EmptyDir != "" {
		volumes = append(volumes, map[string]any{"name": "empty", "emptyDir": map[string]any{}})
		shared = append(shared, map[string]any{"name": "empty", "mountPath": spec.EmptyDir})
	}
	for _, c := range spec.Containers {
		mounts := shared[:len(shared):len(shared)]
		for _, v := range c.Volumes {
			mounts = append(mounts, addVolume(v))
		}
		if c.Name == "" {
			c.Name = "main"
		}
		if c.Image == "" {
			c.Image = n.GuestImage
		}
		containers = append(containers, map[string]any{
			"name":            c.Name,
			"image":           c.Image,
			"imagePullPolicy": "Never",
			"command":         c.Command,
			"args":            c.Args,
			"volumeMounts":    mounts,
			"securityContext": c.SecurityContext,
		})
	}
	text, err := json.MarshalIndent(map[string]any{
		"apiVersion": "v1",
		"kind":       "Pod",
		"metadata":   map[string]any{"name": spec.Name, "namespace": "default"},
		"spec": map[string]any{
			"hostNetwork":                   !spec.OwnNetwork,
			"hostUsers":                     !spec.UserNamespace,
			"terminationGracePeriodSeconds": 1,
			"securityContext":               spec.SecurityContext,
			"volumes":                       volumes,
			"containers":                    containers,
		},
	}, "", "  ")
	if err != nil {
		return err
	}
	return n.RunStaticManifest(spec.Name, string(text))
}

// RunStaticManifest is RunStaticPod with a manifest in JSON or YAML.
func (n *Node) RunStaticManifest(name, text string) error {
	// kubelet ignores names with a leading dot, and reads a file as soon as it has its
	// final name.
	draft := filepath.Join(n.path("static-pods"), "."+name) // one per pod, because tests start pods concurrently
	if err := os.WriteFile(draft, []byte(text), 0o644); err != nil {
		return err
	}
	return os.Rename(draft, n.manifest(name))
}

func (n *Node) manifest(name string) string {
	return filepath.Join(n.path("static-pods"), name+".json")
}

// RemoveStaticPod deletes the pod's manifest and waits until its sandbox is gone.
func (n *Node) RemoveStaticPod(name string) error {
	if err := os.Remove(n.manifest(name)); err != nil {
		return err
	}
	return n.await("kubelet to remove the pod "+name, func() error {
		out, err := n.Crictl("pods", "--quiet", "--state", "ready", "--name", "^"+name+"-"+kubeletName+"$")
		if err == nil && strings.TrimSpace(out) != "" {
			err = errors.New("it is still there")
		}
		return err
	})
}

// StaticPod is kubelet's status of a pod. It has the methods of Pod that work on a
// running container; remove it with RemoveStaticPod.
type StaticPod struct {
	Pod
	Status map[string]ContainerStatus // by the container's name
}

// ContainerStatus is the part of Kubernetes' container status that tests need.
type ContainerStatus struct {
	ID        string // without "containerd://"
	Restarts  int
	Running   bool
	StartedAt time.Time // if it runs
	Reason    string    // if it does not run
	Message   string    // as in `kubectl describe pod`
}

// StaticPods returns the status of all pods by the names of their specs.
func (n *Node) StaticPods() (map[string]StaticPod, error) {
	client := http.Client{Timeout: time.Minute}
	resp, err := client.Get(n.kubeletPods)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	type reason struct {
		Reason, Message string
		StartedAt       time.Time
	}
	var list struct {
		Items []struct {
			Metadata struct{ Name string }
			Status   struct {
				ContainerStatuses []struct {
					Name         string
					ContainerID  string
					RestartCount int
					State        struct{ Waiting, Running, Terminated *reason }
				}
			}
		}
	}
	if err := json.NewDecoder(resp.Body).Decode(&list); err != nil {
		return nil, fmt.Errorf("kubelet's pod list: %w", err)
	}
	pods := map[string]StaticPod{}
	for _, item := range list.Items {
		pod := StaticPod{Pod: Pod{node: n, Containers: map[string]string{}}, Status: map[string]ContainerStatus{}}
		for _, c := range item.Status.ContainerStatuses {
			status := ContainerStatus{ID: strings.TrimPrefix(c.ContainerID, "containerd://"), Restarts: c.RestartCount}
			switch state := c.State; {
			case state.Running != nil:
				status.Running, status.StartedAt = true, state.Running.StartedAt
				pod.Containers[c.Name] = status.ID
			case state.Waiting != nil:
				status.Reason, status.Message = state.Waiting.Reason, state.Waiting.Message
			case state.Terminated != nil:
				status.Reason, status.Message = state.Terminated.Reason, state.Terminated.Message
			}
			pod.Status[c.Name] = status
		}
		pods[strings.TrimSuffix(item.Metadata.Name, "-"+kubeletName)] = pod
	}
	return pods, nil
}
