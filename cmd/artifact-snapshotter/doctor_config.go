// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/defaults"
	"github.com/containerd/containerd/v2/plugins"
	containerdplugin "github.com/containerd/plugin"
	"github.com/pelletier/go-toml/v2"

	"github.com/artifact-snapshotter/artifact-snapshotter/snapshot"
)

// compiledIn is the address of a plugin that is part of containerd.
const compiledIn = "compiled in"

// configFacts are the facts of checkContainerdConfig.
type configFacts struct {
	File        string     `json:"file"`
	Snapshotter proxyFacts `json:"snapshotter"`
	Differ      proxyFacts `json:"differ"`
	// Node is the snapshotter of pods whose runtime handler names none, and Handlers
	// are those that name this one.
	Node     string   `json:"node_snapshotter"`
	Handlers []string `json:"runtime_handlers"`
	// OtherHandlers are the runtime handlers that name another snapshotter.
	OtherHandlers map[string]string `json:"other_handlers"`
	// Unpack are the snapshotters for which containerd pulls images, and UnpackLate
	// those of them for which it unpacks an ordinary image when it creates a container.
	Unpack     []string `json:"unpack_config"`
	UnpackLate []string `json:"unpack_at_creation"`
	// Capabilities are those that containerd is told the snapshotter has.
	Capabilities []string `json:"capabilities"`
}

// proxyFacts are the sockets of a proxy plugin, "" if there is none.
type proxyFacts struct {
	Configured string `json:"configured"`
	// Loaded is what the running containerd has, and may be compiledIn.
	Loaded string `json:"loaded"`
}

func (f configFacts) text() string {
	var text strings.Builder
	fmt.Fprintf(&text, "%s and what it imports\n", f.File)
	fmt.Fprintln(&text, "PLUGIN\tCONFIGURED\tLOADED")
	fmt.Fprintf(&text, "snapshotter\t%s\t%s\n", cmp.Or(f.Snapshotter.Configured, "-"), cmp.Or(f.Snapshotter.Loaded, "-"))
	fmt.Fprintf(&text, "differ\t%s\t%s\n", cmp.Or(f.Differ.Configured, "-"), cmp.Or(f.Differ.Loaded, "-"))
	switch {
	case f.Node == proxyName && len(f.OtherHandlers) > 0:
		var others []string
		for _, handler := range slices.Sorted(maps.Keys(f.OtherHandlers)) {
			others = append(others, fmt.Sprintf("%s (%s)", handler, f.OtherHandlers[handler]))
		}
		fmt.Fprintf(&text, "every pod of the node has the snapshotter, but not those of these runtime handlers: %s\n", list(others))
	case f.Node == proxyName:
		fmt.Fprintln(&text, "every pod of the node has the snapshotter")
	case len(f.Handlers) > 0:
		fmt.Fprintf(&text, "pods of these runtime handlers have the snapshotter: %s; all others have %s\n", list(f.Handlers), f.Node)
	default:
		fmt.Fprintf(&text, "no pod has the snapshotter; all have %s\n", f.Node)
	}
	fmt.Fprintf(&text, "images can be pulled for: %s\n", list(f.Unpack))
	if len(f.UnpackLate) > 0 {
		fmt.Fprintf(&text, "ordinary images are not unpacked when they are pulled, but for their first container, for: %s\n", list(f.UnpackLate))
	}
	return text.String()
}

// configExam is a check of containerd's configuration under way.
type configExam struct {
	finding
	patient
	facts configFacts
	read  *runtimeConfig
	// unread says that read has the drop-in, too, which containerd does not read.
	unread bool
	drop   dropIn
	ours   map[string]any // what `config containerd` prints
	// mapsOwners says whether the kernel can map the owners of layers.
	mapsOwners bool
	gains      []string // of what was added to drop
}

// checkContainerdConfig reads containerd's configuration, and asks containerd what
// it has loaded of it.
func checkContainerdConfig(ctx context.Context, p patient) finding {
	e := newConfigExam(p)
	if err := e.examine(ctx); err != nil {
		return failed(err)
	}
	return e.finding
}

func newConfigExam(p patient) *configExam {
	return &configExam{patient: p, mapsOwners: snapshot.MapsOwners(), facts: configFacts{
		File: p.containerdConfig, Handlers: []string{}, OtherHandlers: map[string]string{}, Unpack: []string{}, UnpackLate: []string{},
		Capabilities: []string{},
	}}
}

func (e *configExam) examine(ctx context.Context) error {
	older := true
	if e.unanswered != nil {
		e.Unknown = "what of it containerd has loaded: " + noContainerd
	} else {
		if err := e.askLoaded(ctx); err != nil {
			return err
		}
		version, err := e.containerd.Version(ctx)
		if err != nil {
			return err
		}
		major, minor, err := majorMinor(version.Version)
		older = err != nil || major == 2 && minor < 3
	}
	return e.examineFiles(ctx, older)
}

// examineFiles reads the configuration; older says whether containerd is, or may be,
// older than 2.3.
func (e *configExam) examineFiles(ctx context.Context, older bool) (err error) {
	if e.drop, err = findDropIn(e.containerdConfig); err != nil {
		return err
	}
	files := []string{e.containerdConfig}
	if !e.drop.main.exists {
		if e.unanswered != nil || e.facts.Snapshotter.Loaded != "" {
			e.Facts, e.text = e.facts, notLookedAt
			e.Unknown = e.containerdConfig + " is not there"
			e.advise("give doctor the file that containerd reads (--containerd-config)", "it is checked")
			return nil
		}
		files = nil
	}
	if e.read, err = readRuntimeConfig(ctx, files...); err != nil {
		return err
	}
	e.facts.Snapshotter.Configured = socketOf(e.read.proxies[proxyName].Address)
	e.facts.Differ.Configured = socketOf(e.read.proxies[diffName].Address)
	e.facts.Node, e.facts.Handlers, e.facts.OtherHandlers = e.read.images.Snapshotter, e.read.handlers(), e.read.otherHandlers()
	e.facts.Unpack, e.facts.UnpackLate = e.read.unpacks()
	e.Facts, e.text = e.facts, e.facts.text()
	if e.drop.exists && !e.drop.imported && e.facts.Snapshotter == (proxyFacts{}) {
		e.unread = true
		if e.read, err = readRuntimeConfig(ctx, append(files, e.drop.path)...); err != nil {
			return err
		}
	}

	var text strings.Builder
	if err := writeContainerdConfig(&text, e.Config, "", e.mapsOwners); err != nil {
		return err
	}
	if err := toml.Unmarshal([]byte(text.String()), &e.ours); err != nil {
		return err
	}
	e.examineSnapshotter()
	e.examineScope()
	e.examineUnpack()
	e.examineDiffer()
	if err := e.examineOverlayfs(); err != nil {
		return err
	}
	return e.conclude(older)
}

// conclude advises how to get what was found to be missing.
func (e *configExam) conclude(older bool) error {
	write := len(e.gains) > 0 || e.unread
	if older && e.drop.main.Version == 2 && (write || e.drop.newer() && e.unanswered == nil) {
		e.Advice = append(e.Advice, e.drop.migration(e.containerdConfig))
		return nil
	}
	if !write {
		return nil
	}
	all, err := e.drop.advice(e.containerdConfig, e.gains)
	e.Advice = append(e.Advice, all...)
	return err
}

// askLoaded asks containerd for its plugins.
func (e *configExam) askLoaded(ctx context.Context) error {
	for _, ask := range []struct {
		kind containerdplugin.Type
		id   string // of the proxy; ours is "artifact" when it is compiled in
		into *string
	}{
		{plugins.SnapshotPlugin, proxyName, &e.facts.Snapshotter.Loaded},
		{plugins.DiffPlugin, diffName, &e.facts.Differ.Loaded},
		{plugins.DiffPlugin, proxyName, &e.facts.Differ.Loaded},
	} {
		found, err := e.plugin(ctx, ask.kind, ask.id)
		if err != nil {
			return err
		}
		if found != nil && *ask.into == "" {
			*ask.into = cmp.Or(socketOf(found.Exports["address"]), compiledIn)
		}
	}
	for _, id := range []string{criImages, transfer} {
		dot := strings.LastIndex(id, ".")
		found, err := e.plugin(ctx, containerdplugin.Type(id[:dot]), id[dot+1:])
		if err != nil {
			return err
		}
		if found != nil && found.InitErr != nil {
			e.problem(fmt.Sprintf("containerd's plugin %s does not start: %s", id, found.InitErr.GetMessage()))
		}
	}
	return nil
}

// examineSnapshotter looks at [proxy_plugins.artifact].
func (e *configExam) examineSnapshotter() {
	proxy, ok := e.read.proxies[proxyName]
	address := socketOf(proxy.Address)
	kinds := []string{"snapshot", string(plugins.SnapshotPlugin)}
	switch loaded := e.facts.Snapshotter.Loaded; {
	case loaded == compiledIn:
		return
	case !ok && loaded != "":
		e.advise("give doctor the file that containerd reads (--containerd-config), if this is not the one", "it is checked")
		e.addProxy(proxyName, "containerd has the snapshotter after its next start, too")
	case !ok:
		e.problem("containerd does not have the snapshotter")
		e.addProxy(proxyName, "containerd has the snapshotter")
	case !slices.Contains(kinds, proxy.Type):
		e.problem(fmt.Sprintf("the proxy plugin %s has the type %q", proxyName, proxy.Type))
		e.addProxy(proxyName, "it is a snapshotter")
	case address != e.SocketAddress():
		e.problem(fmt.Sprintf("containerd looks for the daemon at %s, and it serves on %s", address, e.SocketAddress()))
		e.addProxy(proxyName, "containerd reaches the daemon")
	case e.unread:
		e.problem(fmt.Sprintf("containerd does not have the snapshotter: %s is not imported by %s", e.drop.path, e.containerdConfig))
	case e.unanswered == nil && loaded != address:
		e.problem("containerd has not read this configuration since it was changed")
		e.advise("restart containerd", "it has the snapshotter")
	}
	if ok {
		e.examineCapabilities(proxy.Capabilities)
	}
}

// examineCapabilities looks whether containerd is told what the kernel can do for pods with
// a user namespace.
func (e *configExam) examineCapabilities(told []string) {
	e.facts.Capabilities = append(e.facts.Capabilities, told...)
	e.Facts = e.facts
	maps, copies := slices.Contains(told, snapshot.RemapIDs), !slices.Contains(told, snapshot.OnlyRemapIDs)
	switch {
	case e.mapsOwners && !maps && copies:
		e.addProxy(proxyName, "the root filesystems of pods with a user namespace are not copied")
	case e.mapsOwners && !maps:
		e.addProxy(proxyName, "pods with a user namespace start")
	case e.mapsOwners:
	case maps:
		e.problem(fmt.Sprintf("containerd is told that owners are mapped for user namespaces (%s), which this kernel cannot (Linux can since 5.19): pods with hostUsers: false do not start", snapshot.RemapIDs))
		e.addProxy(proxyName, "containerd does for them what slow_chown says")
	case copies && !e.Overlayfs.SlowChown:
		e.addProxy(proxyName, "containerd refuses pods with a user namespace and does not copy their root filesystems, as slow_chown = false says")
	case !copies && e.Overlayfs.SlowChown:
		e.addProxy(proxyName, "pods with a user namespace start with a copy of their root filesystem, as slow_chown = true says")
	}
}

// examineOverlayfs looks for options of containerd's own overlayfs that the daemon has not.
func (e *configExam) examineOverlayfs() error {
	both := e.Overlayfs.With(e.read.overlayfs.Overlayfs)
	if both.Equal(e.Overlayfs) || !e.read.somePod() || e.facts.Snapshotter.Loaded == compiledIn {
		return nil
	}
	lines, err := overlayfsTable(both)
	e.Advice = append(e.Advice, advice{
		Do:    fmt.Sprintf("write this into %s, in place of an [overlayfs] there, and restart the daemon", e.configFile),
		Gain:  "images and containers have the options of containerd's own overlayfs, which they had before",
		Lines: lines,
	})
	return err
}

// examineScope looks for a pod that has the snapshotter.
func (e *configExam) examineScope() {
	if e.read.somePod() {
		return
	}
	e.problem("no pod has the snapshotter, and image volumes of artifacts are empty directories")
	const gain = "pods see artifacts (for one runtime handler alone see `" + name + " config containerd --help`)"
	if e.read.images.Snapshotter != proxyName {
		e.add(proxyName, gain, "plugins", criImages, "snapshotter")
	}
	handler := e.read.runtime.Containerd.Default
	if e.read.otherHandlers()[handler] != "" {
		e.add(proxyName, "pods of the runtime handler "+handler+" see artifacts", "plugins", criRuntime, "containerd", "runtimes", handler, "snapshotter")
	}
}

// examineUnpack looks for the snapshotters that containerd has to unpack images for.
func (e *configExam) examineUnpack() {
	unpacks, _ := e.read.unpacks()
	var missing []string
	for _, snapshotter := range []string{defaults.DefaultSnapshotter, proxyName} {
		if !slices.Contains(unpacks, snapshotter) {
			missing = append(missing, snapshotter)
		}
	}
	if node := e.read.images.Snapshotter; slices.Contains(missing, node) {
		e.problem(fmt.Sprintf("unpack_config does not list %s, the snapshotter of the node: nothing can be pulled", node))
	}
	if len(missing) == 0 {
		return
	}
	// The list of a file that is imported replaces all others.
	entries := e.read.entries
	for _, entry := range table(table(e.ours, "plugins"), transfer)["unpack_config"].([]any) {
		if e.read.entries == nil || slices.Contains(missing, entry.(map[string]any)["snapshotter"].(string)) {
			entries = append(entries[:len(entries):len(entries)], entry)
		}
	}
	e.add(entries, "images can be pulled for "+strings.Join(missing, " and "), "plugins", transfer, "unpack_config")
}

// examineDiffer looks at [proxy_plugins.artifact-diff], which only containerd's own
// unpacker needs.
func (e *configExam) examineDiffer() {
	if e.facts.Differ.Loaded == compiledIn {
		return
	}
	proxy, ok := e.read.proxies[diffName]
	address := socketOf(proxy.Address)
	switch {
	case !ok:
		if slices.ContainsFunc(e.read.transfer.Unpack, func(u unpackEntry) bool { return u.Differ == diffName && !u.Optional }) {
			e.problem(fmt.Sprintf("unpack_config names the differ %s, which containerd does not have: nothing can be pulled", diffName))
		}
		e.addProxy(diffName, "containerd's own unpacker can unpack artifacts (docs/native-unpack.md)")
	case proxy.Type != "diff" && proxy.Type != string(plugins.DiffPlugin):
		e.problem(fmt.Sprintf("the proxy plugin %s has the type %q", diffName, proxy.Type))
		e.addProxy(diffName, "it is a differ")
	case address != e.SocketAddress():
		e.problem(fmt.Sprintf("containerd looks for the differ at %s, and the daemon serves on %s", address, e.SocketAddress()))
		e.addProxy(diffName, "containerd reaches it as a differ, too")
	case !e.unread && e.unanswered == nil && e.facts.Differ.Loaded != address:
		e.advise("restart containerd", "it has the differ")
	}
}

// add adds a value to the drop-in.
func (e *configExam) add(value any, gain string, keys ...string) {
	e.drop.set(value, keys...)
	e.gains = append(e.gains, gain)
}

// addProxy adds a table of proxy_plugins.
func (e *configExam) addProxy(plugin, gain string) {
	e.add(table(e.ours, "proxy_plugins")[plugin], gain, "proxy_plugins", plugin)
}

// socketOf is the path of a proxy plugin's address.
func socketOf(address string) string { return strings.TrimPrefix(address, "unix://") }

// problem adds a problem.
func (f *finding) problem(text string) {
	if f.Problem != "" {
		text = f.Problem + "; " + text
	}
	f.Problem = text
}
