// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package client

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	// checkWait is how long Check waits until it knows the images: longer than it
	// takes to reconnect to a containerd that has just started.
	checkWait = 10 * time.Second
	// lateWait is how long it waits if they have not been known for checkWait: it
	// keeps other pods waiting (see Rules in docs/design.md), and is long enough for
	// a containerd that is back after a while.
	lateWait = time.Second
	// maxNamed is how many artifacts an error names: kubelet's events are short.
	maxNamed = 8
)

// Conflicts returns, by the digest of a manifest, the images of the namespace that
// have the same config as that manifest, but another manifest, and of which one is
// an artifact. CRI takes images with one config for one image
// (internal/cri/store/image of containerd), so that a pod may be shown any of them
// for any other: see [Watcher.Check]. A manifest without such images is not in the
// map. Artifacts that [Client.Images] leaves out because they are refused count, too.
//
// Names of [Image.IsID] are not in it: CRI takes an image by its ID only if it has
// no other name.
func (c *Client) Conflicts(ctx context.Context) (map[digest.Digest][]Image, error) {
	all, err := c.list(ctx)
	if err != nil {
		return nil, err
	}
	found := readAll(c.Context(ctx), c.ContentStore(), all, map[digest.Digest]Image{})
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	byName := slices.SortedFunc(maps.Values(found), func(a, b Image) int { return strings.Compare(a.Name, b.Name) })
	return conflicts(byName), nil
}

// conflicts are the conflicts among images of one namespace, see Client.Conflicts.
func conflicts(all []Image) map[digest.Digest][]Image {
	all = slices.DeleteFunc(slices.Clone(all), func(i Image) bool { return i.Artifact == nil })
	byConfig := map[digest.Digest][]Image{}
	for _, i := range all {
		if !i.IsID() {
			byConfig[i.Artifact.Config] = append(byConfig[i.Artifact.Config], i)
		}
	}
	conflicts := map[digest.Digest][]Image{}
	for _, i := range all {
		manifest := i.Artifact.Manifest.Digest
		if conflicts[manifest] != nil {
			continue
		}
		for _, other := range byConfig[i.Artifact.Config] {
			if other.Artifact.Manifest.Digest != manifest && (!i.ordinary || !other.ordinary) {
				conflicts[manifest] = append(conflicts[manifest], other)
			}
		}
	}
	return conflicts
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
		if known != nil {
			return w.judge(ctx, known, target)
		}
		select {
		case <-changed:
		case <-deadline:
			return unknown(broken)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// WatcherStats is what a Watcher knows.
type WatcherStats struct {
	// Connected tells that containerd's images are known. Else image volumes are
	// refused, and the following are 0.
	Connected bool
	// Artifacts is how many artifacts there are in all namespaces, and Conflicts how
	// many of them are refused because the runtime may take them for others.
	Artifacts, Conflicts int
}

// Stats counts what is known at this moment.
func (w *Watcher) Stats() WatcherStats {
	w.mu.Lock()
	known := map[string][]Image{}
	for namespace, images := range w.known {
		known[namespace] = slices.Collect(maps.Values(images))
	}
	stats := WatcherStats{Connected: w.known != nil}
	w.mu.Unlock()
	for _, images := range known {
		artifacts := map[digest.Digest]bool{}
		for _, i := range images {
			if i.Artifact != nil && !i.ordinary {
				artifacts[i.Artifact.Manifest.Digest] = true
			}
		}
		stats.Artifacts += len(artifacts)
		for manifest := range conflicts(images) {
			if artifacts[manifest] {
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
	var named []Image
	for _, i := range w.known[namespace] {
		if i.Target.Digest == target && !i.IsID() {
			named = append(named, i)
		}
	}
	var names []string
	for _, i := range Named(named) {
		names = append(names, i.Name)
	}
	if len(names) == 0 {
		return ""
	}
	return slices.Min(names)
}

// warn says that an artifact which has just come is in conflict with others.
func (w *Watcher) warn(ctx context.Context, namespace string, image Image) {
	w.mu.Lock()
	known := slices.Collect(maps.Values(w.known[namespace]))
	w.mu.Unlock()
	if err := refuse(image, known); err != nil {
		log.G(ctx).WithError(err).WithField("namespace", namespace).WithField("image", image.Name).
			Warn("An image is in conflict with others: image volumes of them are refused")
	}
}

// sameManifest reports whether two images stand for one manifest.
func (i Image) sameManifest(other Image) bool {
	return i.Artifact != nil && other.Artifact != nil && i.Artifact.Manifest.Digest == other.Artifact.Manifest.Digest
}

// judge is the answer of Check if known are the images of the namespace.
func (w *Watcher) judge(ctx context.Context, known []Image, target digest.Digest) error {
	image, found := find(known, target)
	if !found { // deleted meanwhile, say
		image = readAny(ctx, w.blobs, images.Image{Target: ocispec.Descriptor{Digest: target}})
	}
	for i := range known {
		if known[i].unread != nil {
			known[i] = readAny(ctx, w.blobs, known[i].Image)
		}
	}
	for _, i := range append(slices.Clone(known), image) {
		if i.unread != nil && i.Artifact == nil {
			return fmt.Errorf("image %q (%s) cannot be read to see whether the runtime may take it for another; remove it, if that stays so: %v: %w", i.Name, i.Target.Digest, i.unread, errdefs.ErrUnavailable)
		}
	}
	return refuse(image, known)
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

// look returns the images of the namespace, nil if they are not known as of the
// hello event with that number, and then why, if that is known; and what tells of a
// change.
func (w *Watcher) look(namespace string, number int) (known []Image, changed <-chan struct{}, broken error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.known == nil || w.seen < number {
		return nil, w.changed, w.broken
	}
	known = []Image{}
	return slices.AppendSeq(known, maps.Values(w.known[namespace])), w.changed, nil
}

// find returns an image with that target or manifest, if there is one by a name
// that is one for people.
func find(known []Image, target digest.Digest) (found Image, ok bool) {
	for _, i := range known {
		if i.Target.Digest != target && (i.Artifact == nil || i.Artifact.Manifest.Digest != target) {
			continue
		}
		found, ok = i, true
		if i.Artifact != nil && !i.IsID() {
			break
		}
	}
	return found, ok
}

// refuse returns an error if known has conflicts of the image.
func refuse(image Image, known []Image) error {
	if image.Artifact == nil {
		return nil
	}
	same := slices.DeleteFunc(known, func(i Image) bool {
		return i.Artifact == nil || i.Artifact.Config != image.Artifact.Config
	})
	if len(conflicts(append(slices.Clone(same), image))[image.Artifact.Manifest.Digest]) > 0 {
		return conflict(image, same)
	}
	return nil
}

// conflict is the error for an image that is in conflict with others: all are the
// images with its config.
func conflict(image Image, all []Image) error {
	all = slices.Clone(all)
	slices.SortFunc(all, func(a, b Image) int { return strings.Compare(a.Name, b.Name) })
	// One name for each artifact: the first is a tag, if there is one.
	var names []string
	named := map[digest.Digest]bool{}
	for _, i := range all {
		manifest := i.Artifact.Manifest.Digest
		if !i.IsID() && !named[manifest] {
			named[manifest] = true
			names = append(names, fmt.Sprintf("%q (%s)", i.Name, short(manifest)))
		}
	}
	if more := len(names) - maxNamed; more > 0 {
		names = append(names[:maxNamed], fmt.Sprintf("and %d more", more))
	}
	config, what := image.Artifact.Config, "artifact"
	if image.ordinary {
		what = "image"
	}
	return fmt.Errorf("%s %s has the same config, %s, as another one, and the runtime takes images with one config for one image, so that the volume might show the other: %s; give each a config of its own, or remove them all with `crictl rmi %s` and pull again the one that is needed: %w",
		what, short(image.Artifact.Manifest.Digest), short(config), strings.Join(names, ", "), config.Encoded()[:12], errdefs.ErrFailedPrecondition)
}

// short is a digest for people: what they compare it with is shortened, too.
func short(d digest.Digest) string {
	return d.Algorithm().String() + ":" + d.Encoded()[:12]
}
