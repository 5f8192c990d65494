// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package nri

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/nri/pkg/api"

	"github.com/artifact-snapshotter/artifact-snapshotter/unpack"
)

func TestTheMapOfAUserNamespaceIsRead(t *testing.T) {
	s := newSite(t)
	mapped := unpack.IDMap{UID: "0:200000:65536", GID: "0:300000:65536,65536:7:1"}
	saved := filepath.Join(filepath.Dir(string(s.crio.dir)), "overlay-containers", sandbox, "userdata")
	if err := os.MkdirAll(saved, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(saved, "config.json"), []byte(`{"linux": {
		"uidMappings": [{"containerID": 0, "hostID": 200000, "size": 65536}],
		"gidMappings": [{"containerID": 0, "hostID": 300000, "size": 65536}, {"containerID": 65536, "hostID": 7, "size": 1}]}}`), 0o644); err != nil {
		t.Fatal(err)
	}
	user := func(path string) *api.Container {
		return &api.Container{Linux: &api.LinuxContainer{Namespaces: []*api.LinuxNamespace{{Type: "mount"}, {Type: "user", Path: path}}}}
	}
	self := fmt.Sprintf("/proc/%d/ns/user", os.Getpid())
	for name, tt := range map[string]struct {
		pod  *api.PodSandbox
		c    *api.Container
		want unpack.IDMap
		err  string
	}{
		"no user namespace":           {&api.PodSandbox{Id: sandbox}, &api.Container{}, unpack.IDMap{}, ""},
		"the namespace of the node":   {&api.PodSandbox{Id: sandbox}, user(self), unpack.IDMap{}, ""},
		"the pod's process":           {&api.PodSandbox{Id: sandbox, Pid: uint32(os.Getpid())}, user(""), unpack.IDMap{}, ""},
		"a sandbox without a process": {&api.PodSandbox{Id: sandbox}, user("/run/userns/x"), mapped, ""},
		"a process in another one":    {&api.PodSandbox{Id: sandbox, Pid: uint32(os.Getpid())}, user("/proc/self/ns/mnt"), mapped, ""},
		"a sandbox that is not saved": {&api.PodSandbox{Id: "unknown"}, user(""), unpack.IDMap{}, "no configuration of sandbox unknown"},
		"a sandbox with an unsafe ID": {&api.PodSandbox{Id: "../*"}, user(""), unpack.IDMap{}, "is not the ID of a sandbox"},
		"a process that is not there": {&api.PodSandbox{Id: "unknown"}, user("/proc/4194999/ns/user"), unpack.IDMap{}, "whose map cannot be read"},
		"a pod whose process is gone": {&api.PodSandbox{Id: "unknown", Pid: 1 << 30}, user(""), unpack.IDMap{}, "whose map cannot be read"},
	} {
		got, err := s.owners(tt.pod, tt.c)
		if got != tt.want || (err == nil) != (tt.err == "") || err != nil && !strings.Contains(err.Error(), tt.err) {
			t.Errorf("%s: %+v, %v; want %+v, %q", name, got, err, tt.want, tt.err)
		}
	}
}
