// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"net"
	"os"
	"slices"
	"strings"
	"time"

	introspection "github.com/containerd/containerd/api/services/introspection/v1"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/pkg/dialer"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/errdefs"
	"github.com/containerd/plugin"
	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/artifact-snapshotter/artifact-snapshotter/client"
	"github.com/artifact-snapshotter/artifact-snapshotter/snapshot"
)

const (
	// proxyName and diffName are the names of the proxy plugins in containerd.
	proxyName = "artifact"
	diffName  = "artifact-diff"

	// The minor versions of containerd 2 that have image volumes, and of which one
	// was tested (docs/support.md).
	oldestMinor, newestMinor = 1, 4

	// askTimeout is longer than the 3 s that containerd waits at most before it
	// connects to a proxy plugin again.
	askTimeout = 5 * time.Second

	notLookedAt  = "not looked at\n"
	noContainerd = "containerd does not answer"
)

// silent is the finding about what only containerd knows, if it does not answer.
func (p patient) silent() finding {
	return finding{Unknown: noContainerd, text: notLookedAt}
}

// plugin is what containerd has loaded under a type and a name, nil for nothing.
func (p patient) plugin(ctx context.Context, kind plugin.Type, id string) (*introspection.Plugin, error) {
	found, err := p.containerd.IntrospectionService().Plugins(ctx, fmt.Sprintf("type==%s,id==%s", kind, id))
	if err != nil || len(found.Plugins) == 0 {
		return nil, err
	}
	return found.Plugins[0], nil
}

// containerdFacts are the facts of checkContainerd.
type containerdFacts struct {
	Address     string `json:"address"`
	Version     string `json:"version,omitempty"`
	ContentRoot string `json:"content_root,omitempty"`
}

// checkContainerd asks containerd what it is, and where its blobs are.
func checkContainerd(ctx context.Context, p patient) finding {
	facts := containerdFacts{Address: p.ContainerdAddress}
	if p.unanswered != nil {
		found := finding{Facts: facts, Unknown: p.unanswered.Error(), text: notLookedAt}
		found.advise("start containerd, or set containerd_address to its socket", "the daemon plants the empty blob, and doctor sees what containerd has loaded")
		return found
	}
	version, err := p.containerd.Version(ctx)
	if err != nil {
		return failed(err)
	}
	facts.Version = version.Version
	content, err := p.plugin(ctx, plugins.ContentPlugin, "content")
	if err != nil {
		return failed(err)
	}
	if content != nil {
		facts.ContentRoot = content.Exports["root"]
	}
	found := finding{Facts: facts, text: fmt.Sprintf("%s answers on %s\n", facts.Version, p.ContainerdAddress)}
	major, minor, err := majorMinor(facts.Version)
	switch {
	case err != nil:
		found.Unknown = fmt.Sprintf("%q is no version of containerd", facts.Version)
	case major < 2 || major == 2 && minor < oldestMinor:
		found.Problem = fmt.Sprintf("this containerd has no image volumes: upgrade it to 2.%d or later", oldestMinor)
	case major == 2 && minor < 2:
		found.advise("upgrade containerd to 2.2 or later", "sub paths of volumes are not ignored (docs/support.md)")
	case major > 2 || minor > newestMinor:
		found.text += fmt.Sprintf("newer than 2.%d, the newest that was tested\n", newestMinor)
	}
	if facts.ContentRoot != "" && !same(facts.ContentRoot, p.ContentRoot) {
		found.problem(fmt.Sprintf("containerd's blobs are in %s, and content_root is %s: no artifact is found there", facts.ContentRoot, p.ContentRoot))
		found.advise(fmt.Sprintf("set content_root to %q", facts.ContentRoot), "the daemon finds the blobs")
	}
	return found
}

// majorMinor are the first two numbers of a version.
func majorMinor(version string) (major, minor int, err error) {
	_, err = fmt.Sscanf(strings.TrimPrefix(version, "v"), "%d.%d", &major, &minor)
	return major, minor, err
}

// same says whether two paths are one directory.
func same(a, b string) bool {
	ai, aerr := os.Stat(a)
	bi, berr := os.Stat(b)
	return aerr == nil && berr == nil && os.SameFile(ai, bi)
}

// socketFacts are the facts of checkSocket.
type socketFacts struct {
	Address string `json:"address"`
	Answers bool   `json:"answers"`
	// Reached says whether the daemon is what containerd's snapshotter "artifact"
	// is; absent if that was not asked.
	Reached *bool `json:"reached_by_containerd,omitempty"`
}

// checkSocket asks the daemon for a snapshot that is not there, and lets
// containerd ask it, too.
func checkSocket(ctx context.Context, p patient) finding {
	address := p.SocketAddress()
	var loaded *introspection.Plugin
	if p.unanswered == nil {
		var err error
		if loaded, err = p.plugin(ctx, plugins.SnapshotPlugin, proxyName); err != nil {
			return failed(err)
		}
		if loaded != nil && loaded.Exports["address"] == "" {
			return finding{text: "not needed: the snapshotter is compiled into containerd\n"}
		}
	}
	err := askDaemon(ctx, address)
	facts := &socketFacts{Address: address, Answers: err == nil}
	found := finding{Facts: facts, text: fmt.Sprintf("the daemon answers on %s\n", address)}
	switch {
	case facts.Answers:
	case errdefs.IsUnavailable(err) || errdefs.IsDeadlineExceeded(err):
		found.text = notLookedAt
		found.Unknown = fmt.Sprintf("no daemon answers on %s: %s", address, err)
		found.advise("start the daemon (artifact-snapshotter serve)", "pods with the snapshotter start")
		return found
	default:
		found.text = fmt.Sprintf("something answers on %s\n", address)
		found.Problem = fmt.Sprintf("it is no snapshotter, and the daemon cannot serve there: %s; stop it, or set address to another path", err)
		return found
	}
	if p.unanswered != nil {
		found.Unknown = "whether containerd reaches it: " + noContainerd
		return found
	}
	if loaded == nil { // checkContainerdConfig says it
		found.text += "containerd has not loaded the snapshotter\n"
		return found
	}
	facts.Reached, err = p.askThrough(ctx)
	switch {
	case err != nil:
		found.Problem = "containerd does not reach it: " + err.Error()
	case facts.Reached == nil:
		found.Unknown = "whether containerd reaches it: containerd has no namespace yet, pull something first"
	default:
		found.text += "containerd reaches it\n"
	}
	return found
}

// askDaemon returns nil if a snapshotter answers on the socket.
func askDaemon(ctx context.Context, address string) error {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	// gRPC says in many more words that nobody listens.
	listening, err := (&net.Dialer{}).DialContext(ctx, "unix", address)
	if err != nil {
		return fmt.Errorf("%v: %w", err, errdefs.ErrUnavailable)
	}
	_ = listening.Close()
	conn, err := grpc.NewClient(dialer.DialAddress(address), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	_, err = proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), proxyName).Stat(ctx, "doctor")
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err == nil {
		err = fmt.Errorf("it has a snapshot %q: %w", "doctor", errdefs.ErrUnknown)
	}
	return err
}

// askThrough lets containerd ask the snapshotter for something that ours, and no
// other, refuses as an invalid argument before it does anything. containerd itself
// answers what is only looked up. The answer is nil if there is no namespace, which
// asking would create.
func (p patient) askThrough(ctx context.Context) (reached *bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	all, err := p.containerd.NamespaceService().List(ctx)
	if err != nil || len(all) == 0 {
		return nil, err
	}
	ctx = namespaces.WithNamespace(ctx, all[0])
	snapshotter := p.containerd.SnapshotService(proxyName)
	key := snapshot.UnpackKey(fmt.Sprintf("doctor-%d", os.Getpid()), digest.FromBytes(nil))
	reached = new(bool)
	for {
		_, err := snapshotter.Prepare(ctx, key, "")
		switch {
		case errdefs.IsInvalidArgument(err):
			*reached = true
			return reached, nil
		case err == nil:
			return reached, cmp.Or(snapshotter.Remove(ctx, key), fmt.Errorf("its snapshotter %q is another one", proxyName))
		case !errdefs.IsUnavailable(err) || ctx.Err() != nil:
			return reached, err
		}
		select {
		case <-ctx.Done():
			return reached, err
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// blobFacts are the facts of checkEmptyBlob.
type blobFacts struct {
	Planted []string `json:"planted"`
	Missing []string `json:"missing"`
}

// checkEmptyBlob looks for the blob of no bytes, which containerd cannot fetch.
func checkEmptyBlob(ctx context.Context, p patient) finding {
	if p.unanswered != nil {
		return p.silent()
	}
	facts := blobFacts{Planted: []string{}, Missing: []string{}}
	for _, namespace := range p.Namespaces {
		_, err := p.containerd.ContentStore().Info(namespaces.WithNamespace(ctx, namespace), digest.FromBytes(nil))
		switch {
		case err == nil:
			facts.Planted = append(facts.Planted, namespace)
		case errdefs.IsNotFound(err):
			facts.Missing = append(facts.Missing, namespace)
		default:
			return failed(err)
		}
	}
	found := finding{Facts: facts, text: fmt.Sprintf("in the namespaces: %s\n", list(facts.Planted))}
	if len(facts.Missing) > 0 {
		found.text += fmt.Sprintf("missing in: %s\n", list(facts.Missing))
		found.advise("start the daemon, or look into its log for \"Cannot plant the empty blob\"", "artifacts with an empty file or config can be pulled into "+list(facts.Missing))
	}
	return found
}

// list is names as a person reads them.
func list(names []string) string {
	if len(names) == 0 {
		return "none"
	}
	return strings.Join(names, ", ")
}

// sharedFacts are artifacts of one namespace with one config.
type sharedFacts struct {
	Namespace string        `json:"namespace"`
	Config    digest.Digest `json:"config"`
	Images    []imageFacts  `json:"images"`
}

type imageFacts struct {
	Name     string        `json:"name"`
	Manifest digest.Digest `json:"manifest"`
}

// checkSharedConfigs lists the artifacts that CRI takes for one and the same image.
func checkSharedConfigs(ctx context.Context, p patient) finding {
	if p.unanswered != nil {
		return p.silent()
	}
	all, err := p.containerd.NamespaceService().List(ctx)
	if err != nil {
		return failed(err)
	}
	shared := []sharedFacts{}
	for _, namespace := range all {
		found, err := sharedIn(ctx, p.containerd.In(namespace))
		if err != nil {
			return failed(err)
		}
		shared = append(shared, found...)
	}
	found := finding{Facts: shared, text: "none\n"}
	if len(shared) == 0 {
		return found
	}
	var text strings.Builder
	fmt.Fprintln(&text, "the volumes of these artifacts are refused")
	fmt.Fprintln(&text, "NAMESPACE\tCONFIG\tMANIFEST\tREFERENCE")
	for _, s := range shared {
		for _, i := range s.Images {
			fmt.Fprintf(&text, "%s\t%s\t%s\t%s\n", s.Namespace, s.Config, i.Manifest, printable(i.Name))
		}
	}
	found.text = text.String()
	found.advise("pack each of these artifacts with a config of its own, or remove all but one", "pods can mount them")
	return found
}

// sharedIn are the configs of a namespace that artifacts of several manifests have,
// in order.
func sharedIn(ctx context.Context, c *client.Client) ([]sharedFacts, error) {
	conflicts, err := c.Conflicts(ctx)
	if err != nil {
		return nil, err
	}
	var found []sharedFacts
	for _, config := range slices.Sorted(maps.Keys(conflicts)) {
		shared := sharedFacts{Namespace: c.Namespace, Config: config}
		for _, i := range conflicts[config].Images {
			if others, _ := conflicts[config].With(*i, 1); len(others) > 0 { // else the others have lost their names
				shared.Images = append(shared.Images, imageFacts{i.Name, i.Artifact.Manifest.Digest})
			}
		}
		if len(shared.Images) > 0 {
			found = append(found, shared)
		}
	}
	return found, nil
}
