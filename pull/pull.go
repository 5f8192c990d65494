// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

// Package pull has the artifacts that the node pulls by itself, without a container runtime.
//
// It puts containerd's own parts together: the content store (plugins/content/local), whose
// blobs have the same layout on disk as those of every other directory of blobs, the metadata
// with images, leases and garbage collection (core/metadata), and the client of registries with
// its hosts.toml (core/remotes/docker). Everything is below one directory:
//
//	blobs/<algorithm>/<hex>  complete blobs, verified by their digest
//	ingest/                  blobs that are arriving, which also survive the end of the process
//	meta.db                  images, leases and labels
//
// What it adds is what a node needs whose pods wait: all who want an artifact share one
// download, which outlives their requests; a host that stalls, or sends other bytes than the
// digest says, is given up for the next one; a failure that may pass is tried again where it
// was; and a blob that another directory of the node has is linked instead of fetched.
//
// Who may use what is on the node is decided as Kubernetes does it for images: a request
// whose credentials have not read this manifest before makes the registry decide.
//
// A registry is hostile until proven otherwise; limits.go has the bounds.
package pull

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
	"golang.org/x/sync/semaphore"

	"github.com/artifact-snapshotter/artifact-snapshotter/blobs"
)

// namespace is the one namespace of the metadata.
const namespace = "artifacts"

// labelAnonymous marks an image that has been read without credentials: anybody may use it.
const labelAnonymous = "artifact-snapshotter.dev/anonymous"

// Config says where artifacts are kept, and where they come from.
type Config struct {
	// Root is the directory of the artifacts.
	Root string
	// Hosts is the directory of hosts.toml files
	// (https://github.com/containerd/containerd/blob/main/docs/hosts.md); "" for none.
	Hosts string
	// Others are further directories of blobs on this node. A blob that one of them has is
	// linked, or copied if it is on another file system.
	Others []blobs.Dir
	// Limits are DefaultLimits if they are not set, and Retention is DefaultRetention.
	Limits    Limits
	Retention Retention
	Observer  Observer
}

// Puller pulls artifacts. It is safe for concurrent use.
type Puller struct {
	root, hosts string
	dir         blobs.Dir
	others      []blobs.Dir
	limits      Limits
	retention   Retention
	observer    Observer
	part        int
	// inUse list the references that stay.
	inUse []func() []string

	bolt    *bbolt.DB
	db      *metadata.DB
	content content.Store
	images  images.Store
	leases  leases.Manager

	blobs, connections *semaphore.Weighted

	// closing ends the downloads, which outlive the requests that began them.
	closing context.Context
	close   context.CancelFunc
	running sync.WaitGroup

	// adopting is held for reading while a blob is on the disk that no metadata knows, and
	// for writing by garbage collection.
	adopting sync.RWMutex

	mu        sync.Mutex
	downloads map[digest.Digest]*download
	// key is for the names in the bucket readers.
	key []byte
	// failed are the leases of downloads that have failed, and when.
	failed map[string]time.Time
	// dirty is set if there may be garbage.
	dirty bool
}

// Open opens the artifacts in c.Root. A root that another process has open is
// errdefs.ErrFailedPrecondition.
func Open(ctx context.Context, c Config) (_ *Puller, err error) {
	if c.Limits == (Limits{}) {
		c.Limits = DefaultLimits
	}
	if c.Retention == (Retention{}) {
		c.Retention = DefaultRetention
	}
	p := &Puller{
		root: c.Root, hosts: c.Hosts, dir: blobs.Dir(c.Root), others: c.Others, limits: c.Limits, retention: c.Retention, observer: c.Observer.complete(),
		part:        int(max(c.Limits.Memory/int64(c.Limits.Blobs*ways), minPart)),
		blobs:       semaphore.NewWeighted(int64(c.Limits.Blobs)),
		connections: semaphore.NewWeighted(int64(c.Limits.Connections)),
		downloads:   map[digest.Digest]*download{},
		failed:      map[string]time.Time{},
		dirty:       true,
	}
	// Pods with a user namespace read blobs through the mounts, and never by this path.
	if err := os.MkdirAll(filepath.Join(c.Root, "blobs"), 0o700); err != nil {
		return nil, err
	}
	store, err := local.NewStore(c.Root)
	if err != nil {
		return nil, fmt.Errorf("open the content in %s: %w", c.Root, err)
	}
	path := filepath.Join(c.Root, "meta.db")
	p.bolt, err = bbolt.Open(path, 0o600, &bbolt.Options{Timeout: time.Second})
	if errors.Is(err, bolterrors.ErrTimeout) {
		return nil, fmt.Errorf("%s is open in another process: %w", path, errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	p.db = metadata.NewDB(p.bolt, store, nil)
	if err := errors.Join(p.db.Init(ctx), p.bolt.Update(p.openReaders)); err != nil {
		return nil, errors.Join(fmt.Errorf("open %s: %w", path, err), p.bolt.Close())
	}
	p.content, p.images, p.leases = p.db.ContentStore(), metadata.NewImageStore(p.db), metadata.NewLeaseManager(p.db)
	p.closing, p.close = context.WithCancel(in(context.WithoutCancel(ctx)))
	// What has a lease now belongs to pulls that have not ended before the last process did.
	old, err := p.leases.List(p.closing)
	if err != nil {
		return nil, errors.Join(err, p.bolt.Close())
	}
	for _, l := range old {
		p.failed[l.ID] = time.Now()
	}
	return p, nil
}

// in sets the namespace of the metadata.
func in(ctx context.Context) context.Context { return namespaces.WithNamespace(ctx, namespace) }

// Dir is the directory of blobs in which the artifacts are.
func (p *Puller) Dir() blobs.Dir { return p.dir }

// Close ends the downloads that are under way. What has arrived of them stays.
func (p *Puller) Close() error {
	p.mu.Lock()
	p.close()
	p.mu.Unlock()
	p.running.Wait()
	return p.bolt.Close()
}

// Run removes what is not to stay until ctx ends.
func (p *Puller) Run(ctx context.Context) {
	tick := time.NewTicker(collectEvery)
	defer tick.Stop()
	for {
		if err := errors.Join(p.retain(in(ctx)), p.CollectGarbage(ctx)); err != nil && ctx.Err() == nil {
			log.G(ctx).WithError(err).Error("cannot remove artifacts and blobs that are not used; trying again")
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// CollectGarbage removes the blobs that no artifact has, and what has arrived of pulls that
// failed long ago. Trees that are made of a blob have links to it.
func (p *Puller) CollectGarbage(ctx context.Context) error {
	ctx = in(ctx)
	p.mu.Lock()
	var expired []string
	for id, at := range p.failed {
		if time.Since(at) > keepPartial {
			expired = append(expired, id)
		}
	}
	p.mu.Unlock()
	for _, id := range expired {
		if err := p.forget(ctx, id); err != nil {
			return err
		}
	}
	p.adopting.Lock()
	defer p.adopting.Unlock()
	p.mu.Lock()
	dirty := p.dirty
	p.dirty = false
	p.mu.Unlock()
	if !dirty {
		return nil
	}
	_, err := p.db.GarbageCollect(ctx)
	if err != nil {
		p.soil()
	}
	return err
}

// soil notes that there may be garbage.
func (p *Puller) soil() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.dirty = true
}

// forget deletes the lease of a download, so that what it has kept is garbage.
func (p *Puller) forget(ctx context.Context, lease string) error {
	err := p.leases.Delete(ctx, leases.Lease{ID: lease})
	if err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.failed, lease)
	p.dirty = true
	return nil
}

// Request asks for an artifact.
type Request struct {
	Reference Reference
	Policy    Policy
	// Credentials are tried in this order; none is anonymous.
	Credentials []Credential
}

// Pull waits until the artifact is on the node, and returns its manifest or index. If ctx ends
// before, the error is an *UnfinishedError with the progress, the download goes on, and the
// next request joins it. An image is artifact.ErrNotArtifact.
func (p *Puller) Pull(ctx context.Context, r Request) (_ ocispec.Descriptor, err error) {
	defer func() { p.failure(err) }()
	ctx = in(ctx)
	if len(r.Credentials) == 0 {
		r.Credentials = []Credential{{}}
	}
	d, target, err := p.begin(ctx, r)
	if d == nil {
		return target, err
	}
	return d.target, p.wait(ctx, d)
}

// begin decides whether the artifact is there, and may be used. If it has to be downloaded,
// it returns the download.
func (p *Puller) begin(ctx context.Context, r Request) (*download, ocispec.Descriptor, error) {
	name := r.Reference.String()
	image, err := p.images.Get(ctx, name)
	known := err == nil
	if err != nil && !errdefs.IsNotFound(err) {
		return nil, ocispec.Descriptor{}, err
	}
	if !known && r.Policy == Never {
		return nil, ocispec.Descriptor{}, fmt.Errorf("%s is not on this node, and the pull policy is %s: %w", name, Never, errdefs.ErrNotFound)
	}
	ask := r.Reference
	if known && r.Policy != Always {
		if image.Labels[labelAnonymous] != "" || p.permitted(r, image.Target.Digest) {
			p.touch(ctx, image)
			return nil, image.Target, nil
		}
		ask = ask.at(image.Target.Digest) // one HEAD, whatever the tag stands for by now
	}
	s, target, err := p.resolve(ctx, r, ask)
	if err != nil {
		return nil, ocispec.Descriptor{}, err
	}
	if known && image.Target.Digest == target.Digest {
		s.close()
		p.touch(ctx, image)
		return nil, image.Target, nil
	}
	d, err := p.join(s, target, name)
	return d, target, err
}

// resolve asks for a manifest with one credential after another, and remembers which may read
// it.
func (p *Puller) resolve(ctx context.Context, r Request, ask Reference) (*session, ocispec.Descriptor, error) {
	var first error
	for _, cred := range r.Credentials {
		s, err := p.session(p.closing, r.Reference, cred)
		if err != nil {
			return nil, ocispec.Descriptor{}, err
		}
		var target ocispec.Descriptor
		err = again(ctx, func() (_ int64, err error) {
			target, err = s.resolve(ctx, ask)
			return 0, err
		})
		if err == nil {
			p.permit(ctx, r.Reference, cred, target.Digest)
			return s, target, nil
		}
		s.close()
		if first == nil {
			first = fmt.Errorf("%s: %w", ask, err)
		}
		if ctx.Err() != nil {
			return nil, ocispec.Descriptor{}, &UnfinishedError{fmt.Sprintf("pulling: the registry has not said what %s is: %v", ask, err), ctx.Err()}
		}
		if !isDenied(err) {
			break
		}
	}
	return nil, ocispec.Descriptor{}, first
}
