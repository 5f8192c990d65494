// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package store

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/log"

	"github.com/artifact-snapshotter/artifact-snapshotter/unpack"
)

// logged collects what a logger writes.
type logged struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *logged) count(text string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.text.String(), text)
}

// In a user namespace, the limits of the namespace apply as well (kernel/ucount.c), so other
// processes do not disturb the test, and are not disturbed.
func TestWithoutInotifyBlobsAreLookedFor(t *testing.T) {
	const inNamespace = "ARTIFACT_SNAPSHOTTER_TEST_INOTIFY"
	limit := os.Getenv(inNamespace)
	if limit == "" {
		for _, limit := range []string{"max_inotify_watches", "max_inotify_instances"} {
			t.Run(limit, func(t *testing.T) {
				again := exec.Command("/proc/self/exe", "-test.run=^TestWithoutInotifyBlobsAreLookedFor$")
				again.Env = append(os.Environ(), inNamespace+"="+limit)
				ids := []syscall.SysProcIDMap{{Size: 65536}}
				again.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER, UidMappings: ids, GidMappings: ids}
				if out, err := again.CombinedOutput(); err != nil {
					t.Errorf("%v\n%s", err, out)
				}
			})
		}
		return
	}

	allow := func(n string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join("/proc/sys/user", limit), []byte(n), 0); err != nil {
			t.Fatal(err)
		}
	}
	allow("0")
	s := newSite(t)
	s.Close()
	s.config.DecompressOnPull, s.config.Modes = true, unpack.Modes{Raw: unpack.Copy, Tar: unpack.Extract} // without a mount
	s.open()
	s.pack("x") // makes a directory of blobs
	// The clock is an hour fast until the directories have been looked into for the first time.
	var fast atomic.Int64
	fast.Store(int64(time.Hour))
	s.now = func() time.Time { return time.Now().Add(time.Duration(fast.Load())) }
	var out logged
	log.L.Logger.SetOutput(&out) // the process runs no other test
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { s.Run(ctx) })
	defer running.Wait()
	defer cancel()

	eventually(t, "it has been looked", func() bool { return out.count("looking once a second") == 1 })
	fast.Store(0)

	unpacked := func(n int) ID {
		t.Helper()
		d, blobs := s.gzipped(n)
		for hex, b := range blobs {
			s.arrive(hex, b)
		}
		id := ID{Manifest: d.Digest}
		eventually(t, "the tree is built", func() bool { return s.has(id) })
		return id
	}
	id := unpacked(1)
	if err := CanWatch(s.content); err == nil || !strings.HasPrefix(err.Error(), "raise the kernel parameter fs.inotify.max_user_") {
		t.Errorf("%v, want what to do", err)
	}
	if err := os.Remove(s.content.Path(id.Manifest)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the tree of what was deleted has gone", func() bool { return !s.has(id) })
	if n := out.count("looking once a second"); n != 1 || out.count("raise the kernel parameter fs.inotify.max_user_") != 1 {
		t.Errorf("said %d times in\n%s", n, out.text.String())
	}

	allow("100")
	eventually(t, "inotify works again", func() bool { return out.count("inotify tells of new and deleted blobs again") == 1 })
	if err := CanWatch(s.content); err != nil {
		t.Error(err)
	}
	unpacked(2)
}
