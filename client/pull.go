// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package client

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"

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
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
	"github.com/artifact-snapshotter/artifact-snapshotter/images"
	"github.com/artifact-snapshotter/artifact-snapshotter/unpack"
)

// Registry says how to reach a registry.
type Registry struct {
	// HostsDir is the directory with <host>/hosts.toml (docs/hosts.md of containerd). It
	// need not exist.
	HostsDir string
	// PlainHTTP selects HTTP for hosts without a hosts.toml.
	PlainHTTP bool
	// User and Password are empty for anonymous access.
	User, Password string
}

// login gives the password to the hosts of the registry, its own or those of its hosts.toml,
// and to no host that one of them redirects to.
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

// Fetched is the progress of a layer during [Client.Pull].
type Fetched struct {
	artifact.Layer
	// Bytes is how many bytes containerd has, of Descriptor.Size.
	Bytes int64
	// Done is set when containerd has all bytes. Present is set, too, if it had them before
	// the pull.
	Done, Present bool
}

// Pull has containerd pull an artifact with its transfer service, without unpacking it.
// Progress, which may be nil, is called sequentially: first with all layers of the manifest,
// then with those that have progressed.
//
// Pull reads the manifest first. It pulls nothing if the manifest is a container image's,
// which is errdefs.ErrInvalidArgument, if the artifact is one that is refused (see
// [unpack.Check]), or if the snapshotter does not answer. It warns if pods will not get the
// artifact because another one has the same config.
func (c *Client) Pull(ctx context.Context, ref string, r Registry, progress func([]Fetched)) (images.Image, error) {
	if err := ValidReference(ref); err != nil {
		return images.Image{}, err
	}
	// There is no use in pulling what cannot be unpacked.
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
	a, platform, err := preview(ctx, from)
	switch {
	case errors.Is(err, artifact.ErrNotArtifact):
		return images.Image{}, fmt.Errorf("%q is a container image, not an artifact; pull it with ctr or crictl: %w", ref, errdefs.ErrInvalidArgument)
	case err != nil:
		return images.Image{}, fmt.Errorf("pull %s: %w", ref, ofRegistry(err))
	}
	if err := unpack.Check(ctx, a); err != nil {
		return images.Image{}, fmt.Errorf("pull %s: %w", ref, err)
	}
	if err := c.warnOfSharedConfig(ctx, ref, a); err != nil {
		return images.Image{}, err
	}
	if i := slices.IndexFunc(a.Layers, func(l artifact.Layer) bool { return coreimages.IsLayerType(l.Descriptor.MediaType) }); i >= 0 && c.Warning != nil {
		c.Warning(fmt.Sprintf("containerd refuses %s as an image volume, since its layer %d has the type of an image's, %s: give it another type, or use a volume of CSI or `mount`", ref, a.Layers[i].Index, a.Layers[i].Descriptor.MediaType))
	}
	ctx = c.Context(ctx)
	ctx, done, err := c.WithLease(ctx, leases.WithRandomID(), leases.WithExpiration(pullLease))
	if err != nil {
		return images.Image{}, err
	}
	defer func() { _ = done(context.WithoutCancel(ctx)) }() // on failure the lease expires
	for _, algorithm := range emptyBlobs(a) {
		if _, err := images.EnsureEmptyBlob(ctx, c.ContentStore(), algorithm); err != nil {
			return images.Image{}, err
		}
	}
	store := image.NewStore(ref, image.WithPlatforms(platform))
	t := newTracker(a, progress)
	if err := c.Transfer(ctx, from, store, transfer.WithProgress(t.update)); err != nil {
		return images.Image{}, fmt.Errorf("pull %s: %w", ref, err)
	}
	// The last events may come after the answer, or never.
	t.finish()
	return c.Image(ctx, ref)
}

// ofRegistry words an error of the registry for people.
func ofRegistry(err error) error {
	var errno unix.Errno
	var dns *net.DNSError
	var unknown x509.UnknownAuthorityError
	switch {
	case errdefs.IsNotFound(err):
		return errdefs.ErrNotFound.WithMessage("the registry does not have it, or only some users may pull it (-u)")
	case errors.As(err, &dns):
		return fmt.Errorf("there is no host %s: %s: %w", dns.Name, dns.Err, errdefs.ErrUnavailable)
	case errors.As(err, &errno):
		return fmt.Errorf("the registry does not answer: %w", errno)
	case errors.As(err, &unknown):
		return fmt.Errorf("this node does not trust the registry's certificate; name its CA in a hosts.toml (--hosts-dir): %v: %w", unknown, errdefs.ErrUnavailable)
	case strings.Contains(err.Error(), "server gave HTTP response to HTTPS client"): // net/http has no type for it
		return fmt.Errorf("the registry speaks HTTP and not HTTPS: use --plain-http, or a hosts.toml (--hosts-dir): %w", errdefs.ErrUnavailable)
	}
	return err
}

// warnOfSharedConfig warns if another artifact of the namespace has the same config.
func (c *Client) warnOfSharedConfig(ctx context.Context, ref string, a *artifact.Artifact) error {
	all, err := c.Survey(ctx, nil, nil)
	if errdefs.IsNotFound(err) { // the pull makes the namespace
		return nil
	}
	if err != nil {
		return err
	}
	for _, other := range images.Named(all.Artifacts) {
		if other.Config == a.Config && other.Manifest != a.Manifest.Digest && other.Name != ref && c.Warning != nil {
			c.Warning(fmt.Sprintf("%s has the same config as %s, so pods with either of them will be refused; pack each with a config of its own", ref, other.Name))
			break
		}
	}
	return nil
}

// reach returns an error if the snapshotter does not answer.
func (c *Client) reach(ctx context.Context) error {
	walk := func(context.Context, snapshots.Info) error { return nil }
	return c.explain(c.SnapshotService(c.Snapshotter).Walk(c.Context(ctx), walk))
}

// ValidReference returns errdefs.ErrInvalidArgument for a reference that [Client.Pull] refuses:
// one that containerd's resolver misunderstands, or refuses without saying how to correct it.
func ValidReference(ref string) error {
	spec, err := reference.Parse(ref)
	if err == nil && spec.Object == "" {
		err = errors.New("it has neither a tag nor a digest")
	}
	if _, parseErr := digest.Parse(ref); parseErr == nil {
		err = errors.New("a digest does not say which registry has it: write registry.example.com/models/llama@" + ref)
	}
	if err != nil {
		return fmt.Errorf("%.255q is not a full reference like registry.example.com/models/llama:v1: %v: %w", ref, err, errdefs.ErrInvalidArgument)
	}
	return nil
}

// preview reads the artifact in the registry, without its layers. The platform is the one to
// pull: that of the manifest if an index has it for another platform only.
func preview(ctx context.Context, from *registry.OCIRegistry) (a *artifact.Artifact, platform ocispec.Platform, err error) {
	platform = platforms.DefaultSpec()
	name, target, err := from.Resolve(ctx)
	if err != nil {
		return nil, platform, err
	}
	fetcher, err := from.Fetcher(ctx, name)
	if err != nil {
		return nil, platform, err
	}
	read := &recorder{Provider: remote{fetcher}}
	a, err = artifact.Read(ctx, read, target)
	for _, desc := range read.descs {
		if desc.Platform != nil {
			platform = *desc.Platform
		}
	}
	return a, platform, err
}

// remote provides the manifests and configs of a registry.
type remote struct{ transfer.Fetcher }

// ReaderAt implements content.Provider.
func (r remote) ReaderAt(ctx context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	in, err := r.Fetch(ctx, desc)
	if err != nil {
		return nil, err
	}
	defer in.Close()
	text, err := io.ReadAll(io.LimitReader(in, maxRemote))
	if err != nil {
		return nil, err
	}
	return inMemory{bytes.NewReader(text)}, nil
}

type inMemory struct{ *bytes.Reader }

func (inMemory) Close() error { return nil }

// emptyBlobs returns the algorithms of the digests by which the artifact names the empty
// blob, as its config or as a layer.
func emptyBlobs(a *artifact.Artifact) (algorithms []digest.Algorithm) {
	blobs := []digest.Digest{a.Config}
	for _, l := range a.Layers {
		blobs = append(blobs, l.Descriptor.Digest)
	}
	for _, d := range blobs {
		if d == d.Algorithm().FromBytes(nil) && !slices.Contains(algorithms, d.Algorithm()) {
			algorithms = append(algorithms, d.Algorithm())
		}
	}
	return algorithms
}

// tracker follows the layers by the events of the transfer service.
type tracker struct {
	report func([]Fetched)
	mu     sync.Mutex // events come on a goroutine of their own
	layers []Fetched
	with   map[digest.Digest][]int // indexes of the layers with that blob
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

// set changes the layers, and reports those that have changed. The caller holds mu.
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

// finish reports that all layers are done, and ends the reports.
func (t *tracker) finish() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, layers := range t.with {
		t.set(layers, func(l *Fetched) { l.Bytes, l.Done = l.Descriptor.Size, true })
	}
	t.ended = true
}
