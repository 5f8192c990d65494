// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/client"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/treelist"
)

// One goroutine makes containerd collect garbage all the time. Meanwhile artifacts are
// pulled, unpacked, mounted, read and deleted, and pods start and end, many times and
// concurrently. The daemon has Go's race detector.
func TestGarbageCollectionWhileMountsUnpacksAndPullsRun(t *testing.T) {
	rounds := 100
	if testing.Short() {
		rounds = 20
	}
	n := node.ForTest(t, node.Options{RaceDaemon: true})
	c := connect(t, n)
	src := writeModel(t)
	before, snapshotsBefore := daemonUsage(t, n), snapshotsIn(t, n, "artifact")

	// One artifact stays, in a pod and in a mount.
	stay := pulled(t, n, src, pack.Raw)
	image, err := c.Image(t.Context(), stay)
	check(t, err)
	pod, err := n.RunPod(reading(stay))
	check(t, err)
	mounted := mountPoint(t)
	_, err = c.Mount(t.Context(), image, mounted)
	check(t, err)

	var collections atomic.Int64
	collecting, stop := context.WithCancel(t.Context())
	defer stop()
	collector, _ := errgroup.WithContext(t.Context())
	collector.Go(func() error {
		for collecting.Err() == nil {
			if err := collectGarbage(t.Context(), c); err != nil {
				return err
			}
			collections.Add(1)
		}
		return nil
	})
	work, ctx := errgroup.WithContext(t.Context())
	for _, form := range []pack.Form{pack.TarGzip, pack.TarZstd} {
		// Each form has its own model; otherwise deleting one would not delete the shared
		// blobs.
		src := writeModel(t)
		check(t, os.WriteFile(filepath.Join(src, "form"), []byte(form), 0o600))
		check(t, os.Chtimes(filepath.Join(src, "form"), pack.Created, pack.Created))
		tag := strings.ReplaceAll(string(form), "+", "-")
		pushModel(t, n, src, form, tag)
		comes := comesAndGoes{c: c, ref: n.Registry + "/models/tiny:" + tag, want: wantTree(t, src, form), target: mountPoint(t)}
		work.Go(func() error {
			for round := range rounds {
				if err := comes.round(ctx); err != nil {
					return fmt.Errorf("%s, round %d: %w", form, round, err)
				}
			}
			return nil
		})
	}
	var pods int
	worked := make(chan struct{})
	podWork, _ := errgroup.WithContext(t.Context())
	podWork.Go(func() error {
		for ; ; pods++ {
			select {
			case <-worked:
				return nil
			default:
			}
			p, err := n.RunPod(node.PodSpec{Volumes: []node.Volume{{Image: stay, Path: "/model"}}})
			if err != nil {
				return err
			}
			if err := p.Remove(); err != nil {
				return err
			}
		}
	})
	failed := work.Wait()
	close(worked)
	failed = errors.Join(failed, podWork.Wait())
	stop()
	check(t, errors.Join(failed, collector.Wait()))
	t.Logf("%d garbage collections while %d artifacts and %d pods came and went", collections.Load(), 2*rounds, pods)
	if collections.Load() < int64(rounds) || pods == 0 {
		t.Errorf("too few garbage collections or pods")
	}

	// The remaining volumes are correct, and nothing else is left over.
	want := wantTree(t, src, pack.Raw)
	wantReading(t, pod)
	wantVolume(t, pod, "main", "/model", want)
	got, err := treelist.List(mounted)
	check(t, err)
	if diff := treelist.Diff(want, got); diff != "" {
		t.Errorf("the mount differs from the source:\n%s", diff)
	}
	check(t, pod.Remove())
	_, err = c.Unmount(t.Context(), mounted)
	check(t, err)
	check(t, deleteImage(t.Context(), c, stay))
	check(t, collectGarbage(t.Context(), c))
	waitFor(t, "the number of snapshots to be as before", func() bool {
		return len(snapshotsIn(t, n, "artifact")) == len(snapshotsBefore)
	})
	wantUsage(t, n, before)
	all, err := c.LeasesService().List(c.Context(t.Context()))
	check(t, err)
	if len(all) > 0 {
		t.Errorf("remaining leases: %v", all)
	}
	mounts, err := node.Mounts(n.State)
	check(t, err)
	if len(mounts) > 0 {
		t.Errorf("containerd has not removed the mounts %q", mounts)
	}
	check(t, n.StopDaemon())
	log, err := os.ReadFile(filepath.Join(n.Dir, "logs", "daemon"))
	check(t, err)
	if _, race, ok := strings.Cut(string(log), "WARNING: DATA RACE"); ok {
		t.Errorf("the daemon has a data race%.4000s", race)
	}
}

// mountPoint returns a directory where nothing is mounted after the test.
func mountPoint(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	return dir
}

// comesAndGoes is an artifact that is repeatedly pulled and deleted.
type comesAndGoes struct {
	c      *client.Client
	ref    string
	want   []treelist.Entry
	target string // the target of its mount
}

// round pulls, unpacks, mounts, reads and deletes the artifact.
func (a comesAndGoes) round(ctx context.Context) error {
	image, err := a.c.Pull(ctx, a.ref, client.Registry{PlainHTTP: true}, nil)
	if err != nil {
		return err
	}
	name, err := a.c.Unpack(ctx, image)
	if err != nil {
		return err
	}
	if _, err := a.c.Mount(ctx, image, a.target); err != nil {
		return err
	}
	got, err := treelist.List(a.target)
	if err != nil {
		return err
	}
	if diff := treelist.Diff(a.want, got); diff != "" {
		return fmt.Errorf("the mount differs from the source:\n%s", diff)
	}
	// The image references the snapshot, so no garbage collection may delete it.
	info, err := a.c.SnapshotService(a.c.Snapshotter).Stat(a.c.Context(ctx), name)
	if err != nil {
		return err
	}
	if info.Kind != snapshots.KindCommitted {
		return fmt.Errorf("snapshot %s is %s", name, info.Kind)
	}
	if err := deleteImage(ctx, a.c, a.ref); err != nil {
		return err
	}
	// A mount survives the deletion of its image.
	if got, err = treelist.List(a.target); err != nil {
		return err
	}
	if diff := treelist.Diff(a.want, got); diff != "" {
		return fmt.Errorf("after the deletion of the image the mount differs from the source:\n%s", diff)
	}
	_, err = a.c.Unmount(ctx, a.target)
	return err
}

// deleteImage deletes all names of the image and waits until containerd has collected its
// garbage.
func deleteImage(ctx context.Context, c *client.Client, ref string) error {
	image, err := c.Image(ctx, ref)
	if err != nil {
		return err
	}
	all, err := c.Images(ctx)
	if err != nil {
		return err
	}
	for _, i := range all {
		if i.Target.Digest == image.Target.Digest {
			if err := c.ImageService().Delete(c.Context(ctx), i.Name, images.SynchronousDelete()); err != nil && !errdefs.IsNotFound(err) {
				return err
			}
		}
	}
	return nil
}

// collectGarbage makes containerd collect garbage by deleting an empty lease.
func collectGarbage(ctx context.Context, c *client.Client) error {
	ctx = c.Context(ctx)
	lease, err := c.LeasesService().Create(ctx, leases.WithRandomID(), leases.WithExpiration(time.Minute))
	if err != nil {
		return err
	}
	return c.LeasesService().Delete(ctx, lease, leases.SynchronousDelete)
}
