// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

//go:build amd64

package crash

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
)

// cuts is the number of power cuts; cutsSelected is the number without long.
const (
	cuts         = 400
	cutsSelected = 12
)

// moment is what the daemon had acknowledged, and what was requested, after position log
// entries.
type moment struct {
	position int
	must     map[string]*model
	may      map[string]bool
}

// The daemon's root and containerd's content survive a power cut at random moments of a
// busy node. In every second case the disk also loses unflushed writes.
func TestTheDaemonSurvivesAPowerCutAtAnyMoment(t *testing.T) {
	program, err := node.Program()
	check(t, err)
	number := selection(cutsSelected)
	if long {
		number = cuts
	}
	began := time.Now()
	c := campaign{shortDir(t), program, startContainerd(t)}
	p, err := c.powerCut(packModels(t), number)
	check(t, err)
	for _, err := range p.lost {
		t.Error(err)
	}
	t.Logf("the disk saw %d writes of %d KiB and %d flushes while the daemon acknowledged %d requests", p.writes, p.bytes>>10, p.flushes, p.acknowledged)
	t.Logf("%d distinct cuts survived, %d lost, in %v", p.distinct-len(p.lost), len(p.lost), time.Since(began).Round(time.Second))
}

// powerCuts counts the outcomes.
type powerCuts struct {
	writes, bytes, flushes, acknowledged, distinct int
	lost                                           []error
}

// powerCut runs the daemon once and tries number power cuts.
func (c campaign) powerCut(m *models, number int) (done powerCuts, err error) {
	dir := filepath.Join(c.dir, "live")
	if err := os.Mkdir(dir, 0o755); err != nil {
		return done, err
	}
	d, err := newDisk(dir)
	if err != nil {
		return done, err
	}
	moments, err := c.live(d, m)
	if err := errors.Join(err, d.close()); err != nil {
		return done, err
	}
	for _, w := range d.log {
		if done.bytes += len(w.data); w.data == nil {
			done.flushes++
		}
	}
	done.writes, done.acknowledged = len(d.log)-done.flushes, acknowledged(moments)

	random := rand.New(rand.NewPCG(20, 0)) // any seed will do
	runs := pool{dir: c.dir}
	var mu sync.Mutex
	distinct := map[cut]bool{}
	for i := range number {
		at := cut{position: random.IntN(len(d.log) + 1), some: i%2 == 1}
		if at.some {
			at.seed = random.Uint64()
		}
		distinct[at] = true
		runs.add(func(dir string) {
			if err := c.recovered(dir, d, at, moments, m); err != nil {
				mu.Lock()
				defer mu.Unlock()
				done.lost = append(done.lost, fmt.Errorf("after a cut at %+v of %d: %w", at, len(d.log), err))
			}
		})
	}
	runs.running.Wait()
	done.distinct = len(distinct)
	return done, nil
}

func acknowledged(moments []moment) (number int) {
	for i, m := range moments {
		if i > 0 && len(m.may) < len(moments[i-1].may) {
			number++
		}
	}
	return number
}

// live runs every task of the daemon on the disk, and returns what was acknowledged at each
// moment.
func (c campaign) live(d *disk, m *models) (moments []moment, err error) {
	h, err := newHost(filepath.Join(d.dir, "host"), d.mounted, c.program, c.containerd, "")
	if err != nil {
		return nil, err
	}
	h.synced = true
	var unread error
	h.noted = func() {
		position, err := d.position()
		unread = errors.Join(unread, err)
		moments = append(moments, moment{position, maps.Clone(h.must), maps.Clone(h.may)})
	}
	h.note()
	writing := writeBack(h.root)
	defer func() {
		writing()
		err = errors.Join(err, unread, h.clear())
	}()
	if err := h.start(false, false, nil, false); err != nil {
		return nil, err
	}
	endPods := func(n int) func() error {
		return func() error {
			for range n {
				if err := h.end(h.pods[0]); err != nil {
					return err
				}
			}
			return nil
		}
	}
	mountModel := func(of *model) func() error {
		return func() error { return do(h.pull(of), func() error { return h.run(of) }) }
	}
	// The wait is longer than the commit interval of the file system, so that the file
	// system commits by itself.
	wait := func() error { time.Sleep(1100 * time.Millisecond); return nil }
	for range 2 {
		if err := do(nil,
			mountModel(m.raw), mountModel(m.mixed), mountModel(m.raw), wait,
			func() error { return do(h.pull(m.gzip), func() error { return h.unpack(m.gzip) }) },
			func() error { return do(h.pull(m.zstd), func() error { return h.record(m.zstd) }) },
			h.image,
			endPods(2), wait,
			mountModel(m.half), mountModel(m.otherHalf), mountModel(m.tar), endPods(2),
			func() error { return h.remove(m.half, m.mixed) }, h.cleanup,
			func() error { return h.stop(syscall.SIGTERM) }, func() error { return h.start(false, false, nil, false) },
			mountModel(m.mixed), wait,
			func() error { return h.stop(syscall.SIGKILL) }, func() error { return h.start(false, false, nil, false) },
			endPods(1), h.cleanup,
		); err != nil {
			return nil, err
		}
	}
	return moments, do(wait(), h.empty, wait)
}

// writeBack writes random files to the disk. The kernel does this at any time from 30
// seconds after a change, which is too long for a test. sync_file_range(2) neither flushes
// the disk's cache nor commits metadata.
func writeBack(root string) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var done sync.WaitGroup
	done.Go(func() {
		random := rand.New(rand.NewPCG(1, 0))
		for ctx.Err() == nil {
			var files []string
			_ = filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
				if err == nil && entry.Type().IsRegular() { // otherwise it has been removed
					files = append(files, path)
				}
				return nil
			})
			if len(files) > 0 {
				if f, err := os.Open(files[random.IntN(len(files))]); err == nil {
					_ = unix.SyncFileRange(int(f.Fd()), 0, 0, unix.SYNC_FILE_RANGE_WRITE)
					f.Close()
				}
			}
			time.Sleep(5 * time.Millisecond)
		}
	})
	return func() {
		cancel()
		done.Wait()
	}
}

// recovered boots a node with the content of the disk after the cut, and checks it.
func (c campaign) recovered(dir string, d *disk, at cut, moments []moment, m *models) (err error) {
	image, mounted := filepath.Join(dir, "image"), filepath.Join(dir, "disk")
	if err := os.MkdirAll(mounted, 0o755); err != nil {
		return err
	}
	if err := errors.Join(d.after(at, image), mountFS(image, mounted, "")); err != nil {
		return err
	}
	h, err := newHost(dir, mounted, c.program, c.containerd, "")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(h.withLog(err), h.clear()) }()
	h.number = 1000 // no key collides with an earlier one
	for _, then := range moments {
		if then.position <= at.position {
			h.must, h.may = maps.Clone(then.must), maps.Clone(then.may)
		}
	}
	if err := errors.Join(h.bootedBefore(), h.checkDatabase()); err != nil {
		return err
	}
	if err := h.start(false, false, nil, false); err != nil {
		return fmt.Errorf("start again: %w", err)
	}
	// Pods pull missing images again.
	if err := do(h.pull(m.all()...), h.checkSnapshots, func() error { return h.checkNext(m.all()) }); err != nil {
		return err
	}
	if err := do(h.unpack(m.gzip), func() error { return h.record(m.zstd) }, h.image); err != nil {
		return fmt.Errorf("later requests: %w", err)
	}
	return do(h.empty(), func() error { return h.stop(syscall.SIGTERM) }, h.checkDatabase, func() error { return h.checkIdle() })
}
