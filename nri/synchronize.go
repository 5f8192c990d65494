// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package nri

import (
	"context"
	"errors"
	"maps"
	"slices"
	"sync"

	"github.com/containerd/log"
	"github.com/containerd/nri/pkg/api"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
	"github.com/artifact-snapshotter/artifact-snapshotter/store"
	"github.com/artifact-snapshotter/artifact-snapshotter/unpack"
)

// synchronize makes the records agree with the runtime, whose containers are all those that run
// or are being created. It does not touch the records of another runtime on the node. What is
// mounted in a container counts, not its record: the runtime may not have waited for the
// answer that was recorded, and a record may be lost.
func (p *Plugin) synchronize(ctx context.Context, runtime string, pods []*api.PodSandbox, containers []*api.Container) {
	sandboxes := map[string]*api.PodSandbox{}
	for _, pod := range pods {
		sandboxes[pod.GetId()] = pod
	}
	listed, missed := map[string]bool{}, map[string]string{}
	for _, c := range containers {
		listed[c.GetId()] = true
		pod := sandboxes[c.GetPodSandboxId()]
		if pod == nil {
			pod = &api.PodSandbox{Id: c.GetPodSandboxId()}
		}
		rec, recorded := p.records.Get(c.GetId())
		ids, unreplaced := p.mounted(pod, c, rec), p.unreplaced(ctx, pod, c)
		if p.warnUnreplaced(ctx, c, unreplaced) {
			missed[c.GetId()] = c.GetPodSandboxId()
		}
		switch {
		case len(ids) == 0 && len(unreplaced) > 0:
			p.unmount(ctx, c.GetId())
		case len(ids) == 0:
			// The container has no artifacts, or state was another directory when they
			// were mounted: keep the record.
		case !recorded || len(ids) != len(rec.Trees):
			if err := p.records.set(runtime, c.GetId(), c.GetPodSandboxId(), ids); err != nil {
				log.G(ctx).WithError(err).WithField("container", c.GetId()).Error("cannot record the artifacts of a container")
			}
		}
	}
	p.missed.set(missed)
	for container, rec := range p.records.All() {
		creating := sandboxes[rec.Sandbox] != nil && uptime()-rec.Uptime < creationWindow
		if rec.Runtime == runtime && !listed[container] && !creating {
			p.unmount(ctx, container)
		}
	}
}

// unreplaced returns the volumes of artifacts in a container that are the runtime's own mounts.
func (p *Plugin) unreplaced(ctx context.Context, pod *api.PodSandbox, c *api.Container) (volumes []volume) {
	for _, v := range p.find(ctx, "", pod, c) {
		if v.Namespace == "" || p.isArtifact(ctx, v.Hex) {
			volumes = append(volumes, v)
		}
	}
	return volumes
}

// isArtifact reports whether the manifest or index is that of an artifact, or cannot be read.
func (p *Plugin) isArtifact(ctx context.Context, hex string) bool {
	desc, err := p.Blobs.Find(hex)
	if err == nil {
		_, err = artifact.Read(ctx, p.Blobs, desc)
	}
	return !errors.Is(err, artifact.ErrNotArtifact)
}

// missed are the containers that were created without the plugin and are still there.
type missed struct {
	mu        sync.Mutex
	sandboxes map[string]string // of the containers
	changed   func(n int)       // nil if nobody wants to know
}

func (m *missed) set(sandboxes map[string]string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.sandboxes = sandboxes
	m.tell()
}

// remove removes a container, or all of a sandbox.
func (m *missed) remove(id string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	maps.DeleteFunc(m.sandboxes, func(container, sandbox string) bool { return container == id || sandbox == id })
	m.tell()
}

func (m *missed) tell() {
	if m.changed != nil {
		m.changed(len(m.sandboxes))
	}
}

// warnUnreplaced warns of a container that was created without the plugin, and reports whether it
// was. Files in containerd's directory were mounted by the snapshotter.
func (p *Plugin) warnUnreplaced(ctx context.Context, c *api.Container, volumes []volume) bool {
	i := slices.IndexFunc(volumes, func(v volume) bool {
		return v.Namespace == "" || unpacked(v.directory()) == store.NotUnpacked
	})
	if i < 0 || p.Passthrough { // with passthrough it may have been intended
		return false
	}
	log.G(ctx).WithFields(log.Fields{"sandbox": c.GetPodSandboxId(), "container": c.GetName(), "path": volumes[i].destination}).
		Warn("a container was created without the NRI plugin, so the runtime mounted its artifact by itself: delete its pod")
	return true
}

// mounted returns the trees that are mounted in a container. The path of a mount does not say
// for which user namespace a tree is: the container's record does, or its pod.
func (p *Plugin) mounted(pod *api.PodSandbox, c *api.Container, rec record) (ids []store.ID) {
	var owners []unpack.IDMap
	for _, id := range rec.Trees {
		owners = append(owners, id.Owners)
	}
	if o, err := p.owners(pod, c); err == nil {
		owners = append(owners, o)
	}
	if len(owners) == 0 {
		owners = []unpack.IDMap{{}}
	}
	for _, m := range c.GetMounts() {
		for _, o := range owners {
			if id, ok := p.Store.MountedAt(m.GetSource(), o); ok {
				if !slices.Contains(ids, id) {
					ids = append(ids, id)
				}
				break
			}
		}
	}
	return ids
}
