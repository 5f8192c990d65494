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

	"github.com/artifact-snapshotter/artifact-snapshotter/unpack"
)

// userNamespaceOf matches the path of a process' user namespace.
var userNamespaceOf = regexp.MustCompile(`^/proc/([1-9][0-9]*)/ns/user$`)

// owners is the user namespace of a container, by which its owners are mapped. NRI says
// that there is one and may say where, but not its map. It is that of the sandbox's
// process. CRI-O may have ended that (drop_infra_ctr); then it is in the configuration of
// the sandbox that CRI-O has saved.
func (p *Plugin) owners(pod *api.PodSandbox, c *api.Container) (unpack.IDMap, error) {
	namespace, ok := userNamespace(c)
	if !ok {
		return unpack.IDMap{}, nil
	}
	pid := ""
	if m := userNamespaceOf.FindStringSubmatch(namespace); m != nil {
		pid = m[1]
	} else if pod.GetPid() > 0 {
		pid = fmt.Sprint(pod.GetPid())
	}
	err := fmt.Errorf("the sandbox has no process: %w", errdefs.ErrNotFound)
	if pid != "" {
		var m unpack.IDMap
		if m, err = mapOf("/proc/"+pid, namespace); err == nil {
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

// userNamespace is the path of the container's user namespace, if it says one; false if
// it has none of its own.
func userNamespace(c *api.Container) (path string, ok bool) {
	for _, n := range c.GetLinux().GetNamespaces() {
		if n.GetType() == "user" {
			return n.GetPath(), true
		}
	}
	return "", false
}

// mapOf is the map of the process whose directory in /proc is given, which must be in
// that user namespace, if it is known. To look at a namespace takes CAP_SYS_PTRACE, which
// the daemon need not have; to read a map does not.
func mapOf(process, namespace string) (m unpack.IDMap, err error) {
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
	if m.UID, err = readMap(filepath.Join(process, "uid_map")); err != nil {
		return m, err
	}
	m.GID, err = readMap(filepath.Join(process, "gid_map"))
	if m.UID == allIDs && m.GID == allIDs {
		m = unpack.IDMap{} // the host's
	}
	return m, err
}

// allIDs is the map of the initial user namespace.
const allIDs = "0:0:4294967295"

// readMap reads a map as in user_namespaces(7), and writes it as containerd does.
func readMap(path string) (string, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return "", err
	}
	var ranges []string
	for line := range strings.Lines(string(b)) {
		fields := strings.Fields(line)
		if len(fields) != 3 {
			return "", fmt.Errorf("%s has the line %.100q: %w", path, line, errdefs.ErrInvalidArgument)
		}
		ranges = append(ranges, strings.Join(fields, ":"))
	}
	if len(ranges) == 0 {
		return "", fmt.Errorf("%s is empty: %w", path, errdefs.ErrNotFound)
	}
	return strings.Join(ranges, ","), nil
}

// savedMap is the map in the configuration of a sandbox (config.md of the OCI runtime
// specification) that a CRI-O with that storage root has saved.
func savedMap(storage, sandbox string) (m unpack.IDMap, err error) {
	if !containerID.MatchString(sandbox) {
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
	type mapping struct {
		ContainerID uint32 `json:"containerID"`
		HostID      uint32 `json:"hostID"`
		Size        uint32 `json:"size"`
	}
	var spec struct {
		Linux struct {
			UIDMappings []mapping `json:"uidMappings"`
			GIDMappings []mapping `json:"gidMappings"`
		} `json:"linux"`
	}
	if err := json.Unmarshal(b, &spec); err != nil {
		return m, fmt.Errorf("%s: %w", saved[0], err)
	}
	join := func(mappings []mapping) string {
		var ranges []string
		for _, r := range mappings {
			ranges = append(ranges, fmt.Sprintf("%d:%d:%d", r.ContainerID, r.HostID, r.Size))
		}
		return strings.Join(ranges, ",")
	}
	m = unpack.IDMap{UID: join(spec.Linux.UIDMappings), GID: join(spec.Linux.GIDMappings)}
	if m.UID == "" || m.GID == "" {
		return m, fmt.Errorf("%s has no map: %w", saved[0], errdefs.ErrNotFound)
	}
	return m, nil
}
