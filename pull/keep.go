// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package pull

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"
)

// The labels of an image that say whether it stays.
const (
	// labelUsed is when the image was last asked for, in seconds of the Unix epoch.
	labelUsed = "artifact-snapshotter.dev/used"
	// labelPinned marks an image that stays until somebody removes it.
	labelPinned = "artifact-snapshotter.dev/pinned"
)

// Retention says which artifacts stay on the node.
type Retention struct {
	// High and Low are percentages of the file system. Over High, artifacts are removed until
	// it is under Low, the longest unused first.
	High, Low int
	// MaxAge is how long an artifact stays that nobody uses; 0 is for ever.
	MaxAge time.Duration
}

// DefaultRetention is the retention of kubelet for images, without an age.
var DefaultRetention = Retention{High: 85, Low: 80}

// Protect makes the references that names lists stay, whatever the retention is: they are in
// use. It must be called before Run and Pull.
func (p *Puller) Protect(names func() []string) { p.inUse = append(p.inUse, names) }

// touch notes that the image is used now. An hour more or less does not matter, and each note is
// a write to the disk.
func (p *Puller) touch(ctx context.Context, image images.Image) {
	if time.Since(used(image)) < time.Hour {
		return
	}
	image.Labels = map[string]string{labelUsed: strconv.FormatInt(time.Now().Unix(), 10)}
	if _, err := p.images.Update(ctx, image, "labels."+labelUsed); err != nil && !errdefs.IsNotFound(err) {
		log.G(ctx).WithError(err).Warn("cannot note that an artifact is used")
	}
}

func used(image images.Image) time.Time {
	seconds, err := strconv.ParseInt(image.Labels[labelUsed], 10, 64)
	if err != nil {
		return image.UpdatedAt
	}
	return time.Unix(seconds, 0)
}

// fileSystem returns the size of the file system, and how much of it is free, in bytes.
func (p *Puller) fileSystem() (size, free int64, err error) {
	var fs unix.Statfs_t
	if err := unix.Statfs(p.root, &fs); err != nil {
		return 0, 0, fmt.Errorf("the free space of %s: %w", p.root, err)
	}
	return int64(fs.Blocks) * fs.Bsize, int64(fs.Bavail) * fs.Bsize, nil
}

// retain removes artifacts that nobody uses: those that are too old and, if the file system is
// too full, the longest unused.
func (p *Puller) retain(ctx context.Context) error {
	size, free, err := p.fileSystem()
	if err != nil {
		return err
	}
	want := int64(0)
	if free < size/100*int64(100-p.retention.High) {
		want = size / 100 * int64(100-p.retention.Low)
	}
	return p.evict(ctx, want)
}

// evict removes artifacts that nobody uses until so many bytes are free, and in any case those
// that are too old.
func (p *Puller) evict(ctx context.Context, want int64) error {
	all, err := p.images.List(ctx)
	if err != nil {
		return err
	}
	kept := map[string]bool{}
	for _, names := range p.inUse {
		for _, name := range names() {
			kept[name] = true
		}
	}
	slices.SortFunc(all, func(a, b images.Image) int { return used(a).Compare(used(b)) })
	for _, image := range all {
		_, free, err := p.fileSystem()
		if err != nil {
			return err
		}
		unused := time.Since(used(image))
		tooOld := p.retention.MaxAge > 0 && unused > p.retention.MaxAge
		if free >= want && !tooOld || kept[image.Name] || image.Labels[labelPinned] != "" {
			continue
		}
		log.G(ctx).WithFields(log.Fields{"reference": image.Name, "unused": unused.Round(time.Second), "free": free, "wanted": want}).Info("removing an artifact that nobody uses")
		if err := p.images.Delete(ctx, image.Name); err != nil && !errdefs.IsNotFound(err) {
			return err
		}
		p.soil()
		p.observer.Removed()
		// A pod that begins to use it meanwhile has a tree with links to the blobs, or pulls
		// it again.
		if err := p.CollectGarbage(ctx); err != nil {
			return err
		}
	}
	return nil
}
