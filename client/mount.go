// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package client

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
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

// Labels of containerd's garbage collector (docs/garbage-collection.md of
// containerd).
const (
	// labelContent keeps the content that is its value.
	labelContent = "containerd.io/gc.ref.content.artifact"
)

// labelImage is on the views of Mount: the name of the image, which may be deleted.
const labelImage = "artifact-snapshotter/image"

// Mounted is an artifact that [Client.Mount] shows at a path.
type Mounted struct {
	// Target is the path.
	Target string
	// Manifest is the artifact's.
	Manifest digest.Digest
	// Mounted is false if the mount has gone, by a reboot or by umount(8), or was
	// never made. The artifact is kept all the same; see Mount and Unmount.
	Mounted bool

	key    string
	pinned bool          // whether it has images.LabelGCRoot
	target digest.Digest // of the image
	image  string        // the name that it had
}

// Mount shows the artifact at target, read-only: an empty directory, or a new one
// in a directory that is there. It waits for the artifact to be unpacked, and
// returns target as an absolute path without symlinks. The view of the artifact
// outlives this process, the image and a reboot, until [Client.Unmount]; the mount
// itself does not outlive a reboot, and is then made again by the next Mount.
//
// A target that cannot be one is errdefs.ErrInvalidArgument, one that is still that
// of another artifact errdefs.ErrFailedPrecondition, and one at which another process
// is mounting errdefs.ErrUnavailable. After any error nothing is mounted.
func (c *Client) Mount(ctx context.Context, image images.Image, target string) (path string, err error) {
	if path, err = resolve(target); err != nil {
		return "", err
	}
	return path, c.mount(ctx, image, path)
}

// mount is Mount for a path that is resolved.
func (c *Client) mount(ctx context.Context, image images.Image, target string) (err error) {
	made, dir, err := makeTarget(target)
	if err != nil {
		return err
	}
	defer dir.Close() // and nobody else has mounted at it meanwhile
	defer func() {
		if err != nil && made {
			_ = os.Remove(target) // an empty directory at worst
		}
	}()
	old, err := c.mountAt(ctx, target, image.Target.Digest)
	if err != nil {
		return err
	}
	ctx = c.Context(ctx)
	service := c.SnapshotService(c.Snapshotter)
	if old != nil && !old.pinned { // of a Mount that has not ended: view removes it
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
		// A bind that could not be made read-only is there already.
		_ = unix.Unmount(target, unix.UMOUNT_NOFOLLOW)
		return fmt.Errorf("mount %s at %s: %w", image.Name, target, err)
	}
	return nil
}

// view makes the view with that key, once the artifact is unpacked.
func (c *Client) view(ctx context.Context, key string, image images.Image) (mounts []mount.Mount, err error) {
	attempt := func() (err error) {
		mounts, err = c.viewOnce(ctx, key, image)
		return err
	}
	// A daemon that is not there is no reason to wait, unless it was there.
	if err = attempt(); err != nil && !isUnreachable(err) {
		err = c.patiently(ctx, attempt)
	}
	return mounts, err
}

// viewOnce makes one attempt. containerd may record a view after its client has gone, and
// nobody would remove it if it had images.LabelGCRoot. So a lease keeps the view at first. It
// gets the label when it has proved to be one of the artifact: any other snapshotter makes
// an empty one.
func (c *Client) viewOnce(ctx context.Context, key string, image images.Image) (mounts []mount.Mount, err error) {
	lease, err := c.LeasesService().Create(ctx, leases.WithRandomID(), leases.WithExpiration(viewLease))
	if err != nil {
		return nil, fmt.Errorf("create a lease: %w", err)
	}
	outliving, cancel := outlive(ctx, viewTimeout)
	defer cancel()
	defer func() { _ = c.LeasesService().Delete(outliving, lease) }() // else it expires

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
	// Whoever holds the target is the only one who makes a view for it, so one that is there is
	// of an attempt that had no answer, as when containerd was restarted.
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

// outlive returns a context that ends at most so long after ctx.
func outlive(ctx context.Context, by time.Duration) (context.Context, context.CancelFunc) {
	outliving, cancel := context.WithCancel(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, func() { time.AfterFunc(by, cancel) })
	return outliving, func() { stop(); cancel() }
}

// withoutView removes a view because of err. What has ended ctx is no reason to leave it.
func (c *Client) withoutView(ctx context.Context, key string, err error) error {
	if left := c.SnapshotService(c.Snapshotter).Remove(context.WithoutCancel(ctx), key); left != nil {
		return fmt.Errorf("%w; and its view is left: %v", err, left)
	}
	return err
}

// Unmount undoes [Client.Mount]: it takes the mount away, if it is still there,
// and gives the artifact up. It returns target as Mount does. What is no target of
// Mount is errdefs.ErrNotFound, one that has something else mounted
// errdefs.ErrInvalidArgument.
func (c *Client) Unmount(ctx context.Context, target string) (path string, err error) {
	path, err = resolve(target)
	if err != nil && target != "" { // what is above it is no directory any more, say
		path, err = filepath.Abs(target)
	}
	if err != nil {
		return "", err
	}
	return path, c.unmount(ctx, path)
}

// unmount is Unmount for a path that is resolved.
func (c *Client) unmount(ctx context.Context, target string) error {
	there, err := c.mountsAt(ctx, target)
	if err != nil {
		return err
	}
	if len(there) == 0 {
		return c.notMounted(ctx, target)
	}
	mounted, err := isMounted(target)
	if err != nil {
		return err
	}
	ctx = c.Context(ctx)
	service := c.SnapshotService(c.Snapshotter)
	m := there[0]
	if mounted {
		top := slices.IndexFunc(there, func(m Mounted) bool {
			mounts, odd := service.Mounts(ctx, m.key)
			if odd != nil {
				err = odd
			}
			return shows(target, mounts)
		})
		switch {
		case top < 0 && err != nil:
			return c.explain(err)
		case top < 0:
			return fmt.Errorf("what is mounted at %s is not the artifact; take it away with umount, then try again: %w", target, errdefs.ErrInvalidArgument)
		}
		m = there[top]
		if err := mount.Unmount(target, unix.UMOUNT_NOFOLLOW); err != nil {
			return fmt.Errorf("unmount %s, which may be in use: %w", target, err)
		}
	}
	return c.explain(service.Remove(ctx, m.key))
}

// notMounted says in which other namespace something is mounted at the target.
func (c *Client) notMounted(ctx context.Context, target string) error {
	namespaces, err := c.NamespaceService().List(ctx)
	if err != nil {
		return fmt.Errorf("list containerd's namespaces: %w", err)
	}
	hint := ""
	for _, namespace := range namespaces {
		if there, err := c.In(namespace).mountsAt(ctx, target); err == nil && len(there) > 0 {
			hint = fmt.Sprintf("; one is in namespace %s: use -n %[1]s", namespace)
		}
	}
	return fmt.Errorf("no artifact is mounted at %s with snapshotter %s in namespace %s%s: %w", target, c.Snapshotter, c.Namespace, hint, errdefs.ErrNotFound)
}

// Mounts lists what [Client.Mount] shows, and should show, in the order of the
// targets.
func (c *Client) Mounts(ctx context.Context) ([]Mounted, error) {
	all, err := c.views(ctx)
	all = slices.DeleteFunc(all, func(m Mounted) bool { return !m.pinned }) // of a Mount that has not ended
	if err != nil || len(all) == 0 {
		return nil, err
	}
	at := map[string]bool{}
	for _, m := range all {
		at[m.Target] = false
	}
	// The paths themselves may be anything by now, and hang whoever looks at them.
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
	slices.SortFunc(all, func(a, b Mounted) int {
		return cmp.Or(cmp.Compare(a.Target, b.Target), cmp.Compare(a.key, b.key))
	})
	return all, nil
}

// views are Mounts in no order, without a look at what is mounted.
func (c *Client) views(ctx context.Context) (all []Mounted, err error) {
	err = c.SnapshotService(c.Snapshotter).Walk(c.Context(ctx), func(_ context.Context, i snapshots.Info) error {
		if path, ok := snapshot.ParseMountKey(i.Name); ok {
			all = append(all, mountedAs(path, i))
		}
		return nil
	})
	return all, c.explain(err)
}

// mountedAs is what the snapshot of a key for the path says.
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

// mountAt returns that of views which has the target, nil if there is none. Of the
// views of older versions of this program it knows that of an artifact alone, by the
// digest of its image: containerd asks the daemon about each snapshot that it lists.
func (c *Client) mountAt(ctx context.Context, target string, image digest.Digest) (*Mounted, error) {
	keys := []string{snapshot.MountKey(target)}
	if image != "" {
		keys = append(keys, snapshot.OldMountKey(target, image))
	}
	for _, key := range keys {
		i, err := c.SnapshotService(c.Snapshotter).Stat(c.Context(ctx), key)
		if err == nil {
			m := mountedAs(target, i)
			return &m, nil
		}
		if !errdefs.IsNotFound(err) {
			return nil, c.explain(err)
		}
	}
	return nil, nil
}

// mountsAt are those of views that have the target: one, unless versions of this
// program, or others, have made more.
func (c *Client) mountsAt(ctx context.Context, target string) ([]Mounted, error) {
	switch m, err := c.mountAt(ctx, target, ""); {
	case err != nil:
		return nil, err
	case m != nil:
		return []Mounted{*m}, nil
	}
	all, err := c.views(ctx)
	return slices.DeleteFunc(all, func(m Mounted) bool { return m.Target != target }), err
}

// isMounted reports whether something is mounted at the path, whatever it shows: a disk
// may have died. Linux since 5.6 tells of one path, without a list of all mounts.
func isMounted(path string) (bool, error) {
	if mounted, sure, err := mountinfo.MountedFast(path); sure && err == nil {
		return mounted, nil
	}
	found, err := mountinfo.GetMounts(mountinfo.SingleEntryFilter(path))
	if err != nil {
		return false, fmt.Errorf("list the mounts of the node: %w", err)
	}
	return len(found) > 0, nil
}

// ImageAt is as [images.Reader.Image], and finds also the image that was mounted at target
// and has been deleted since, by the name that it had then or by its digest: its
// content is there until Unmount.
func (c *Client) ImageAt(ctx context.Context, ref, target string) (images.Image, error) {
	image, err := c.Image(ctx, ref)
	if !errdefs.IsNotFound(err) {
		return image, err
	}
	path, odd := resolve(target)
	if odd != nil { // for Mount to say, if there were an image
		return images.Image{}, err
	}
	there, odd := c.mountsAt(ctx, path)
	if odd != nil {
		return images.Image{}, err
	}
	for _, m := range there {
		if slices.Contains([]string{m.image, m.target.String(), m.Manifest.String()}, ref) {
			return c.Read(ctx, coreimages.Image{Name: m.image, Target: ocispec.Descriptor{Digest: m.target}})
		}
	}
	return images.Image{}, err
}

// resolve makes a target absolute and follows its symlinks. Its last element need
// not be there.
func resolve(target string) (string, error) {
	if target == "" {
		return "", fmt.Errorf("the target is empty: %w", errdefs.ErrInvalidArgument)
	}
	abs, err := filepath.Abs(target)
	if err != nil {
		return "", err
	}
	path, err := filepath.EvalSymlinks(abs)
	if err == nil || !errors.Is(err, os.ErrNotExist) {
		return path, err
	}
	parent, err := filepath.EvalSymlinks(filepath.Dir(abs))
	if err != nil {
		return "", fmt.Errorf("the directory above target %s must be there: %w", target, err)
	}
	return filepath.Join(parent, filepath.Base(abs)), nil
}

// makeTarget makes the directory target, unless it is there, and refuses what
// cannot be mounted on. It reports whether it has made it. Until dir is closed, it
// refuses the target to everybody else.
func makeTarget(target string) (made bool, dir *os.File, err error) {
	err = os.Mkdir(target, 0o755)
	made = err == nil
	if err != nil && !errors.Is(err, os.ErrExist) {
		return false, nil, err
	}
	defer func() {
		if err != nil && made {
			_ = os.Remove(target)
		}
	}()
	dir, err = os.OpenFile(target, unix.O_DIRECTORY, 0)
	if errors.Is(err, unix.ENOTDIR) {
		return made, nil, fmt.Errorf("target %s is not a directory: %w", target, errdefs.ErrInvalidArgument)
	}
	if err != nil {
		return made, nil, err // a symlink to nothing, too
	}
	if err := checkTarget(target, dir); err != nil {
		_ = dir.Close()
		return made, nil, err
	}
	return made, dir, nil
}

// checkTarget takes dir, which is what was at target, for this process, and refuses
// what is a mount point now, or not empty.
func checkTarget(target string, dir *os.File) error {
	err := unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return fmt.Errorf("another process is about to mount at %s, or has locked it; try again: %w", target, errdefs.ErrUnavailable)
	}
	if err != nil {
		return fmt.Errorf("lock %s: %w", target, err)
	}
	mounted, err := mountinfo.Mounted(target)
	if err != nil {
		return err
	}
	if mounted {
		return fmt.Errorf("target %s is a mount point already; choose another directory, or unmount it: %w", target, errdefs.ErrInvalidArgument)
	}
	switch _, err := dir.Readdirnames(1); {
	case err == nil:
		return fmt.Errorf("target %s is not empty; choose an empty directory, or one that is not there yet: %w", target, errdefs.ErrInvalidArgument)
	case errors.Is(err, io.EOF):
		return nil
	default:
		return err
	}
}

// shows reports whether target is a bind of the artifact's mount.
func shows(target string, mounts []mount.Mount) bool {
	var at, from unix.Stat_t
	return len(mounts) == 1 && unix.Stat(target, &at) == nil && unix.Stat(mounts[0].Source, &from) == nil &&
		at.Dev == from.Dev && at.Ino == from.Ino
}
