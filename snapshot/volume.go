// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package snapshot

import (
	"context"
	"errors"
	"maps"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/tracing"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
	"github.com/artifact-snapshotter/artifact-snapshotter/store"
)

// volume is the image volume that a key asks for. Only namespace may be "".
type volume struct {
	namespace, sandbox, hex string
	target                  digest.Digest // whose encoded form is hex; "" until it has been found
}

// parseVolume is nil if the key is that of no image volume.
func parseVolume(key string) *volume {
	m := imageVolume.FindStringSubmatch(key)
	if m == nil {
		return nil
	}
	return &volume{namespace: m[1], sandbox: m[2], hex: m[3]}
}

// VolumeSandbox returns the ID of the pod's sandbox for which containerd's CRI plugin
// uses the key, as a proxy snapshotter sees it; false if it is not the key of an
// image volume.
func VolumeSandbox(key string) (sandbox string, ok bool) {
	v := parseVolume(key)
	if v == nil {
		return "", false
	}
	return v.sandbox, true
}

// context gives all that is logged in it the pod's sandbox.
func (v *volume) context(ctx context.Context) context.Context {
	return log.WithLogger(ctx, log.G(ctx).WithFields(log.Fields{"sandbox": v.sandbox, "namespace": v.namespace}))
}

// asked begins to serve a request for v, which may be nil. What it returns tells how
// it ended, in the log and in the trace.
func (s *snapshotter) asked(ctx context.Context, v *volume) (context.Context, func(*store.Reference, error)) {
	if v == nil {
		return ctx, func(*store.Reference, error) {}
	}
	began := time.Now()
	ctx, span := tracing.StartSpan(v.context(ctx), "volume.prepare",
		tracing.WithAttribute("sandbox", v.sandbox), tracing.WithAttribute("target", v.hex))
	return ctx, func(shown *store.Reference, err error) {
		defer span.End()
		switch {
		case err == nil:
			s.logShown(ctx, v, shown, time.Since(began))
		case errors.Is(err, artifact.ErrNotArtifact): // it is served by overlayfs
		case errdefs.IsAlreadyExists(err): // another container of the pod has it, too
		default:
			span.SetStatus(err)
			s.logRefused(ctx, v, err)
		}
	}
}

func (s *snapshotter) logShown(ctx context.Context, v *volume, shown *store.Reference, took time.Duration) {
	f := log.Fields{"artifact": shown.ID.Manifest, "duration": took, "raw": shown.Modes.Raw, "tar": shown.Modes.Tar}
	if shown.Built != nil {
		maps.Copy(f, shown.Built.Fields())
	}
	s.logger(ctx, v).WithFields(f).Info("shown an image volume")
}

// logger names the image, if its name is known.
func (s *snapshotter) logger(ctx context.Context, v *volume) *log.Entry {
	if s.images == nil || v.target == "" {
		return log.G(ctx)
	}
	if name := s.images.Name(v.namespace, v.target); name != "" {
		return log.G(ctx).WithField("image", name)
	}
	return log.G(ctx)
}

func (s *snapshotter) logRefused(ctx context.Context, v *volume, err error) {
	logger := s.logger(ctx, v).WithError(err).WithField("target", v.hex)
	if _, ok := errors.AsType[*store.UnfinishedError](err); ok {
		logger.Info("an image volume has to wait")
		return
	}
	logger.Warn("refused an image volume")
}

// dropping is to be called before the snapshot key is removed, and what it returns
// when it has been.
func (s *snapshotter) dropping(ctx context.Context, key string) (dropped func()) {
	v := parseVolume(key)
	if v == nil {
		return func() {}
	}
	info, err := s.Stat(ctx, key)
	id, ok := shown(info)
	if err != nil || !ok || info.Kind == snapshots.KindCommitted {
		return func() {}
	}
	return func() {
		log.G(v.context(ctx)).WithField("artifact", id.Manifest).Info("dropped an image volume")
	}
}
