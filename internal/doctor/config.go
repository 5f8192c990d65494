// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"path/filepath"
	"reflect"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/defaults"
	"github.com/containerd/containerd/v2/plugins"
	containerdplugin "github.com/containerd/plugin"

	"github.com/artifact-snapshotter/artifact-snapshotter/internal/containerdconfig"
	"github.com/artifact-snapshotter/artifact-snapshotter/snapshot"
)

// ConfigFacts are the facts about containerd's configuration.
type ConfigFacts struct {
	File        string     `json:"file"`
	Snapshotter ProxyFacts `json:"snapshotter"`
	Differ      ProxyFacts `json:"differ"`
	// Node is the snapshotter of pods whose runtime handler names none, and Handlers are
	// the runtime handlers that name ours.
	Node     string   `json:"node_snapshotter"`
	Handlers []string `json:"runtime_handlers"`
	// OtherHandlers are the runtime handlers that name another snapshotter.
	OtherHandlers map[string]string `json:"other_handlers"`
	// Unpack are the snapshotters for which containerd pulls images. For those in
	// UnpackLate it unpacks a container image only when it creates a container.
	Unpack     []string `json:"unpack_config"`
	UnpackLate []string `json:"unpack_at_creation"`
	// Capabilities are those that the configuration gives the snapshotter.
	Capabilities []string `json:"capabilities"`
}

// ProxyFacts are the sockets of a proxy plugin, "" if there is none.
type ProxyFacts struct {
	Configured string `json:"configured"`
	// Loaded is that of the running containerd, or containerdconfig.CompiledIn.
	Loaded string `json:"loaded"`
}

// describe sets the text and the table.
func (e *configCheck) describe() {
	f := e.facts
	e.Facts, e.Text, e.Table = f, nil, nil
	e.sayf("%s and what it imports", f.File)
	e.row("PLUGIN", "CONFIGURED", "LOADED")
	e.row("snapshotter", cmp.Or(f.Snapshotter.Configured, "-"), cmp.Or(f.Snapshotter.Loaded, "-"))
	e.row("differ", cmp.Or(f.Differ.Configured, "-"), cmp.Or(f.Differ.Loaded, "-"))
	switch {
	case f.Node == containerdconfig.Snapshotter && len(f.OtherHandlers) > 0:
		var others []string
		for _, handler := range slices.Sorted(maps.Keys(f.OtherHandlers)) {
			others = append(others, fmt.Sprintf("%s (%s)", handler, f.OtherHandlers[handler]))
		}
		e.sayf("all pods of the node use the snapshotter, except those of these runtime handlers: %s", list(others))
	case f.Node == containerdconfig.Snapshotter:
		e.sayf("all pods of the node use the snapshotter")
	case len(f.Handlers) > 0:
		e.sayf("pods of these runtime handlers use the snapshotter: %s; all others use %s", list(f.Handlers), f.Node)
	default:
		e.sayf("no pod uses the snapshotter; all use %s", f.Node)
	}
	e.sayf("images can be pulled for: %s", list(f.Unpack))
	if len(f.UnpackLate) > 0 {
		e.sayf("container images are unpacked for their first container, not when they are pulled, for: %s", list(f.UnpackLate))
	}
}

// configCheck is a check of containerd's configuration in progress.
type configCheck struct {
	Finding
	Node
	facts ConfigFacts
	read  *containerdconfig.Config
	// unread says that read includes the drop-in although containerd does not read it.
	unread bool
	drop   containerdconfig.DropIn
	needed map[string]any
	// mapsOwners is snapshot.MapsOwners.
	mapsOwners bool
	gains      []string // of what is added to drop
}

// checkContainerdConfig reads containerd's configuration, and asks containerd what it has
// loaded.
func checkContainerdConfig(ctx context.Context, n Node) Finding {
	e := newConfigCheck(n)
	if err := e.run(ctx); err != nil {
		return failed(err)
	}
	return e.Finding
}

func newConfigCheck(n Node) *configCheck {
	return &configCheck{Node: n, mapsOwners: snapshot.MapsOwners(), facts: ConfigFacts{
		File: n.ContainerdConfig, Handlers: []string{}, OtherHandlers: map[string]string{}, Unpack: []string{}, UnpackLate: []string{},
		Capabilities: []string{},
	}}
}

func (e *configCheck) run(ctx context.Context) error {
	older := true
	if e.Unanswered != nil {
		e.Unknown = "what containerd has loaded of it: " + noContainerd
	} else {
		if err := e.askLoaded(ctx); err != nil {
			return err
		}
		version, err := e.Containerd.Version(ctx)
		if err != nil {
			return err
		}
		major, minor, err := majorMinor(version.Version)
		older = err != nil || major == 2 && minor < 3
	}
	return e.checkFiles(ctx, older)
}

// checkFiles reads the configuration. older says that containerd is older than 2.3, or
// may be.
func (e *configCheck) checkFiles(ctx context.Context, older bool) (err error) {
	if e.drop, err = containerdconfig.FindDropIn(e.ContainerdConfig); err != nil {
		return err
	}
	files := []string{e.ContainerdConfig}
	if !e.drop.Main.Exists {
		if e.Unanswered != nil || e.facts.Snapshotter.Loaded != "" {
			e.Facts, e.Text = e.facts, []string{notExamined}
			e.Unknown = e.ContainerdConfig + " does not exist"
			e.advise("give doctor the file that containerd reads (--containerd-config)", "doctor checks it")
			return nil
		}
		files = nil
	}
	if e.read, err = containerdconfig.Read(ctx, files...); err != nil {
		return err
	}
	e.facts.Snapshotter.Configured = containerdconfig.Socket(e.read.Proxies[containerdconfig.Snapshotter].Address)
	e.facts.Differ.Configured = containerdconfig.Socket(e.read.Proxies[containerdconfig.Differ].Address)
	e.facts.Node, e.facts.Handlers, e.facts.OtherHandlers = e.read.NodeSnapshotter, e.read.Handlers(), e.read.OtherHandlers()
	e.facts.Unpack, e.facts.UnpackLate = e.read.Unpacks()
	e.describe()
	if e.drop.Exists && !e.drop.Imported && e.facts.Snapshotter == (ProxyFacts{}) {
		e.unread = true
		if e.read, err = containerdconfig.Read(ctx, append(files, e.drop.Path)...); err != nil {
			return err
		}
	}
	if e.needed, err = (containerdconfig.Needs{Daemon: e.Config, MapsOwners: e.mapsOwners}).Tables(); err != nil {
		return err
	}
	e.checkSnapshotter()
	e.checkScope()
	e.checkUnpack()
	e.checkDiffer()
	if err := e.checkOverlayfs(); err != nil {
		return err
	}
	return e.conclude(older)
}

// askLoaded asks containerd which of our plugins it has loaded.
func (e *configCheck) askLoaded(ctx context.Context) error {
	for _, ask := range []struct {
		kind containerdplugin.Type
		id   string // of the proxy plugin; a compiled-in differ is called "artifact", too
		into *string
	}{
		{plugins.SnapshotPlugin, containerdconfig.Snapshotter, &e.facts.Snapshotter.Loaded},
		{plugins.DiffPlugin, containerdconfig.Differ, &e.facts.Differ.Loaded},
		{plugins.DiffPlugin, containerdconfig.Snapshotter, &e.facts.Differ.Loaded},
	} {
		loaded, err := containerdconfig.LoadedAddress(ctx, e.Containerd.Client, ask.kind, ask.id)
		if err != nil {
			return err
		}
		*ask.into = cmp.Or(*ask.into, loaded)
	}
	for _, id := range []string{containerdconfig.CRIImages, containerdconfig.Transfer} {
		dot := strings.LastIndex(id, ".")
		found, err := containerdconfig.Loaded(ctx, e.Containerd.Client, containerdplugin.Type(id[:dot]), id[dot+1:])
		if err != nil {
			return err
		}
		if found != nil && found.InitErr != nil {
			e.problemf("containerd's plugin %s does not start: %s", id, found.InitErr.GetMessage())
		}
	}
	return nil
}

// checkSnapshotter checks [proxy_plugins.artifact].
func (e *configCheck) checkSnapshotter() {
	const name = containerdconfig.Snapshotter
	proxy, ok := e.read.Proxies[name]
	address := containerdconfig.Socket(proxy.Address)
	switch loaded := e.facts.Snapshotter.Loaded; {
	case loaded == containerdconfig.CompiledIn:
		return
	case !ok && loaded != "":
		e.advise("give doctor the file that containerd reads (--containerd-config), if this is another one", "doctor checks it")
		e.addProxy(name, "containerd still has the snapshotter after its next start")
	case !ok:
		e.problemf("containerd does not have the snapshotter")
		e.addProxy(name, "containerd has the snapshotter")
	case !slices.Contains([]string{"snapshot", string(plugins.SnapshotPlugin)}, proxy.Type):
		e.problemf("the proxy plugin %s has the type %q", name, proxy.Type)
		e.addProxy(name, "it is a snapshotter")
	case address != e.SocketAddress():
		e.problemf("containerd expects the daemon at %s, but it serves on %s", address, e.SocketAddress())
		e.addProxy(name, "containerd reaches the daemon")
	case e.unread:
		e.problemf("containerd does not have the snapshotter: %s does not import %s", e.ContainerdConfig, e.drop.Path)
	case e.Unanswered == nil && loaded != address:
		e.problemf("containerd has not read this configuration since it changed")
		e.advise("restart containerd", "containerd has the snapshotter")
	}
	if ok {
		e.checkCapabilities(proxy.Capabilities)
	}
}

// checkCapabilities checks whether the configuration gives the snapshotter the capabilities
// for user namespaces that the kernel has.
func (e *configCheck) checkCapabilities(configured []string) {
	const name = containerdconfig.Snapshotter
	e.facts.Capabilities = append(e.facts.Capabilities, configured...)
	e.Facts = e.facts
	maps, copies := slices.Contains(configured, snapshot.RemapIDs), !slices.Contains(configured, snapshot.OnlyRemapIDs)
	switch {
	case e.mapsOwners && !maps && copies:
		e.addProxy(name, "the root filesystems of pods with a user namespace are not copied")
	case e.mapsOwners && !maps:
		e.addProxy(name, "pods with a user namespace start")
	case e.mapsOwners:
	case maps:
		e.problemf("the configuration says that owners are mapped for user namespaces (%s), which this kernel cannot do (it takes Linux 5.19): pods with hostUsers: false do not start", snapshot.RemapIDs)
		e.addProxy(name, "containerd does what slow_chown says for these pods")
	case copies && !e.Overlayfs.SlowChown:
		e.addProxy(name, "containerd refuses pods with a user namespace and does not copy their root filesystems, as slow_chown = false says")
	case !copies && e.Overlayfs.SlowChown:
		e.addProxy(name, "pods with a user namespace start with a copy of their root filesystem, as slow_chown = true says")
	}
}

// checkOverlayfs looks for options of containerd's own overlayfs that the daemon lacks.
func (e *configCheck) checkOverlayfs() error {
	both := e.Overlayfs.With(e.read.Overlayfs)
	if both.Equal(e.Overlayfs) || !e.read.ServesPods() || e.facts.Snapshotter.Loaded == containerdconfig.CompiledIn {
		return nil
	}
	lines, err := containerdconfig.OverlayfsTable(both)
	e.Advice = append(e.Advice, Advice{
		Do:    fmt.Sprintf("write this into %s, in place of its [overlayfs] if it has one, and restart the daemon", e.ConfigFile),
		Gain:  "images and containers have the same options as with containerd's own overlayfs",
		Lines: lines,
	})
	return err
}

// checkScope checks whether any pod uses the snapshotter.
func (e *configCheck) checkScope() {
	if e.read.ServesPods() {
		return
	}
	e.problemf("no pod uses the snapshotter, and image volumes of artifacts are empty directories")
	if e.read.NodeSnapshotter != containerdconfig.Snapshotter {
		e.add(containerdconfig.Snapshotter, "pods see artifacts (for one runtime handler only, write what `artifact-snapshotter config containerd` prints)",
			"plugins", containerdconfig.CRIImages, "snapshotter")
	}
	handler := e.read.DefaultHandler
	if e.read.OtherHandlers()[handler] != "" {
		e.add(containerdconfig.Snapshotter, "pods of the runtime handler "+handler+" see artifacts",
			"plugins", containerdconfig.CRIRuntime, "containerd", "runtimes", handler, "snapshotter")
	}
}

// checkUnpack checks whether unpack_config lists the snapshotters of the node.
func (e *configCheck) checkUnpack() {
	unpacks, _ := e.read.Unpacks()
	missing := slices.DeleteFunc([]string{defaults.DefaultSnapshotter, containerdconfig.Snapshotter}, func(snapshotter string) bool {
		return slices.Contains(unpacks, snapshotter)
	})
	if node := e.read.NodeSnapshotter; slices.Contains(missing, node) {
		e.problemf("unpack_config does not list %s, the snapshotter of the node: no image can be pulled", node)
	}
	if len(missing) > 0 {
		e.add(e.read.CompleteUnpack(e.needed), "images can be pulled for "+strings.Join(missing, " and "), "plugins", containerdconfig.Transfer, "unpack_config")
	}
}

// checkDiffer checks [proxy_plugins.artifact-diff], which only containerd's own unpacker
// needs.
func (e *configCheck) checkDiffer() {
	const name = containerdconfig.Differ
	if e.facts.Differ.Loaded == containerdconfig.CompiledIn {
		return
	}
	proxy, ok := e.read.Proxies[name]
	address := containerdconfig.Socket(proxy.Address)
	switch {
	case !ok:
		if slices.ContainsFunc(e.read.Unpack, func(u containerdconfig.UnpackEntry) bool { return u.Differ == name && !u.Optional }) {
			e.problemf("unpack_config names the differ %s, which containerd does not have: no image can be pulled", name)
		}
		e.addProxy(name, "containerd's own unpacker can unpack artifacts (docs/native-unpack.md)")
	case proxy.Type != "diff" && proxy.Type != string(plugins.DiffPlugin):
		e.problemf("the proxy plugin %s has the type %q", name, proxy.Type)
		e.addProxy(name, "it is a differ")
	case address != e.SocketAddress():
		e.problemf("containerd expects the differ at %s, but the daemon serves on %s", address, e.SocketAddress())
		e.addProxy(name, "containerd reaches the differ")
	case !e.unread && e.Unanswered == nil && e.facts.Differ.Loaded != address:
		e.advise("restart containerd", "containerd has the differ")
	}
}

// add adds a value to the drop-in.
func (e *configCheck) add(value any, gain string, keys ...string) {
	e.drop.Set(value, keys...)
	e.gains = append(e.gains, gain)
}

// addProxy adds a table of proxy_plugins.
func (e *configCheck) addProxy(name, gain string) {
	e.add(containerdconfig.Table(e.needed, "proxy_plugins")[name], gain, "proxy_plugins", name)
}

// conclude advises how to add what is missing.
func (e *configCheck) conclude(older bool) error {
	write := len(e.gains) > 0 || e.unread
	if older && e.drop.Main.Version == 2 && (write || e.isNewer() && e.Unanswered == nil) {
		e.adviseMigration()
		return nil
	}
	if !write {
		return nil
	}
	const restart = ", and restart containerd"
	gain := strings.Join(e.gains, ", ")
	if !reflect.DeepEqual(e.drop.Before, e.drop.Tables) {
		lines, err := e.drop.TOML()
		if err != nil {
			return err
		}
		do := "write this into " + e.drop.Path
		if e.drop.Exists {
			do += ", in place of its contents"
		}
		if e.drop.Imported { // otherwise more is to be written
			do += restart
		}
		e.Advice = append(e.Advice, Advice{Do: do, Gain: gain, Lines: lines})
	} else if e.drop.Imported {
		e.advise(fmt.Sprintf("find the file imported after %s that says something else (containerd config dump), and change it%s", e.drop.Path, restart), gain)
	}
	if e.drop.Imported {
		return nil
	}
	main := e.ContainerdConfig
	var quoted []string
	for _, pattern := range append(slices.Clone(e.drop.Main.Imports), filepath.Join(filepath.Dir(e.drop.Path), "*.toml")) {
		quoted = append(quoted, fmt.Sprintf("%q", pattern))
	}
	add := Advice{Do: "add this at the top of " + main + restart, Gain: "containerd reads " + e.drop.Path, Lines: fmt.Sprintf("imports = [%s]\n", strings.Join(quoted, ", "))}
	switch {
	case !e.drop.Main.Exists:
		add.Do = "write this into " + main + restart
		add.Lines = "version = 3\n" + add.Lines
	case e.drop.Main.Imports != nil:
		add.Do = "write this in place of the imports in " + main + restart
	}
	e.Advice = append(e.Advice, add)
	return nil
}

// isNewer reports whether the main file imports a drop-in of a newer version than its own.
func (e *configCheck) isNewer() bool {
	version, _ := e.drop.Before["version"].(int64)
	return e.drop.Imported && version > int64(e.drop.Main.Version)
}

// adviseMigration advises to migrate the main file to version 3 before it imports a file of
// that version: containerd before 2.3 migrates both as one. What else is missing depends
// on the result.
func (e *configCheck) adviseMigration() {
	command := fmt.Sprintf("containerd --config %[1]s config migrate > %[1]s.new && mv %[1]s.new %[1]s", e.ContainerdConfig)
	if e.isNewer() { // the command must not import it
		command = fmt.Sprintf("mv %[1]s %[1]s.off && %[2]s && mv %[1]s.off %[1]s", e.drop.Path, command)
	}
	e.advise(fmt.Sprintf("run `%s`, restart containerd, and run doctor again", command),
		"containerd 2.1 and 2.2 read the file's CRI options, which they ignore in a file of version 2 that imports a newer one")
}
