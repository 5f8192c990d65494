// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package client

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	coreimages "github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/remotes/docker/config"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/transfer"
	"github.com/containerd/containerd/v2/core/transfer/image"
	"github.com/containerd/containerd/v2/core/transfer/registry"
	"github.com/containerd/containerd/v2/pkg/reference"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
	"github.com/artifact-snapshotter/artifact-snapshotter/images"
)

// Registry says how to reach a registry.
type Registry struct {
	// HostsDir is the directory with <host>/hosts.toml (docs/hosts.md of
	// containerd); it need not be there.
	HostsDir string
	// PlainHTTP is for hosts without a hosts.toml.
	PlainHTTP bool
	// User and Password are empty for none.
	User, Password string
}

// login is who may have the password: the hosts of the registry, as it has them
// itself or as its hosts.toml has them, but nobody whom one of them redirects to.
type login struct {
	Registry
	hosts []docker.RegistryHost
}

func (r Registry) login(ctx context.Context, ref string) (login, error) {
	spec, err := reference.Parse(ref)
	if err != nil {
		return login{}, err
	}
	hosts, err := config.ConfigureHosts(ctx, config.HostOptions{HostDir: config.HostDirFromRoot(r.HostsDir)})(spec.Hostname())
	return login{r, hosts}, err
}

// GetCredentials implements registry.CredentialHelper.
func (l login) GetCredentials(_ context.Context, _, host string) (registry.Credentials, error) {
	if slices.ContainsFunc(l.hosts, func(h docker.RegistryHost) bool { return h.Host == host }) {
		return registry.Credentials{Host: host, Username: l.User, Secret: l.Password}, nil
	}
	return registry.Credentials{Host: host}, nil
}

// Fetched is a layer that [Client.Pull] is fetching, or has.
type Fetched struct {
	artifact.Layer
	// Bytes are those that containerd has, of Descriptor.Size.
	Bytes int64
	// Done is set when it has all, and Present, too, if it had them before.
	Done, Present bool
}

// pullTime is how long what an unfinished pull has got is kept if this process is
// killed, for the next one.
const pullTime = 24 * time.Hour

// Pull has containerd pull an artifact with its transfer service, without
// unpacking it. Progress, if it is not nil, is called in turn: first with all layers
// of the manifest, then with those that have got further.
//
// The manifest is read first, and nothing is pulled of an ordinary image,
// errdefs.ErrInvalidArgument, nor of an artifact that would be refused, nor if
// the snapshotter does not answer.
func (c *Client) Pull(ctx context.Context, ref string, r Registry, progress func([]Fetched)) (images.Image, error) {
	if err := validReference(ref); err != nil {
		return images.Image{}, err
	}
	// What could not be unpacked is not pulled.
	if err := c.reach(ctx); err != nil {
		return images.Image{}, err
	}
	opts := []registry.Opt{registry.WithHostDir(r.HostsDir)}
	if r.User != "" {
		login, err := r.login(ctx, ref)
		if err != nil {
			return images.Image{}, fmt.Errorf("pull %s: %w", ref, err)
		}
		opts = append(opts, registry.WithCredentials(login))
	}
	if r.PlainHTTP {
		opts = append(opts, registry.WithDefaultScheme("http"))
	}
	from, err := registry.NewOCIRegistry(ctx, ref, opts...)
	if err != nil {
		return images.Image{}, err
	}
	a, seen, err := preview(ctx, from)
	switch {
	case errors.Is(err, artifact.ErrNotArtifact):
		return images.Image{}, fmt.Errorf("%q is an ordinary image, not an artifact; pull it with ctr or crictl: %w", ref, errdefs.ErrInvalidArgument)
	case errdefs.IsNotFound(err):
		return images.Image{}, fmt.Errorf("pull %s: the registry does not have it, or shows it only to some users (-u): %w", ref, err)
	case err != nil:
		return images.Image{}, fmt.Errorf("pull %s: %w", ref, err)
	}
	ctx = c.Context(ctx)
	ctx, done, err := c.WithLease(ctx, leases.WithRandomID(), leases.WithExpiration(pullTime))
	if err != nil {
		return images.Image{}, err
	}
	defer func() { _ = done(context.WithoutCancel(ctx)) }() // else it expires
	if err := c.ensureEmptyBlobs(ctx, seen.named); err != nil {
		return images.Image{}, err
	}
	store := image.NewStore(ref, image.WithPlatforms(seen.platform))
	t := newTracker(a, progress)
	if err := c.Transfer(ctx, from, store, transfer.WithProgress(t.update)); err != nil {
		return images.Image{}, fmt.Errorf("pull %s: %w", ref, err)
	}
	// The last events may come after the answer, or not at all.
	t.finish()
	return c.Image(ctx, ref)
}

// reach asks the snapshotter for anything.
func (c *Client) reach(ctx context.Context) error {
	walk := func(context.Context, snapshots.Info) error { return nil }
	return c.explain(c.SnapshotService(c.Snapshotter).Walk(c.Context(ctx), walk))
}

// validReference refuses what containerd's resolver takes for something else, or
// refuses without saying how to put it right.
func validReference(ref string) error {
	spec, err := reference.Parse(ref)
	if err == nil && spec.Object == "" {
		err = errors.New("it has neither a tag nor a digest")
	}
	if err != nil {
		return fmt.Errorf("%.255q is not a full reference like registry.example.com/models/llama:v1: %v: %w", ref, err, errdefs.ErrInvalidArgument)
	}
	return nil
}

// seen is what preview has seen of an artifact.
type seen struct {
	// platform is that of its manifest, in an index that has only this one, say.
	platform ocispec.Platform
	// named is all that containerd may fetch with it.
	named []ocispec.Descriptor
}

// preview reads the artifact in the registry, without its layers.
func preview(ctx context.Context, from *registry.OCIRegistry) (*artifact.Artifact, seen, error) {
	s := seen{platform: platforms.DefaultSpec()}
	name, target, err := from.Resolve(ctx)
	if err != nil {
		return nil, s, err
	}
	fetcher, err := from.Fetcher(ctx, name)
	if err != nil {
		return nil, s, err
	}
	r := &remote{Fetcher: fetcher}
	read := &recorder{Provider: r}
	a, err := artifact.Read(ctx, read, target)
	for _, desc := range read.descs {
		if desc.Platform != nil {
			s.platform = *desc.Platform
		}
	}
	s.named = r.named
	return a, s, err
}

// remote reads manifests and configs of a registry, and remembers what they name.
type remote struct {
	transfer.Fetcher
	named []ocispec.Descriptor
}

// maxRemote is more than package artifact reads of a manifest or config.
const maxRemote = 16 << 20

func (r *remote) ReaderAt(ctx context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	in, err := r.Fetch(ctx, desc)
	if err != nil {
		return nil, err
	}
	defer in.Close()
	text, err := io.ReadAll(io.LimitReader(in, maxRemote))
	if err != nil {
		return nil, err
	}
	var names struct { // what is none of these is for artifact.Read to refuse
		Config    ocispec.Descriptor   `json:"config"`
		Layers    []ocispec.Descriptor `json:"layers"`
		Manifests []ocispec.Descriptor `json:"manifests"`
	}
	if json.Unmarshal(text, &names) == nil {
		r.named = slices.Concat(r.named, []ocispec.Descriptor{names.Config}, names.Layers, names.Manifests)
	}
	return inMemory{bytes.NewReader(text)}, nil
}

type inMemory struct{ *bytes.Reader }

func (inMemory) Close() error { return nil }

// ensureEmptyBlobs pre-creates the empty blob for each algorithm by which one of those
// that are named is empty, as an empty file or config is.
func (c *Client) ensureEmptyBlobs(ctx context.Context, named []ocispec.Descriptor) error {
	for _, n := range named {
		d := n.Digest
		if n.Size != 0 || d.Validate() != nil || d != d.Algorithm().FromBytes(nil) {
			continue
		}
		if _, err := images.EnsureEmptyBlob(ctx, c.ContentStore(), d.Algorithm()); err != nil {
			return err
		}
	}
	return nil
}

// tracker makes layers of the transfer service's events.
type tracker struct {
	report func([]Fetched)
	mu     sync.Mutex // events come on a goroutine of their own
	layers []Fetched
	with   map[digest.Digest][]int // those that have the blob
	ended  bool
}

func newTracker(a *artifact.Artifact, report func([]Fetched)) *tracker {
	t := &tracker{report: report, with: map[digest.Digest][]int{}}
	for i, l := range a.Layers {
		t.layers = append(t.layers, Fetched{Layer: l})
		t.with[l.Descriptor.Digest] = append(t.with[l.Descriptor.Digest], i)
	}
	if report != nil {
		report(slices.Clone(t.layers))
	}
	return t
}

// update is a transfer.ProgressFunc.
func (t *tracker) update(p transfer.Progress) {
	if p.Desc == nil || coreimages.IsManifestType(p.Desc.MediaType) || coreimages.IsIndexType(p.Desc.MediaType) {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.set(t.with[p.Desc.Digest], func(l *Fetched) {
		switch p.Event {
		case "downloading":
			l.Bytes = max(l.Bytes, min(p.Progress, l.Descriptor.Size))
		case "already exists":
			l.Bytes, l.Done, l.Present = l.Descriptor.Size, true, true
		case "complete":
			l.Bytes, l.Done = l.Descriptor.Size, true
		}
	})
}

// set changes the layers, and reports those that differ then. It is called with mu
// held.
func (t *tracker) set(layers []int, change func(*Fetched)) {
	var changed []Fetched
	for _, i := range layers {
		l := &t.layers[i]
		if l.Done {
			continue
		}
		before := l.Bytes
		if change(l); l.Done || l.Bytes != before {
			changed = append(changed, *l)
		}
	}
	if len(changed) > 0 && t.report != nil && !t.ended {
		t.report(changed)
	}
}

// finish says that all layers are there, and ends the reports.
func (t *tracker) finish() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, layers := range t.with {
		t.set(layers, func(l *Fetched) { l.Bytes, l.Done = l.Descriptor.Size, true })
	}
	t.ended = true
}
