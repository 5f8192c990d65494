// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package nri

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

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
		v.Sandbox, v.Owners = pod.GetId(), owners
		if v.Refused == nil {
			v.Refused = oerr
		}
		if v.Namespace != "" {
			v.Unpacked = unpacked(v.directory())
		}
		var source string
		shown, err := p.Views.MountVolume(hurried, &v.Volume, func(_ context.Context, r *store.Reference) (err error) {
			if source, err = below(r.Path, v.sub); err == nil && sameFile(v.source, source) {
				err = fmt.Errorf("the snapshotter has mounted the volume: %w", errdefs.ErrAlreadyExists)
			}
			return err
		})
		switch {
		case errors.Is(err, artifact.ErrNotArtifact), errdefs.IsAlreadyExists(err): // it is the runtime's, or the snapshotter's
			continue
		case err != nil && p.Passthrough:
			continue
		case err != nil:
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

// unpacked says what containerd has unpacked of its image volume at dir.
func unpacked(dir string) store.Unpacked {
	switch files, err := hasFiles(dir); {
	case err != nil:
		return store.MaybeUnpacked
	case files:
		return store.IsUnpacked
	}
	return store.NotUnpacked
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
			(&store.Volume{Sandbox: of.Sandbox}).LogUnmounted(ctx, s.Manifest)
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
		pod := sandboxes[c.GetPodSandboxId()]
		if pod == nil {
			pod = &api.PodSandbox{Id: c.GetPodSandboxId()}
		}
		ids := p.mounted(pod, c, of)
		raw := p.raw(ctx, pod, c)
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
func (p *Plugin) raw(ctx context.Context, pod *api.PodSandbox, c *api.Container) (mounts []rawMount) {
	for _, v := range p.find(ctx, "", pod, c) {
		if v.Namespace == "" || p.isArtifact(ctx, v.Hex) {
			mounts = append(mounts, rawMount{v.destination, v.source})
		}
	}
	return mounts
}

// isArtifact reports whether the manifest or index is that of an artifact, or cannot be read.
func (p *Plugin) isArtifact(ctx context.Context, hex string) bool {
	desc, err := p.Blobs.Find(hex)
	if err == nil {
		_, err = artifact.Read(ctx, p.Blobs, desc)
	}
	return !errors.Is(err, artifact.ErrNotArtifact)
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
			if id, ok := p.Views.MountedAt(m.GetSource(), o); ok {
				if !slices.Contains(ids, id) {
					ids = append(ids, id)
				}
				break
			}
		}
	}
	return ids
}
