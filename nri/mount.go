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
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/containerd/nri/pkg/api"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
	"github.com/artifact-snapshotter/artifact-snapshotter/store"
)

var errBusy = errors.New("this node is too busy to mount the artifacts of the container in time; try again")

// mount mounts the artifacts of a container that is being created, records them, and returns
// the adjustment that puts them in the place of the runtime's own mounts; nil if the container
// has no artifacts.
func (p *Plugin) mount(ctx context.Context, runtime string, pod *api.PodSandbox, c *api.Container) (_ *api.ContainerAdjustment, err error) {
	volumes := p.find(ctx, runtime, pod, c)
	if len(volumes) == 0 {
		return nil, nil
	}
	owners, ownersErr := p.owners(pod, c)
	adjustment := &api.ContainerAdjustment{}
	mounting, cancel := within(ctx, mountShare)
	defer cancel()
	var ids []store.ID
	var held []*store.Reference
	end := (*store.Reference).Release
	defer func() {
		for _, r := range held {
			end(r)
		}
	}()
	for i := range volumes {
		v := &volumes[i]
		v.Sandbox, v.Owners = pod.GetId(), owners
		if v.Refused == nil {
			v.Refused = ownersErr
		}
		if v.Namespace != "" {
			v.Unpacked = unpacked(v.directory())
		}
		var source string
		ref, err := p.Store.MountVolume(mounting, &v.Volume, func(_ context.Context, r *store.Reference) (err error) {
			if source, err = directoryIn(r.Path, v.sub); err == nil && sameFile(v.source, source) {
				err = fmt.Errorf("the snapshotter has mounted the volume: %w", errdefs.ErrAlreadyExists)
			}
			return err
		})
		switch {
		case errors.Is(err, artifact.ErrNotArtifact), errdefs.IsAlreadyExists(err), err != nil && p.Passthrough:
			continue // the runtime's mount stays
		case err != nil:
			return nil, fmt.Errorf("image volume %.255s: %w", v.destination, err)
		}
		held, ids = append(held, ref), append(ids, ref.ID)
		for _, destination := range v.remove {
			adjustment.RemoveMount(destination)
		}
		adjustment.AddMount(v.bindMount(source))
	}
	if len(ids) == 0 {
		return nil, nil
	}
	// After the end of ctx the runtime has been told that the node is too busy.
	if err = errBusy; ctx.Err() == nil {
		err = p.records.create(runtime, c.GetId(), pod.GetId(), ids)
	}
	switch {
	case err != nil && p.Passthrough:
		log.G(ctx).WithError(err).Warn("refused the image volumes of a container")
		return nil, nil
	case err != nil:
		return nil, err
	}
	end = (*store.Reference).Listed // the record protects the trees from now on
	return adjustment, nil
}

// within returns a context that ends after that share of the time that ctx has left.
func within(ctx context.Context, share float64) (context.Context, context.CancelFunc) {
	deadline, ok := ctx.Deadline()
	if !ok {
		return context.WithCancel(ctx)
	}
	return context.WithTimeout(ctx, time.Duration(float64(time.Until(deadline))*share))
}

// unpacked reports what containerd has unpacked into its image volume at dir.
func unpacked(dir string) store.Unpacked {
	f, err := os.Open(dir)
	if err != nil {
		return store.MaybeUnpacked
	}
	defer f.Close()
	switch _, err = f.Readdirnames(1); {
	case errors.Is(err, io.EOF):
		return store.NotUnpacked
	case err != nil:
		return store.MaybeUnpacked
	}
	return store.IsUnpacked
}

// directoryIn returns the path of the directory sub in the tree that is mounted at path. It
// follows no symbolic links, because the artifact's author chose them and they could lead to
// files of the node.
func directoryIn(path, sub string) (string, error) {
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
		return "", fmt.Errorf("the sub path %.255q is not a directory of the artifact: %v: %w", sub, err, errdefs.ErrNotFound)
	}
	if err := unix.Close(fd); err != nil {
		return "", err
	}
	return filepath.Join(path, sub), nil
}

// sameFile reports whether two paths lead to the same file. The path "" leads to none.
func sameFile(a, b string) bool {
	fa, aerr := os.Stat(a)
	fb, berr := os.Stat(b)
	return aerr == nil && berr == nil && os.SameFile(fa, fb)
}

// unmount removes the records of the containers, so that nothing protects their trees any more.
// The runtime removes the mounts in the containers.
func (p *Plugin) unmount(ctx context.Context, containers ...string) {
	for _, container := range containers {
		rec, ok, err := p.records.Remove(container)
		if err != nil {
			log.G(ctx).WithError(err).WithField("container", container).Error("cannot remove the record of a container: its trees stay on the node")
			continue
		}
		if !ok {
			continue
		}
		for _, id := range rec.Trees {
			(&store.Volume{Sandbox: rec.Sandbox}).LogUnmounted(ctx, id.Manifest)
		}
		p.Store.Wake()
	}
}
