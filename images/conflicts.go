// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package images

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Sharing is the images of a namespace that have one config, which CRI takes for one
// image (internal/cri/store/image of containerd), so that a pod may be shown any of
// them for any other: see [Watcher.Check].
type Sharing struct {
	// Images are those that have a name of their own, which [Image.IsID] is not: CRI
	// takes an image by its ID only if it has no other name.
	Images []*Image

	all        counts
	ofManifest map[digest.Digest]counts
}

// counts are of images: all, and those that are no ordinary ones.
type counts struct{ images, artifacts int }

// sharings are the images by their configs.
func sharings(all []*Image) map[digest.Digest]*Sharing {
	sharing := map[digest.Digest]*Sharing{}
	for _, i := range all {
		if i.Artifact == nil {
			continue
		}
		if sharing[i.Artifact.Config] == nil {
			sharing[i.Artifact.Config] = &Sharing{ofManifest: map[digest.Digest]counts{}}
		}
		sharing[i.Artifact.Config].add(i)
	}
	return sharing
}

func (s *Sharing) add(i *Image) {
	if i.IsID() {
		return
	}
	manifest := s.ofManifest[i.Artifact.Manifest.Digest]
	for _, c := range []*counts{&s.all, &manifest} {
		c.images++
		if !i.ordinary {
			c.artifacts++
		}
	}
	s.ofManifest[i.Artifact.Manifest.Digest] = manifest
	s.Images = append(s.Images, i)
}

// With returns the first images that CRI may take for i, which has the config, at most
// limit, and how many more there are. Ordinary images are no danger to each other. Of
// nil there are none.
func (s *Sharing) With(i Image, limit int) (some []Image, more int) {
	all := s.others(i)
	if all == 0 {
		return nil, 0
	}
	for _, other := range s.Images {
		if len(some) == min(limit, all) {
			break
		}
		if !i.sameManifest(other) && (!i.ordinary || !other.ordinary) {
			some = append(some, *other)
		}
	}
	return some, all - len(some)
}

// others is how many images CRI may take for i.
func (s *Sharing) others(i Image) int {
	if s == nil {
		return 0
	}
	same := s.ofManifest[i.Artifact.Manifest.Digest]
	if i.ordinary {
		return s.all.artifacts - same.artifacts
	}
	return s.all.images - same.images
}

// Check returns errdefs.ErrFailedPrecondition if the runtime may take another image
// for the one whose manifest or index is target: the namespace has another one with
// the same config, and one of the two is an artifact. Before the images of a
// containerd that has just started are known it waits, and in the end returns
// errdefs.ErrUnavailable.
//
// CRI may ask for another image than the pod does, and one that has been known for
// long. So Check waits until all is known that CRI knew when it asked: until an event
// has come back that was published after Check was called.
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
			return fmt.Errorf("containerd (containerd_address = %q) has not said in time which images there are, so this might be the wrong one; try again: %w", w.address, ctx.Err())
		}
	}
}

// WatcherStats is what a Watcher knows.
type WatcherStats struct {
	// Connected tells that containerd's images are known. Else volumes of artifacts are
	// refused, and the following are 0.
	Connected bool
	// Artifacts is how many artifacts there are in all namespaces, and Conflicts how
	// many of them are refused because the runtime may take them for others.
	Artifacts, Conflicts int
}

// Stats counts what is known at this moment.
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
			if i.Artifact == nil || i.ordinary || counted[i.Artifact.Manifest.Digest] {
				continue
			}
			counted[i.Artifact.Manifest.Digest] = true
			stats.Artifacts++
			if sharing[i.Artifact.Config].others(*i) > 0 {
				stats.Conflicts++
			}
		}
	}
	return stats
}

// Name returns the best name that the namespace has for the image with that target:
// a tag, if there is one. It is "" if none is known.
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

// warn says that an artifact which has just come is in conflict with others.
func (w *Watcher) warn(ctx context.Context, namespace string, image Image) {
	if image.Artifact == nil {
		return
	}
	w.mu.Lock()
	same := w.known[namespace].withConfig(image.Artifact.Config)
	w.mu.Unlock()
	if err := refuse(image, same); err != nil {
		log.G(ctx).WithError(err).WithField("namespace", namespace).WithField("image", image.Name).
			Warn("An image is in conflict with others: image volumes of them are refused")
	}
}

// sameManifest reports whether two images stand for one manifest.
func (i Image) sameManifest(other *Image) bool {
	return i.Artifact != nil && other.Artifact != nil && i.Artifact.Manifest.Digest == other.Artifact.Manifest.Digest
}

// judge is the answer of Check if known are the images of the namespace, or later ones.
func (w *Watcher) judge(ctx context.Context, known *catalog, target digest.Digest) error {
	w.mu.Lock()
	image, again := known.find(target), known.again()
	w.mu.Unlock()
	if image == nil { // deleted meanwhile, say
		unknown := readAny(ctx, w.blobs, images.Image{Target: ocispec.Descriptor{Digest: target}})
		image = &unknown
	}
	var read []*Image
	for _, i := range again {
		now := readAny(ctx, w.blobs, i.Image)
		if i == image {
			image = &now
		}
		read = append(read, &now)
	}
	for _, i := range append(slices.Clone(read), image) {
		if i.unread != nil && i.Artifact == nil {
			return fmt.Errorf("image %q (%s) cannot be read to see whether the runtime may take it for another; remove it, if that stays so: %v: %w", i.Name, i.Target.Digest, i.unread, errdefs.ErrUnavailable)
		}
	}
	if image.Artifact == nil {
		return nil
	}
	w.mu.Lock()
	same := known.withConfig(image.Artifact.Config)
	w.mu.Unlock()
	same = slices.DeleteFunc(same, func(i *Image) bool { return slices.Contains(again, i) })
	for _, i := range read {
		if i.Artifact != nil && i.Artifact.Config == image.Artifact.Config {
			same = append(same, i)
		}
	}
	return refuse(*image, same)
}

// patience is how long to wait now.
func (w *Watcher) patience() time.Duration {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.known == nil && time.Since(w.lost) > w.checkWait {
		return w.lateWait
	}
	return w.checkWait
}

// unknown is the error if the images are not known, because of why if that is known.
func unknown(why error) error {
	switch {
	case why == nil:
		why = fmt.Errorf("containerd has not answered yet: %w", errdefs.ErrUnavailable)
	case !errdefs.IsUnavailable(why):
		why = fmt.Errorf("%v: %w", why, errdefs.ErrUnavailable)
	}
	return fmt.Errorf("it is not known which images there are, so that this might be the wrong one; check containerd_address in the snapshotter's configuration: %w", why)
}

// look returns the images of the namespace if they are known as of the hello event with
// that number, and what tells of a change; or else why they are not. What it returns is
// looked at under w.mu: events change it, until the connection breaks.
func (w *Watcher) look(namespace string, number int) (known *catalog, changed <-chan struct{}, broken error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.known == nil || w.seen < number {
		return nil, w.changed, unknown(w.broken)
	}
	return w.known[namespace], nil, nil
}

// refuse returns an error if the image is in conflict with one of those that have its
// config.
func refuse(image Image, same []*Image) error {
	if len(same) == 0 || image.Artifact == nil {
		return nil
	}
	if sharing := sharings(same)[image.Artifact.Config]; sharing.others(image) > 0 {
		return sharing.conflict(image)
	}
	return nil
}

// conflict is the error for an image that is in conflict with others.
func (s *Sharing) conflict(image Image) error {
	// One name for each artifact: the first is a tag, if there is one.
	var first []*Image // in the order of the names
	for _, i := range s.Images {
		same := slices.IndexFunc(first, i.sameManifest)
		switch {
		case same >= 0 && first[same].Name <= i.Name:
			continue
		case same >= 0:
			first = slices.Delete(first, same, same+1)
		case len(first) == maxNamed && first[maxNamed-1].Name <= i.Name:
			continue
		}
		at, _ := slices.BinarySearchFunc(first, i.Name, func(i *Image, name string) int { return strings.Compare(i.Name, name) })
		first = slices.Insert(first, at, i)
		first = first[:min(len(first), maxNamed)]
	}
	var names []string
	for _, i := range first {
		names = append(names, fmt.Sprintf("%s (%s)", quote(i.Name), short(i.Artifact.Manifest.Digest)))
	}
	if more := len(s.ofManifest) - len(names); more > 0 {
		names = append(names, fmt.Sprintf("and %d more", more))
	}
	config, what := image.Artifact.Config, "artifact"
	if image.ordinary {
		what = "image"
	}
	return fmt.Errorf("%s %s has the same config, %s, as another one, and the runtime takes images with one config for one image, so that the volume might show the other: %s; give each a config of its own, or remove them all with `crictl rmi %s` and pull again the one that is needed: %w",
		what, short(image.Artifact.Manifest.Digest), short(config), strings.Join(names, ", "), config.Encoded()[:12], errdefs.ErrFailedPrecondition)
}

// quote is the name in quotes; of one that is too long the beginning and the end, where
// the registry and the tag are.
func quote(name string) string {
	quoted := strconv.Quote(name)
	if len(quoted) <= maxNameBytes {
		return quoted
	}
	half := maxNameBytes / 2
	return strings.ToValidUTF8(quoted[:half], "") + "…" + strings.ToValidUTF8(quoted[len(quoted)-half:], "")
}

// short is a digest for people: what they compare it with is shortened, too.
func short(d digest.Digest) string {
	return d.Algorithm().String() + ":" + d.Encoded()[:12]
}
