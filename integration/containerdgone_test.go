// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/treelist"
)

// While containerd is gone the daemon keeps trying to reach it. This must not cost
// anything: no log line per attempt, no file, no thread. When containerd is back,
// everything works without a restart of the daemon.
func TestContainerdIsGoneForAnHour(t *testing.T) {
	t.Parallel()
	gone := 5 * time.Second
	if os.Getenv("ARTIFACT_SNAPSHOTTER_LONG") != "" {
		gone = time.Hour
	}
	n := node.ForTest(t, node.Options{DaemonFlags: []string{"--log-level", "info"}})
	src := writeModel(t)
	before := daemonUsage(t, n)
	type reader struct {
		pod  *node.Pod
		root string // the volume as the container sees it, readable without containerd
		want []treelist.Entry
	}
	var readers []reader
	for _, form := range []pack.Form{pack.Raw, pack.TarGzip} {
		pod, err := n.RunPod(node.PodSpec{Volumes: []node.Volume{{Image: pulled(t, n, src, form), Path: "/model"}}})
		check(t, err)
		pid, err := pod.PID("main")
		check(t, err)
		readers = append(readers, reader{pod, filepath.Join("/proc", pid, "root/model"), wantTree(t, src, form)})
	}
	wantRead := func() {
		t.Helper()
		for _, r := range readers {
			got, err := treelist.List(r.root)
			check(t, err)
			if diff := treelist.Diff(r.want, got); diff != "" {
				t.Fatalf("the volume differs:\n%s", diff)
			}
		}
	}
	wantRead()
	logged := len(daemonLog(t, n))
	was := costOf(t, n.DaemonPID())
	check(t, n.KillContainerd())
	// After these messages the attempts have reached their maximum interval.
	for _, what := range []string{"cannot watch containerd's images", "cannot pre-create the empty blob"} {
		if what == "cannot pre-create the empty blob" && gone < time.Minute {
			continue // it checks every three minutes
		}
		for deadline := time.Now().Add(10 * time.Minute); !strings.Contains(daemonLog(t, n)[logged:], what); time.Sleep(100 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("the daemon did not log %q", what)
			}
		}
	}
	settled := costOf(t, n.DaemonPID())
	for end := time.Now().Add(gone); time.Now().Before(end); time.Sleep(min(gone, time.Minute)) {
		wantRead()
	}
	is := costOf(t, n.DaemonPID())
	said := daemonLog(t, n)[logged:]
	// One line about the loss, and one warning of each task that retries.
	if lines := strings.Count(said, "\n"); lines > 3 {
		t.Errorf("the daemon has logged %d lines:\n%s", lines, said)
	}
	// An attempt in progress has a socket.
	if is.files > settled.files+2 || is.threads > settled.threads+4 {
		t.Errorf("the daemon uses %v, want at most %v", is, settled)
	}
	t.Logf("in %v without containerd: %d lines logged; the daemon used before: %v; at the beginning: %v; at the end: %v", gone, strings.Count(said, "\n"), was, settled, is)

	pid := n.DaemonPID()
	check(t, n.StartContainerd())
	waitForDaemon(t, n)
	wantRead()
	for _, r := range readers {
		wantVolume(t, r.pod, "main", "/model", r.want)
	}
	// Artifacts from before, and a new one.
	for _, form := range []pack.Form{pack.Raw, pack.TarGzip, pack.TarZstd} {
		next, err := n.RunPod(node.PodSpec{Volumes: []node.Volume{{Image: pulled(t, n, src, form), Path: "/model"}}})
		check(t, err)
		wantVolume(t, next, "main", "/model", wantTree(t, src, form))
		check(t, next.Remove())
		_, err = n.Crictl("rmi", n.Registry+"/models/tiny:"+strings.ReplaceAll(string(form), "+", "-"))
		check(t, err)
	}
	for _, r := range readers {
		check(t, r.pod.Remove())
	}
	wantUsage(t, n, before)
	if n.DaemonPID() != pid {
		t.Fatal("the daemon was restarted")
	}
	waitFor(t, fmt.Sprintf("the daemon to have no more than %d open files", was.files+2), func() bool { return costOf(t, pid).files <= was.files+2 })
}

// cost is the resource usage of a process.
type cost struct {
	files, threads int
	resident       int64 // bytes
	cpu            time.Duration
}

func (c cost) String() string {
	return fmt.Sprintf("%d open files, %d threads, %d MiB resident, %v of CPU time", c.files, c.threads, c.resident>>20, c.cpu)
}

func costOf(t *testing.T, pid int) (c cost) {
	t.Helper()
	proc := filepath.Join("/proc", strconv.Itoa(pid))
	files, err := os.ReadDir(filepath.Join(proc, "fd"))
	check(t, err)
	stat, err := os.ReadFile(filepath.Join(proc, "stat"))
	check(t, err)
	// See proc_pid_stat(5). The second field is the program's name in parentheses.
	fields := strings.Fields(string(stat[strings.LastIndex(string(stat), ")")+1:]))
	number := func(field int) int64 {
		n, err := strconv.ParseInt(fields[field-3], 10, 64)
		check(t, err)
		return n
	}
	const tick = 10 * time.Millisecond // USER_HZ is 100 on every architecture that Go supports
	return cost{len(files), int(number(20)), number(24) * int64(os.Getpagesize()), time.Duration(number(14)+number(15)) * tick}
}
