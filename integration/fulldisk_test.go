// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
)

// Disks that the kernel itself reports as full, over quota or dead. Package crash injects
// such errors at single operations with a tracer.

// ballast fills the disk.
func ballast(t *testing.T, disk string) (drop func()) {
	t.Helper()
	name := filepath.Join(disk, "ballast")
	f, err := os.Create(name)
	check(t, err)
	defer f.Close()
	for at, size := int64(0), int64(1<<30); size >= 4096; {
		if err := unix.Fallocate(int(f.Fd()), 0, at, size); err == unix.ENOSPC {
			size /= 2
		} else {
			check(t, err)
			at += size
		}
	}
	return func() { check(t, os.Remove(name)) }
}

// quota limits a btrfs to less than it contains.
func quota(t *testing.T, disk string) (drop func()) {
	t.Helper()
	for _, args := range [][]string{{"quota", "enable", disk}, {"qgroup", "limit", "64K", disk}} {
		out, err := exec.Command("btrfs", args...).CombinedOutput()
		if err != nil {
			t.Fatalf("btrfs %q: %v: %s", args, err, out)
		}
	}
	return func() {
		out, err := exec.Command("btrfs", "quota", "disable", disk).CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
}

// wantNoStart checks that a container does not start and that the error contains all texts.
// In contrast to wantRefused the error may differ each time.
func wantNoStart(t *testing.T, pod *node.Pod, wanted ...string) {
	t.Helper()
	err := pod.Start(node.Container{})
	if err == nil {
		t.Fatal("the container started")
	}
	said := answer(t, err)
	for _, want := range wanted {
		if !strings.Contains(said, want) {
			t.Errorf("the error does not contain %q: %s", want, said)
		}
	}
}

func TestAFullDiskIsReported(t *testing.T) {
	for _, tt := range []struct {
		name string
		kind fileSystem
		fill func(*testing.T, string) func()
		want string
	}{
		{"ext4", ext4, ballast, "no space left on device"},
		{"xfs", xfs, ballast, "no space left on device"},
		{"btrfs with a quota", btrfs, quota, "disk quota exceeded"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			disk := tt.kind.mounted(t)
			n := node.ForTest(t, node.Options{DaemonRoot: filepath.Join(disk, "root")})
			before := daemonUsage(t, n)
			src := writeModel(t)
			running, err := n.RunPod(reading(pulled(t, n, src, pack.Raw)))
			check(t, err)
			served := daemonUsage(t, n)

			// The container's root file system is on this disk too.
			ref := n.Registry + "/models/tiny:tar-gzip"
			pod, err := n.RunSandbox(node.PodSpec{Volumes: []node.Volume{{Image: ref, Path: "/model"}}})
			check(t, err)
			drop := tt.fill(t, disk)
			pulled(t, n, src, pack.TarGzip)
			for range 2 {
				wantNoStart(t, pod, tt.want, "free space on the file system of the snapshotter's root and try again")
				wantUsage(t, n, served)
			}
			wantReading(t, running)
			wantVolume(t, running, "main", "/model", wantTree(t, src, pack.Raw))

			drop()
			check(t, pod.Start(node.Container{}))
			wantVolume(t, pod, "main", "/model", wantTree(t, src, pack.TarGzip))
			check(t, pod.Remove())
			check(t, running.Remove())
			_, err = n.Crictl("rmi", ref, n.Registry+"/models/tiny:raw")
			check(t, err)
			wantUsage(t, n, before)
		})
	}
}

// Every read and write of the disk fails, as if it were gone. Volumes that need it are
// refused; when the disk is back, only the daemon must be restarted.
func TestADeadDiskIsReported(t *testing.T) {
	disk := ext4.mounted(t)
	n := node.ForTest(t, node.Options{DaemonRoot: filepath.Join(disk, "root")})
	src := writeModel(t)
	ref := pulled(t, n, src, pack.TarGzip)
	pod, err := n.RunSandbox(node.PodSpec{Volumes: []node.Volume{{Image: ref, Path: "/model"}}})
	check(t, err)

	usedBytes(t, disk) // containerd does not sync the unpacked layers of images, such as the pod's own
	shutDown(t, disk)
	wantNoStart(t, pod, "input/output error", n.DaemonRoot)

	check(t, n.StopDaemon())
	replaceDisk(t, disk)
	check(t, n.StartDaemon())
	waitForDaemon(t, n)
	wantServed(t, n, ref, wantTree(t, src, pack.TarGzip))
	check(t, pod.Remove())
}

// replaceDisk mounts a copy of the disk, with everything that was written to it, at the
// same place. The old file system would stay shut down as long as anybody has it open.
func replaceDisk(t *testing.T, disk string) {
	t.Helper()
	before, err := mount.Lookup(disk)
	check(t, err)
	text, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(before.Source), "loop/backing_file"))
	check(t, err)
	file := strings.TrimSpace(string(text))
	copied := filepath.Join(filepath.Dir(file), "copy")
	if out, err := exec.Command("cp", "--sparse=always", file, copied).CombinedOutput(); err != nil {
		t.Fatalf("cp: %v: %s", err, out)
	}
	check(t, unix.Unmount(disk, unix.MNT_DETACH))
	loop, err := mount.SetupLoop(copied, mount.LoopParams{Autoclear: true})
	check(t, err)
	defer loop.Close() // the mount keeps it attached
	check(t, unix.Mount(loop.Name(), disk, before.FSType, unix.MS_NOSUID|unix.MS_NODEV, ""))
}

// shutDown makes a file system fail every request from now on (ext4 and xfs,
// EXT4_IOC_SHUTDOWN in fs/ext4/ext4.h), without writing its journal.
func shutDown(t *testing.T, dir string) {
	t.Helper()
	const (
		ioctl = 0x8004587d
		now   = 2 // EXT4_GOING_FLAGS_NOLOGFLUSH
	)
	f, err := os.Open(dir)
	check(t, err)
	defer f.Close()
	check(t, unix.IoctlSetPointerInt(int(f.Fd()), ioctl, now))
}

// A daemon that cannot open more files reports it, and works again when it can.
func TestTooManyOpenFilesAreReported(t *testing.T) {
	t.Parallel()
	n := node.ForTest(t, node.Options{})
	src := writeModel(t)
	ref := pulled(t, n, src, pack.TarGzip)
	running, err := n.RunPod(reading(pulled(t, n, src, pack.Raw)))
	check(t, err)
	pod, err := n.RunSandbox(node.PodSpec{Volumes: []node.Volume{{Image: ref, Path: "/model"}}})
	check(t, err)
	var limit unix.Rlimit
	check(t, unix.Prlimit(n.DaemonPID(), unix.RLIMIT_NOFILE, nil, &limit))
	few := limit
	few.Cur = 3 // fewer than are open
	check(t, unix.Prlimit(n.DaemonPID(), unix.RLIMIT_NOFILE, &few, nil))
	wantNoStart(t, pod, "too many open files")
	wantReading(t, running)
	check(t, unix.Prlimit(n.DaemonPID(), unix.RLIMIT_NOFILE, &limit, nil))
	check(t, pod.Start(node.Container{}))
	wantVolume(t, pod, "main", "/model", wantTree(t, src, pack.TarGzip))
	check(t, pod.Remove())
	check(t, running.Remove())
}
