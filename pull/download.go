// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package pull

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
)

// download is the work on one manifest or index, for all who want it.
type download struct {
	*Puller
	session *session
	target  ocispec.Descriptor
	lease   string
	progress

	cancel context.CancelCauseFunc
	ended  chan struct{}
	err    error // set when ended is closed

	// Guarded by Puller.mu: the names that the artifact gets, how many requests wait, and
	// what ends a download that nobody waits for.
	names   map[string]bool
	waiting int
	idle    *time.Timer

	// oneIsEnough is set when several connections have been no faster than one.
	oneIsEnough atomic.Bool

	// trust is guarded by its mutex: the hosts that have sent wrong bytes, by their index.
	trust struct {
		sync.Mutex
		lied map[int]bool
	}
}

var errAbandoned = errors.New("nobody has waited for the pull")

// join joins the download of target, or begins it, and waits count in it. The session's
// credentials have read target.
func (p *Puller) join(s *session, target ocispec.Descriptor, name string) (*download, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if d := p.downloads[target.Digest]; d != nil {
		s.close()
		d.names[name] = d.names[name] || s.cred == (Credential{})
		d.waiting++
		return d, nil
	}
	if p.closing.Err() != nil {
		s.close()
		return nil, fmt.Errorf("the daemon is shutting down: %w", errdefs.ErrUnavailable)
	}
	ctx, cancel := context.WithCancelCause(p.closing)
	d := &download{
		Puller: p, session: s, target: target, lease: "pull-" + target.Digest.String(), cancel: cancel,
		ended: make(chan struct{}), names: map[string]bool{name: s.cred == (Credential{})}, waiting: 1,
	}
	d.trust.lied = map[int]bool{}
	d.idle = time.AfterFunc(abandoned, func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		if d.waiting == 0 {
			d.cancel(errAbandoned)
		}
	})
	d.idle.Stop()
	p.downloads[target.Digest] = d
	p.running.Go(func() { d.run(ctx) })
	return d, nil
}

// wait waits for d.
func (p *Puller) wait(ctx context.Context, d *download) error {
	defer func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		if d.waiting--; d.waiting == 0 && p.downloads[d.target.Digest] == d {
			d.idle.Reset(abandoned)
		}
	}()
	select {
	case <-d.ended:
		return d.err
	case <-ctx.Done():
		return &UnfinishedError{d.text(time.Now()), ctx.Err()}
	}
}

// run downloads everything and, at the end, gives it its names.
func (d *download) run(ctx context.Context) {
	began := time.Now()
	logger := log.G(ctx).WithFields(log.Fields{"reference": d.session.ref.String(), "digest": d.target.Digest})
	ctx = log.WithLogger(ctx, logger)
	logger.Info("pulling an artifact")
	err := d.all(leases.WithLease(ctx, d.lease))
	switch {
	case err == nil:
		logger.WithFields(log.Fields{"bytes": d.total.Load(), "fetched": d.fetched.Load(), "duration": time.Since(began)}).Info("pulled an artifact")
		d.observer.Pulled(time.Since(began))
	case ctx.Err() != nil:
		err = context.Cause(ctx)
		logger.WithError(err).Info("stopped pulling an artifact")
	default:
		logger.WithError(err).Warn("cannot pull an artifact")
	}
	d.session.close()
	d.cancel(nil)
	d.idle.Stop()
	d.mu.Lock()
	delete(d.downloads, d.target.Digest)
	d.err = err
	d.mu.Unlock()
	close(d.ended)
	// Of other failures everything stays for the next try.
	if err != nil && !isFull(err) {
		return
	}
	err = d.CollectGarbage(context.WithoutCancel(ctx))
	if err != nil {
		logger.WithError(err).Error("cannot remove blobs that no artifact has")
	}
}

// isFull reports whether a download has failed because the disk is full.
func isFull(err error) bool {
	return errdefs.IsResourceExhausted(err) || errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT)
}

// all downloads everything, below the lease of the context.
func (d *download) all(ctx context.Context) (err error) {
	_, err = d.leases.Create(ctx, leases.WithID(d.lease))
	if err != nil && !errdefs.IsAlreadyExists(err) {
		return err
	}
	d.mu.Lock()
	delete(d.failed, d.lease)
	d.mu.Unlock()
	defer func() {
		final := context.WithoutCancel(ctx)
		if err == nil || isFull(err) {
			err = errors.Join(err, d.forget(final, d.lease))
			return
		}
		d.mu.Lock()
		defer d.mu.Unlock()
		d.failed[d.lease] = time.Now()
	}()
	// artifact.Read says which blobs it needs by asking for them, in this order: indexes, the
	// manifest, the config. Whatever it refuses is refused before any layer is fetched.
	documents := &documents{download: d}
	a, err := artifact.Read(ctx, documents, d.target)
	if err != nil {
		return err
	}
	missing, err := d.missing(ctx, a)
	if err != nil {
		return err
	}
	if err := d.space(ctx, missing); err != nil {
		return err
	}
	d.began.Store(time.Now().UnixNano())
	group, gctx := errgroup.WithContext(ctx)
	seen := map[digest.Digest]bool{}
	for _, l := range a.Layers {
		if seen[l.Descriptor.Digest] || l.Format == artifact.FormatEmpty {
			continue
		}
		seen[l.Descriptor.Digest] = true
		if err := d.blobs.Acquire(gctx, 1); err != nil {
			break // the group has the reason
		}
		group.Go(func() error {
			defer d.blobs.Release(1)
			if err := d.get(gctx, l.Descriptor); err != nil {
				return l.Wrap(err)
			}
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return err
	}
	if err := d.label(ctx, append(documents.chain, a.Manifest), a); err != nil {
		return err
	}
	return d.name(ctx)
}

// documents is a content.Provider that fetches what it does not have.
type documents struct {
	*download
	chain []ocispec.Descriptor // the indexes, and whatever else was asked for before
}

// ReaderAt implements content.Provider.
func (d *documents) ReaderAt(ctx context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	if desc.Size > maxDocument {
		return nil, fmt.Errorf("it has %d bytes, over the limit of %d: %w", desc.Size, maxDocument, errdefs.ErrOutOfRange)
	}
	if err := d.get(ctx, desc); err != nil {
		return nil, err
	}
	d.chain = append(d.chain, desc)
	return d.content.ReaderAt(ctx, desc)
}

// missing counts the bytes of all layers, and returns how many of them are not here.
func (d *download) missing(ctx context.Context, a *artifact.Artifact) (missing int64, err error) {
	seen := map[digest.Digest]bool{}
	var total int64
	for _, l := range a.Layers {
		if seen[l.Descriptor.Digest] || l.Format == artifact.FormatEmpty {
			continue
		}
		seen[l.Descriptor.Digest] = true
		if total += l.Descriptor.Size; total < 0 {
			return 0, fmt.Errorf("the layers have more bytes than any disk: %w", errdefs.ErrInvalidArgument)
		}
		if _, err := d.content.Info(ctx, l.Descriptor.Digest); err != nil {
			missing += l.Descriptor.Size
		}
	}
	// What has arrived of an earlier try has its place on the disk.
	arriving, err := d.content.ListStatuses(ctx)
	if err != nil {
		return 0, err
	}
	for _, status := range arriving {
		for dgst := range seen {
			if status.Ref == refOf(dgst) {
				missing -= status.Offset
			}
		}
	}
	d.total.Store(max(total, 1))
	return max(missing, 0), nil
}

// space refuses a download for which the file system has no room, also after artifacts have
// been removed that nobody uses.
func (d *download) space(ctx context.Context, need int64) error {
	size, free, err := d.fileSystem()
	if err != nil {
		return err
	}
	reserve := size / 100 * int64(d.limits.Reserve)
	if need <= max(free-reserve, 0) {
		return nil
	}
	if need <= size-reserve {
		if err := d.evict(ctx, need+reserve); err != nil {
			return err
		}
		if size, free, err = d.fileSystem(); err != nil || need <= max(free-reserve, 0) {
			return err
		}
	}
	return fmt.Errorf("the pull needs %s, but of the %s of the file system of %s %s are free, and %d %% have to stay free: %w",
		Bytes(need), Bytes(size), d.root, Bytes(free), d.limits.Reserve, errdefs.ErrResourceExhausted)
}

// label makes the metadata's garbage collection keep the blobs of the artifact as long as its
// image: each index refers to the next one or to the manifest, which refers to everything else.
func (d *download) label(ctx context.Context, chain []ocispec.Descriptor, a *artifact.Artifact) error {
	const prefix = "containerd.io/gc.ref.content."
	refer := func(from digest.Digest, labels map[string]string) error {
		var fields []string
		for key := range labels {
			fields = append(fields, "labels."+key)
		}
		_, err := d.content.Update(ctx, content.Info{Digest: from, Labels: labels}, fields...)
		return err
	}
	var above digest.Digest
	for _, desc := range chain {
		if above != "" && above != desc.Digest {
			if err := refer(above, map[string]string{prefix + "m.0": desc.Digest.String()}); err != nil {
				return err
			}
		}
		if above = desc.Digest; above == a.Manifest.Digest {
			break
		}
	}
	labels := map[string]string{prefix + "config": a.Config.String()}
	for _, l := range a.Layers {
		if l.Format != artifact.FormatEmpty {
			labels[fmt.Sprintf("%sl.%d", prefix, l.Index)] = l.Descriptor.Digest.String()
		}
	}
	return refer(a.Manifest.Digest, labels)
}

// name gives the artifact all names by which it was asked for.
func (d *download) name(ctx context.Context) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	for name, anonymous := range d.names {
		image := images.Image{Name: name, Target: d.target, Labels: map[string]string{labelUsed: strconv.FormatInt(time.Now().Unix(), 10)}}
		if anonymous {
			image.Labels[labelAnonymous] = "true"
		}
		_, err := d.images.Create(ctx, image)
		if errdefs.IsAlreadyExists(err) {
			old, gerr := d.images.Get(ctx, name)
			if gerr == nil && old.Labels[labelPinned] != "" {
				image.Labels[labelPinned] = old.Labels[labelPinned]
			}
			_, err = d.images.Update(ctx, image)
			d.dirty = true
		}
		if err != nil {
			return fmt.Errorf("cannot name the artifact %s: %w", name, err)
		}
	}
	return nil
}
