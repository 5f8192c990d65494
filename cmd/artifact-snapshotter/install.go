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
	"time"

	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/moby/sys/mountinfo"
	"github.com/urfave/cli/v3"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/deploy"
)

// gcTimeout is how long the daemon may take to drop the mounts of what is gone.
const gcTimeout = 10 * time.Second

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
	if !r.dryRun {
		lock, err := lockFor(filepath.Dir(r.main))
		if err != nil {
			return err
		}
		defer lock.Close()
	}
	if err := do(r, ctx); err != nil {
		return err
	}
	if !r.did {
		r.say("nothing to do")
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
			text, err := os.ReadFile(config)
			if err != nil && command.IsSet("config") {
				return nil, err
			}
			if err == nil {
				r.configText = append([]byte(writtenBy), text...)
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
	if r.service && !hasSystemd() {
		return nil, fmt.Errorf("there is no systemd here: use --no-service, and have `%s serve` run before containerd: %w", name, errdefs.ErrFailedPrecondition)
	}
	return r, nil
}

func (r *installRun) say(what string) {
	r.did = true
	_, _ = fmt.Fprintln(r.out, what)
}

// nothing says that no file has been changed when the error came.
func nothing(err error) error { return fmt.Errorf("nothing was changed: %w", err) }

// install plans everything before it writes the first byte.
func (r *installRun) install(ctx context.Context) error {
	c, err := r.askRuntime(ctx)
	if err != nil {
		return nothing(err)
	}
	if c != nil {
		defer func() { _ = c.Close() }()
		if err := errors.Join(r.checkFile(c), r.checkContent(ctx, c)); err != nil {
			return nothing(err)
		}
	}
	now, err := r.look(ctx)
	if err != nil {
		return nothing(err)
	}
	defer now.close()
	var ofService []change
	theirs := now.read.overlayfs.Overlayfs
	if r.service {
		if ofService, err = r.serviceChanges(theirs); err != nil {
			return nothing(err)
		}
	}
	ofContainerd, err := r.containerdChanges(ctx, now)
	if err != nil {
		return nothing(err)
	}
	ofService, ofContainerd = slices.DeleteFunc(ofService, change.none), slices.DeleteFunc(ofContainerd, change.none)
	if err := writable(slices.Concat(ofService, ofContainerd)); err != nil {
		return nothing(err)
	}
	if err := r.adviseOverlayfs(theirs); err != nil {
		return err
	}
	if r.dryRun {
		if err := r.preview(ctx, c, slices.Concat(ofService, ofContainerd), len(ofContainerd) > 0, r.cfg.SocketAddress()); err != nil {
			return err
		}
		if len(ofService) > 0 {
			r.say("would restart " + unitName)
		}
		return nil
	}
	if err := r.write(ofService); err != nil {
		return err
	}
	if r.service {
		if err := r.startService(ctx); err != nil {
			return err
		}
	}
	if err := r.write(ofContainerd); err != nil {
		return err
	}
	return r.finish(ctx, c, len(ofContainerd) > 0, r.cfg.SocketAddress())
}

func writable(changes []change) error {
	for _, c := range changes {
		if err := c.writable(); err != nil {
			return err
		}
	}
	return nil
}

// checkFile looks whether the containerd that runs reads the file.
func (r *installRun) checkFile(c *running) error {
	if c.config == "" || c.config == r.main || same(c.config, r.main) {
		return nil
	}
	return fmt.Errorf("containerd (process %d) does not read %s, but %s: use --containerd-config %[3]s: %w", c.pid, r.main, c.config, errdefs.ErrInvalidArgument)
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
	for _, c := range changes {
		if c.folder != "" && c.after != nil {
			r.say("made " + c.folder)
		}
		r.say(c.String())
	}
	return nil
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

// preview prints what would be done, to containerd if its files change or it has not
// read them as they are.
func (r *installRun) preview(ctx context.Context, c *running, changes []change, ofContainerd bool, wanted string) error {
	for _, change := range changes {
		text, err := change.diff()
		if err != nil {
			return err
		}
		if change.folder != "" && change.after != nil {
			r.say("would make " + change.folder)
		}
		r.did = true
		if _, err := io.WriteString(r.out, text); err != nil {
			return err
		}
	}
	if c == nil || !r.restart || c.unit == "" {
		return nil
	}
	stale := ofContainerd
	if !stale {
		var err error
		if stale, err = r.stale(ctx, c, wanted); err != nil {
			return err
		}
	}
	if stale {
		r.say(fmt.Sprintf("would restart %s (containerd is its process %d)", c.unit, c.pid))
	}
	return nil
}

// uninstall takes back what install has done.
func (r *installRun) uninstall(ctx context.Context) error {
	c, err := r.askRuntime(ctx)
	if err != nil {
		return nothing(err)
	}
	if c != nil {
		defer func() { _ = c.Close() }()
		using, err := c.Using(ctx)
		if err == nil {
			err = r.checkFile(c)
		}
		if err != nil {
			return nothing(err)
		}
		if len(using) > 0 {
			return r.retire(ctx, c, using)
		}
	}
	changes, folders, err := r.removal(ctx)
	if err != nil {
		return nothing(err)
	}
	changes = slices.DeleteFunc(changes, change.none)
	if err := writable(changes); err != nil {
		return nothing(err)
	}
	if c == nil && (len(changes) > 0 || r.service && exists(installedUnit)) && r.used() {
		return nothing(fmt.Errorf("no containerd answers on %s, so it is not known whether containers still have the snapshotter: start it, and uninstall again; if it cannot start because of %s, take that out of its imports by hand: %w",
			r.cfg.ContainerdAddress, name+".toml", errdefs.ErrUnavailable))
	}
	if r.dryRun {
		for _, folder := range folders {
			r.say(fmt.Sprintf("would remove %s, if nothing else is in it", folder))
		}
		return r.previewRemoval(ctx, c, changes)
	}
	if c != nil {
		if err := r.forget(ctx, c); err != nil {
			return nothing(err)
		}
	}
	if err := r.write(changes); err != nil {
		return err
	}
	for _, folder := range folders {
		if unix.Rmdir(folder) != nil { // somebody uses it
			break
		}
		r.say("removed " + folder)
	}
	if err := r.finish(ctx, c, len(changes) > 0, ""); err != nil {
		return err
	}
	if left, err := r.stillLoaded(ctx); err != nil || left {
		if left {
			r.say("uninstall again when it has been restarted, for the rest")
		}
		return err
	}
	if r.service {
		if err := r.removeService(ctx); err != nil {
			return err
		}
	}
	if r.did && exists(r.cfg.Root) {
		r.say(fmt.Sprintf("%s stays: remove it with rm -rf", r.cfg.Root))
	}
	return nil
}

// used says whether the daemon has made snapshots of images or containers.
func (r *installRun) used() bool {
	snapshots, _ := os.ReadDir(filepath.Join(r.cfg.Root, "overlayfs", "snapshots"))
	return len(snapshots) > 0
}

// forget removes what containerd has of the snapshotter while it has it: it would take
// it for unpacked images after another install. The daemon then drops its mounts.
func (r *installRun) forget(ctx context.Context, c *running) error {
	loaded, err := c.loaded(ctx)
	if err != nil || loaded != r.cfg.SocketAddress() {
		return err
	}
	removed, err := c.RemoveSnapshots(ctx)
	if removed > 0 {
		r.say(fmt.Sprintf("removed snapshots of images from containerd: %d", removed))
	}
	if err != nil {
		return err
	}
	return r.awaitNoMounts(ctx)
}

// awaitNoMounts waits for the daemon's sweep, for a while.
func (r *installRun) awaitNoMounts(ctx context.Context) error {
	dir := filepath.Join(r.cfg.State, "mounts")
	for deadline := time.Now().Add(gcTimeout); ; time.Sleep(100 * time.Millisecond) {
		left, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
		if err != nil || len(left) == 0 || ctx.Err() != nil {
			return errors.Join(err, ctx.Err())
		}
		if time.Now().After(deadline) {
			r.say(fmt.Sprintf("%d mounts are left in %s: umount %[2]s/*", len(left), dir))
			return nil
		}
	}
}

// stillLoaded says whether the containerd that runs has the snapshotter, and so needs
// the daemon.
func (r *installRun) stillLoaded(ctx context.Context) (bool, error) {
	c, err := r.askRuntime(ctx)
	if err != nil || c == nil {
		return false, err
	}
	defer func() { _ = c.Close() }()
	loaded, err := c.loaded(ctx)
	return loaded == r.cfg.SocketAddress(), err
}

func (r *installRun) previewRemoval(ctx context.Context, c *running, changes []change) error {
	if err := r.preview(ctx, c, changes, len(changes) > 0, ""); err != nil || !r.service {
		return err
	}
	files, err := r.serviceFiles()
	if err != nil {
		return err
	}
	for _, file := range files {
		if !file.none() {
			r.say("would " + map[bool]string{true: "remove ", false: "change "}[file.after == nil] + file.path)
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
		return nothing(err)
	}
	changes = slices.DeleteFunc(changes, change.none)
	if r.dryRun {
		err = r.preview(ctx, c, changes, len(changes) > 0, r.cfg.SocketAddress())
	} else if err = r.write(changes); err == nil {
		err = r.finish(ctx, c, len(changes) > 0, r.cfg.SocketAddress())
	}
	if err != nil {
		return err
	}
	state := "nothing was changed"
	if r.did && !r.dryRun {
		state = "new containers will have another snapshotter"
	}
	return fmt.Errorf("%s, but %d containers have this one, and could not be removed without it: drain the node, remove what is left (crictl rmp --force), and uninstall again: %s: %w",
		state, len(using), list(using[:min(len(using), 3)]), errdefs.ErrFailedPrecondition)
}
