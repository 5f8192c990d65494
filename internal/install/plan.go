// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package install

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/defaults"
	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/containerd/v2/version"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/deploy"
	"github.com/artifact-snapshotter/artifact-snapshotter/internal/containerdconfig"
	"github.com/artifact-snapshotter/artifact-snapshotter/internal/plain"
	"github.com/artifact-snapshotter/artifact-snapshotter/snapshot"
)

const (
	// installedUnit is the systemd unit of the daemon.
	installedUnit = "/etc/systemd/system/" + program + ".service"
	// backupSuffix is that of the copy of containerd's main file before it was changed.
	backupSuffix = ".before-" + program
	// header begins the files that install makes. It changes no others.
	header = "# Written by `" + program + " install`, which undoes edits; `" + program + " uninstall` removes it.\n"
	// folderComment begins the line of the drop-in that names the outermost folder that
	// install has made for it. No package makes the folder that containerd's default
	// configuration imports, nor do k3s and RKE2.
	folderComment = "# Uninstall also removes this folder, if it is empty then: "
)

// ours reports whether install has written the file.
func ours(text []byte) bool { return strings.HasPrefix(string(text), header) }

// mainText is containerd's main file if install makes it.
func mainText(drop string) []byte {
	return fmt.Appendf(nil, "%sversion = 3\nimports = [%q]\n", header, drop)
}

// dropInText is the drop-in with its tables. folder is the outermost one that install
// makes for it, "" if none.
func dropInText(d containerdconfig.DropIn, folder string) ([]byte, error) {
	tables, err := d.TOML()
	if folder != "" {
		folder = folderComment + folder + "\n"
	}
	return []byte(header + folder + tables), err
}

// folderOf returns the outermost folder that install has made for the drop-in, or has to
// make; "" if none.
func folderOf(drop change) string {
	made := ""
	if drop.before == nil {
		for dir := filepath.Dir(drop.path); !exists(dir); dir = filepath.Dir(dir) {
			made = dir
		}
	}
	for line := range strings.Lines(string(drop.before)) {
		if dir, ok := strings.CutPrefix(strings.TrimSpace(line), folderComment); ok {
			made = dir
		}
	}
	return made
}

// plainPath matches what can stand in a unit without quotes.
var plainPath = regexp.MustCompile(`^/[\w/.@+,:-]*$`)

// serviceChanges are the files of the service. theirs are the options of containerd's own
// overlayfs, which the daemon adopts.
func (r *run) serviceChanges(theirs snapshot.Overlayfs) (changes []change, err error) {
	for _, path := range []string{r.Binary, r.configFile} {
		if path != "" && !plainPath.MatchString(path) {
			return nil, fmt.Errorf("a systemd unit cannot contain the path %q: use only letters, digits and /._@+,:-: %w", path, errdefs.ErrInvalidArgument)
		}
	}
	unit := deploy.Unit
	exec := "ExecStart=" + deploy.UnitBinary + " serve"
	if !strings.Contains(unit, exec+"\n") {
		return nil, errors.New("the unit has another ExecStart=")
	}
	start := "ExecStart=" + r.Binary + " serve"
	if r.configFile != "" {
		start += " --config " + r.configFile
	}
	unit = strings.Replace(unit, exec+"\n", start+"\n", 1)
	if r.Daemon.CSI.Enabled { // it pulls from registries
		unit = strings.Replace(unit, "IPAddressAllow=localhost\n", "IPAddressAllow=any\n", 1)
	}
	binary, err := changed(r.Binary, r.program, 0o755)
	if err != nil {
		return nil, err
	}
	binary.note = "a program of " + plain.Size(int64(len(r.program)))
	service, err := changed(installedUnit, []byte(unit), 0o644)
	if err != nil {
		return nil, err
	}
	config, err := r.configChange(theirs)
	return []change{binary, service, config}, err
}

// current are containerd's files before a change.
type current struct {
	main change
	drop containerdconfig.DropIn
	// read is what the files say without the drop-in.
	read *containerdconfig.Config
	// earlier and later are these files: containerd merges the earlier ones before the
	// drop-in, and the later ones after it.
	earlier, later []string
	close          func()
}

// look reads containerd's files.
func (r *run) look(ctx context.Context) (c *current, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("cannot read containerd's configuration: %w", err)
		}
	}()
	c = &current{close: func() {}}
	if c.main, err = changed(r.main, nil, 0o644); err != nil {
		return nil, err
	}
	if c.drop, err = containerdconfig.FindDropIn(r.main); err != nil {
		return nil, err
	}
	switch v := c.drop.Main.Version; {
	case strings.Contains(c.drop.Path, "*"):
		return nil, fmt.Errorf("containerd reads the * in %s as a pattern: %w", c.drop.Path, errdefs.ErrInvalidArgument)
	case v < 0 || v > version.ConfigVersion:
		return nil, fmt.Errorf("%s is of version %d, which this program does not know: %w", r.main, v, errdefs.ErrInvalidArgument)
	case c.main.before != nil:
		// Its errors name the files.
		if _, err := containerdconfig.Read(ctx, r.main); err != nil {
			return nil, err
		}
		text, err := containerdconfig.WithoutImports(c.main.before)
		if err != nil {
			return nil, err
		}
		without, err := inMemory(text)
		if err != nil {
			return nil, err
		}
		c.close = func() { _ = without.Close() }
		before, after, err := c.drop.Others(r.main)
		if err != nil {
			return nil, err
		}
		c.earlier, c.later = append([]string{pathOf(without)}, before...), after
	}
	c.read, err = containerdconfig.Read(ctx, slices.Concat(c.earlier, c.later)...)
	return c, err
}

// containerdChanges are the changes of containerd's files in an order in which containerd
// can always start.
func (r *run) containerdChanges(ctx context.Context, now *current) ([]change, error) {
	main, d := now.main, now.drop
	drop, err := changed(d.Path, nil, 0o644)
	if err != nil {
		return nil, err
	}
	foreign := drop.before != nil && !ours(drop.before)
	if foreign || !d.Imported && containerdconfig.Generated(main.before) {
		switch missing := r.checkEffect(ctx, r.main); {
		case missing == nil && main.before != nil: // somebody has done it by hand
			return nil, nil
		case foreign:
			return nil, errdefs.ErrAlreadyExists.WithMessage(fmt.Sprintf("%s was not written by install, which would replace it: move it away", d.Path))
		default:
			return nil, r.templateError()
		}
	}
	if err := r.checkNames(now.read, d); err != nil {
		return nil, err
	}
	if drop.after, err = r.dropIn(now.read, d, folderOf(drop)); err != nil {
		return nil, err
	}
	changes := []change{drop}
	switch {
	case d.Imported:
	case main.before == nil:
		main.after = mainText(d.Path)
		changes = append(changes, main)
	default:
		if main.after, err = containerdconfig.AddImport(main.before, d.Path); err != nil {
			return nil, fmt.Errorf("%s: %w; add %q to its imports by hand", r.main, err, d.Path)
		}
		backup, err := changed(r.main+backupSuffix, main.before, 0)
		if err != nil {
			return nil, err
		}
		backup.owner = main.owner // it may contain passwords
		backup.note = "a copy of " + r.main
		changes = append(changes, backup, main)
	}
	f, err := inMemory(drop.after)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return changes, r.checkEffect(ctx, slices.Concat(now.earlier, []string{pathOf(f)}, now.later)...)
}

// templateError says what to do where k3s or RKE2 generate a file without imports, as
// releases before 2026 do. Tables of their base template must not be repeated.
func (r *run) templateError() error {
	if r.Handler == "" {
		return fmt.Errorf("%s is generated whenever its service starts, and imports nothing: use --scope %s, or a release of k3s or RKE2 whose file has imports: %w", r.main, ScopeHandler, errdefs.ErrFailedPrecondition)
	}
	return fmt.Errorf("%s is generated whenever its service starts, and imports nothing: write {{ template \"base\" . }} into config-v3.toml.tmpl beside it, then what `%s config containerd --scope %s --runtime-handler %s` prints except the version, and restart the service; or use a release of k3s or RKE2 whose file has imports: %w",
		r.main, program, ScopeHandler, r.Handler, errdefs.ErrFailedPrecondition)
}

// checkNames checks that nobody else uses our names, according to the files without the
// drop-in, and that the drop-in has no other scope.
func (r *run) checkNames(read *containerdconfig.Config, d containerdconfig.DropIn) error {
	for name, kinds := range map[string][]string{
		containerdconfig.Snapshotter: {"snapshot", string(plugins.SnapshotPlugin)},
		containerdconfig.Differ:      {"diff", string(plugins.DiffPlugin)},
	} {
		p, ok := read.Proxies[name]
		if ok && (!slices.Contains(kinds, p.Type) || containerdconfig.Socket(p.Address) != r.Daemon.SocketAddress()) {
			return errdefs.ErrAlreadyExists.WithMessage(fmt.Sprintf("containerd already has another plugin called %s (type %q, address %q; the daemon's is %q): remove [proxy_plugins.%[1]s] from %[5]s or from what it imports, or give the daemon that address",
				name, p.Type, p.Address, r.Daemon.SocketAddress(), r.main))
		}
	}
	node, handlers := d.Scope()
	handlers = slices.DeleteFunc(handlers, func(handler string) bool {
		return handler == r.Handler || node && handler == read.DefaultHandler
	})
	// Pods that run use it and would be lost.
	switch {
	case len(handlers) > 0:
		return fmt.Errorf("it is installed for the runtime handler %s: use --scope %s --runtime-handler %[1]s, or `%[3]s uninstall` first: %[4]w", strings.Join(handlers, ", "), ScopeHandler, program, errdefs.ErrFailedPrecondition)
	case r.Handler != "" && node:
		return fmt.Errorf("it is installed for all pods of the node: use --scope %s, or `%s uninstall` first: %w", ScopeNode, program, errdefs.ErrFailedPrecondition)
	case r.Handler != "":
		if table, ok := read.Runtimes[r.Handler].(map[string]any); ok && table["snapshotter"] != containerdconfig.Snapshotter {
			return errdefs.ErrAlreadyExists.WithMessage(fmt.Sprintf("containerd already has a runtime handler %s: choose another name with --runtime-handler, or set its snapshotter to %q by hand", r.Handler, containerdconfig.Snapshotter))
		}
		return nil
	}
	known := []string{"", defaults.DefaultSnapshotter, containerdconfig.Snapshotter}
	for whose, snapshotter := range map[string]string{"the node": read.NodeSnapshotter, "its default runtime handler " + read.DefaultHandler: read.OtherHandlers()[read.DefaultHandler]} {
		if !slices.Contains(known, snapshotter) {
			return errdefs.ErrAlreadyExists.WithMessage(fmt.Sprintf("the snapshotter of %s is %s, which pods would lose: use --scope %s, or set it to %q by hand", whose, snapshotter, ScopeHandler, containerdconfig.Snapshotter))
		}
	}
	return nil
}

// dropIn is the text of the drop-in.
func (r *run) dropIn(read *containerdconfig.Config, d containerdconfig.DropIn, folder string) ([]byte, error) {
	needed, err := containerdconfig.Needs{Daemon: r.Daemon, MapsOwners: snapshot.MapsOwners()}.Tables()
	if err != nil {
		return nil, err
	}
	d.Tables = map[string]any{"version": int64(3), "proxy_plugins": needed["proxy_plugins"]}
	usual, ok := read.Runtimes[read.DefaultHandler].(map[string]any)
	if !ok {
		usual = map[string]any{"runtime_type": "io.containerd.runc.v2"}
	}
	images, runtimes := []string{"plugins", containerdconfig.CRIImages}, []string{"plugins", containerdconfig.CRIRuntime, "containerd", "runtimes"}
	if d.Main.Exists && d.Main.Version < 3 { // all files must have one version (docs/install.md)
		d.Set(int64(d.Main.Version), "version")
		images = []string{"plugins", containerdconfig.CRIVersion2, "containerd"}
		runtimes = slices.Concat(images, []string{"runtimes"})
		if r.Handler == "" { // containerd ignores the snapshotter if there is no runtime
			d.Set(usual, append(runtimes, read.DefaultHandler)...)
		}
	}
	if r.Handler == "" {
		d.Set(containerdconfig.Snapshotter, append(images, "snapshotter")...)
		if other := read.OtherHandlers()[read.DefaultHandler]; other != "" {
			d.Set(containerdconfig.Snapshotter, append(runtimes, read.DefaultHandler, "snapshotter")...)
		}
	} else {
		handler := maps.Clone(usual)
		handler["snapshotter"] = containerdconfig.Snapshotter
		d.Set(handler, append(runtimes, r.Handler)...)
	}
	d.Set(read.CompleteUnpack(needed), "plugins", containerdconfig.Transfer, "unpack_config")
	return dropInText(d, folder)
}

// inMemory returns a file that leaves nothing behind, even if the process is killed.
func inMemory(text []byte) (*os.File, error) {
	fd, err := unix.MemfdCreate(program, unix.MFD_CLOEXEC)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), program)
	if _, err := f.Write(text); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// pathOf is where a file of inMemory can be read.
func pathOf(f *os.File) string { return fmt.Sprintf("/proc/self/fd/%d", f.Fd()) }

// checkEffect reads the files as containerd does, and returns an error if it would not have
// the snapshotter.
func (r *run) checkEffect(ctx context.Context, files ...string) error {
	read, err := containerdconfig.Read(ctx, files...)
	if err != nil {
		return fmt.Errorf("containerd could not read it: %w", err)
	}
	const ours = containerdconfig.Snapshotter
	unpacks, _ := read.Unpacks()
	var missing string
	switch {
	case containerdconfig.Socket(read.Proxies[ours].Address) != r.Daemon.SocketAddress():
		missing = "proxy_plugins." + ours
	case r.Handler == "" && (read.NodeSnapshotter != ours || read.OtherHandlers()[read.DefaultHandler] != ""):
		missing = "the snapshotter of the node"
	case r.Handler != "" && !slices.Contains(read.Handlers(), r.Handler):
		missing = "the runtime handler " + r.Handler
	case r.Handler != "" && read.NodeSnapshotter == ours:
		missing = "the snapshotter of the node, which is not to change,"
	case !slices.Contains(unpacks, ours) || !slices.Contains(unpacks, read.NodeSnapshotter):
		missing = "unpack_config"
	default:
		return nil
	}
	return fmt.Errorf("%s is overruled by %s or a file that it imports: find the one that says something else (containerd config dump), and change it: %w", missing, r.main, errdefs.ErrFailedPrecondition)
}
