// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
)

// holding is the resource usage of a daemon.
type holding struct {
	goroutines, descriptors int
	rss                     int      // KiB
	files                   []string // below its root and state, with the sizes of files
}

// holds returns the daemon's current usage.
func (s *soak) holds(t *testing.T) (i holding) {
	t.Helper()
	i.goroutines = int(families(t, s.metrics)["go_goroutines"].GetMetric()[0].GetGauge().GetValue())
	i.descriptors, i.rss = openFiles(t, s.n), s.status(t, "VmRSS")
	for _, dir := range []string{s.n.DaemonRoot, s.n.DaemonState} {
		check(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			if err != nil {
				return err
			}
			// The database never shrinks.
			if fi, err := d.Info(); err == nil && fi.Mode().IsRegular() && d.Name() != "metadata.db" {
				path += fmt.Sprintf(" (%d bytes)", fi.Size())
			}
			i.files = append(i.files, path)
			return nil
		}))
	}
	return i
}

// settled waits until the daemon's files have not changed for 50 samples. It returns the
// minimum of each number, because a sample itself needs a connection.
func (s *soak) settled(t *testing.T) (least holding) {
	t.Helper()
	looks := 0
	waitFor(t, "the daemon to settle", func() bool {
		now := s.holds(t)
		if looks++; looks == 1 || !slices.Equal(now.files, least.files) {
			looks, least = 1, now
		}
		least.goroutines, least.descriptors, least.rss = min(least.goroutines, now.goroutines), min(least.descriptors, now.descriptors), now.rss
		return looks > 50
	})
	return least
}

// eventually waits until problem returns "", for at most three minutes. The daemon checks
// for changes without an event every minute.
func eventually(t *testing.T, problem func() string) {
	t.Helper()
	for deadline := time.Now().Add(3 * time.Minute); ; time.Sleep(50 * time.Millisecond) {
		text := problem()
		if text == "" {
			return
		}
		if time.Now().After(deadline) {
			t.Error(text)
			return
		}
	}
}

// wantExplained waits until exactly the wanted names are listed.
func wantExplained(t *testing.T, what string, want map[string]bool, list func() []string) {
	t.Helper()
	eventually(t, func() string {
		got := list()
		var odd []string
		for _, name := range got {
			if !want[name] {
				odd = append(odd, "too many: "+name)
			}
		}
		for name := range want {
			if !slices.Contains(got, name) {
				odd = append(odd, "missing: "+name)
			}
		}
		if len(odd) == 0 {
			return ""
		}
		return fmt.Sprintf("%s do not match the images and pods:\n%s", what, strings.Join(odd, "\n"))
	})
}

// check checks the state of the node between rounds, when nothing is in progress.
func (s *soak) check(t *testing.T, workers []*worker, idle holding) {
	t.Helper()
	var pods []*soakPod
	for _, w := range workers {
		pods = append(pods, w.pods...)
	}
	s.removeStrays(t, pods)
	s.giveUpLeases(t)
	check(t, collectGarbage(t.Context(), s.c))

	// Every pod reads the right bytes, through a file that it has held open and through a
	// new one.
	for _, p := range pods {
		wantReading(t, p.Pod)
		if err := p.compare(); err != nil {
			t.Error(err)
		}
		s.compared += len(p.volumes)
	}

	// The daemon's volumes and mounts, and containerd's mounts, belong to the pods.
	volumes, artifacts, mounts, trees := map[string]bool{}, map[string]bool{}, map[string]bool{}, map[string]bool{}
	for _, p := range pods {
		for _, a := range p.volumes {
			volume := p.ID + "/" + a.target.Encoded()
			volumes[volume] = true
			mounts[filepath.Join(s.volumes(), volume)] = true
			if a.manifest != "" { // the others are served by overlayfs
				artifacts[volume] = true
				trees[fmt.Sprintf("%s for %d", a.manifest.Encoded(), p.spec.HostID)] = true
			}
		}
	}
	wantExplained(t, "the daemon's volumes", volumes, func() []string { return s.volumeSnapshots(t) })
	// containerd knows the snapshots that the daemon has committed by other names.
	eventually(t, func() string {
		var known []string
		check(t, s.c.SnapshotService("artifact").Walk(s.c.Context(t.Context()), func(_ context.Context, i snapshots.Info) error {
			known = append(known, i.Name)
			return nil
		}))
		keys := daemonKeys(t, s.n)
		if len(keys) == len(known) {
			return ""
		}
		return fmt.Sprintf("the daemon's snapshots are\n%s\nbut containerd's are\n%s", strings.Join(keys, "\n"), strings.Join(known, "\n"))
	})
	wantExplained(t, "containerd's mounts", mounts, func() []string {
		got, err := node.Mounts(s.volumes())
		check(t, err)
		return got
	})
	var mounted []string
	eventually(t, func() string {
		var err error
		mounted, err = node.Mounts(s.n.DaemonState)
		check(t, err)
		if len(mounted) == len(trees) {
			return ""
		}
		return fmt.Sprintf("the daemon's mounts are\n%s\nwant one for each of\n%s", strings.Join(mounted, "\n"), strings.Join(slices.Sorted(maps.Keys(trees)), "\n"))
	})
	for _, point := range mounted {
		hex := manifestIn(point)
		if !slices.ContainsFunc(slices.Collect(maps.Keys(trees)), func(tree string) bool { return strings.HasPrefix(tree, hex+" ") }) {
			t.Errorf("the mount %s belongs to no pod", point)
		}
	}
	for _, device := range loopDevicesIn(t, s.n.DaemonRoot) {
		if !slices.ContainsFunc(mounted, func(point string) bool { return strings.Contains(device, "/"+filepath.Base(point)+"/") }) {
			t.Errorf("the loop device of %s belongs to no mount", device)
		}
	}
	// Every tree belongs to a pod or to an image in containerd.
	eventually(t, func() string {
		entries, err := os.ReadDir(filepath.Join(s.n.DaemonRoot, "trees"))
		check(t, err)
		for _, e := range entries {
			_, err := os.Stat(blobPath(s.n, manifestIn(e.Name())))
			used := slices.ContainsFunc(mounted, func(point string) bool { return filepath.Base(point) == e.Name() })
			if !used && (err != nil || strings.Count(e.Name(), "-") > 1) {
				return "this tree belongs neither to a pod nor to an image: " + e.Name()
			}
		}
		return ""
	})

	// The daemon holds nothing for clients that have disconnected. Mounts need no file and
	// no goroutine.
	eventually(t, func() string {
		now := s.holds(t)
		if now.goroutines <= idle.goroutines && now.descriptors <= idle.descriptors {
			return ""
		}
		return fmt.Sprintf("the daemon has %d goroutines and %d descriptors, want at most %d and %d as when it was idle",
			now.goroutines, now.descriptors, idle.goroutines, idle.descriptors)
	})
	if leaked := series(t, s.metrics)["gc_failures_total"]; leaked != 0 {
		t.Errorf("%v garbage collections failed", leaked)
	}
	wantSeries(t, s.metrics, map[string]float64{"containerd_connected": 1, "references": float64(len(artifacts)), "mounts": float64(len(mounted))})
	if out, _, err := s.n.Artifact("health", "--config", s.n.ConfigFile()); err != nil || out != "ok\n" {
		t.Errorf("health prints %q (%v)", out, err)
	}
	s.checkDatabase(t)
	s.readLog(t)
	s.memory(t)
}

// volumes is the directory where containerd mounts image volumes.
func (s *soak) volumes() string {
	return filepath.Join(s.n.State, "io.containerd.grpc.v1.cri", "image-volumes")
}

// volumeSnapshots returns the daemon's volumes as <sandbox>/<hex>.
func (s *soak) volumeSnapshots(t *testing.T) (keys []string) {
	t.Helper()
	for _, key := range daemonVolumes(t, s.n) {
		_, volume, _ := strings.Cut(key, "/image-volumes/")
		keys = append(keys, volume)
	}
	return keys
}

// manifestIn returns the hex digest in the name of a tree.
func manifestIn(name string) string {
	_, rest, _ := strings.Cut(filepath.Base(name), "-")
	hex, _, _ := strings.Cut(rest, "-")
	return hex
}

// removeStrays removes the pods of requests that were not answered.
func (s *soak) removeStrays(t *testing.T, pods []*soakPod) {
	t.Helper()
	out, err := s.n.Crictl("pods", "--quiet", "--no-trunc")
	check(t, err)
	strays := int64(0)
	for _, id := range strings.Fields(out) {
		if slices.ContainsFunc(pods, func(p *soakPod) bool { return p.ID == id }) {
			continue
		}
		strays++
		_, err := s.n.Crictl("rmp", "--force", id)
		check(t, err)
	}
	if failed := s.failures.Load(); strays > failed {
		t.Errorf("%d unknown pods, but only %d requests failed", strays, failed)
	}
}

// giveUpLeases deletes the leases of requests that ended with containerd. Otherwise they
// would expire later.
func (s *soak) giveUpLeases(t *testing.T) {
	t.Helper()
	ctx := s.c.Context(t.Context())
	all, err := s.c.LeasesService().List(ctx)
	check(t, err)
	for _, l := range all {
		if l.Labels["containerd.io/gc.expire"] == "" {
			continue
		}
		s.count("leases left by a restart")
		if err := s.c.LeasesService().Delete(ctx, l); err != nil && !errdefs.IsNotFound(err) {
			t.Error(err)
		}
	}
}

// endShims kills the shims that a stopped or killed containerd had started but not recorded:
// on SIGTERM, too, containerd exits without waiting for its requests (grpc.Server.Stop in
// plugins/server/grpc). All other shims end with their pods.
func (s *soak) endShims(t *testing.T) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		left, err := node.Processes(s.n.Address)
		check(t, err)
		maps.DeleteFunc(left, func(_ int, command string) bool { return !strings.Contains(command, "containerd-shim-runc-v2") })
		if len(left) == 0 {
			return
		}
		if time.Now().Before(deadline) {
			continue
		}
		for pid, command := range left {
			if s.counts["restart: containerd, SIGKILL"]+s.counts["restart: containerd, SIGTERM"] == 0 {
				t.Errorf("the process %d did not end: %s", pid, command)
			}
			s.count("shims left by a restart of containerd")
			check(t, syscall.Kill(pid, syscall.SIGKILL))
		}
		return
	}
}

// checkDatabase checks a copy, because the daemon has locked its database. The daemon
// writes nothing now.
func (s *soak) checkDatabase(t *testing.T) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(s.n.DaemonRoot, "overlayfs", "metadata.db"))
	check(t, err)
	name := filepath.Join(t.TempDir(), "metadata.db")
	check(t, os.WriteFile(name, text, 0o600))
	check(t, node.CheckDatabase(name))
}

// explained matches the warnings that refused artifacts, conflicts and restarts cause.
// Those in the last line are not faults of the daemon: with the race detector, which needs
// cgo, it cannot drop the capabilities of all threads; the test accepts only READY=1 from
// it; the configured mode is not the best one; and a daemon of another test mounts an EROFS
// at the same time.
var explained = regexp.MustCompile(`msg="(refused an image volume|an image is in conflict|cannot watch containerd's images` +
	`|cannot drop capabilities|cannot notify systemd|layers are laid out by a fallback mode|cannot set the read-ahead of an EROFS: .* error="[0-9]+ superblocks have appeared)`)

// readLog checks the daemon's new log lines.
func (s *soak) readLog(t *testing.T) {
	t.Helper()
	log := daemonLog(t, s.n)
	fresh := log[s.logged:]
	s.logged = len(log)
	if _, race, ok := strings.Cut(fresh, "WARNING: DATA RACE"); ok {
		t.Errorf("the daemon has a data race%.6000s", race)
	}
	for line := range strings.Lines(fresh) {
		if strings.Contains(line, "level=warning") && !explained.MatchString(line) {
			t.Errorf("unexpected warning of the daemon: %.2000s", line)
		}
		for _, bad := range []string{"level=error", "level=fatal", "level=panic", "panic: ", "fatal error: "} {
			if strings.Contains(line, bad) {
				t.Errorf("unexpected line in the daemon's log: %.2000s", line)
			}
		}
	}
}

// wantGone deletes everything and checks that the daemon's usage is as at the beginning.
func (s *soak) wantGone(t *testing.T, idle holding) {
	t.Helper()
	for _, a := range slices.Concat(s.mountable, s.bad) {
		for _, ref := range a.refs() { // an image that was pulled by digest has no tag
			if _, err := s.n.Crictl("rmi", ref); err != nil && !vanished.MatchString(err.Error()) {
				t.Error(err)
			}
		}
	}
	s.endShims(t)
	unused, err := s.c.Unused(t.Context(), nil)
	check(t, err)
	_, _, err = s.c.Remove(t.Context(), unused)
	check(t, err)
	images, err := s.c.Images(t.Context())
	check(t, err)
	for _, i := range images {
		t.Errorf("the image %q was not removed", i.Name)
	}
	eventually(t, func() string {
		// Repeat this: a pull whose client has disconnected may just have ended, with a
		// snapshot that nothing refers to.
		s.giveUpLeases(t)
		check(t, collectGarbage(t.Context(), s.c))
		now := s.holds(t)
		if now.goroutines <= idle.goroutines && now.descriptors <= idle.descriptors && slices.Equal(now.files, idle.files) {
			return ""
		}
		return fmt.Sprintf("the daemon has %d goroutines, %d descriptors and the files\n%s\nwant %d, %d and\n%s",
			now.goroutines, now.descriptors, strings.Join(now.files, "\n"), idle.goroutines, idle.descriptors, strings.Join(idle.files, "\n"))
	})
	for _, dir := range []string{s.n.DaemonRoot, s.n.DaemonState, s.n.State} {
		mounts, err := node.Mounts(dir)
		check(t, err)
		if len(mounts) > 0 {
			t.Errorf("remaining mounts: %q", mounts)
		}
	}
	if devices := loopDevicesIn(t, s.n.DaemonRoot); len(devices) > 0 {
		t.Errorf("remaining loop devices: %q", devices)
	}
	leases, err := s.c.LeasesService().List(s.c.Context(t.Context()))
	check(t, err)
	if len(leases) > 0 {
		t.Errorf("remaining leases: %v", leases)
	}
	if got := snapshotsIn(t, s.n, "artifact"); len(got) != 1 { // the layer of the test image
		t.Errorf("remaining snapshots: %v", got)
	}
}
