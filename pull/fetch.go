// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package pull

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/internal/retry"
)

var (
	errTooSlow  = errors.New("one connection is slow")
	errNoFaster = errors.New("several connections are not faster than one")
	errWrong    = fmt.Errorf("the bytes do not match the digest: %w", errdefs.ErrDataLoss)
)

// refOf is the name under which a blob arrives.
func refOf(d digest.Digest) string { return "blob-" + d.String() }

// get makes sure that the blob is in the content store, below the lease of the context.
func (d *download) get(ctx context.Context, desc ocispec.Descriptor) error {
	if err := desc.Digest.Validate(); err != nil {
		return fmt.Errorf("digest %.255q: %v: %w", desc.Digest, err, errdefs.ErrInvalidArgument)
	}
	if desc.Size < 0 {
		return fmt.Errorf("negative size %d: %w", desc.Size, errdefs.ErrInvalidArgument)
	}
	// No other field of a descriptor is used. An author could put addresses of any hosts into
	// its urls, which containerd's fetcher would ask.
	desc = ocispec.Descriptor{MediaType: desc.MediaType, Digest: desc.Digest, Size: desc.Size}
	if found, err := d.find(ctx, desc); found || err != nil {
		return err
	}
	for alone := false; ; alone = true {
		w, err := content.OpenWriter(ctx, d.content, content.WithRef(refOf(desc.Digest)), content.WithDescriptor(desc))
		if errdefs.IsAlreadyExists(err) {
			return d.confirm(ctx, desc) // another download has just fetched it
		}
		if err != nil {
			return err
		}
		a := &arrival{download: d, w: w, desc: desc, from: map[int]bool{}, alone: alone}
		err = a.receive(ctx)
		_ = w.Close()
		if !errors.Is(err, errWrong) {
			return err
		}
		if aerr := d.content.Abort(ctx, refOf(desc.Digest)); aerr != nil && !errdefs.IsNotFound(aerr) {
			return errors.Join(err, aerr)
		}
		if len(d.trusted()) == 0 {
			return fmt.Errorf("blob %s of %s: %w", desc.Digest, d.session.ref.Name(), err)
		}
	}
}

// find looks for the blob on this node. Whoever knows a digest must not get at the bytes of
// somebody else's private blob, so the registry has to confirm that the repository has it.
func (d *download) find(ctx context.Context, desc ocispec.Descriptor) (bool, error) {
	info, err := d.content.Info(ctx, desc.Digest)
	switch {
	case err == nil:
		if fi, err := os.Lstat(d.dir.Path(desc.Digest)); err != nil || fi.Size() != info.Size {
			log.G(ctx).WithField("blob", desc.Digest).Warn("a blob has disappeared from the disk: fetching it again")
			return false, d.content.Delete(ctx, desc.Digest)
		}
		if info.Size != desc.Size && desc.Size != 0 {
			return false, fmt.Errorf("the blob has %d bytes, and its descriptor says %d: %w", info.Size, desc.Size, errdefs.ErrInvalidArgument)
		}
	case !errdefs.IsNotFound(err):
		return false, err
	default:
		path := d.other(desc)
		if path == "" {
			return false, nil
		}
		if err := d.confirm(ctx, desc); err != nil {
			return false, err
		}
		return d.adopt(ctx, path, desc)
	}
	if err := d.confirm(ctx, desc); err != nil {
		return false, err
	}
	// It is known, so this only adds it to the lease.
	w, err := d.content.Writer(ctx, content.WithRef(refOf(desc.Digest)), content.WithDescriptor(desc))
	if !errdefs.IsAlreadyExists(err) {
		if err == nil {
			_ = w.Close()
		}
		return false, err
	}
	d.had(desc.Size)
	return true, nil
}

// confirm asks the registry whether the repository has a blob that is on this node already.
func (d *download) confirm(ctx context.Context, desc ocispec.Descriptor) error {
	if desc.Digest == d.target.Digest {
		return nil // these credentials have read it
	}
	return again(ctx, func() (int64, error) { return 0, d.session.confirm(ctx, desc) })
}

// other returns the path of the blob in another directory; "" if none has it.
func (d *download) other(desc ocispec.Descriptor) string {
	for _, dir := range d.others {
		path := dir.Path(desc.Digest)
		if fi, err := os.Lstat(path); err == nil && fi.Mode().IsRegular() && fi.Size() == desc.Size {
			return path
		}
	}
	return ""
}

// adopt links a blob of another directory into ours, or copies it if it is on another file
// system. It returns false if it has to be fetched after all.
func (d *download) adopt(ctx context.Context, path string, desc ocispec.Descriptor) (bool, error) {
	d.adopting.RLock()
	defer d.adopting.RUnlock()
	own := d.dir.Path(desc.Digest)
	if err := os.MkdirAll(filepath.Dir(own), 0o755); err != nil {
		return false, err
	}
	var done bool
	err := os.Link(path, own)
	switch {
	case err == nil, errors.Is(err, os.ErrExist):
		done, err = d.register(ctx, desc)
	case errors.Is(err, os.ErrNotExist):
		return false, nil // it has just been deleted
	case errors.Is(err, unix.EXDEV), errors.Is(err, unix.EPERM), errors.Is(err, unix.EMLINK):
		done, err = d.copy(ctx, path, desc)
	default:
		err = fmt.Errorf("link a blob of the node: %w", err)
	}
	if done {
		d.had(desc.Size)
		d.observer.Linked(desc.Size)
		log.G(ctx).WithField("blob", desc.Digest).Debug("the node had a blob already")
	}
	return done, err
}

// register tells the metadata of a blob that is in its place on the disk.
func (d *download) register(ctx context.Context, desc ocispec.Descriptor) (bool, error) {
	w, err := d.content.Writer(ctx, content.WithRef(refOf(desc.Digest)), content.WithDescriptor(desc))
	if errdefs.IsAlreadyExists(err) {
		return true, nil
	}
	if err != nil {
		return false, err
	}
	defer func() { _ = w.Close() }()
	// The content store has the blob, so this is a writer that is at its end
	// (core/metadata/content.go, namespacedWriter).
	if status, err := w.Status(); err != nil || status.Offset != desc.Size {
		return false, err
	}
	err = w.Commit(ctx, desc.Size, desc.Digest)
	return err == nil || errdefs.IsAlreadyExists(err), ignore(err, errdefs.IsAlreadyExists)
}

// copy copies a blob of another directory, and verifies it.
func (d *download) copy(ctx context.Context, path string, desc ocispec.Descriptor) (bool, error) {
	f, err := os.Open(path)
	if err != nil {
		return false, ignore(err, os.IsNotExist)
	}
	defer f.Close()
	err = content.WriteBlob(ctx, d.content, refOf(desc.Digest), f, desc)
	if err == nil || errors.Is(err, unix.ENOSPC) || ctx.Err() != nil {
		return err == nil, err
	}
	log.G(ctx).WithError(err).WithField("path", path).Warn("cannot copy a blob of the node: fetching it")
	return false, ignore(d.content.Abort(ctx, refOf(desc.Digest)), errdefs.IsNotFound)
}

func ignore(err error, is func(error) bool) error {
	if is(err) {
		return nil
	}
	return err
}

// again repeats an attempt that fails for reasons that may pass, as long as bytes arrive or
// patience lasts. attempt returns how many bytes have arrived. If ctx ends, the error is that
// of the last attempt.
func again(ctx context.Context, attempt func() (int64, error)) error {
	wait, last := minBackoff, time.Now()
	for {
		n, err := attempt()
		if err == nil || ctx.Err() != nil || !mayPass(err) {
			return err
		}
		if n > 0 {
			wait, last = minBackoff, time.Now()
		}
		if time.Since(last) > patience {
			return fmt.Errorf("no further byte in %s: %w", patience, err)
		}
		log.G(ctx).WithError(err).WithField("wait", wait).Info("a registry fails; trying again")
		if retry.Sleep(ctx, wait) != nil {
			return err
		}
		wait = min(2*wait, maxBackoff)
	}
}

// arrival is a blob that arrives.
type arrival struct {
	*download
	w    content.Writer
	desc ocispec.Descriptor
	// from are the hosts that have sent some of it; older is set if an earlier try, whose
	// hosts nobody knows, has left some of it.
	from  map[int]bool
	older bool
	// alone is set after bytes of several hosts were wrong together: now all of the blob comes
	// from one host, so that the one to blame is found.
	alone bool
	sum   int64 // of the bytes from the hosts in from
}

// receive writes the blob into w, and commits it. If all of it has come and it is not what the
// digest says, the error is errWrong, and the hosts that are to blame are not trusted any more.
func (a *arrival) receive(ctx context.Context) error {
	status, err := a.w.Status()
	if err != nil {
		return err
	}
	if a.older = status.Offset > 0; status.Offset > a.desc.Size {
		return errWrong
	}
	a.had(status.Offset)
	if status.Offset != a.desc.Size {
		if err := again(ctx, func() (int64, error) { return a.round(ctx) }); err != nil {
			return err
		}
	}
	err = a.w.Commit(ctx, a.desc.Size, a.desc.Digest)
	if !errdefs.IsFailedPrecondition(err) {
		return ignore(err, errdefs.IsAlreadyExists)
	}
	a.had(-a.desc.Size)
	if a.older || len(a.from) > 1 {
		return errWrong // nobody knows whose bytes were wrong
	}
	for i := range a.from {
		log.G(ctx).WithError(err).WithFields(log.Fields{"blob": a.desc.Digest, "host": a.session.hosts[i].Host}).Warn("a host sends other bytes than the digest says: not asking it again for this artifact")
		a.distrust(i)
	}
	return errWrong
}

// round asks one host after another for the rest of the blob, and returns how much has come.
func (a *arrival) round(ctx context.Context) (arrived int64, _ error) {
	err := errWrong // no host is trusted any more
	for _, i := range a.trusted() {
		if a.alone && len(a.from) > 0 && !a.from[i] {
			if err := a.w.Truncate(0); err != nil {
				return arrived, err
			}
			a.had(-a.sum)
			a.sum = 0
			clear(a.from)
		}
		host := a.session.hosts[i]
		n, herr := a.ask(ctx, host)
		a.sum += n
		arrived += n
		if n > 0 {
			a.from[i] = true
		}
		if herr == nil || ctx.Err() != nil || errors.Is(herr, unix.ENOSPC) {
			return arrived, herr
		}
		if errdefs.IsFailedPrecondition(herr) || errors.Is(herr, errWrong) {
			a.distrust(i) // it sends more than the descriptor says
		}
		// What the last host says counts, unless an earlier one may do better later.
		herr = fmt.Errorf("%s: %w", host.Host, herr)
		log.G(ctx).WithError(herr).WithField("blob", a.desc.Digest).Info("a host does not send all of a blob")
		if !mayPass(err) {
			err = herr
		}
	}
	return arrived, err
}

// ask takes the rest of the blob from one host: by one connection and, if that is slow, by
// several. If they are not much faster, something else is the limit, and the rest comes by one
// connection, as do the other blobs of the artifact.
func (a *arrival) ask(ctx context.Context, host docker.RegistryHost) (got int64, err error) {
	var rate float64 // of one connection
	for connections := 1; ; {
		var n int64
		began := time.Now()
		n, err = a.stream(ctx, host, connections, rate)
		got += n
		switch {
		case errors.Is(err, errTooSlow):
			rate, connections = float64(n)/time.Since(began).Seconds(), ways
		case errors.Is(err, errNoFaster):
			a.oneIsEnough.Store(true)
			connections = 1
		default:
			return got, err
		}
	}
}

var buffers = sync.Pool{New: func() any { b := make([]byte, bufferSize); return &b }}

// stream copies the rest of the blob, and returns how many bytes have come. rate is what one
// connection has given, in bytes a second, if there are several now.
func (a *arrival) stream(ctx context.Context, host docker.RegistryHost, connections int, rate float64) (got int64, err error) {
	status, err := a.w.Status()
	if err != nil {
		return 0, err
	}
	rc, err := a.session.open(ctx, host, connections, a.desc)
	if err != nil {
		return 0, err
	}
	defer func() { _ = rc.Close() }()
	if status.Offset > 0 {
		seeker, ok := rc.(io.Seeker)
		if !ok {
			return 0, fmt.Errorf("the blob cannot be read from byte %d: %w", status.Offset, errdefs.ErrNotImplemented)
		}
		if _, err := seeker.Seek(status.Offset, io.SeekStart); err != nil {
			return 0, err
		}
	}
	buffer, ok := buffers.Get().(*[]byte)
	if ok {
		defer buffers.Put(buffer)
	}
	began, rest, measured := time.Now(), a.desc.Size-status.Offset, false
	for {
		n, rerr := rc.Read(*buffer)
		if got += int64(n); got > rest {
			return got, fmt.Errorf("more than the %d bytes of the descriptor: %w", a.desc.Size, errWrong)
		}
		if n > 0 {
			if _, err := a.w.Write((*buffer)[:n]); err != nil {
				return got, err
			}
			a.add(int64(n))
			a.observer.Fetched(int64(n))
		}
		switch {
		case errors.Is(rerr, io.EOF) && got == rest:
			return got, nil
		case errors.Is(rerr, io.EOF):
			return got, fmt.Errorf("it ends %d bytes too early: %w", rest-got, io.ErrUnexpectedEOF)
		case rerr != nil:
			return got, rerr
		}
		took, most := time.Since(began), rest-got > 2*int64(a.part)
		switch now := float64(got) / took.Seconds(); {
		case !most || measured || took < probe:
		case connections > 1:
			if took > 2*probe {
				measured = true
				if now < faster*rate {
					return got, errNoFaster
				}
			}
		case now < slow && !a.oneIsEnough.Load():
			return got, errTooSlow
		}
	}
}

func (d *download) distrust(host int) {
	d.trust.Lock()
	defer d.trust.Unlock()
	d.trust.lied[host] = true
}

// trusted returns the hosts that have not sent wrong bytes.
func (d *download) trusted() (hosts []int) {
	d.trust.Lock()
	defer d.trust.Unlock()
	for i := range d.session.hosts {
		if !d.trust.lied[i] {
			hosts = append(hosts, i)
		}
	}
	return hosts
}
