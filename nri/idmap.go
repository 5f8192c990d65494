// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package nri

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/containerd/nri/pkg/api"
	"github.com/moby/sys/user"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/artifact-snapshotter/artifact-snapshotter/unpack"
)

// processUserNamespace matches the path of the user namespace of a process.
var processUserNamespace = regexp.MustCompile(`^/proc/([1-9][0-9]*)/ns/user$`)

// owners returns the ID map of a container's user namespace; the zero value if the container is
// in that of the node. NRI says that there is a user namespace, and may say where, but not its
// map. The sandbox's process has it. CRI-O may have ended that process (drop_infra_ctr); then
// the map is in the sandbox's configuration, which CRI-O has saved.
func (p *Plugin) owners(pod *api.PodSandbox, c *api.Container) (unpack.IDMap, error) {
	namespace, ok := userNamespace(c)
	if !ok {
		return unpack.IDMap{}, nil
	}
	pid := ""
	if m := processUserNamespace.FindStringSubmatch(namespace); m != nil {
		pid = m[1]
	} else if pod.GetPid() > 0 {
		pid = fmt.Sprint(pod.GetPid())
	}
	err := fmt.Errorf("the sandbox has no process: %w", errdefs.ErrNotFound)
	if pid != "" {
		var m unpack.IDMap
		if m, err = processMap("/proc/"+pid, namespace); err == nil {
			return m, nil
		}
	}
	for _, layout := range p.Layouts {
		m, serr := savedMap(filepath.Dir(string(layout)), pod.GetId())
		if serr == nil {
			return m, nil
		}
		err = errors.Join(err, serr)
	}
	return unpack.IDMap{}, fmt.Errorf("the pod has a user namespace, whose map cannot be read: %w", err)
}

// userNamespace returns the path of the container's user namespace, which may be "". ok is false
// if the container has none of its own.
func userNamespace(c *api.Container) (path string, ok bool) {
	for _, n := range c.GetLinux().GetNamespaces() {
		if n.GetType() == "user" {
			return n.GetPath(), true
		}
	}
	return "", false
}

// processMap reads the map of the process with that directory in /proc. If the path of the
// namespace is known, the process must be in that namespace. Comparing namespaces needs
// CAP_SYS_PTRACE, which the daemon may not have; reading a map does not.
func processMap(process, namespace string) (m unpack.IDMap, err error) {
	if own := filepath.Join(process, "ns/user"); namespace != "" && namespace != own {
		is, err := os.Stat(own)
		if err != nil {
			return m, err
		}
		want, err := os.Stat(namespace)
		if err != nil {
			return m, err
		}
		if !os.SameFile(is, want) {
			return m, fmt.Errorf("%s is not in the user namespace %s: %w", process, namespace, errdefs.ErrFailedPrecondition)
		}
	}
	uid, err := user.ParseIDMapFile(filepath.Join(process, "uid_map"))
	if err != nil {
		return m, err
	}
	gid, err := user.ParseIDMapFile(filepath.Join(process, "gid_map"))
	if err != nil {
		return m, err
	}
	return newIDMap(process, uid, gid)
}

// allIDs is the map of the initial user namespace.
const allIDs = "0:0:4294967295"

// newIDMap writes a map as containerd does, "<ID in the container>:<ID on the node>:<count>,…".
// source names in an error where the map is from.
func newIDMap(source string, uid, gid []user.IDMap) (unpack.IDMap, error) {
	join := func(ranges []user.IDMap) string {
		var all []string
		for _, r := range ranges {
			all = append(all, fmt.Sprintf("%d:%d:%d", r.ID, r.ParentID, r.Count))
		}
		return strings.Join(all, ",")
	}
	switch m := (unpack.IDMap{UID: join(uid), GID: join(gid)}); {
	case m.UID == "" || m.GID == "":
		return unpack.IDMap{}, fmt.Errorf("%s has no map: %w", source, errdefs.ErrNotFound)
	case m.UID == allIDs && m.GID == allIDs:
		return unpack.IDMap{}, nil
	default:
		return m, nil
	}
}

// savedMap reads the map from the OCI configuration of a sandbox that a CRI-O with that storage
// root has saved.
func savedMap(storage, sandbox string) (m unpack.IDMap, err error) {
	if !idPattern.MatchString(sandbox) {
		return m, fmt.Errorf("%.255q is not the ID of a sandbox: %w", sandbox, errdefs.ErrInvalidArgument)
	}
	saved, err := filepath.Glob(filepath.Join(storage, "*-containers", sandbox, "userdata", "config.json"))
	if err != nil {
		return m, err
	}
	if len(saved) == 0 {
		return m, fmt.Errorf("no configuration of sandbox %s in %s: %w", sandbox, storage, errdefs.ErrNotFound)
	}
	b, err := os.ReadFile(saved[0])
	if err != nil {
		return m, err
	}
	var spec struct {
		Linux struct {
			UIDMappings, GIDMappings []specs.LinuxIDMapping
		} `json:"linux"`
	}
	if err := json.Unmarshal(b, &spec); err != nil {
		return m, fmt.Errorf("%s: %w", saved[0], err)
	}
	ranges := func(mappings []specs.LinuxIDMapping) (all []user.IDMap) {
		for _, r := range mappings {
			all = append(all, user.IDMap{ID: int64(r.ContainerID), ParentID: int64(r.HostID), Count: int64(r.Size)})
		}
		return all
	}
	return newIDMap(saved[0], ranges(spec.Linux.UIDMappings), ranges(spec.Linux.GIDMappings))
}
