// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package store

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"time"

	"github.com/containerd/containerd/v2/pkg/tracing"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
	"github.com/artifact-snapshotter/artifact-snapshotter/unpack"
)

// Images is what is known of the runtime's images. It must not call the runtime.
type Images interface {
	// Check returns an error if the runtime may have taken another image for the one
	// whose manifest or index is target, in a namespace of containerd's.
	Check(ctx context.Context, namespace string, target digest.Digest) error
	// Name returns a name of the image with that target, for people; "" if none is known.
	Name(namespace string, target digest.Digest) string
}

// CheckError is an error of Images.Check: the volume may be that of another image.
type CheckError struct{ Err error }

// Error implements error.
func (e *CheckError) Error() string { return e.Err.Error() }

// Unwrap returns the error of Images.Check.
func (e *CheckError) Unwrap() error { return e.Err }

// Unpacked says whether the runtime has unpacked layers for an image volume by itself. It
// does so for images, and not for artifacts, whose config it does not know.
type Unpacked int

const (
	// NotUnpacked is an artifact, or an image without layers.
	NotUnpacked Unpacked = iota
	// MaybeUnpacked means that the front end cannot see what the runtime has unpacked.
	MaybeUnpacked
	// IsUnpacked is an image, or an artifact whose config lists the DiffIDs of some layers.
	IsUnpacked
)

// Volume is a request of a pod for an image volume, which may be that of an artifact or of
// an image.
type Volume struct {
	// Namespace is containerd's namespace of the image. If it is "", the image is not
	// containerd's, and Images is not asked.
	Namespace string
	// Sandbox is the ID of the pod's sandbox.
	Sandbox string
	// Hex is the encoded digest of the image's target, which is all that containerd's CRI
	// plugin says of it.
	Hex string
	// Target is the image's manifest or index; MountVolume finds it by Hex if it is not set.
	Target ocispec.Descriptor
	// Owners is the user namespace of the pod.
	Owners unpack.IDMap
	// Unpacked says what the runtime has made of the image.
	Unpacked Unpacked
	// Refused, if it is not nil, is why the volume cannot be mounted if it is that of an
	// artifact; without Hex and Target, whatever it is.
	Refused error
}

// volumePath matches the path at which containerd's CRI plugin mounts an image volume
// (internal/cri/server/container_image_mount.go), and whatever is below it. The path is
// also the key of the volume's snapshot, which a proxy snapshotter sees behind the
// namespace and a number (core/metadata/snapshot.go, createKey).
var volumePath = regexp.MustCompile(`^(?:([^/]+)/\d+/)?/(?:.*?/)?image-volumes/([^/]+)/([0-9a-f]{64}|[0-9a-f]{96}|[0-9a-f]{128})(?:/(.*))?$`)

// ParseVolume returns the image volume of containerd's CRI plugin that is at the path, or
// whose snapshot has it as its key, and the path below the volume. ok is false if it is
// neither.
func ParseVolume(path string) (v Volume, sub string, ok bool) {
	m := volumePath.FindStringSubmatch(path)
	if m == nil {
		return v, "", false
	}
	return Volume{Namespace: m[1], Sandbox: m[2], Hex: m[3]}, m[4], true
}

// MountVolume mounts the artifact that the volume is of. accept records that it is in use,
// as a References lists it; if it fails, so does MountVolume. On success the caller must
// end the Reference with Listed or Release.
//
// An image is artifact.ErrNotArtifact; it is the runtime's, and there is nothing in the log
// about it, as there is nothing if accept returns errdefs.ErrAlreadyExists.
func (s *Store) MountVolume(ctx context.Context, v *Volume, accept func(context.Context, *Reference) error) (ref *Reference, err error) {
	began := time.Now()
	ctx, span := tracing.StartSpan(v.WithLogger(ctx), "volume.mount",
		tracing.WithAttribute("sandbox", v.Sandbox), tracing.WithAttribute("target", v.Hex))
	defer func() {
		if !errors.Is(err, artifact.ErrNotArtifact) && !errdefs.IsAlreadyExists(err) {
			span.SetStatus(err)
			s.answered(ctx, v, ref, time.Since(began), err)
		}
		span.End()
	}()
	// One budget for all that the request waits for: the runtime's images and the tree.
	waiting, cancel := context.WithTimeout(ctx, MaxWait)
	defer cancel()
	if err := s.identify(waiting, v); err != nil {
		return nil, err
	}
	if ref, err = s.Acquire(waiting, v.Target, v.Owners); err != nil {
		return nil, err
	}
	if err := accept(ctx, ref); err != nil {
		ref.Release()
		return nil, err
	}
	return ref, nil
}

// identify finds the target of the volume. It returns artifact.ErrNotArtifact for an image
// of which the runtime has unpacked something: for such a volume neither the blobs nor the
// runtime's images need to be known. Where the runtime has unpacked nothing, it may have
// taken an image without layers for an artifact with the same config, so Images is asked
// about both.
func (s *Store) identify(ctx context.Context, v *Volume) (err error) {
	if v.Hex == "" && v.Target.Digest == "" {
		return cmp.Or(v.Refused, fmt.Errorf("the volume names no image: %w", errdefs.ErrInvalidArgument))
	}
	if v.Target.Digest == "" {
		found, err := s.content.Find(v.Hex)
		switch {
		case err == nil:
			v.Target = found
		case v.Unpacked == IsUnpacked:
			return isImage(ctx, err)
		default:
			return err
		}
	}
	if v.Unpacked != NotUnpacked || v.Refused != nil {
		switch _, err := s.read(ctx, v.Target); {
		case err == nil:
		case v.Unpacked != IsUnpacked, errors.Is(err, artifact.ErrNotArtifact):
			return err
		case (errdefs.IsInvalidArgument(err) || errdefs.IsNotImplemented(err)) && !s.isImageToCRI(ctx, v.Target):
			return err // an artifact that breaks a rule
		default:
			return isImage(ctx, err)
		}
	}
	if v.Namespace != "" && s.images != nil {
		if err := s.images.Check(ctx, v.Namespace, v.Target.Digest); err != nil {
			if errors.Is(err, artifact.ErrNotArtifact) {
				return err
			}
			return &CheckError{err}
		}
	}
	return v.Refused
}

// isImageToCRI reports whether CRI finds an image's config. The rules of artifacts are stricter
// than those of images: an index, for example, need not name platforms.
func (s *Store) isImageToCRI(ctx context.Context, target ocispec.Descriptor) bool {
	_, config, err := artifact.Identify(ctx, s.content, target)
	return err == nil && artifact.IsImageConfig(config.MediaType)
}

// isImage returns artifact.ErrNotArtifact for a volume that the runtime has unpacked and
// whose manifest cannot be read because of err. That is not wrong: nearly all such volumes
// are images, and the runtime, which has read the manifest, can mount them without us. The
// usual reason is a wrong content root, and then volumes of artifacts, for which the runtime
// unpacks nothing, are refused and say so.
func isImage(ctx context.Context, err error) error {
	log.G(ctx).WithError(err).Debug("cannot read the manifest of an image volume that the runtime has unpacked: it is an image")
	return artifact.ErrNotArtifact
}

// WithLogger adds the pod's sandbox, and the namespace if there is one, to all that is
// logged in the context.
func (v *Volume) WithLogger(ctx context.Context) context.Context {
	fields := log.Fields{"sandbox": v.Sandbox}
	if v.Namespace != "" {
		fields["namespace"] = v.Namespace
	}
	return log.WithLogger(ctx, log.G(ctx).WithFields(fields))
}

// answered logs and counts how a request for the volume of an artifact ended.
func (s *Store) answered(ctx context.Context, v *Volume, ref *Reference, took time.Duration, err error) {
	if s.observer.Answered != nil {
		s.observer.Answered(took, err)
	}
	if err != nil {
		s.LogRefused(ctx, v, err)
		return
	}
	f := log.Fields{"artifact": ref.ID.Manifest, "duration": took, "raw": ref.Modes.Raw, "tar": ref.Modes.Tar}
	if ref.Built != nil {
		maps.Copy(f, ref.Built.Fields())
	}
	s.logger(ctx, v).WithFields(f).Info("mounted an image volume")
}

// LogRefused logs why the volume is not mounted.
func (s *Store) LogRefused(ctx context.Context, v *Volume, err error) {
	logger := s.logger(ctx, v).WithError(err).WithField("target", v.Hex)
	if _, ok := errors.AsType[*UnfinishedError](err); ok {
		logger.Info("an image volume has to wait")
		return
	}
	logger.Warn("refused an image volume")
}

// LogUnmounted logs that the pod does not use the volume of the artifact any more.
func (v *Volume) LogUnmounted(ctx context.Context, manifest digest.Digest) {
	log.G(v.WithLogger(ctx)).WithField("artifact", manifest).Info("unmounted an image volume")
}

// logger names the image if its name is known.
func (s *Store) logger(ctx context.Context, v *Volume) *log.Entry {
	if s.images != nil && v.Namespace != "" && v.Target.Digest != "" {
		if name := s.images.Name(v.Namespace, v.Target.Digest); name != "" {
			return log.G(ctx).WithField("image", name)
		}
	}
	return log.G(ctx)
}
