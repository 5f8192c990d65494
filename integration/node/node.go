// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

// Package node runs a real node in a temporary directory: a registry, containerd with
// its CRI service or CRI-O, the artifact-snapshotter daemon and optionally kubelet.
// Tests, the demo and benchmarks use it. Nothing is simulated, and nothing outlives
// [Node.Stop]. It needs root.
package node

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/process"
)

// Options configure a node. The zero value is a node with the daemon as its
// snapshotter.
type Options struct {
	// Stock leaves the daemon out: stock containerd, with overlayfs.
	Stock bool

	// NRI runs stock containerd, with overlayfs, and the daemon as its NRI plugin.
	// [Node.WaitForNRI] waits for the registration. NRIConfig adds keys to the nri
	// table of the daemon's configuration file.
	NRI       bool
	NRIConfig string

	// ContainerdConfig is TOML that containerd merges over its configuration
	// (tables by key; a list replaces one of the snippet's). DaemonConfig is the daemon's
	// configuration file, DaemonFlags are added to its command line.
	ContainerdConfig string
	DaemonConfig     string
	DaemonFlags      []string

	// HandlerScope makes the daemon the snapshotter of the pods of one
	// RuntimeHandler, [ArtifactHandler]; the others have overlayfs.
	HandlerScope bool

	// NativeUnpack lets containerd's own unpacker unpack artifacts.
	NativeUnpack bool

	// RaceDaemon builds the daemon with Go's race detector.
	RaceDaemon bool

	// Traces is the URL of an OTLP receiver for the spans of containerd and the daemon;
	// "" is none.
	Traces string

	// Kubelet prepares the node for StartKubelet.
	Kubelet bool

	// CRIO runs CRI-O instead of containerd. With Stock it is stock CRI-O; otherwise
	// the daemon is its NRI plugin. If CRI-O is missing, Start returns [ErrNoCRIO].
	// CRIOConfig is TOML that CRI-O reads after its own configuration.
	CRIO       bool
	CRIOConfig string

	// Systemd boots a machine in its own namespaces. Its first process is systemd,
	// containerd is a service at its default paths, and /etc/containerd/config.toml
	// does not mention the daemon: the caller installs it, with Run. It requires Stock;
	// the methods that start and stop daemons do not work with it.
	Systemd bool

	// Member makes the machine of Systemd a member of a cluster; see package cluster.
	Member *Member

	// DaemonRoot is the daemon's root; "" is a directory of the node on the file system
	// of containerd's content.
	DaemonRoot string

	// ContainerdRoot is containerd's root, including its content; "" is a directory of
	// the node. It does not work with CRIO or Systemd.
	ContainerdRoot string
}

// Node is a running node. Its methods may be called concurrently, except those
// that start or stop something.
type Node struct {
	Dir         string // everything below it is the node's
	Registry    string // host:port; plain HTTP
	Address     string // containerd's socket, for CRI too, or CRI-O's
	Root        string // containerd's, or that of CRI-O's storage
	State       string // containerd's, or the run root of CRI-O's storage
	ContentRoot string // containerd's or CRI-O's blob directory: blobs/<algorithm>/<hex>
	DaemonRoot  string
	DaemonState string
	GuestImage  string // reference of the test image, whose only program is Guest
	Minor       int    // containerd is of version 2.Minor; 0 with CRI-O

	// ctx is Start's context: when it ends, running commands end too.
	ctx     context.Context
	options Options
	tools   string
	// containerd is the directory of containerd, ctr and the shim.
	containerd string
	crio       crioPrograms
	daemon     *process.Process
	registry   *process.Process
	private    *process.Process // of StartPrivateRegistry
	mirror     *process.Process // of StartMirror
	runtime    *process.Process // containerd or CRI-O
	kubelet    *process.Process
	machine    *process.Process // of Options.Systemd
	// kubeletPods is the URL of kubelet's pod list.
	kubeletPods  string
	kubeletFlags []string // of ProvideCredentials
	cgroup       string   // parent of all containers' cgroups
	strays       []string // made by the node elsewhere
	pods         atomic.Int64
	lastLogs     string // of a node that was stopped
}

// temporary is this process's first temporary directory. Tests set TMPDIR to their own
// later.
var temporary = os.TempDir()

// Start starts a node and returns when pods can run on it. With the daemon, it also
// waits for the pre-created empty blob, without which artifacts with an empty file
// cannot be pulled. Cancelling ctx ends running commands, not the node: call Stop.
func Start(ctx context.Context, o Options) (*Node, error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("a node needs root: run it with sudo")
	}
	parent := ""
	if o.Member != nil {
		parent = o.Member.Dir
	}
	dir, err := os.MkdirTemp(parent, "as-")
	if err != nil {
		return nil, err
	}
	n := &Node{
		Dir:         dir,
		Address:     filepath.Join(dir, "containerd.sock"),
		Root:        cmp.Or(o.ContainerdRoot, filepath.Join(dir, "containerd")),
		State:       filepath.Join(dir, "state"),
		DaemonRoot:  cmp.Or(o.DaemonRoot, filepath.Join(dir, "daemon")),
		DaemonState: filepath.Join(dir, "daemon-state"),
		ctx:         ctx,
		options:     o,
		cgroup:      filepath.Base(dir),
	}
	n.ContentRoot = filepath.Join(n.Root, "io.containerd.content.v1.content")
	if o.CRIO {
		n.options.NRI = !o.Stock
		n.Address = filepath.Join(dir, "crio.sock")
		n.Root = filepath.Join(dir, "storage")
		n.ContentRoot = filepath.Join(n.Root, "artifacts")
	}
	if err := n.start(); err != nil {
		err = fmt.Errorf("start a node: %w\n%s", err, n.Logs())
		return nil, errors.Join(err, n.Stop())
	}
	return n, nil
}

func (n *Node) start() error {
	// The shim allows its socket directory 38 bytes (core/runtime/v2/socket_unix.go). On
	// a machine it is /run/containerd/s.
	if sockets := n.path("s"); len(sockets) > 38 && !n.options.Systemd {
		return fmt.Errorf("%s is too long for containerd's shims by %d bytes: set TMPDIR to a shorter directory", sockets, len(sockets)-38)
	}
	// User namespaces in pods must be able to pass through.
	if err := os.Chmod(n.Dir, 0o711); err != nil {
		return err
	}
	var err error
	if n.tools, n.containerd, err = findTools(); err != nil {
		return err
	}
	if !n.options.CRIO {
		if n.Minor, err = Minor(); err != nil {
			return err
		}
	}
	if m := n.options.Member; m != nil {
		n.Registry = m.Registries[0]
	} else if err := n.startRegistry(); err != nil {
		return err
	}
	n.GuestImage = n.Registry + "/" + guestName
	if n.options.Member == nil {
		if err := PushGuest(n.ctx, n.Registry); err != nil {
			return fmt.Errorf("test image: %w", err)
		}
	}
	if n.options.Systemd {
		if err := n.startMachine(); err != nil {
			return err
		}
		_, err = n.Pull(n.GuestImage)
		return err
	}
	if n.options.CRIO {
		return n.startCRIO()
	}
	if err := n.writeConfig(); err != nil {
		return err
	}
	if !n.options.Stock {
		if err := n.StartDaemon(); err != nil {
			return err
		}
	}
	if err := n.StartContainerd(); err != nil {
		return err
	}
	if !n.options.Stock {
		if err := n.waitForEmptyBlob(); err != nil {
			return err
		}
	}
	if n.options.NRI {
		if err := n.WaitForNRI(); err != nil {
			return err
		}
	}
	_, err = n.Pull(n.GuestImage)
	return err
}

// ForTest starts a node for one test and stops it at the end. Leftovers fail the test,
// and a failed test prints the logs.
func ForTest(t testing.TB, o Options) *Node {
	t.Helper()
	n, err := Start(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Stop(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Log(n.Logs())
		}
	})
	return n
}

// Stop removes all pods, ends all processes of the node, and unmounts and removes
// everything below Dir. The error lists processes, mounts and control groups that
// should already have been gone. Mounts below DaemonRoot and DaemonState do not count,
// because the daemon leaves volumes mounted when it stops.
func (n *Node) Stop() error {
	var errs []error
	n.ctx = context.WithoutCancel(n.ctx)
	errs = append(errs, n.StopKubelet()) // or it would start the pods again
	if n.runtime != nil {
		if !n.options.Stock && !n.daemon.Running() {
			errs = append(errs, n.StartDaemon())
		}
		if !n.runtime.Running() {
			errs = append(errs, n.startRuntime())
		}
		if _, err := n.Crictl("rmp", "--force", "--all"); err != nil {
			errs = append(errs, err)
		}
	}
	if n.machine.Running() {
		if n.options.Member != nil {
			// Its pods are the cluster's, and all that it has mounted ends with it.
			errs = append(errs, n.saveJournal(), n.Cut())
		} else {
			_, err := n.Crictl("rmp", "--force", "--all")
			errs = append(errs, err, n.Shutdown())
		}
	}
	for _, p := range []*process.Process{n.runtime, n.daemon, n.registry, n.private, n.mirror} {
		errs = append(errs, p.Stop(syscall.SIGTERM))
	}
	n.runtime, n.daemon, n.registry, n.private, n.mirror, n.kubelet = nil, nil, nil, nil, nil, nil // a second Stop has nothing to do
	if err := n.cleanUp(); err != nil {
		errs = append(errs, fmt.Errorf("left over by the node in %s: %w", n.Dir, err))
	}
	return errors.Join(errs...)
}

// StartContainerd starts containerd and returns when CRI answers.
func (n *Node) StartContainerd() error {
	p, err := n.spawn("containerd", []string{filepath.Join(n.containerd, "containerd"), "--config", n.path("containerd.toml")}, true)
	if err != nil {
		return err
	}
	n.runtime = p
	// CRI starts after containerd reports that it is ready.
	return n.await("CRI", func() error {
		_, err := n.Crictl("version")
		return err
	})
}

// StopContainerd stops containerd with SIGTERM and waits for it. Pods keep running.
func (n *Node) StopContainerd() error { return n.runtime.Stop(syscall.SIGTERM) }

// KillContainerd kills containerd with SIGKILL and waits for it. Pods keep running.
func (n *Node) KillContainerd() error { return n.runtime.Stop(syscall.SIGKILL) }

// RestartContainerd is StopContainerd and StartContainerd.
func (n *Node) RestartContainerd() error {
	return errors.Join(n.StopContainerd(), n.StartContainerd())
}

// StartDaemon starts the daemon and returns when it has reported that it is ready.
func (n *Node) StartDaemon() error {
	bin, err := n.daemonBinary()
	if err != nil {
		return err
	}
	// With CRI-O there is no containerd, and CRI-O's store is one of blob_roots.
	contentRoot, containerd := n.ContentRoot, n.Address
	if n.options.CRIO {
		contentRoot, containerd = n.path("containerd"), n.path("containerd.sock")
	}
	args := append([]string{
		bin, "serve",
		"--config", n.path("daemon.toml"),
		"--root", n.DaemonRoot,
		"--state", n.DaemonState,
		"--address", n.path("daemon.sock"),
		"--content-root", contentRoot,
		"--containerd-address", containerd,
		"--log-level", "debug",
	}, n.options.DaemonFlags...)
	n.daemon, err = n.spawn("daemon", args, true)
	return err
}

// WaitForNRI waits until the runtime has registered the daemon as an NRI plugin. Call it
// after a start of either.
func (n *Node) WaitForNRI() error {
	bin, err := findDaemon()
	if err != nil {
		return err
	}
	return n.await("NRI", func() error {
		_, err := n.run(bin, "health", "--address", n.path("daemon.sock"), "--nri")
		return err
	})
}

// StopDaemon stops the daemon with SIGTERM and waits for it.
func (n *Node) StopDaemon() error { return n.daemon.Stop(syscall.SIGTERM) }

// KillDaemon kills the daemon with SIGKILL and waits for it.
func (n *Node) KillDaemon() error { return n.daemon.Stop(syscall.SIGKILL) }

// QuitDaemon ends the daemon with SIGQUIT and returns the number of its goroutines, which
// the Go runtime prints.
func (n *Node) QuitDaemon() (goroutines int, err error) {
	before, err := os.ReadFile(n.logPath("daemon"))
	if err != nil {
		return 0, err
	}
	if err := n.daemon.Stop(syscall.SIGQUIT); err != nil {
		return 0, err
	}
	after, err := os.ReadFile(n.logPath("daemon"))
	if err != nil {
		return 0, err
	}
	return strings.Count(string(after[len(before):]), "\ngoroutine "), nil
}

// DaemonPID is the daemon's process ID.
func (n *Node) DaemonPID() int { return n.daemon.PID() }

// Crictl runs crictl against the node and returns its standard output. The error contains
// its standard error, with the message that `kubectl describe pod` would show.
func (n *Node) Crictl(args ...string) (string, error) { return n.CrictlContext(n.ctx, args...) }

// CrictlContext is Crictl, killed when ctx ends.
func (n *Node) CrictlContext(ctx context.Context, args ...string) (string, error) {
	return n.runContext(ctx, filepath.Join(n.tools, "crictl"), append([]string{"--config", n.path("crictl.yaml")}, args...)...)
}

// Critest runs Kubernetes' CRI validation suite against the node with env
// ("NAME=value") and returns its output. A failed spec is an error.
func (n *Node) Critest(env []string, args ...string) (string, error) {
	endpoint := "unix://" + n.Address
	command := []string{filepath.Join(n.tools, "critest"), "--runtime-endpoint", endpoint, "--image-endpoint", endpoint}
	return n.run("env", slices.Concat(env, command, args)...)
}

// Ctr runs ctr in CRI's namespace and returns its standard output.
func (n *Node) Ctr(args ...string) (string, error) {
	return n.run(filepath.Join(n.containerd, "ctr"), append([]string{"--address", n.Address, "--namespace", "k8s.io"}, args...)...)
}

// Pull pulls an image or artifact through CRI, as kubelet does, and returns
// its image ID ("sha256:<hex>").
func (n *Node) Pull(ref string) (string, error) {
	out, err := n.Crictl("pull", ref)
	return strings.TrimPrefix(strings.TrimSpace(out), "Image is up to date for "), err
}

// waitForEmptyBlob waits until containerd has the empty blob.
func (n *Node) waitForEmptyBlob() error {
	const empty = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
	return n.await("the empty blob that the daemon pre-creates in containerd's content store", func() error {
		_, err := n.Ctr("content", "get", empty)
		return err
	})
}

// await calls done until it returns nil, for at most three minutes.
func (n *Node) await(what string, done func() error) error {
	return process.Await(n.ctx, 3*time.Minute, what, done)
}

func (n *Node) path(name string) string { return filepath.Join(n.Dir, name) }
