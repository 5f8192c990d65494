// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package node

import (
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"text/template"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/process"
)

// containerdConfig keeps everything that containerd writes below the node's directory,
// except for the shims' sockets in /run/containerd/s before 2.3. Every containerd since 2.1
// reads this version.
const containerdConfig = `version = 3
root = '{{.Root}}'
state = '{{.State}}'
temp = '{{.Dir}}/tmp'
imports = ['{{.Dir}}/containerd.d/*.toml']

[grpc]
  address = '{{.Address}}'
[plugins.'io.containerd.shim.v1.manager']
  socket_dir = '{{.Dir}}/s'
[plugins.'io.containerd.internal.v1.opt']
  path = '{{.Dir}}/opt'
[plugins.'io.containerd.nri.v1.nri']
  socket_path = '{{.Dir}}/nri.sock'
  plugin_path = '{{.Dir}}/nri/plugins'
  plugin_config_path = '{{.Dir}}/nri/conf.d'

[plugins.'io.containerd.cri.v1.images']
  [plugins.'io.containerd.cri.v1.images'.pinned_images]
    sandbox = '{{.GuestImage}}'

[plugins.'io.containerd.cri.v1.runtime']
  # Not every sandbox may lower the OOM score of a process.
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
  [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
    runtime_type = 'io.containerd.runc.v2'
    [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
      BinaryName = '{{.Runc}}'
      Root = '{{.Dir}}/runc'
  [plugins.'io.containerd.cri.v1.runtime'.cni]
    bin_dirs = ['/opt/cni/bin', '/usr/lib/cni']
    conf_dir = '{{.Dir}}/cni'
`

// daemonConfig is the daemon's configuration file, in addition to its flags.
const daemonConfig = `{{.DaemonConfig}}
{{if or .NRI .NRIConfig -}}
[nri]
enabled = {{.NRI}}
socket = '{{.Dir}}/nri.sock'
{{.NRIConfig}}
{{end}}`

// snippetConfig lets `config containerd` print the containerd configuration for this node.
// The client commands read it too.
const snippetConfig = `root = '{{.DaemonRoot}}'
state = '{{.DaemonState}}'
address = '{{.Dir}}/daemon.sock'
content_root = '{{.ContentRoot}}'
containerd_address = '{{.Address}}'
`

// ArtifactHandler is the runtime handler of Options.HandlerScope.
const ArtifactHandler = "artifact"

// handlerConfig sets runc's options for the handler, as the comments of the snippet ask
// for.
const handlerConfig = `version = 3
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.artifact.options]
  BinaryName = '{{.Runc}}'
  Root = '{{.Dir}}/runc'
`

// cniConfig uses ptp, whose devices disappear with the pod's network namespace. A bridge
// would remain.
const cniConfig = `{
  "cniVersion": "1.0.0",
  "name": "test",
  "plugins": [{
    "type": "ptp",
    "ipam": {"type": "host-local", "dataDir": "{{.Dir}}/ipam", "ranges": [[{"subnet": "10.253.0.0/16"}]]}
  }]
}
`

const crictlConfig = `runtime-endpoint: unix://{{.Address}}
image-endpoint: unix://{{.Address}}
timeout: 120
`

const registryConfig = `version: 0.1
log:
  accesslog: {disabled: true}
storage:
  delete: {enabled: true}
  filesystem: {rootdirectory: {{.Dir}}/registry}
http:
  addr: 127.0.0.1:0
`

// writeFile writes a file below the node's directory from a template.
func (n *Node) writeFile(name, text string) error {
	runc := filepath.Join(n.tools, "runc")
	if n.options.Kubelet || n.options.Member != nil {
		runc = n.path("runc.sh")
	}
	var out strings.Builder
	err := template.Must(template.New(name).Parse(text)).Execute(&out, struct {
		*Node
		Tools      string
		Containerd string
		Temporary  string
		Runc       string
		Cgroup     string
		Member     *Member
		NRI        bool
		CRIO       crioPrograms

		DaemonConfig, NRIConfig string
	}{n, n.tools, n.containerd, temporary, runc, n.cgroup, n.options.Member, n.options.NRI, n.crio, n.options.DaemonConfig, n.options.NRIConfig})
	if err != nil {
		return err
	}
	return n.writeVerbatim(name, out.String())
}

func (n *Node) writeVerbatim(name, text string) error {
	if err := os.MkdirAll(filepath.Dir(n.path(name)), 0o711); err != nil {
		return err
	}
	return os.WriteFile(n.path(name), []byte(text), 0o644)
}

func (n *Node) writeConfig() error {
	errs := []error{
		n.writeFile("containerd.toml", containerdConfig),
		n.writeFile("cni/10-test.conflist", cniConfig),
		n.writeFile("crictl.yaml", crictlConfig),
		n.writeFile("daemon.toml", daemonConfig),
		n.writeVerbatim("containerd.d/20-test.toml", "version = 3\n"+n.options.ContainerdConfig),
	}
	if n.options.Kubelet {
		errs = append(errs, n.writeKubelet())
	}
	if !n.options.Stock && !n.options.NRI {
		errs = append(errs, n.writeSnippet())
	}
	return errors.Join(errs...)
}

// writeSnippet gives containerd the text that users paste, unchanged.
func (n *Node) writeSnippet() error {
	bin, err := findDaemon()
	if err != nil {
		return err
	}
	if err := n.writeFile("snippet.toml", snippetConfig); err != nil {
		return err
	}
	scope := "node"
	if n.options.HandlerScope {
		scope = "runtime-handler"
		if err := n.writeFile("containerd.d/15-handler.toml", handlerConfig); err != nil {
			return err
		}
	}
	args := []string{"config", "containerd", "--config", n.path("snippet.toml"), "--scope", scope}
	if n.options.NativeUnpack {
		args = append(args, "--native-unpack")
	}
	snippet, err := n.run(bin, args...)
	if err != nil {
		return err
	}
	return n.writeVerbatim("containerd.d/10-snapshotter.toml", snippet)
}

var listening = regexp.MustCompile(`listening on (127\.0\.0\.1:\d+)`)

func (n *Node) startRegistry() (err error) {
	n.registry, n.Registry, err = n.spawnRegistry("registry", registryConfig)
	return err
}

// spawnRegistry starts a registry on a port that the kernel chooses, and reads the port
// from the log.
func (n *Node) spawnRegistry(name, config string) (p *process.Process, host string, err error) {
	if err := n.writeFile(name+".yaml", config); err != nil {
		return nil, "", err
	}
	p, err = n.spawn(name, []string{filepath.Join(n.tools, "registry"), "serve", n.path(name + ".yaml")}, false)
	if err != nil {
		return nil, "", err
	}
	err = n.await("the "+name, func() error {
		text, err := os.ReadFile(n.logPath(name))
		if err != nil {
			return err
		}
		found := listening.FindSubmatch(text)
		if found == nil {
			return errors.New("its log does not have its address")
		}
		host = string(found[1])
		return nil
	})
	return p, host, err
}
