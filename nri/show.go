// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package nri

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/containerd/containerd/v2/pkg/tracing"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/containerd/nri/pkg/api"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
	"github.com/artifact-snapshotter/artifact-snapshotter/store"
	"github.com/artifact-snapshotter/artifact-snapshotter/unpack"
)

// settling is how long a container that the runtime does not list may be about to be
// created: its creation was answered by an earlier connection.
const settling = 2 * time.Minute

// create is the answer to the creation of a container.
func (p *Plugin) create(ctx context.Context, runtime string, pod *api.PodSandbox, c *api.Container) (_ *api.ContainerAdjustment, err error) {
	volumes := p.find(ctx, runtime, pod, c)
	if len(volumes) == 0 {
		return nil, nil
	}
	owners, oerr := p.owners(pod, c)
	adjustment := &api.ContainerAdjustment{}
	// Who waits for a build is told so while there is time to say it.
	hurried, cancel := within(ctx, 2, 3)
	defer cancel()
	var ids []store.ID
	var held []*store.Reference
	end := (*store.Reference).Release
	defer func() {
		for _, v := range held {
			end(v)
		}
	}()
	for i := range volumes {
		v := &volumes[i]
		began := time.Now()
		ctx, span := tracing.StartSpan(hurried, "volume.nri", tracing.WithAttribute("sandbox", pod.GetId()), tracing.WithAttribute("target", v.hex))
		shown, source, err := p.show(ctx, v, owners, oerr)
		span.SetStatus(err)
		span.End()
		switch {
		case errors.Is(err, artifact.ErrNotArtifact): // it is the runtime's
			continue
		case err == nil && sameFile(v.source, source): // the snapshotter has shown it already
			shown.Release()
			continue
		}
		p.answered(ctx, v, shown, time.Since(began), err)
		if err != nil {
			if p.Passthrough {
				continue
			}
			return nil, fmt.Errorf("image volume %.255s: %w", v.destination, err)
		}
		held, ids = append(held, shown), append(ids, shown.ID)
		for _, destination := range v.remove {
			adjustment.RemoveMount(destination)
		}
		adjustment.AddMount(v.mount(source))
	}
	if len(ids) == 0 {
		return nil, nil
	}
	if err = errBusy; ctx.Err() == nil { // else the runtime has been answered
		// From here on the record keeps what is held until now.
		err = p.references.add(runtime, c.GetId(), pod.GetId(), ids)
	}
	switch {
	case err != nil && p.Passthrough:
		log.G(ctx).WithError(err).Warn("refused the image volumes of a container")
		return nil, nil
	case err != nil:
		return nil, err
	}
	end = (*store.Reference).Listed
	return adjustment, nil
}

var errBusy = errors.New("this node is too busy to say in time what artifacts the container mounts; try again")

// within leaves a part of the time that is left, which is what the runtime waits for the
// answer.
func within(ctx context.Context, part, of time.Duration) (context.Context, context.CancelFunc) {
	deadline, ok := ctx.Deadline()
	if !ok {
		return context.WithCancel(ctx)
	}
	return context.WithTimeout(ctx, time.Until(deadline)*part/of)
}

// show mounts what the volume is of, and returns what to bind: all of it, or the sub
// path. It is artifact.ErrNotArtifact if that is an image.
func (p *Plugin) show(ctx context.Context, v *volume, owners unpack.IDMap, unmapped error) (shown *store.Reference, source string, err error) {
	if v.refused != nil {
		return nil, "", v.refused
	}
	if v.namespace != "" {
		if err := p.identify(ctx, v); err != nil {
			return nil, "", err
		}
	}
	if unmapped != nil {
		// Of an image there are no owners to map.
		if _, err := artifact.Read(ctx, p.Blobs, v.target); err != nil {
			return nil, "", err
		}
		return nil, "", unmapped
	}
	if shown, err = p.Views.Acquire(ctx, v.target, owners); err != nil {
		return nil, "", err
	}
	if source, err = below(shown.Path, v.sub); err != nil {
		shown.Release()
		return nil, "", err
	}
	return shown, source, nil
}

// identify finds out what containerd has mounted. It is artifact.ErrNotArtifact if that is an
// image, which concerns nobody here: neither a blob nor the images of containerd need to be
// known for it. containerd unpacks nothing of an artifact, so what has files, but no
// manifest in any directory of blobs (content_root is wrong, say), is an image, too. What has
// no files may be an image without any that containerd has taken for an artifact.
func (p *Plugin) identify(ctx context.Context, v *volume) (err error) {
	files, unseen := hasFiles(v.directory())
	switch v.target, err = p.Blobs.Find(v.hex); {
	case err != nil && files:
		log.G(ctx).WithError(err).WithField("target", v.hex).Debug("a volume with files of containerd's own is that of an image")
		return artifact.ErrNotArtifact
	case err != nil:
		return err
	case files || unseen != nil:
		if _, err := artifact.Read(ctx, p.Blobs, v.target); errors.Is(err, artifact.ErrNotArtifact) {
			return err
		}
	}
	return p.check(ctx, v)
}

// check refuses what containerd may have taken for another image.
func (p *Plugin) check(ctx context.Context, v *volume) error {
	if p.Images == nil {
		return nil
	}
	err := p.Images.Check(ctx, v.namespace, v.target.Digest)
	if err != nil && ctx.Err() != nil {
		return fmt.Errorf("containerd (containerd_address = %q) has not said in time which images there are, so this might be the wrong one; try again: %w", p.ContainerdAddress, err)
	}
	return err
}

// below is the directory sub of the mount at path. Symlinks in it are the artifact's, and
// are not followed: they would lead to files of the node.
func below(path, sub string) (string, error) {
	if sub == "" {
		return path, nil
	}
	dir, err := unix.Open(path, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", err
	}
	defer func() { _ = unix.Close(dir) }()
	fd, err := unix.Openat2(dir, sub, &unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS,
	})
	if err != nil {
		return "", fmt.Errorf("the sub path %.255q is no directory of the artifact: %v: %w", sub, err, errdefs.ErrNotFound)
	}
	if err := unix.Close(fd); err != nil {
		return "", err
	}
	return filepath.Join(path, sub), nil
}

// sameFile reports whether two paths are of one file; a is "" for none.
func sameFile(a, b string) bool {
	if a == "" {
		return false
	}
	fa, aerr := os.Stat(a)
	fb, berr := os.Stat(b)
	return aerr == nil && berr == nil && os.SameFile(fa, fb)
}

// answered tells how a request for an image volume ended.
func (p *Plugin) answered(ctx context.Context, v *volume, shown *store.Reference, took time.Duration, err error) {
	if p.Observer.Answered != nil {
		p.Observer.Answered(took, err)
	}
	logger := log.G(ctx)
	if v.namespace != "" {
		logger = logger.WithField("namespace", v.namespace)
		if p.Images != nil && v.target.Digest != "" {
			if name := p.Images.Name(v.namespace, v.target.Digest); name != "" {
				logger = logger.WithField("image", name)
			}
		}
	}
	if err != nil {
		logger = logger.WithError(err).WithField("target", v.hex)
		if _, ok := errors.AsType[*store.UnfinishedError](err); ok {
			logger.Info("an image volume has to wait")
			return
		}
		logger.Warn("refused an image volume")
		return
	}
	f := log.Fields{"artifact": shown.ID.Manifest, "duration": took, "raw": shown.Modes.Raw, "tar": shown.Modes.Tar}
	if shown.Built != nil {
		maps.Copy(f, shown.Built.Fields())
	}
	logger.WithFields(f).Info("shown an image volume")
}

// drop forgets what the containers have shown.
func (p *Plugin) drop(ctx context.Context, containers ...string) {
	for _, container := range containers {
		of, ok, err := p.references.drop(container)
		if err != nil {
			log.G(ctx).WithError(err).WithField("container", container).Error("cannot drop an image volume: what it shows stays on the node")
			continue
		}
		if !ok {
			continue
		}
		for _, s := range of.Shows {
			log.G(ctx).WithFields(log.Fields{"sandbox": of.Sandbox, "artifact": s.Manifest}).Info("dropped an image volume")
		}
		p.Views.Wake()
	}
}

// synchronize makes the records say what the runtime has: containers is all that run or
// are about to. Those of another runtime are not touched, which is there, too, or was there
// in this boot. What is mounted in one counts, whatever its record says: the runtime may
// have given up waiting for the answer that was recorded, and the record may be lost.
func (p *Plugin) synchronize(ctx context.Context, runtime string, pods []*api.PodSandbox, containers []*api.Container) {
	sandboxes := map[string]*api.PodSandbox{}
	for _, pod := range pods {
		sandboxes[pod.GetId()] = pod
	}
	listed := map[string]bool{}
	for _, c := range containers {
		listed[c.GetId()] = true
		of, recorded := p.references.get(c.GetId())
		ids := p.mounted(sandboxes[c.GetPodSandboxId()], c, of)
		raw := p.raw(ctx, c)
		p.missed(ctx, c, raw)
		switch {
		case len(ids) == 0:
			// That its mounts are nowhere below the state may also mean that the state
			// was elsewhere.
			if len(raw) > 0 {
				p.drop(ctx, c.GetId())
			}
		case !recorded || len(ids) != len(of.Shows):
			if err := p.references.set(runtime, c.GetId(), c.GetPodSandboxId(), ids); err != nil {
				log.G(ctx).WithError(err).WithField("container", c.GetId()).Error("cannot record what a container shows")
			}
		}
	}
	for _, container := range p.references.of("") {
		of, _ := p.references.get(container)
		if of.Runtime != "" && of.Runtime != runtime || listed[container] || sandboxes[of.Sandbox] != nil && uptime()-of.Uptime < settling {
			continue
		}
		p.drop(ctx, container)
	}
}

// raw are the runtime's own mounts of artifacts in a container.
func (p *Plugin) raw(ctx context.Context, c *api.Container) (mounts []rawMount) {
	var binds []bind
	for _, m := range c.GetMounts() {
		if !isBind(m) {
			continue
		}
		if v, ok := inContainerd(m, c.GetPodSandboxId()); ok {
			if p.isArtifact(ctx, v.hex) {
				mounts = append(mounts, rawMount{v.destination, v.source})
			}
		} else if b, ok := p.inCRIO(m, ""); ok {
			binds = append(binds, b)
		}
	}
	for _, b := range p.ofArtifacts(ctx, c.GetAnnotations()[volumesAnnotation], binds) {
		mounts = append(mounts, rawMount{path: b.destination})
	}
	return mounts
}

// rawMount is a mount of the runtime's own: containerd's directory, or a blob ("").
type rawMount struct{ path, dir string }

// missed warns of a container that was created without the plugin: nothing else does.
func (p *Plugin) missed(ctx context.Context, c *api.Container, raw []rawMount) {
	if p.Passthrough { // it may be as it should
		return
	}
	for _, m := range raw {
		files, err := hasFiles(m.dir)
		if m.dir == "" || err == nil && !files { // else the snapshotter has shown it
			log.G(ctx).WithFields(log.Fields{"sandbox": c.GetPodSandboxId(), "container": c.GetName(), "path": m.path}).
				Warn("A container was created without the plugin of NRI, and its volume of an artifact is what the runtime makes of it: delete its pod")
			return
		}
	}
}

// hasFiles reports whether there is anything in dir: in that of containerd's volume of an
// artifact there is nothing.
func hasFiles(dir string) (bool, error) {
	f, err := os.Open(dir)
	if err != nil {
		return false, err
	}
	defer f.Close()
	switch _, err = f.Readdirnames(1); {
	case errors.Is(err, io.EOF):
		return false, nil
	case err != nil:
		return false, err
	}
	return true, nil
}

// mounted is what a container shows by its mounts. Of a Tree that is shifted for a user
// namespace the record knows the owners, or else the pod.
func (p *Plugin) mounted(pod *api.PodSandbox, c *api.Container, of reference) (ids []store.ID) {
	var owners []unpack.IDMap
	for _, s := range of.Shows {
		owners = append(owners, s.id().Owners)
	}
	if o, err := p.owners(pod, c); err == nil {
		owners = append(owners, o)
	}
	if len(owners) == 0 {
		owners = []unpack.IDMap{{}}
	}
	for _, m := range c.GetMounts() {
		for _, o := range owners {
			if id, ok := p.Views.Shown(m.GetSource(), o); ok {
				if !slices.Contains(ids, id) {
					ids = append(ids, id)
				}
				break
			}
		}
	}
	return ids
}
