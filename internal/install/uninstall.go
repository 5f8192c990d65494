// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package install

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/client"
	"github.com/artifact-snapshotter/artifact-snapshotter/internal/containerdconfig"
)

// unmountTimeout is how long the daemon may take to unmount what containerd has deleted.
const unmountTimeout = 10 * time.Second

const (
	// waitInterval is how often uninstall asks whether the snapshotter is still used.
	waitInterval = 2 * time.Second
	// maxNames is how many names of pods a message has.
	maxNames = 5
)

func (r *run) uninstall(ctx context.Context) error {
	c, err := r.connect(ctx)
	if err != nil {
		return unchanged(err)
	}
	if c != nil {
		defer func() { _ = c.Close() }()
		using, err := c.Using(ctx)
		if err == nil {
			err = r.checkMain(c)
		}
		if err != nil {
			return unchanged(err)
		}
		if len(using) > 0 {
			return r.retire(ctx, c, using)
		}
	}
	changes, folders, err := r.removal(ctx)
	if err != nil {
		return unchanged(err)
	}
	changes = slices.DeleteFunc(changes, change.none)
	if err := writable(changes); err != nil {
		return unchanged(err)
	}
	if c == nil && (len(changes) > 0 || r.Service && exists(installedUnit)) && r.hasSnapshots() {
		return unchanged(fmt.Errorf("no containerd answers on %s, so containers may still use the snapshotter: start containerd, and uninstall again; if it cannot start because of %s.toml, remove that from its imports by hand: %w",
			r.Daemon.ContainerdAddress, program, errdefs.ErrUnavailable))
	}
	if c != nil && !r.DryRun {
		if err := r.forget(ctx, c); err != nil {
			return unchanged(err)
		}
	}
	if err := r.write(changes); err != nil {
		return err
	}
	for _, folder := range folders {
		if r.DryRun {
			r.reportf("would remove %s, if it is empty then", folder)
			continue
		}
		if unix.Rmdir(folder) != nil { // it is not empty
			break
		}
		r.reportf("removed %s", folder)
	}
	if err := r.finish(ctx, c, len(changes) > 0, ""); err != nil {
		return err
	}
	if !r.DryRun {
		if left, err := r.stillLoaded(ctx); err != nil || left {
			if left {
				r.reportf("uninstall again after containerd has been restarted, to remove the rest")
			}
			return err
		}
	}
	if r.Service {
		if err := r.removeService(ctx); err != nil {
			return err
		}
	}
	if r.did && !r.DryRun && exists(r.Daemon.Root) {
		r.reportf("%s stays: remove it with rm -rf", r.Daemon.Root)
	}
	return nil
}

// hasSnapshots reports whether the daemon has snapshots of images or containers.
func (r *run) hasSnapshots() bool {
	snapshots, _ := os.ReadDir(filepath.Join(r.Daemon.Root, "overlayfs", "snapshots"))
	return len(snapshots) > 0
}

// forget removes containerd's records of our snapshots while it has the snapshotter.
// After another installation it would take them for unpacked images. The daemon then
// unmounts them.
func (r *run) forget(ctx context.Context, c *running) error {
	loaded, err := c.loaded(ctx)
	if err != nil || loaded != r.Daemon.SocketAddress() {
		return err
	}
	removed, err := c.RemoveSnapshots(ctx)
	if removed > 0 {
		r.reportf("removed snapshots of images from containerd: %d", removed)
	}
	if err != nil {
		return err
	}
	dir := filepath.Join(r.Daemon.State, "mounts")
	for deadline := time.Now().Add(unmountTimeout); ; time.Sleep(100 * time.Millisecond) {
		left, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
		if err != nil || len(left) == 0 || ctx.Err() != nil {
			return errors.Join(err, ctx.Err())
		}
		if time.Now().After(deadline) {
			r.reportf("%d mounts are left in %s: umount %[2]s/*", len(left), dir)
			return nil
		}
	}
}

// stillLoaded reports whether the running containerd has the snapshotter and so needs the
// daemon.
func (r *run) stillLoaded(ctx context.Context) (bool, error) {
	c, err := r.connect(ctx)
	if err != nil || c == nil {
		return false, err
	}
	defer func() { _ = c.Close() }()
	loaded, err := c.loaded(ctx)
	return loaded == r.Daemon.SocketAddress(), err
}

// retire is what uninstall can do while containers use the snapshotter: new ones get the
// snapshotter that the node had before. Its error says what is left to do.
func (r *run) retire(ctx context.Context, c *running, using []client.User) error {
	changes, err := r.retirement()
	if err != nil {
		return unchanged(err)
	}
	changes = slices.DeleteFunc(changes, change.none)
	if err = r.write(changes); err == nil {
		err = r.finish(ctx, c, len(changes) > 0, r.Daemon.SocketAddress())
	}
	if err != nil {
		return err
	}
	state := "nothing was changed"
	if r.did && !r.DryRun {
		state = "new containers will use another snapshotter"
	}
	return &usedError{state, using}
}

// usedError says that containers use the snapshotter.
type usedError struct {
	state string
	users []client.User
}

func (e *usedError) Error() string {
	return fmt.Sprintf("%s, but %d containers use this one and could not be removed without it: drain the node, remove what is left (crictl rmp --force), and uninstall again: %s",
		e.state, len(e.users), e.names())
}

// names are those of some pods and containers.
func (e *usedError) names() string {
	var names []string
	for _, u := range e.users {
		if name := u.String(); !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	if len(names) > maxNames {
		names = append(names[:maxNames], fmt.Sprintf("and %d more", len(names)-maxNames))
	}
	return strings.Join(names, ", ")
}

func (*usedError) Unwrap() error { return errdefs.ErrFailedPrecondition }

// awaitUninstall uninstalls. With Wait it waits for the last container, and says for which; a dry
// run does not wait, since it does not take the snapshotter from new containers.
func (r *run) awaitUninstall(ctx context.Context) error {
	for said := ""; ; {
		err := r.uninstall(ctx)
		var used *usedError
		if !r.Wait || r.DryRun || !errors.As(err, &used) {
			return err
		}
		if names := used.names(); names != said {
			r.reportf("waiting until these are deleted, which use the snapshotter: %s", names)
			said = names
		}
		if err := r.leave(ctx, used.users); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(waitInterval):
		}
	}
}

// leave kills the sandbox of this process' own pod if it uses the snapshotter: uninstall would
// wait for itself. kubelet makes another one for the pod, without the snapshotter, which new
// containers do not get any more, and removes the old one.
func (r *run) leave(ctx context.Context, users []client.User) error {
	i := slices.IndexFunc(users, func(u client.User) bool { return u.UID != "" && u.UID == r.PodUID && u.Sandbox })
	if i < 0 {
		return nil
	}
	c, err := r.connect(ctx)
	if err != nil || c == nil {
		return err
	}
	defer func() { _ = c.Close() }()
	err = c.Kill(ctx, users[i])
	if errdefs.IsNotFound(err) { // an old sandbox, which kubelet has not removed yet
		return nil
	}
	r.reportf("this pod uses the snapshotter: it starts again without it")
	return err
}

// retirement takes the snapshotter from new containers, if it is that of the node.
// Containers of a runtime handler keep it.
func (r *run) retirement() ([]change, error) {
	d, err := containerdconfig.FindDropIn(r.main)
	if err != nil {
		return nil, fmt.Errorf("cannot read containerd's configuration: %w", err)
	}
	if node, _ := d.Scope(); !node {
		return nil, nil
	}
	drop, err := changed(d.Path, nil, 0o644)
	if err != nil || !ours(drop.before) {
		return nil, err
	}
	d.RemoveScope()
	if drop.after, err = dropInText(d, folderOf(drop)); err != nil {
		return nil, err
	}
	return []change{drop}, drop.writable()
}

// removal returns the changes of containerd's files in an order in which containerd can
// always start, and the folders that install has made, which go if they are empty then.
func (r *run) removal(ctx context.Context) (changes []change, folders []string, err error) {
	now, err := r.look(ctx)
	if err != nil {
		return nil, nil, err
	}
	defer now.close()
	main := now.main
	drop, err := changed(now.drop.Path, nil, 0)
	if err != nil {
		return nil, nil, err
	}
	_, theirs := now.read.Proxies[containerdconfig.Snapshotter]
	if theirs || drop.before != nil && !ours(drop.before) {
		where := r.main
		if !theirs {
			where = drop.path
		}
		return nil, nil, fmt.Errorf("%s, or a file that it imports, names the snapshotter and was not written by install: remove that by hand: %w", where, errdefs.ErrFailedPrecondition)
	}
	if made := folderOf(drop); drop.before != nil && made != "" {
		for dir := filepath.Dir(drop.path); strings.HasPrefix(dir+"/", made+"/"); dir = filepath.Dir(dir) {
			folders = append(folders, dir)
		}
	}
	backup, err := changed(r.main+backupSuffix, nil, 0)
	if err != nil {
		return nil, nil, err
	}
	backup.note = "the copy of " + r.main
	switch {
	case main.before == nil || bytes.Equal(main.before, mainText(drop.path)):
	case backup.before == nil: // we have not added the import
		main.after = main.before
	default:
		if edited, err := containerdconfig.AddImport(backup.before, drop.path); err == nil && bytes.Equal(main.before, edited) {
			main.after = backup.before
		} else if main.after, err = containerdconfig.RemoveImport(main.before, drop.path); err != nil {
			return nil, nil, fmt.Errorf("%s: %w; remove %q from its imports by hand", r.main, err, drop.path)
		}
	}
	return []change{main, drop, backup}, folders, nil
}
