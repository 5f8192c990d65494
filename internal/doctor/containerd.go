// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package doctor

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

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/pkg/dialer"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/artifact-snapshotter/artifact-snapshotter/client"
	"github.com/artifact-snapshotter/artifact-snapshotter/internal/containerdconfig"
	"github.com/artifact-snapshotter/artifact-snapshotter/internal/plain"
	"github.com/artifact-snapshotter/artifact-snapshotter/snapshot"
)

// The minor versions of containerd 2 that have image volumes, and that were tested
// (docs/support.md).
const oldestMinor, newestMinor = 1, 4

// askTimeout exceeds the 3 s that containerd waits at most before it connects to a proxy
// plugin again.
const askTimeout = 5 * time.Second

const (
	notExamined  = "not examined"
	noContainerd = "containerd does not answer"
)

// unanswered is the finding about what only containerd knows, if it does not answer.
func unanswered() Finding { return Finding{Unknown: noContainerd, Text: []string{notExamined}} }

// ContainerdFacts are the facts about containerd.
type ContainerdFacts struct {
	Address     string `json:"address"`
	Version     string `json:"version,omitempty"`
	ContentRoot string `json:"content_root,omitempty"`
}

// checkContainerd asks containerd for its version and its content root.
func checkContainerd(ctx context.Context, n Node) (found Finding) {
	facts := ContainerdFacts{Address: n.ContainerdAddress}
	if n.Unanswered != nil {
		found = Finding{Facts: facts, Unknown: plain.Error(n.Unanswered), Text: []string{notExamined}}
		found.advise("start containerd, or set containerd_address to its socket", "the daemon creates the empty blob, and doctor sees what containerd has loaded")
		return found
	}
	version, err := n.Containerd.Version(ctx)
	if err != nil {
		return failed(err)
	}
	facts.Version = version.Version
	content, err := containerdconfig.Loaded(ctx, n.Containerd.Client, plugins.ContentPlugin, "content")
	if err != nil {
		return failed(err)
	}
	if content != nil {
		facts.ContentRoot = content.Exports["root"]
	}
	found.Facts = facts
	found.sayf("%s answers on %s", facts.Version, n.ContainerdAddress)
	major, minor, err := majorMinor(facts.Version)
	switch {
	case err != nil:
		found.Unknown = fmt.Sprintf("%q is not a version of containerd", facts.Version)
	case major < 2 || major == 2 && minor < oldestMinor:
		found.problemf("this containerd has no image volumes: upgrade it to 2.%d or later", oldestMinor)
	case major == 2 && minor < 2:
		found.advise("upgrade containerd to 2.2 or later", "it no longer ignores the sub paths of volumes (docs/support.md)")
	case major > 2 || minor > newestMinor:
		found.sayf("this is newer than 2.%d, the newest tested version", newestMinor)
	}
	if facts.ContentRoot != "" && !sameFile(facts.ContentRoot, n.ContentRoot) {
		found.problemf("containerd's blobs are in %s, but content_root is %s: no artifact is found there", facts.ContentRoot, n.ContentRoot)
		found.advise(fmt.Sprintf("set content_root to %q", facts.ContentRoot), "the daemon finds the blobs")
	}
	return found
}

// majorMinor returns the first two numbers of a version.
func majorMinor(version string) (major, minor int, err error) {
	_, err = fmt.Sscanf(strings.TrimPrefix(version, "v"), "%d.%d", &major, &minor)
	return major, minor, err
}

func sameFile(a, b string) bool {
	ai, aerr := os.Stat(a)
	bi, berr := os.Stat(b)
	return aerr == nil && berr == nil && os.SameFile(ai, bi)
}

// SocketFacts are the facts about the daemon's socket.
type SocketFacts struct {
	Address string `json:"address"`
	Answers bool   `json:"answers"`
	// Reached says whether containerd's snapshotter "artifact" is the daemon; absent if
	// containerd was not asked.
	Reached *bool `json:"reached_by_containerd,omitempty"`
}

// checkSocket asks the daemon for a snapshot that does not exist, and has containerd ask
// it, too.
func checkSocket(ctx context.Context, n Node) (found Finding) {
	address := n.SocketAddress()
	loaded := ""
	if n.Unanswered == nil {
		var err error
		if loaded, err = containerdconfig.LoadedAddress(ctx, n.Containerd.Client, plugins.SnapshotPlugin, containerdconfig.Snapshotter); err != nil {
			return failed(err)
		}
		if loaded == containerdconfig.CompiledIn {
			return Finding{Text: []string{"not needed: the snapshotter is compiled into containerd"}}
		}
	}
	err := askDaemon(ctx, address)
	facts := &SocketFacts{Address: address, Answers: err == nil}
	found.Facts = facts
	switch {
	case facts.Answers:
		found.sayf("the daemon answers on %s", address)
	case errdefs.IsUnavailable(err) || errdefs.IsDeadlineExceeded(err):
		found.sayf(notExamined)
		found.Unknown = fmt.Sprintf("no daemon answers on %s: %s", address, plain.Error(err))
		found.advise("start the daemon (artifact-snapshotter serve)", "pods with the snapshotter start")
		return found
	default:
		found.sayf("something answers on %s", address)
		found.problemf("it is not a snapshotter, and the daemon cannot serve there: %s; stop it, or set address to another path", plain.Error(err))
		return found
	}
	if n.Unanswered != nil {
		found.Unknown = "whether containerd reaches it: " + noContainerd
		return found
	}
	if loaded == "" { // checkContainerdConfig says what to do
		found.sayf("containerd has not loaded the snapshotter")
		return found
	}
	facts.Reached, err = askThrough(ctx, n.Containerd)
	switch {
	case err != nil:
		found.problemf("containerd does not reach it: %s", plain.Error(err))
	case facts.Reached == nil:
		found.Unknown = "whether containerd reaches it: containerd has no namespace yet, pull something first"
	default:
		found.sayf("containerd reaches it")
	}
	return found
}

// askDaemon returns nil if a snapshotter answers on the socket.
func askDaemon(ctx context.Context, address string) error {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	// If nobody listens, this error is shorter than gRPC's.
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
	_, err = proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), containerdconfig.Snapshotter).Stat(ctx, "doctor")
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err == nil {
		err = fmt.Errorf("it has a snapshot %q: %w", "doctor", errdefs.ErrUnknown)
	}
	return err
}

// askThrough has containerd ask its snapshotter "artifact" for something that only ours
// refuses as an invalid argument, before it does anything. containerd would answer a
// lookup itself. The result is nil if containerd has no namespace: the request would
// create one.
func askThrough(ctx context.Context, c *client.Client) (reached *bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	all, err := c.NamespaceService().List(ctx)
	if err != nil || len(all) == 0 {
		return nil, err
	}
	ctx = namespaces.WithNamespace(ctx, all[0])
	snapshotter := c.SnapshotService(containerdconfig.Snapshotter)
	key := snapshot.UnpackKey(fmt.Sprintf("doctor-%d", os.Getpid()), digest.FromBytes(nil))
	reached = new(bool)
	for {
		_, err := snapshotter.Prepare(ctx, key, "")
		switch {
		case errdefs.IsInvalidArgument(err):
			*reached = true
			return reached, nil
		case err == nil:
			return reached, cmp.Or(snapshotter.Remove(ctx, key), fmt.Errorf("its snapshotter %q is another one", containerdconfig.Snapshotter))
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

// BlobFacts are the namespaces with and without the empty blob.
type BlobFacts struct {
	Present []string `json:"present"`
	Missing []string `json:"missing"`
}

// checkEmptyBlob looks for the blob of zero bytes, which containerd cannot fetch.
func checkEmptyBlob(ctx context.Context, n Node) (found Finding) {
	if n.Unanswered != nil {
		return unanswered()
	}
	facts := BlobFacts{Present: []string{}, Missing: []string{}}
	for _, namespace := range n.Namespaces {
		_, err := n.Containerd.ContentStore().Info(namespaces.WithNamespace(ctx, namespace), digest.FromBytes(nil))
		switch {
		case err == nil:
			facts.Present = append(facts.Present, namespace)
		case errdefs.IsNotFound(err):
			facts.Missing = append(facts.Missing, namespace)
		default:
			return failed(err)
		}
	}
	found.Facts = facts
	found.sayf("present in the namespaces: %s", list(facts.Present))
	if len(facts.Missing) > 0 {
		found.sayf("missing in: %s", list(facts.Missing))
		found.advise("start the daemon, or search its log for \"empty blob\"", "artifacts with an empty file or config can be pulled into "+list(facts.Missing))
	}
	return found
}

// SharedFacts are artifacts of one namespace that share a config.
type SharedFacts struct {
	Namespace string        `json:"namespace"`
	Config    digest.Digest `json:"config"`
	Images    []ImageFacts  `json:"images"`
}

// ImageFacts are an image and the manifest of its artifact.
type ImageFacts struct {
	Name     string        `json:"name"`
	Manifest digest.Digest `json:"manifest"`
}

// checkSharedConfigs lists the artifacts that CRI takes for one image.
func checkSharedConfigs(ctx context.Context, n Node) (found Finding) {
	if n.Unanswered != nil {
		return unanswered()
	}
	all, err := n.Containerd.NamespaceService().List(ctx)
	if err != nil {
		return failed(err)
	}
	shared := []SharedFacts{}
	for _, namespace := range all {
		found, err := sharedIn(ctx, n.Containerd.In(namespace))
		if err != nil {
			return failed(err)
		}
		shared = append(shared, found...)
	}
	found.Facts = shared
	if len(shared) == 0 {
		found.sayf("none")
		return found
	}
	found.sayf("the volumes of these artifacts are refused")
	found.row("NAMESPACE", "CONFIG", "MANIFEST", "REFERENCE")
	for _, s := range shared {
		for _, i := range s.Images {
			found.row(s.Namespace, s.Config.String(), i.Manifest.String(), i.Name)
		}
	}
	found.advise("pack each of these artifacts with a config of its own, or remove all but one", "pods can mount them")
	return found
}

// sharedIn returns the configs that several artifacts of the namespace share, sorted.
func sharedIn(ctx context.Context, c *client.Client) ([]SharedFacts, error) {
	conflicts, err := c.Conflicts(ctx)
	if err != nil {
		return nil, err
	}
	var found []SharedFacts
	for _, config := range slices.Sorted(maps.Keys(conflicts)) {
		shared := SharedFacts{Namespace: c.Namespace, Config: config}
		for _, i := range conflicts[config].Images {
			if others, _ := conflicts[config].With(*i, 1); len(others) > 0 { // else the others have no name any more
				shared.Images = append(shared.Images, ImageFacts{i.Name, i.Manifest})
			}
		}
		if len(shared.Images) > 0 {
			found = append(found, shared)
		}
	}
	return found, nil
}
