// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"context"
	"slices"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
)

// Check returns the error with which [Build] refuses the files that the manifest names, before
// any of their blobs exists: for example two files with one path. What is in archives it
// cannot know.
func Check(ctx context.Context, a *artifact.Artifact) error {
	p := newPlan(a.Created, a.Layers)
	archives := slices.ContainsFunc(a.Layers, isDetected)
	return each(ctx, a.Layers, func(l artifact.Layer) error {
		if l.Format != artifact.FormatRaw {
			return nil
		}
		if l.Descriptor.Size == 0 {
			if err := checkEmpty(l); err != nil {
				return err
			}
		}
		if archives { // which may replace what is in the way of a file, but not one raw layer by another
			return p.claimRaw(l)
		}
		return p.placeRaw(l, &node{kind: regular, layer: l.Index, bytes: extent{size: l.Descriptor.Size}})
	})
}
