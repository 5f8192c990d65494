// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package csi

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	csiapi "github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/log"
	"github.com/moby/sys/mountinfo"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
	"github.com/artifact-snapshotter/artifact-snapshotter/pull"
	"github.com/artifact-snapshotter/artifact-snapshotter/pull/credentials"
	"github.com/artifact-snapshotter/artifact-snapshotter/store"
	"github.com/artifact-snapshotter/artifact-snapshotter/unpack"
)

// NodeGetCapabilities implements the Node service.
func (d *Driver) NodeGetCapabilities(context.Context, *csiapi.NodeGetCapabilitiesRequest) (*csiapi.NodeGetCapabilitiesResponse, error) {
	return &csiapi.NodeGetCapabilitiesResponse{Capabilities: []*csiapi.NodeServiceCapability{{
		Type: &csiapi.NodeServiceCapability_Rpc{Rpc: &csiapi.NodeServiceCapability_RPC{Type: csiapi.NodeServiceCapability_RPC_GET_VOLUME_STATS}},
	}}}, nil
}

// NodeGetInfo implements the Node service.
func (d *Driver) NodeGetInfo(context.Context, *csiapi.NodeGetInfoRequest) (*csiapi.NodeGetInfoResponse, error) {
	return &csiapi.NodeGetInfoResponse{NodeId: d.Node}, nil
}

// NodePublishVolume implements the Node service. It waits until the volume is there, or until
// just before the deadline of ctx.
func (d *Driver) NodePublishVolume(ctx context.Context, req *csiapi.NodePublishVolumeRequest) (*csiapi.NodePublishVolumeResponse, error) {
	began := time.Now()
	v, err := parse(req)
	if err != nil {
		return nil, toStatus(err)
	}
	logger := log.G(ctx).WithFields(log.Fields{"reference": v.reference.String(), "pod": v.pod, "volume": v.id})
	ctx = log.WithLogger(ctx, logger)
	end, ok := d.begin(v.target)
	if !ok {
		return nil, status.Errorf(codes.Aborted, "another call is at work on %s", v.target)
	}
	defer end()
	err = d.publish(ctx, &v)
	switch {
	case err == nil:
		logger.WithField("duration", time.Since(began)).Info("published a volume")
	case isUnfinished(err):
		logger.WithError(err).Info("a volume has to wait")
	default:
		logger.WithError(err).Warn("refused a volume")
	}
	if err != nil {
		return nil, toStatus(err)
	}
	return &csiapi.NodePublishVolumeResponse{}, nil
}

// publish mounts the volume at its target, unless it is there.
func (d *Driver) publish(ctx context.Context, v *volume) error {
	mounted, err := isMounted(v.target)
	if err != nil {
		return err
	}
	rec, known := d.records.get(v.target)
	switch {
	case mounted && known && (rec.Volume != v.id || rec.Reference != v.reference.String()):
		return fmt.Errorf("%s is published at %s already, as volume %q: %w", rec.Reference, v.target, rec.Volume, errdefs.ErrAlreadyExists)
	case mounted && known:
		return nil
	case mounted: // its record was lost, so its tree may be
		if err := unmount(v.target); err != nil {
			return err
		}
	}
	holding, cancel := d.holding(ctx)
	defer cancel()
	target, err := d.pull(holding, v)
	if err != nil {
		return err
	}
	a, err := artifact.Read(ctx, d.Puller.Dir(), target)
	if err != nil {
		return err
	}
	rec = record{Target: v.target, Volume: v.id, Reference: v.reference.String(), Pod: v.uid}
	for _, l := range a.Layers {
		rec.Bytes += l.Descriptor.Size
	}
	ref, err := d.mount(holding, v, target, &rec)
	if err != nil {
		return err
	}
	if err := bind(ref.Path, v.target); err != nil {
		err = errors.Join(err, d.records.remove(v.target))
		ref.Release()
		return err
	}
	ref.Listed() // the record protects the tree from now on
	return nil
}

// pull pulls the artifact of the volume with the credentials of the pod, then those of the node.
func (d *Driver) pull(ctx context.Context, v *volume) (ocispec.Descriptor, error) {
	r := pull.Request{Reference: v.reference, Policy: v.policy, Credentials: v.secret.For(v.reference)}
	node, err := credentials.Read(d.DockerConfig)
	if err != nil {
		log.G(ctx).WithError(err).Warn("the node's credentials cannot be read")
	}
	r.Credentials = append(r.Credentials, node.For(v.reference)...)
	target, err := d.Puller.Pull(ctx, r)
	if errors.Is(err, artifact.ErrNotArtifact) {
		err = fmt.Errorf("%s is a container image: use a volume with image: instead of csi: (%v): %w", v.reference, err, errdefs.ErrInvalidArgument)
	}
	return target, err
}

// mount mounts the tree of the artifact, and writes the record. The store answers within 20
// seconds, because other front ends need that; here there is more time.
func (d *Driver) mount(ctx context.Context, v *volume, target ocispec.Descriptor, rec *record) (*store.Reference, error) {
	for {
		ref, err := d.Store.MountVolume(ctx, &store.Volume{Sandbox: cmp.Or(v.uid, v.id), Hex: target.Digest.Encoded(), Target: target},
			func(_ context.Context, ref *store.Reference) error {
				rec.Tree = ref.ID
				return d.records.add(*rec)
			})
		if _, unfinished := errors.AsType[*store.UnfinishedError](err); !unfinished || ctx.Err() != nil {
			return ref, err
		}
	}
}

// NodeUnpublishVolume implements the Node service.
func (d *Driver) NodeUnpublishVolume(ctx context.Context, req *csiapi.NodeUnpublishVolumeRequest) (*csiapi.NodeUnpublishVolumeResponse, error) {
	if req.GetVolumeId() == "" {
		return nil, toStatus(invalid("volume_id is missing"))
	}
	target, err := checkPath("target_path", req.GetTargetPath())
	if err != nil {
		return nil, toStatus(err)
	}
	end, ok := d.begin(target)
	if !ok {
		return nil, status.Errorf(codes.Aborted, "another call is at work on %s", target)
	}
	defer end()
	rec, known := d.records.get(target)
	if err := unmount(target); err != nil {
		return nil, toStatus(err)
	}
	// The record goes last, so that a call that fails before is made again.
	if err := d.records.remove(target); err != nil {
		return nil, toStatus(err)
	}
	if known {
		log.G(ctx).WithFields(log.Fields{"reference": rec.Reference, "artifact": rec.Tree.Manifest, "volume": rec.Volume}).Info("unpublished a volume")
		d.Store.Wake()
	}
	return &csiapi.NodeUnpublishVolumeResponse{}, nil
}

// NodeGetVolumeStats implements the Node service. A volume takes what the blobs of its artifact
// take, which all volumes of the artifact share; nothing can be added to it.
func (d *Driver) NodeGetVolumeStats(_ context.Context, req *csiapi.NodeGetVolumeStatsRequest) (*csiapi.NodeGetVolumeStatsResponse, error) {
	if req.GetVolumeId() == "" {
		return nil, toStatus(invalid("volume_id is missing"))
	}
	path := req.GetVolumePath()
	if path == "" {
		return nil, toStatus(invalid("volume_path is missing"))
	}
	path = filepath.Clean(path)
	rec, known := d.records.get(path)
	mounted, err := isMounted(path)
	if err != nil {
		return nil, toStatus(err)
	}
	if !known || !mounted || rec.Volume != req.GetVolumeId() {
		return nil, status.Errorf(codes.NotFound, "no volume %q is published at %s", req.GetVolumeId(), path)
	}
	return &csiapi.NodeGetVolumeStatsResponse{Usage: []*csiapi.VolumeUsage{
		{Unit: csiapi.VolumeUsage_BYTES, Total: rec.Bytes, Used: rec.Bytes},
	}}, nil
}

// bind mounts the shared mount at target. kubelet has made the directory above it.
func bind(source, target string) error {
	if err := os.MkdirAll(target, 0o750); err != nil {
		return fmt.Errorf("make the directory of the volume: %w", err)
	}
	m := unpack.Bind(source)
	if err := m.Mount(target); err != nil {
		return fmt.Errorf("mount the volume at %s: %w", target, errors.Join(err, unmount(target)))
	}
	return nil
}

// unmount removes all mounts at target, and the directory.
func unmount(target string) error {
	if err := mount.UnmountAll(target, unix.UMOUNT_NOFOLLOW); err != nil {
		return fmt.Errorf("unmount %s: %w", target, err)
	}
	if err := os.Remove(target); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove the directory of the volume: %w", err)
	}
	return nil
}

func isMounted(target string) (bool, error) {
	mounted, err := mountinfo.Mounted(target)
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("cannot tell whether %s is mounted: %w", target, err)
	}
	return mounted, nil
}

func isUnfinished(err error) bool {
	_, pulling := errors.AsType[*pull.UnfinishedError](err)
	_, building := errors.AsType[*store.UnfinishedError](err)
	return pulling || building
}

// toStatus returns the error of gRPC. kubelet puts its text into an event of the pod.
func toStatus(err error) error {
	if isUnfinished(err) {
		return status.Error(codes.DeadlineExceeded, err.Error())
	}
	// Without the details that errgrpc adds: the body of a registry's answer, for example.
	return status.Error(status.Code(errgrpc.ToGRPC(err)), err.Error())
}
