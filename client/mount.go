// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package client

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	coreimages "github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/images"
	"github.com/artifact-snapshotter/artifact-snapshotter/snapshot"
)

// Labels of the snapshots of Mount, which containerd calls views.
const (
	// labelContent makes containerd retain the content that is its value
	// (docs/garbage-collection.md of containerd).
	labelContent = "containerd.io/gc.ref.content.artifact"
	// labelImage has the name of the image, which may be deleted before the view.
	labelImage = "artifact-snapshotter/image"
)

// Mounted is an artifact that [Client.Mount] has mounted.
type Mounted struct {
	// Target is the path.
	Target string
	// Manifest is the digest of the artifact's manifest.
	Manifest digest.Digest
	// Mounted is false if nothing is mounted at Target, after a reboot, umount(8) or a kill.
	// The artifact is still in use, see Mount and Unmount.
	Mounted bool

	key    string
	pinned bool          // the view has images.LabelGCRoot
	target digest.Digest // the digest of the image's target
	image  string        // the name of the image at the time
}

// Mount mounts the artifact at target, read-only. target is an empty directory, or a new one
// in an existing directory. Mount waits until the artifact is unpacked, and returns target as
// an absolute path without symlinks. The artifact is in use until [Client.Unmount], also
// after the end of this process, the deletion of the image and a reboot. The mount itself
// does not survive a reboot; another Mount restores it.
//
// If target cannot be mounted on, the error is errdefs.ErrInvalidArgument. If it is still the
// target of another artifact, it is errdefs.ErrFailedPrecondition, and if another process is
// mounting there, errdefs.ErrUnavailable. After any error nothing is mounted.
func (c *Client) Mount(ctx context.Context, image images.Image, target string) (path string, err error) {
	if path, err = resolve(target); err != nil {
		return "", err
	}
	return path, c.mount(ctx, image, path)
}

// mount is Mount for a resolved path.
func (c *Client) mount(ctx context.Context, image images.Image, target string) (err error) {
	made, dir, err := makeTarget(target)
	if err != nil {
		return err
	}
	defer dir.Close() // until then no other Mount uses the target
	defer func() {
		if err != nil && made {
			_ = os.Remove(target) // on failure an empty directory is left
		}
	}()
	old, err := c.mountedAt(ctx, target)
	if err != nil {
		return err
	}
	ctx = c.Context(ctx)
	service := c.SnapshotService(c.Snapshotter)
	if old != nil && !old.pinned { // left by a Mount that was interrupted; view removes it
		old = nil
	}
	if old != nil && old.Manifest != image.Manifest {
		return fmt.Errorf("%s is still the target of artifact %s, whose mount has gone; unmount it first: %w", target, old.Manifest, errdefs.ErrFailedPrecondition)
	}
	var mounts []mount.Mount
	if old != nil {
		err = c.patiently(ctx, func() (err error) {
			mounts, err = service.Mounts(ctx, old.key)
			return err
		})
	} else {
		key := snapshot.MountKey(target)
		mounts, err = c.view(ctx, key, image)
		viewed := err == nil
		defer func() {
			if err != nil && viewed {
				err = c.withoutView(ctx, key, err)
			}
		}()
	}
	if err != nil {
		return fmt.Errorf("unpack %q: %w", image.Name, c.explain(err))
	}
	if err := mount.All(mounts, target); err != nil {
		// The bind may exist although it could not be made read-only.
		_ = unix.Unmount(target, unix.UMOUNT_NOFOLLOW)
		return fmt.Errorf("mount %s at %s: %w", image.Name, target, err)
	}
	return nil
}

// view makes the view with that key, and waits until the artifact is unpacked.
func (c *Client) view(ctx context.Context, key string, image images.Image) (mounts []mount.Mount, err error) {
	attempt := func() (err error) {
		mounts, err = c.viewOnce(ctx, key, image)
		return err
	}
	// If the daemon cannot be reached at first, waiting is of no use.
	if err = attempt(); err != nil && !isUnreachable(err) {
		err = c.patiently(ctx, attempt)
	}
	return mounts, err
}

// viewOnce makes one attempt. containerd may record a view after its client has gone; with
// images.LabelGCRoot, nobody would remove it. So a lease keeps the view at first. It gets the
// label once it has proved to be a view of the artifact; another snapshotter makes an empty
// one.
func (c *Client) viewOnce(ctx context.Context, key string, image images.Image) (mounts []mount.Mount, err error) {
	lease, err := c.LeasesService().Create(ctx, leases.WithRandomID(), leases.WithExpiration(viewLease))
	if err != nil {
		return nil, fmt.Errorf("create a lease: %w", err)
	}
	outliving, cancel := outlive(ctx, viewTimeout)
	defer cancel()
	defer func() { _ = c.LeasesService().Delete(outliving, lease) }() // on failure it expires

	// View is not cancelled at once: containerd might not learn of a view that the daemon has
	// recorded, and would have it removed only with the next snapshot of this snapshotter
	// (core/metadata/db.go, dirtySS). The daemon answers after about a second at most
	// (unpackWait in package snapshot).
	service := c.SnapshotService(c.Snapshotter)
	view := func() (err error) {
		mounts, err = service.View(leases.WithLease(outliving, lease.ID), key, "", snapshots.WithLabels(map[string]string{
			labelContent:         image.Target.Digest.String(),
			labelImage:           image.Name,
			snapshot.LabelTarget: image.Target.Digest.String(),
		}))
		return err
	}
	// No other process makes a view for this target, so an existing one is from an attempt
	// without an answer, for example because containerd was restarted.
	if err = view(); errdefs.IsAlreadyExists(err) {
		if err = service.Remove(outliving, key); err == nil || errdefs.IsNotFound(err) {
			err = view()
		}
	}
	if err != nil {
		return nil, err
	}
	info, err := service.Stat(ctx, key)
	if err == nil && info.Labels[snapshot.LabelArtifact] != image.Manifest.String() {
		err = c.foreign()
	}
	if err == nil {
		root := map[string]string{images.LabelGCRoot: images.GCRootTime()}
		_, err = service.Update(ctx, snapshots.Info{Name: key, Labels: root}, "labels."+images.LabelGCRoot)
	}
	if err != nil {
		return nil, c.withoutView(ctx, key, err)
	}
	return mounts, nil
}

// outlive returns a context that ends when that time has passed after the end of ctx.
func outlive(ctx context.Context, by time.Duration) (context.Context, context.CancelFunc) {
	outliving, cancel := context.WithCancel(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, func() { time.AfterFunc(by, cancel) })
	return outliving, func() { stop(); cancel() }
}

// withoutView removes a view because of err, also if ctx has ended.
func (c *Client) withoutView(ctx context.Context, key string, err error) error {
	outliving, cancel := outlive(ctx, viewTimeout)
	defer cancel()
	if left := c.SnapshotService(c.Snapshotter).Remove(outliving, key); left != nil && !errdefs.IsNotFound(left) {
		return fmt.Errorf("%w; the snapshot %s could not be removed: %v", err, key, left)
	}
	return err
}

// Unmount undoes [Client.Mount]: it unmounts the artifact if it is still mounted, and then the
// artifact is no longer in use. It returns target as Mount does. If target is not one of
// Mount's, the error is errdefs.ErrNotFound; if something else is mounted there, it is
// errdefs.ErrInvalidArgument; if another process is mounting there, errdefs.ErrUnavailable.
func (c *Client) Unmount(ctx context.Context, target string) (path string, err error) {
	path, err = resolve(target)
	if err != nil && target != "" { // the directory above may not exist any more
		path, err = filepath.Abs(target)
	}
	if err != nil {
		return "", err
	}
	return path, c.unmount(ctx, path)
}

// unmount is Unmount for a resolved path.
func (c *Client) unmount(ctx context.Context, target string) error {
	m, err := c.mountedAt(ctx, target)
	if err != nil {
		return err
	}
	if m == nil {
		return c.notMounted(ctx, target)
	}
	mounted, err := isMounted(target)
	if err != nil {
		return err
	}
	if !mounted {
		// Mount makes its view before it mounts, and holds the lock until it has mounted. The
		// directory may not exist any more.
		if dir, err := os.OpenFile(target, unix.O_DIRECTORY, 0); err == nil {
			defer dir.Close()
			if err := lockTarget(target, dir); err != nil {
				return err
			}
			if mounted, err := isMounted(target); err != nil {
				return err
			} else if mounted { // before we had the lock
				return fmt.Errorf("another process has just mounted at %s; try again: %w", target, errdefs.ErrUnavailable)
			}
		}
	}
	ctx = c.Context(ctx)
	service := c.SnapshotService(c.Snapshotter)
	if mounted {
		mounts, err := service.Mounts(ctx, m.key)
		if err != nil {
			return c.explain(err)
		}
		if !isBindOf(target, mounts) {
			return fmt.Errorf("what is mounted at %s is not the artifact; unmount it with umount, then try again: %w", target, errdefs.ErrInvalidArgument)
		}
		if err := mount.Unmount(target, unix.UMOUNT_NOFOLLOW); err != nil {
			return fmt.Errorf("unmount %s, which may be in use: %w", target, err)
		}
	}
	return c.explain(service.Remove(ctx, m.key))
}

// notMounted returns the error for a target where no artifact is mounted. It names another
// namespace that has one.
func (c *Client) notMounted(ctx context.Context, target string) error {
	namespaces, err := c.NamespaceService().List(ctx)
	if err != nil {
		return fmt.Errorf("list containerd's namespaces: %w", err)
	}
	hint := ""
	for _, namespace := range namespaces {
		if m, err := c.In(namespace).mountedAt(ctx, target); err == nil && m != nil {
			hint = fmt.Sprintf("; one is in namespace %s: use -n %[1]s", namespace)
		}
	}
	return errdefs.ErrNotFound.WithMessage(fmt.Sprintf("no artifact is mounted at %s with snapshotter %s in namespace %s%s", target, c.Snapshotter, c.Namespace, hint))
}

// Mounts returns the mounts of [Client.Mount] in the order of the targets.
func (c *Client) Mounts(ctx context.Context) ([]Mounted, error) {
	var all []Mounted
	err := c.SnapshotService(c.Snapshotter).Walk(c.Context(ctx), func(_ context.Context, i snapshots.Info) error {
		path, ok := snapshot.ParseMountKey(i.Name)
		if m := mountedAs(path, i); ok && m.pinned { // otherwise its Mount has not ended
			all = append(all, m)
		}
		return nil
	})
	if err != nil || len(all) == 0 {
		return nil, c.explain(err)
	}
	at := map[string]bool{}
	for _, m := range all {
		at[m.Target] = false
	}
	// Looking at the paths themselves could hang, whatever they are by now.
	_, err = mountinfo.GetMounts(func(i *mountinfo.Info) (skip, stop bool) {
		if _, ours := at[i.Mountpoint]; ours {
			at[i.Mountpoint] = true
		}
		return true, false
	})
	if err != nil {
		return nil, fmt.Errorf("list the mounts of the node: %w", err)
	}
	for i := range all {
		all[i].Mounted = at[all[i].Target]
	}
	slices.SortFunc(all, func(a, b Mounted) int { return cmp.Compare(a.Target, b.Target) })
	return all, nil
}

// mountedAs returns the mount at the path whose view is i.
func mountedAs(path string, i snapshots.Info) Mounted {
	return Mounted{
		Target:   path,
		Manifest: digest.Digest(i.Labels[snapshot.LabelArtifact]),
		key:      i.Name,
		pinned:   i.Labels[images.LabelGCRoot] != "",
		target:   digest.Digest(i.Labels[labelContent]),
		image:    i.Labels[labelImage],
	}
}

// mountedAt returns the mount with that target, or nil.
func (c *Client) mountedAt(ctx context.Context, target string) (*Mounted, error) {
	i, err := c.SnapshotService(c.Snapshotter).Stat(c.Context(ctx), snapshot.MountKey(target))
	if errdefs.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, c.explain(err)
	}
	m := mountedAs(target, i)
	return &m, nil
}

// ImageAt is [images.Reader.Image], and also finds the image that was mounted at target and
// has been deleted since: by its name at the time, or by its digest. Its content exists until
// Unmount.
func (c *Client) ImageAt(ctx context.Context, ref, target string) (images.Image, error) {
	image, err := c.Image(ctx, ref)
	if !errdefs.IsNotFound(err) {
		return image, err
	}
	// Other errors than err are Mount's to report, if there were an image.
	path, odd := resolve(target)
	if odd != nil {
		return images.Image{}, err
	}
	m, odd := c.mountedAt(ctx, path)
	if odd != nil || m == nil || m.image != ref && !images.HasPrefix(m.target, ref) && !images.HasPrefix(m.Manifest, ref) {
		return images.Image{}, err
	}
	return c.Read(ctx, coreimages.Image{Name: m.image, Target: ocispec.Descriptor{Digest: m.target}})
}
