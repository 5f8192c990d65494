// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package images

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
)

// Check returns errdefs.ErrFailedPrecondition if CRI may mount another image in place of
// the one whose manifest or index is target: the namespace has an image with the same
// config and another manifest, and one of the two is an artifact. It returns
// errdefs.ErrUnavailable if this is unknown, because containerd does not answer in time or
// an image that may have the config cannot be read.
//
// CRI may ask for another image than the pod does, and for one that is long known. So
// Check waits until it knows everything that CRI knew when CRI asked: until an event comes
// back that was published after Check was called.
func (w *Watcher) Check(ctx context.Context, namespace string, target digest.Digest) error {
	number := w.ask()
	deadline := time.After(w.patience())
	for {
		known, changed, broken := w.look(namespace, number)
		if broken == nil {
			return w.judge(ctx, known, target)
		}
		select {
		case <-changed:
		case <-deadline:
			return broken
		case <-ctx.Done():
			return fmt.Errorf("containerd (containerd_address = %q) has not said in time which images it has, so the runtime might mount the wrong one; try again: %w", w.address, ctx.Err())
		}
	}
}

// patience returns how long to wait now.
func (w *Watcher) patience() time.Duration {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.known == nil && time.Since(w.lost) > w.checkWait {
		return w.lateWait
	}
	return w.checkWait
}

// look returns the images of the namespace if they are known as of the hello event with
// that number. Otherwise it returns the reason, and a channel that is closed on a change.
// The caller reads the catalog under w.mu, because events change it.
func (w *Watcher) look(namespace string, number int) (known *catalog, changed <-chan struct{}, broken error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.known == nil || w.seen < number {
		return nil, w.changed, unknown(w.broken)
	}
	return w.known[namespace], nil, nil
}

// unknown is the error of Check if the images are unknown because of why, which may be nil.
func unknown(why error) error {
	switch {
	case why == nil:
		why = fmt.Errorf("containerd has not answered yet: %w", errdefs.ErrUnavailable)
	case !errdefs.IsUnavailable(why):
		why = fmt.Errorf("%v: %w", why, errdefs.ErrUnavailable)
	}
	return fmt.Errorf("containerd's images are unknown, so the runtime might mount the wrong one; check containerd_address in the snapshotter's configuration: %w", why)
}

// judge is Check for the images that are known.
func (w *Watcher) judge(ctx context.Context, known *catalog, target digest.Digest) error {
	undecided := w.readAgain(ctx, known)
	w.mu.Lock()
	image := known.find(target)
	w.mu.Unlock()
	if image == nil { // it has just been deleted, for example
		read := w.identify(ctx, images.Image{Target: ocispec.Descriptor{Digest: target}})
		image = &read
		if image.undecided != nil {
			undecided = append(undecided, *image)
		}
	}
	for _, other := range undecided {
		if !w.excluded(ctx, known, other, image.Config) {
			return fmt.Errorf("the config of image %q (%s) cannot be read, so the runtime might mount it in place of another image; remove it if this lasts: %v: %w", other.Name, other.Target.Digest, other.undecided, errdefs.ErrUnavailable)
		}
	}
	w.mu.Lock()
	same := known.withConfig(image.Config)
	w.mu.Unlock()
	return refuse(*image, same)
}

// excluded reports whether an image whose config is unknown has another one than this, so that
// one image of somebody's does not make all volumes unavailable.
func (w *Watcher) excluded(ctx context.Context, known *catalog, undecided Image, config digest.Digest) bool {
	if config == "" || !errors.Is(undecided.undecided, artifact.ErrTooLarge) {
		return false
	}
	key := [2]digest.Digest{undecided.Target.Digest, config}
	w.mu.Lock()
	excluded, asked := known.isExcluded(key), known.undecidedAs(undecided.Name)
	w.mu.Unlock()
	if excluded {
		return true
	}
	may, err := artifact.MayHaveConfig(ctx, w.blobs, undecided.Target, config)
	if may || err != nil {
		return false
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if asked != nil && known.undecidedAs(undecided.Name) == asked { // no event has come meanwhile
		known.excluded[key] = true
	}
	return true
}

// readAgain looks for the configs that could not be found, and returns the images whose
// config is still unknown.
func (w *Watcher) readAgain(ctx context.Context, known *catalog) (undecided []Image) {
	w.mu.Lock()
	again := known.toReadAgain()
	w.mu.Unlock()
	for _, old := range again {
		now := w.identify(ctx, old.Image)
		if now.undecided != nil {
			undecided = append(undecided, now)
			continue
		}
		w.replace(known, old, now)
	}
	return undecided
}

// replace replaces an image, unless an event has replaced or removed it meanwhile.
func (w *Watcher) replace(known *catalog, old *Image, now Image) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if known.byName[old.Name] == old {
		known.put(now)
	}
}

// WatcherStats counts what a Watcher knows.
type WatcherStats struct {
	// Connected reports whether containerd's images are known. If not, volumes of
	// artifacts are refused, and the counts are 0.
	Connected bool
	// Artifacts is the number of artifacts in all namespaces, and Conflicts the number of
	// those that are refused because the runtime may mount another image in their place.
	Artifacts, Conflicts int
}

// Stats returns the counts at this moment.
func (w *Watcher) Stats() WatcherStats {
	w.mu.Lock()
	stats := WatcherStats{Connected: w.known != nil}
	var known [][]*Image
	for _, images := range w.known {
		known = append(known, images.all())
	}
	w.mu.Unlock()
	for _, images := range known {
		sharing := sharings(images)
		counted := map[digest.Digest]bool{}
		for _, i := range images {
			if i.Config == "" || i.container || counted[i.Manifest] {
				continue
			}
			counted[i.Manifest] = true
			stats.Artifacts++
			if sharing[i.Config].others(*i) > 0 {
				stats.Conflicts++
			}
		}
	}
	return stats
}

// Name returns the best name that the namespace has for the image with that target: a tag
// if there is one. It returns "" if there is none.
func (w *Watcher) Name(namespace string, target digest.Digest) string {
	w.mu.Lock()
	defer w.mu.Unlock()
	var images []Image
	for _, i := range w.known[namespace].withTarget(target) {
		if !i.IsID() {
			images = append(images, *i)
		}
	}
	var names []string
	for _, i := range Named(images) {
		names = append(names, i.Name)
	}
	if len(names) == 0 {
		return ""
	}
	return slices.Min(names)
}
