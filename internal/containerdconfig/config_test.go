// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package containerdconfig_test

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/artifact-snapshotter/artifact-snapshotter/daemon"
	"github.com/artifact-snapshotter/artifact-snapshotter/internal/containerdconfig"
	"github.com/artifact-snapshotter/artifact-snapshotter/internal/containerdtest"
)

func TestReadReadsWhatContainerdReads(t *testing.T) {
	dir := t.TempDir()
	imported := filepath.Join(dir, "conf.d", "imported.toml")
	if err := os.Mkdir(filepath.Dir(imported), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(imported, []byte(`version = 2
[plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.imported]
  snapshotter = 'artifact'
[proxy_plugins.artifact]
  type = 'snapshot'
  address = '/imported'
`), 0o600); err != nil {
		t.Fatal(err)
	}
	needed := func(handler string) string {
		var text strings.Builder
		if err := (containerdconfig.Needs{Daemon: daemon.Default(), Handler: handler}).Write(&text); err != nil {
			t.Fatal(err)
		}
		return text.String()
	}
	for name, text := range map[string]string{
		"empty":              "",
		"no version":         "[plugins.cri.containerd]\n  snapshotter = 'artifact'\n  [plugins.cri.containerd.runtimes.a]\n    snapshotter = 'native'\n",
		"version 2, alone":   "version = 2\n[plugins.'io.containerd.grpc.v1.cri'.containerd]\n  snapshotter = 'artifact'\n",
		"version 2":          "version = 2\n[plugins.'io.containerd.grpc.v1.cri'.containerd]\n  snapshotter = 'artifact'\n  [plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.a]\n    snapshotter = 'artifact'\n",
		"version 2, both":    "version = 2\n[plugins.'io.containerd.grpc.v1.cri'.containerd]\n  snapshotter = 'artifact'\n[plugins.'io.containerd.cri.v1.images']\n  snapshotter = 'native'\n",
		"version 2, kubeadm": strings.Replace(containerdtest.Kubeadm, `= "runc"`, `= "other"`, 1) + "[plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.other]\n  runtime_type = 'io.containerd.runc.v2'\n",
		"version 3":          needed(""),
		"version 4":          strings.Replace(needed("artifact"), "version = 3", "version = 4", 1),
		"an import":          fmt.Sprintf("version = 3\nimports = [%q]\n[proxy_plugins.artifact]\n  address = '/here'\n", imported),
		"imports by a *":     "version = 4\nimports = ['conf.d/*.toml']\n",
		"a relative import":  "version = 4\nimports = ['conf.d/imported.toml']\n[plugins.'io.containerd.cri.v1.images']\n  snapshotter = 'artifact'\n",
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(dir, "containerd.toml")
			if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			got, err := containerdconfig.Read(t.Context(), path)
			if err != nil {
				t.Fatal(err)
			}
			want := containerdtest.Dump(t, containerdtest.Tool(t, "containerd"), path)
			if got.NodeSnapshotter != want.Plugins.Images.Snapshotter {
				t.Errorf("the node's snapshotter is %q, containerd says %q", got.NodeSnapshotter, want.Plugins.Images.Snapshotter)
			}
			var handlers, unpack []string
			for name, runtime := range want.Plugins.Runtime.Containerd.Runtimes {
				if runtime.Snapshotter == "artifact" {
					handlers = append(handlers, name)
				}
			}
			slices.Sort(handlers)
			if unpack = want.Unpacks(); unpack == nil { // it does not print its default
				unpack = []string{"overlayfs"}
			}
			slices.Sort(unpack)
			unpacks, _ := got.Unpacks()
			if !slices.Equal(got.Handlers(), handlers) || !slices.Equal(unpacks, slices.Compact(unpack)) {
				t.Errorf("handlers %q and unpack_config %q, containerd says %q and %q", got.Handlers(), unpacks, handlers, unpack)
			}
			if got.DefaultHandler != want.Plugins.Runtime.Containerd.Default {
				t.Errorf("the default handler is %q, containerd says %q", got.DefaultHandler, want.Plugins.Runtime.Containerd.Default)
			}
			if got.Proxies["artifact"].Address != want.ProxyPlugins["artifact"].Address {
				t.Errorf("the address is %q, containerd says %q", got.Proxies["artifact"].Address, want.ProxyPlugins["artifact"].Address)
			}
		})
	}
}
