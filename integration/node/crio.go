// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package node

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
)

// ErrNoCRIO means that Options.CRIO needs CRI-O and the machine has none.
var ErrNoCRIO = errors.New("CRI-O was not found: CONTRIBUTING.md says how to get crio, pinns and conmon; " +
	"put them into PATH or the tools' directory, or set ARTIFACT_SNAPSHOTTER_CRIO to the directory that has them")

// crioConfig keeps everything that CRI-O writes below the node's directory.
const crioConfig = `[crio]
root = '{{.Root}}'
runroot = '{{.State}}'
storage_driver = 'overlay'
log_dir = '{{.Dir}}/pods'
version_file = '{{.Dir}}/crio-version'
clean_shutdown_file = '{{.Dir}}/crio-clean'

[crio.api]
listen = '{{.Address}}'
stream_address = '127.0.0.1'
stream_port = '0'

[crio.runtime]
conmon_cgroup = 'pod'
cgroup_manager = 'cgroupfs'
default_runtime = 'runc'
drop_infra_ctr = true
namespaces_dir = '{{.Dir}}/ns'
pinns_path = '{{.CRIO.Pinns}}'
container_exits_dir = '{{.Dir}}/exits'
container_attach_socket_dir = '{{.Dir}}/attach'
hooks_dir = []
cdi_spec_dirs = []
apparmor_profile = 'unconfined'
irqbalance_config_restore_file = 'disable'
[crio.runtime.runtimes.runc]
runtime_path = '{{.Dir}}/runc.sh'
runtime_root = '{{.Dir}}/runc'
monitor_path = '{{.CRIO.Conmon}}'

[crio.image]
pause_image = '{{.GuestImage}}'
pause_command = ''
signature_policy = '{{.Dir}}/policy.json'
signature_policy_dir = '{{.Dir}}/policies'
namespaced_auth_dir = '{{.Dir}}/auth'
big_files_temporary_dir = '{{.Dir}}/tmp'

[crio.network]
network_dir = '{{.Dir}}/cni'
plugin_dirs = ['/opt/cni/bin', '/usr/lib/cni']

[crio.nri]
enable_nri = true
nri_listen = '{{.Dir}}/nri.sock'
nri_plugin_dir = '{{.Dir}}/nri/plugins'
nri_plugin_config_dir = '{{.Dir}}/nri/conf.d'
`

const crioRegistries = `[[registry]]
location = '{{.Registry}}'
insecure = true
`

// crioStorage overrides the machine's storage configuration.
const crioStorage = `[storage]
driver = 'overlay'
graphroot = '{{.Root}}'
runroot = '{{.State}}'
`

const crioPolicy = `{"default": [{"type": "insecureAcceptAnything"}]}`

// crioCache is where CRI-O caches blob locations; no configuration changes it.
const crioCache = "/var/lib/containers"

// crioPrograms are the paths of CRI-O's programs.
type crioPrograms struct{ Crio, Pinns, Conmon string }

// FindCRIO returns CRI-O's program, or ErrNoCRIO.
func FindCRIO() (string, error) {
	tools, _, err := findTools()
	if err != nil {
		return "", err
	}
	programs, err := findCRIO(tools)
	return programs.Crio, err
}

// findCRIO searches ARTIFACT_SNAPSHOTTER_CRIO, PATH and the tools' directory for each
// program separately, because distributions install conmon elsewhere.
func findCRIO(tools string) (found crioPrograms, err error) {
	for _, p := range []struct {
		name string
		path *string
	}{{"crio", &found.Crio}, {"pinns", &found.Pinns}, {"conmon", &found.Conmon}} {
		for _, candidate := range []string{filepath.Join(os.Getenv("ARTIFACT_SNAPSHOTTER_CRIO"), p.name), p.name, filepath.Join(tools, p.name)} {
			// Without a slash it is looked up in PATH.
			if path, err := exec.LookPath(candidate); err == nil {
				*p.path = path
				break
			}
		}
		if *p.path == "" {
			return found, fmt.Errorf("%w: %s is missing", ErrNoCRIO, p.name)
		}
		if *p.path, err = filepath.Abs(*p.path); err != nil {
			return found, err
		}
	}
	return found, nil
}

// CRIOVersion returns CRI-O's version, with its commit if known.
func CRIOVersion() (string, error) {
	program, err := FindCRIO()
	if err != nil {
		return "", err
	}
	out, err := exec.Command(program, "version").Output()
	if err != nil {
		return "", fmt.Errorf("crio version: %w", err)
	}
	said := map[string]string{}
	for line := range strings.Lines(string(out)) {
		name, value, _ := strings.Cut(line, ":")
		said[strings.TrimSpace(name)] = strings.TrimSpace(value)
	}
	return strings.TrimSpace(said["Version"] + " " + said["GitCommit"]), nil
}

// startCRIO writes CRI-O's configuration and starts CRI-O and the daemon.
func (n *Node) startCRIO() error {
	var err error
	if n.crio, err = findCRIO(n.tools); err != nil {
		return err
	}
	if err := errors.Join(
		n.writeFile("crio.conf", crioConfig),
		n.writeVerbatim("crio.conf.d/10-test.conf", n.options.CRIOConfig),
		n.writeFile("registries.conf", crioRegistries),
		n.writeFile("storage.conf", crioStorage),
		n.writeVerbatim("policy.json", crioPolicy),
		n.writeFile("runc.sh", runcScript), os.Chmod(n.path("runc.sh"), 0o755),
		n.writeFile("cni/10-test.conflist", cniConfig),
		n.writeFile("crictl.yaml", crictlConfig),
		n.writeFile("daemon.toml", "blob_roots = ['{{.ContentRoot}}']\n"+daemonConfig),
		os.MkdirAll(n.path("tmp"), 0o700),
		// User namespaces must be able to pass through.
		os.MkdirAll(n.Root, 0o711), os.MkdirAll(n.State, 0o711),
	); err != nil {
		return err
	}
	if _, err := os.Stat(crioCache); errors.Is(err, fs.ErrNotExist) {
		n.strays = []string{crioCache} // created by this node, so Stop removes it
	}
	if !n.options.Stock {
		if err := n.StartDaemon(); err != nil {
			return err
		}
	}
	if err := n.StartCRIO(); err != nil {
		return err
	}
	if !n.options.Stock {
		if err := n.WaitForNRI(); err != nil {
			return err
		}
	}
	_, err = n.Pull(n.GuestImage)
	return err
}

// StartCRIO starts CRI-O and returns when CRI answers.
func (n *Node) StartCRIO() error {
	p, err := n.spawn("crio", []string{
		n.crio.Crio, "--config", n.path("crio.conf"), "--config-dir", n.path("crio.conf.d"),
		"--registries-conf", n.path("registries.conf"), "--registries-conf-dir", n.path("registries.conf.d"),
		"--log-level", cmp.Or(os.Getenv("ARTIFACT_SNAPSHOTTER_CRIO_LOG_LEVEL"), "info"),
	}, true)
	if err != nil {
		return err
	}
	n.runtime = p
	return n.await("CRI", func() error {
		_, err := n.Crictl("version")
		return err
	})
}

// StopCRIO stops CRI-O with SIGTERM and waits for it. Pods keep running.
func (n *Node) StopCRIO() error { return n.runtime.Stop(syscall.SIGTERM) }

// KillCRIO kills CRI-O with SIGKILL and waits for it. Pods keep running.
func (n *Node) KillCRIO() error { return n.runtime.Stop(syscall.SIGKILL) }

// startRuntime starts whichever of containerd and CRI-O the node has.
func (n *Node) startRuntime() error {
	if n.options.CRIO {
		return n.StartCRIO()
	}
	return n.StartContainerd()
}
