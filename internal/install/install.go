// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

// Package install makes the snapshotter the one of a node, and undoes that: the program,
// its systemd service, containerd's configuration. It plans all changes before it makes
// the first one; killed at any instant, containerd can start and the next run goes on.
package install

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/daemon"
	"github.com/artifact-snapshotter/artifact-snapshotter/internal/containerdconfig"
)

// ConfigFile is the daemon's configuration file.
const ConfigFile = "/etc/artifact-snapshotter/config.toml"

// The scopes of an installation, as flags name them.
const (
	ScopeNode    = "node"
	ScopeHandler = "runtime-handler"
)

// program is the name of the program.
const program = "artifact-snapshotter"

// Options say what to install, and how.
type Options struct {
	// Daemon is the daemon's configuration, read from Config. It is an error if Config
	// is missing and ConfigRequired.
	Daemon         daemon.Config
	Config         string
	ConfigRequired bool
	// ContainerdConfig is containerd's main file; "" for that of the node.
	ContainerdConfig string
	// Handler is the runtime handler whose pods use the snapshotter; "" for all pods.
	Handler string
	// Service installs the program as Binary, with a systemd service.
	Service bool
	Binary  string
	// Host is the directory with the node's files, if this process is in a container.
	Host string
	// Restart restarts containerd if it has not read its files as they are.
	Restart bool
	// Wait makes Uninstall wait until no container uses the snapshotter. PodUID is the UID of the
	// pod in which this process runs, if it does: its own sandbox may be one of them.
	Wait   bool
	PodUID string
	// DryRun reports what would be done, files as diffs, and changes nothing.
	DryRun bool
	// Report is called with a line, or a diff of several, for each thing done.
	Report func(text string)
}

// run is a run of install or uninstall.
type run struct {
	Options
	// configFile is the daemon's configuration file if it is not ConfigFile, and
	// configText what install is to write into it, nil if nothing.
	configFile string
	configText []byte
	// main is containerd's main file.
	main string
	// program is the content of this program, if it is to be installed.
	program []byte
	did     bool
}

// Install installs the snapshotter, as far as it is not installed already.
func Install(ctx context.Context, o Options) error { return do(ctx, o, (*run).install) }

// Uninstall undoes Install. While containers use the snapshotter, which could not be
// removed without it, it only gives new ones the snapshotter that the node had before, and
// returns an error, or waits.
func Uninstall(ctx context.Context, o Options) error { return do(ctx, o, (*run).awaitUninstall) }

func do(ctx context.Context, o Options, action func(*run, context.Context) error) error {
	r, err := newRun(o)
	if err != nil {
		return err
	}
	if !r.DryRun {
		lock, err := lockDir(filepath.Dir(r.main))
		if err != nil {
			return err
		}
		defer lock.Close()
	}
	if err := action(r, ctx); err != nil {
		return err
	}
	if !r.did {
		r.Report("nothing to do")
	}
	return nil
}

// newRun reads the files of the container that Host does not have, and enters Host.
func newRun(o Options) (r *run, err error) {
	r = &run{Options: o}
	if !filepath.IsAbs(r.Binary) {
		return nil, fmt.Errorf("--binary %q is not an absolute path", r.Binary)
	}
	if r.Service {
		if r.program, err = os.ReadFile("/proc/self/exe"); err != nil {
			return nil, err
		}
	}
	if r.Host != "" {
		if r.Service {
			text, err := os.ReadFile(r.Config)
			if err != nil && r.ConfigRequired {
				return nil, err
			}
			if err == nil {
				r.configText = append([]byte(header), text...)
			}
		}
		if err := errors.Join(unix.Chroot(r.Host), unix.Chdir("/")); err != nil {
			return nil, fmt.Errorf("--host %s: %w", r.Host, err)
		}
		if !exists("/proc/self") {
			return nil, fmt.Errorf("--host %s is not the root of a host: it has no /proc: %w", r.Host, errdefs.ErrInvalidArgument)
		}
	} else if r.Config != ConfigFile {
		if r.configFile, err = filepath.Abs(r.Config); err != nil {
			return nil, err
		}
	}
	if r.main = r.ContainerdConfig; r.main == "" {
		if r.main, err = containerdconfig.FindMain(); err != nil {
			return nil, err
		}
	}
	if r.main, err = filepath.Abs(r.main); err != nil {
		return nil, err
	}
	if r.Service && !hasSystemd() {
		return nil, fmt.Errorf("this node has no systemd: use --no-service, and run `%s serve` before containerd: %w", program, errdefs.ErrFailedPrecondition)
	}
	return r, nil
}

func (r *run) reportf(format string, args ...any) {
	r.did = true
	r.Report(fmt.Sprintf(format, args...))
}

// unchanged says that no file was changed before the error.
func unchanged(err error) error { return fmt.Errorf("nothing was changed: %w", err) }

func (r *run) install(ctx context.Context) error {
	c, err := r.connect(ctx)
	if err != nil {
		return unchanged(err)
	}
	if c != nil {
		defer func() { _ = c.Close() }()
		if err := errors.Join(r.checkMain(c), r.checkContent(ctx, c)); err != nil {
			return unchanged(err)
		}
	}
	now, err := r.look(ctx)
	if err != nil {
		return unchanged(err)
	}
	defer now.close()
	var service []change
	theirs := now.read.Overlayfs
	if r.Service {
		if service, err = r.serviceChanges(theirs); err != nil {
			return unchanged(err)
		}
	}
	containerd, err := r.containerdChanges(ctx, now)
	if err != nil {
		return unchanged(err)
	}
	service, containerd = slices.DeleteFunc(service, change.none), slices.DeleteFunc(containerd, change.none)
	if err := writable(slices.Concat(service, containerd)); err != nil {
		return unchanged(err)
	}
	if err := r.adviseOverlayfs(theirs); err != nil {
		return err
	}
	if err := r.write(service); err != nil {
		return err
	}
	if r.Service && !r.DryRun {
		if err := r.startService(ctx); err != nil {
			return err
		}
	} else if len(service) > 0 {
		r.reportf("would restart %s", unitName)
	}
	if err := r.write(containerd); err != nil {
		return err
	}
	if c == nil && len(containerd) > 0 { // otherwise checkContent has asked it
		r.compareContent(now.read.ContentRoot)
	}
	return r.finish(ctx, c, len(containerd) > 0, r.Daemon.SocketAddress())
}

// checkMain checks that the running containerd reads the main file.
func (r *run) checkMain(c *running) error {
	if c.config == "" || c.config == r.main || sameFile(c.config, r.main) {
		return nil
	}
	return fmt.Errorf("containerd (process %d) reads %s and not %s: use --containerd-config %[2]s: %[4]w", c.pid, c.config, r.main, errdefs.ErrInvalidArgument)
}

// checkContent checks that the daemon looks for blobs where containerd has them.
func (r *run) checkContent(ctx context.Context, c *running) error {
	content, err := containerdconfig.Loaded(ctx, c.Client.Client, plugins.ContentPlugin, "content")
	if err != nil || content == nil {
		return err
	}
	if root := content.Exports["root"]; root != "" && !sameFile(root, r.Daemon.ContentRoot) {
		return fmt.Errorf("containerd's blobs are in %s, but the daemon would look in %s: write content_root = %[1]q into %[3]s: %w", root, r.Daemon.ContentRoot, ConfigFile, errdefs.ErrFailedPrecondition)
	}
	return nil
}

// compareContent warns if the daemon would look for blobs elsewhere than in the root, which
// containerd has according to its configuration; it may be started with another one.
func (r *run) compareContent(root string) {
	if filepath.Clean(root) != filepath.Clean(r.Daemon.ContentRoot) && !sameFile(root, r.Daemon.ContentRoot) {
		r.reportf("warning: %s says that containerd has its blobs in %s, but the daemon will look in %s: unless containerd is started with another --root, write content_root = %[2]q into %[4]s", r.main, root, r.Daemon.ContentRoot, ConfigFile)
	}
}

func sameFile(a, b string) bool {
	ai, aerr := os.Stat(a)
	bi, berr := os.Stat(b)
	return aerr == nil && berr == nil && os.SameFile(ai, bi)
}

// write makes changes, all or none, and reports them. A dry run only reports them.
func (r *run) write(changes []change) error {
	if !r.DryRun {
		if err := applyAll(changes); err != nil {
			return err
		}
	}
	for _, c := range changes {
		made, text := "made", c.String()
		if r.DryRun {
			var err error
			if text, err = c.diff(); err != nil {
				return err
			}
			made = "would make"
		}
		if c.folder != "" && c.after != nil {
			r.reportf("%s %s", made, c.folder)
		}
		r.reportf("%s", text)
	}
	return nil
}

// finish restarts containerd if that is necessary: it is to have loaded the snapshotter
// from the socket wanted, "" for none.
func (r *run) finish(ctx context.Context, c *running, changed bool, wanted string) error {
	if c == nil {
		if changed {
			r.reportf("no containerd answers on %s: it will read this when it starts", r.Daemon.ContainerdAddress)
		}
		return nil
	}
	if !changed {
		stale, err := r.stale(ctx, c, wanted)
		if err != nil || !stale {
			return err
		}
	}
	switch {
	case !r.Restart || c.unit == "" || !hasSystemd():
		r.reportf("containerd (process %d) must be restarted: check then with `%s doctor` that it has read this", c.pid, program)
		return nil
	case r.DryRun:
		r.reportf("would restart %s (containerd is its process %d)", c.unit, c.pid)
		return nil
	default:
		return r.restartContainerd(ctx, c, wanted)
	}
}
