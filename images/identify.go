// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package images

import (
	"context"
	"errors"
	"syscall"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/log"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
)

// identify returns the image with the digests by which CRI identifies it, as far as they
// can be found.
func identify(ctx context.Context, blobs content.Provider, i images.Image) Image {
	image := Image{Image: i}
	manifest, config, err := artifact.Identify(ctx, blobs, i.Target)
	if err != nil {
		log.G(ctx).WithError(err).WithField("image", i.Name).Debug("cannot find the config of an image")
		image.undecided = temporary(err)
		return image
	}
	image.Manifest, image.Config = manifest, config.Digest
	image.container = artifact.IsImageConfig(config.MediaType)
	return image
}

// temporary returns err if CRI may know a config although we do not: the image is too large
// for us, or the error says nothing about the image.
func temporary(err error) error {
	var errno syscall.Errno
	if errors.As(err, &errno) || errors.Is(err, artifact.ErrTooLarge) || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return nil
}
