// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"

	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/urfave/cli/v3"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/deploy"
)

// installFlags are those of install and uninstall.
func installFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "containerd-config", Usage: "containerd's configuration file", TakesFile: true, DefaultText: "the one that is there, containerd's, k3s' or RKE2's"},
		&cli.StringFlag{Name: "scope", Usage: "who gets the snapshotter: every pod of the node (" + scopeNode + "), or the pods of one runtime handler (" + scopeHandler + ")", Value: scopeNode},
		&cli.StringFlag{Name: "runtime-handler", Usage: "the handler that a RuntimeClass names, with --scope " + scopeHandler, Value: "artifact"},
		&cli.StringFlag{Name: "binary", Usage: "where the program goes", Value: deploy.UnitBinary},
		&cli.BoolFlag{Name: "no-service", Usage: "leave alone the program and its service of systemd: the daemon is run by something else"},
		&cli.BoolFlag{Name: "no-restart", Usage: "do not restart containerd, but say that it has to be"},
		&cli.BoolFlag{Name: "dry-run", Usage: "change nothing, but print what would be, files as diffs"},
		&cli.StringFlag{Name: "host", Usage: "directory with the files of the host, for a container that has them in one"},
		&cli.BoolFlag{Name: "stay", Usage: "do not end before a signal (SIGTERM), as the pod of a DaemonSet must not"},
		configFlag(),
	}
}

func installCommand() *cli.Command {
	return &cli.Command{
		Name:  "install",
		Usage: "make this program the node's snapshotter for artifacts: its service, and containerd's configuration",
		Description: "What is there already is left alone, and containerd is restarted only if it has not read\n" +
			"its configuration as it is now. If anything is in the way, nothing is written.\n\n" +
			"Examples:\n\n" +
			"  artifact-snapshotter install --dry-run\n" +
			"  artifact-snapshotter install\n" +
			"  artifact-snapshotter install --scope runtime-handler --runtime-handler models",
		Flags: installFlags(),
		Action: func(ctx context.Context, command *cli.Command) error {
			return runInstall(ctx, command, (*installRun).install)
		},
	}
}

func uninstallCommand() *cli.Command {
	return &cli.Command{
		Name:  "uninstall",
		Usage: "take back what install has done",
		Description: "Containers of the snapshotter could not be removed without it. While there are any, new\n" +
			"ones get the one that the node had before, and the rest waits until the last is gone.\n\n" +
			"Examples:\n\n" +
			"  artifact-snapshotter uninstall --dry-run\n" +
			"  artifact-snapshotter uninstall",
		Flags: installFlags(),
		Action: func(ctx context.Context, command *cli.Command) error {
			return runInstall(ctx, command, (*installRun).uninstall)
		},
	}
}

// installRun is one run of install or uninstall.
type installRun struct {
	installation
	restart, dryRun bool
	out             io.Writer
	did             bool
}

func runInstall(ctx context.Context, command *cli.Command, do func(*installRun, context.Context) error) error {
	r, err := newInstallRun(command)
	if err != nil {
		return err
	}
	if err := do(r, ctx); err != nil {
		return err
	}
	if !r.did {
		r.say("nothing to do")
	}
	if command.Bool("stay") {
		<-ctx.Done()
	}
	return nil
}

// newInstallRun is what the flags say, on the host.
func newInstallRun(command *cli.Command) (*installRun, error) {
	r := &installRun{restart: !command.Bool("no-restart"), dryRun: command.Bool("dry-run"), out: command.Root().Writer}
	r.service, r.binary = !command.Bool("no-service"), command.String("binary")
	// Of containerd's code that reads its files: what matters here is in its errors, too.
	err := log.SetLevel("fatal")
	if err != nil {
		return nil, err
	}
	if r.cfg, err = loadConfig(command); err != nil {
		return nil, err
	}
	if err := r.cfg.Validate(); err != nil {
		return nil, err
	}
	if r.handler, err = handlerOf(command, "scope"); err != nil {
		return nil, err
	}
	if !filepath.IsAbs(r.binary) {
		return nil, fmt.Errorf("--binary %q is not an absolute path", r.binary)
	}
	config := command.String("config")
	if r.service {
		if r.program, err = os.ReadFile("/proc/self/exe"); err != nil {
			return nil, err
		}
	}
	if host := command.String("host"); host != "" {
		if r.service {
			if r.configText, err = os.ReadFile(config); err != nil && command.IsSet("config") {
				return nil, err
			}
		}
		if err := errors.Join(unix.Chroot(host), unix.Chdir("/")); err != nil {
			return nil, fmt.Errorf("--host %s: %w", host, err)
		}
	} else if config != defaultConfigFile {
		if r.configFile, err = filepath.Abs(config); err != nil {
			return nil, err
		}
	}
	if r.main = command.String("containerd-config"); r.main == "" {
		if r.main, err = findContainerdFile(); err != nil {
			return nil, err
		}
	}
	if r.main, err = filepath.Abs(r.main); err != nil {
		return nil, err
	}
	if real, err := filepath.EvalSymlinks(r.main); err == nil {
		r.main = real // which is edited in place of the link
	}
	if r.service && !hasSystemd() {
		return nil, fmt.Errorf("there is no systemd here: use --no-service, and have `%s serve` run before containerd: %w", name, errdefs.ErrFailedPrecondition)
	}
	return r, nil
}

func (r *installRun) say(what string) {
	r.did = true
	_, _ = fmt.Fprintln(r.out, what)
}

// install plans everything before it writes the first byte.
func (r *installRun) install(ctx context.Context) error {
	nothing := func(err error) error { return fmt.Errorf("nothing was changed: %w", err) }
	c, err := r.askRuntime(ctx)
	if err != nil {
		return nothing(err)
	}
	if c != nil {
		defer c.Close()
		if err := r.checkContent(ctx, c); err != nil {
			return nothing(err)
		}
	}
	var ofService []change
	if r.service {
		if ofService, err = r.serviceChanges(); err != nil {
			return nothing(err)
		}
	}
	ofContainerd, err := r.containerdChanges(ctx)
	if err != nil {
		return nothing(err)
	}
	ofService, ofContainerd = slices.DeleteFunc(ofService, change.none), slices.DeleteFunc(ofContainerd, change.none)
	for _, change := range slices.Concat(ofService, ofContainerd) {
		if err := change.writable(); err != nil {
			return nothing(err)
		}
	}
	if r.dryRun {
		return r.preview(ctx, c, ofService, ofContainerd, r.cfg.SocketAddress())
	}
	if err := r.write(ofService); err != nil {
		return err
	}
	if r.service {
		if err := r.startService(ctx, len(ofService) > 0); err != nil {
			return err
		}
	}
	if err := applyAll(ofContainerd); err != nil {
		return err
	}
	if err := r.effective(ctx, r.main); err != nil {
		return takeBack(ofContainerd, err)
	}
	r.report(ofContainerd)
	return r.finish(ctx, c, len(ofContainerd) > 0, r.cfg.SocketAddress())
}

// checkContent looks whether the daemon would look for blobs where containerd has them.
func (r *installRun) checkContent(ctx context.Context, c *running) error {
	content, err := c.patient.plugin(ctx, plugins.ContentPlugin, "content")
	if err != nil || content == nil {
		return err
	}
	if root := content.Exports["root"]; root != "" && !same(root, r.cfg.ContentRoot) {
		return fmt.Errorf("containerd's blobs are in %s, and the daemon would look in %s: write content_root = %q into %s: %w", root, r.cfg.ContentRoot, root, defaultConfigFile, errdefs.ErrFailedPrecondition)
	}
	return nil
}

func (r *installRun) write(changes []change) error {
	if err := applyAll(changes); err != nil {
		return err
	}
	r.report(changes)
	return nil
}

func (r *installRun) report(changes []change) {
	for _, c := range changes {
		r.say(c.String())
	}
}

// finish restarts containerd if it has to be.
func (r *installRun) finish(ctx context.Context, c *running, changed bool, wanted string) error {
	if c == nil {
		if changed {
			r.say(fmt.Sprintf("no containerd answers on %s: it will read this when it starts", r.cfg.ContainerdAddress))
		}
		return nil
	}
	if !changed {
		stale, err := r.stale(ctx, c, wanted)
		if err != nil || !stale {
			return err
		}
	}
	if !r.restart || c.unit == "" || !hasSystemd() {
		r.say(fmt.Sprintf("restart containerd (process %d), and see with `%s doctor` that it has read this", c.pid, name))
		return nil
	}
	return r.restartRuntime(ctx, c, wanted)
}

// preview prints what would be done.
func (r *installRun) preview(ctx context.Context, c *running, ofService, ofContainerd []change, wanted string) error {
	for _, change := range slices.Concat(ofService, ofContainerd) {
		text, err := change.diff()
		if err != nil {
			return err
		}
		r.did = true
		if _, err := io.WriteString(r.out, text); err != nil {
			return err
		}
	}
	if len(ofService) > 0 {
		r.say("would restart " + filepath.Base(installedUnit))
	}
	if c == nil {
		return nil
	}
	stale := len(ofContainerd) > 0
	if !stale {
		var err error
		if stale, err = r.stale(ctx, c, wanted); err != nil {
			return err
		}
	}
	if stale && r.restart && c.unit != "" {
		r.say("would restart " + c.unit)
	}
	return nil
}

// uninstall takes back what install has done.
func (r *installRun) uninstall(ctx context.Context) error {
	nothing := func(err error) error { return fmt.Errorf("nothing was changed: %w", err) }
	c, err := r.askRuntime(ctx)
	if err != nil {
		return nothing(err)
	}
	if c != nil {
		defer c.Close()
		using, err := c.using(ctx)
		if err != nil {
			return nothing(err)
		}
		if len(using) > 0 {
			return r.retire(ctx, c, using)
		}
	}
	changes, err := r.removal()
	if err != nil {
		return nothing(err)
	}
	changes = slices.DeleteFunc(changes, change.none)
	for _, change := range changes {
		if err := change.writable(); err != nil {
			return nothing(err)
		}
	}
	if r.dryRun {
		return r.previewRemoval(ctx, c, changes)
	}
	if err := r.write(changes); err != nil {
		return err
	}
	if err := r.removeEmptyDir(); err != nil {
		return err
	}
	if err := r.finish(ctx, c, len(changes) > 0, ""); err != nil {
		return err
	}
	if r.service {
		if err := r.removeService(ctx); err != nil {
			return err
		}
	}
	if r.did && exists(r.cfg.Root) {
		r.say(fmt.Sprintf("%s stays: once containerd has no snapshots there, remove it with rm -rf", r.cfg.Root))
	}
	return nil
}

func (r *installRun) previewRemoval(ctx context.Context, c *running, changes []change) error {
	if err := r.preview(ctx, c, nil, changes, ""); err != nil || !r.service {
		return err
	}
	for _, path := range []string{installedUnit, r.binary} {
		if exists(path) {
			r.say("would remove " + path)
		}
	}
	return nil
}

// retire is the part of uninstall that can be done while containers have the
// snapshotter, which could neither be restarted nor removed without it: new ones get the
// one that the node had before. It returns an error, for uninstall is not done.
func (r *installRun) retire(ctx context.Context, c *running, using []string) error {
	changes, err := r.retirement()
	if err != nil {
		return fmt.Errorf("nothing was changed: %w", err)
	}
	state := "nothing was changed"
	switch {
	case len(changes) == 0:
	case r.dryRun:
		if err := r.preview(ctx, c, nil, changes, r.cfg.SocketAddress()); err != nil {
			return err
		}
	default:
		if err := r.write(changes); err != nil {
			return err
		}
		if err := r.finish(ctx, c, true, r.cfg.SocketAddress()); err != nil {
			return err
		}
		state = "new containers will have another snapshotter"
	}
	return fmt.Errorf("%s, but %d containers have this one, and could not be removed without it: drain the node, remove what is left (crictl rmp --force), and uninstall again: %s: %w",
		state, len(using), list(using[:min(len(using), 3)]), errdefs.ErrFailedPrecondition)
}

// using are the containers that have the snapshotter.
func (c *running) using(ctx context.Context) (using []string, err error) {
	all, err := c.NamespaceService().List(ctx)
	if err != nil {
		return nil, err
	}
	for _, namespace := range all {
		in := c.In(namespace)
		containers, err := in.ContainerService().List(in.Context(ctx))
		if err != nil {
			return nil, err
		}
		for _, container := range containers {
			if container.Snapshotter == proxyName {
				using = append(using, namespace+"/"+container.ID)
			}
		}
	}
	return using, nil
}
