// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/treelist"
)

// Volume is an image volume, or a directory of the host.
type Volume struct {
	Image   string // reference or image ID; it must be pulled
	Path    string // in the container
	SubPath string // path in the volume; "" means all of it

	// PullPolicy is Kubernetes', for static pods; "" is its default.
	PullPolicy string

	// HostPath is a directory to mount instead of an image; not for static pods.
	HostPath string
}

// Container is a container of a pod.
type Container struct {
	Name    string   // "" means "main"
	Image   string   // "" means the test image
	Command []string // replaces the image's entrypoint
	Args    []string // replaces the image's command
	Volumes []Volume // in addition to the pod's

	// SecurityContext is Kubernetes', for static pods.
	SecurityContext map[string]any

	// MemoryLimit is the container's memory limit in bytes; 0 means none; not for static
	// pods.
	MemoryLimit int64
}

// PodSpec describes a pod for RunPod.
type PodSpec struct {
	Name       string      // "" means that the node chooses one
	Volumes    []Volume    // mounted in every container
	Containers []Container // none means one with all defaults, which waits

	// EmptyDir is the path of an emptyDir in each container of a static pod; "" means none.
	EmptyDir string

	// Annotations are the pod's, not for static pods.
	Annotations map[string]string

	// RuntimeHandler is the handler of a RuntimeClass; "" is the default.
	RuntimeHandler string

	// OwnNetwork gives the pod its own network namespace, which needs the CNI plugins
	// ptp and host-local; otherwise it uses the host's.
	OwnNetwork bool

	// UserNamespace gives the pod a user namespace that maps its IDs from 0 to 65535 to the
	// host's IDs from HostID. It needs OwnNetwork.
	UserNamespace bool
	HostID        uint32 // 0 means UserNamespaceBase

	// SecurityContext is Kubernetes' of the pod, for static pods.
	SecurityContext map[string]any
}

// UserNamespaceBase is the default host ID of root in a pod with UserNamespace.
const UserNamespaceBase = 200000

// idMap is cri-api's IDMapping for such a pod.
func (s PodSpec) idMap() []map[string]any {
	base := s.HostID
	if base == 0 {
		base = UserNamespaceBase
	}
	return []map[string]any{{"container_id": 0, "host_id": base, "length": 65536}}
}

// Pod is a running pod.
type Pod struct {
	ID         string            // of the sandbox
	Containers map[string]string // container IDs by name

	node    *Node
	spec    PodSpec
	dir     string // of the configuration and logs
	sandbox string // path of the sandbox's configuration
}

// The values of cri-api's NamespaceMode.
const (
	namespaceContainer = 1
	namespaceNode      = 2
)

// RunPod runs a pod and returns when its containers have started. If one fails to start, it
// removes the pod.
func (n *Node) RunPod(spec PodSpec) (*Pod, error) {
	if len(spec.Containers) == 0 {
		spec.Containers = []Container{{}}
	}
	pod, err := n.RunSandbox(spec)
	if err != nil {
		return nil, err
	}
	for _, c := range spec.Containers {
		if err := pod.Start(c); err != nil {
			return nil, errors.Join(err, pod.Remove())
		}
	}
	return pod, nil
}

// RunSandbox runs a pod without containers; [Pod.Start] adds them.
func (n *Node) RunSandbox(spec PodSpec) (*Pod, error) {
	number := n.pods.Add(1)
	if spec.Name == "" {
		spec.Name = fmt.Sprintf("pod-%d", number)
	}
	p := &Pod{node: n, spec: spec, Containers: map[string]string{}, dir: n.path(fmt.Sprintf("pods/%d", number))}
	if err := os.MkdirAll(p.dir, 0o711); err != nil {
		return nil, err
	}
	var err error
	p.sandbox, err = p.write("sandbox", map[string]any{
		"metadata":      map[string]any{"name": spec.Name, "namespace": "default", "uid": fmt.Sprint(n.cgroup, "-", number)},
		"labels":        map[string]any{"io.kubernetes.pod.name": spec.Name, "io.kubernetes.pod.namespace": "default"}, // as kubelet's
		"annotations":   spec.Annotations,
		"log_directory": p.dir,
		"linux":         map[string]any{"cgroup_parent": "/" + n.cgroup, "security_context": p.securityContext()},
	})
	if err != nil {
		return nil, err
	}
	id, err := n.Crictl("runp", "--runtime", spec.RuntimeHandler, p.sandbox)
	if err != nil {
		return nil, err
	}
	p.ID = strings.TrimSpace(id)
	return p, nil
}

// securityContext has the defaults of Kubernetes, except for the host's network.
func (p *Pod) securityContext() map[string]any {
	namespaces := map[string]any{"pid": namespaceContainer}
	if !p.spec.OwnNetwork {
		namespaces["network"] = namespaceNode
	}
	if p.spec.UserNamespace {
		namespaces["userns_options"] = map[string]any{"uids": p.spec.idMap(), "gids": p.spec.idMap()}
	}
	return map[string]any{"namespace_options": namespaces}
}

// Start creates and starts a container with the pod's volumes and its own. The error
// contains crictl's message verbatim.
func (p *Pod) Start(c Container) error {
	id, err := p.Create(c)
	if err != nil {
		return err
	}
	_, err = p.node.Crictl("start", id)
	return err
}

// Create is Start without starting, and returns the container's ID.
func (p *Pod) Create(c Container) (id string, err error) { return p.CreateContext(p.node.ctx, c) }

// CreateContext is Create with a client that disconnects when ctx ends.
func (p *Pod) CreateContext(ctx context.Context, c Container) (id string, err error) {
	if c.Name == "" {
		c.Name = "main"
	}
	if c.Image == "" {
		c.Image = p.node.GuestImage
	}
	mounts := []map[string]any{}
	for _, v := range append(p.spec.Volumes[:len(p.spec.Volumes):len(p.spec.Volumes)], c.Volumes...) {
		mount := map[string]any{"container_path": v.Path, "readonly": true}
		if v.HostPath != "" {
			mount["host_path"] = v.HostPath
		} else {
			// As kubelet does; CRI-O needs the latter to check an image's signature.
			mount["image"] = map[string]any{"image": v.Image, "user_specified_image": v.Image}
			mount["image_sub_path"] = v.SubPath
		}
		if p.spec.UserNamespace {
			mount["uidMappings"], mount["gidMappings"] = p.spec.idMap(), p.spec.idMap()
		}
		mounts = append(mounts, mount)
	}
	config, err := p.write(c.Name, map[string]any{
		"metadata": map[string]any{"name": c.Name},
		"image":    map[string]any{"image": c.Image},
		"command":  c.Command,
		"args":     c.Args,
		"mounts":   mounts,
		"log_path": c.Name + ".log",
		"linux": map[string]any{
			"security_context": p.securityContext(),
			"resources":        map[string]any{"memory_limit_in_bytes": c.MemoryLimit},
		},
	})
	if err != nil {
		return "", err
	}
	id, err = p.node.CrictlContext(ctx, "create", p.ID, config, p.sandbox)
	if err != nil {
		return "", err
	}
	id = strings.TrimSpace(id)
	p.Containers[c.Name] = id
	return id, nil
}

func (p *Pod) write(name string, config map[string]any) (string, error) {
	text, err := json.MarshalIndent(config, "", "  ")
	if err != nil {
		return "", err
	}
	path := filepath.Join(p.dir, name+".json")
	return path, os.WriteFile(path, text, 0o644)
}

// Exec runs a command in a container and returns standard output followed by standard
// error. A failed command is an error with the same text.
func (p *Pod) Exec(container string, args ...string) (string, error) {
	out, err := p.node.Crictl(append([]string{"exec", "--sync", p.Containers[container]}, args...)...)
	out = strings.TrimSuffix(out, "\n\n") // crictl ends both streams with one more
	if err != nil {
		err = fmt.Errorf("%w%s", err, out)
	}
	return out, err
}

// Node is the node that the pod runs on.
func (p *Pod) Node() *Node { return p.node }

// PID returns the host's process ID of the container's first process; /proc/<pid>/root is
// the container's file system.
func (p *Pod) PID(container string) (string, error) {
	out, err := p.node.Crictl("inspect", "--output", "go-template", "--template", "{{.info.pid}}", p.Containers[container])
	return strings.TrimSpace(out), err
}

// Tree lists a directory recursively as the container sees it. The container must use
// the test image.
func (p *Pod) Tree(container, dir string) ([]treelist.Entry, error) {
	out, err := p.Exec(container, Guest, "tree", dir)
	if err != nil {
		return nil, err
	}
	var entries []treelist.Entry
	err = json.Unmarshal([]byte(out), &entries)
	return entries, err
}

// Log returns the container's output so far by line, without CRI's time and stream.
func (p *Pod) Log(container string) ([]string, error) {
	text, err := os.ReadFile(filepath.Join(p.dir, container+".log"))
	if err != nil {
		return nil, err
	}
	var lines []string
	for line := range strings.Lines(string(text)) {
		// "2024-02-03T04:05:06.789Z stdout F text"
		if parts := strings.SplitN(strings.TrimSuffix(line, "\n"), " ", 4); len(parts) == 4 {
			lines = append(lines, parts[3])
		}
	}
	return lines, nil
}

// Remove stops and removes the pod and its containers.
func (p *Pod) Remove() error {
	if _, err := p.node.Crictl("stopp", p.ID); err != nil {
		return err
	}
	_, err := p.node.Crictl("rmp", p.ID)
	if err == nil {
		return nil
	}
	// A pod that is gone already is removed, as for CRI's RemovePodSandbox; crictl fails. It is
	// gone if containerd was restarted after it had removed the pod and before it answered.
	if left, listErr := p.node.Crictl("pods", "--quiet", "--no-trunc", "--id", p.ID); listErr == nil && left == "" {
		return nil
	}
	return err
}
