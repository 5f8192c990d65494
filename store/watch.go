// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"syscall"
	"time"

	"github.com/containerd/log"
	"github.com/fsnotify/fsnotify"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/blobs"
)

// changed returns a channel that is closed when a blob may have arrived or been deleted.
func (s *Store) changed() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.change
}

// tellChanged wakes all that wait for a blob, to look again. The caller holds s.mu.
func (s *Store) tellChanged() {
	close(s.change)
	s.change = make(chan struct{})
}

// watcher tells of blobs that appear and disappear: by inotify, or if its limits are reached,
// by looking into the directories once a second.
type watcher struct {
	*Store
	deleted chan<- struct{}
	inotify *fsnotify.Watcher // nil if there is none
	// seen are the directories without a watch, as they were found. trouble is why they have
	// none.
	seen    map[string]seen
	trouble string
}

// seen is how a directory was found when it was last looked into.
type seen struct {
	// changed is its modification time, and first when it was first found with that.
	changed, first time.Time
	// looked is when it was looked into, less coarse, and clock is the same by the clock from
	// which files have their times. The clock may have been set since.
	looked, clock time.Time
}

// complete reports whether no change can have the same modification time as one that has been
// seen.
func (s seen) complete() bool { return !s.looked.Before(s.first) }

// since returns a time that files have at the earliest that have changed after s. now is the
// clock, which may have been set back.
func (s seen) since(now time.Time) time.Time {
	if same := now.Round(0).Add(-time.Since(s.looked)); same.Before(s.clock) {
		return same
	}
	return s.clock
}

// watch returns a channel that tells, until ctx ends, that blobs have been deleted. containerd
// makes the directories when it needs them, so they are looked for every second.
func (s *Store) watch(ctx context.Context) <-chan struct{} {
	deleted := make(chan struct{}, 1)
	w := &watcher{Store: s, deleted: deleted, seen: map[string]seen{}}
	go w.run(ctx)
	return deleted
}

func (w *watcher) run(ctx context.Context) {
	defer func() {
		if w.inotify != nil {
			_ = w.inotify.Close()
		}
	}()
	look := time.NewTicker(lookEvery)
	defer look.Stop()
	w.look(ctx)
	for {
		var events <-chan fsnotify.Event
		var overflow <-chan error
		if w.inotify != nil {
			events, overflow = w.inotify.Events, w.inotify.Errors
		}
		select {
		case <-ctx.Done():
			return
		case <-look.C:
			w.look(ctx)
			w.lookForProgress()
		case e := <-events:
			if e.Has(fsnotify.Create) {
				w.arrived(ctx, e.Name)
			}
			if e.Has(fsnotify.Remove) || e.Has(fsnotify.Rename) {
				w.missed()
			}
		case <-overflow: //nolint:errcheck // events may have been lost
			w.missed()
		}
	}
}

// missed is called when blobs may have been deleted, or may have arrived unseen. A deleted one
// may be a manifest whose layers a build waits for.
func (w *watcher) missed() {
	w.mu.Lock()
	w.tellChanged()
	w.mu.Unlock()
	select {
	case w.deleted <- struct{}{}:
	default:
	}
}

// look watches the directories of blobs that are there and not yet watched, and looks into
// those that cannot be watched.
func (w *watcher) look(ctx context.Context) {
	var trouble error
	for _, dir := range w.blobDirs() {
		if w.inotify != nil && slices.Contains(w.inotify.WatchList(), dir) {
			continue
		}
		at, clock := time.Now(), w.now().Round(0)
		fi, err := os.Stat(dir)
		if err != nil {
			continue // the runtime makes it when it needs it
		}
		before, there := w.seen[dir]
		if !there {
			before = seen{looked: w.opened, clock: w.opened.Round(0)}
		}
		now := seen{fi.ModTime(), at, at.Add(-coarse), clock.Add(-coarse)}
		same := there && before.changed.Equal(now.changed)
		if same {
			now.first = before.first
		}
		switch err = w.add(dir); {
		case err == nil:
			delete(w.seen, dir)
			w.Wake() // for what was deleted before
			w.arrivedSince(ctx, dir, before.since(clock))
		case same && before.complete():
			trouble = err
		default: // it has changed, or may have since
			trouble = err
			w.seen[dir] = now
			w.missed()
			w.arrivedSince(ctx, dir, before.since(clock))
		}
	}
	switch said := w.trouble; {
	case trouble == nil && said != "":
		w.trouble = ""
		log.G(ctx).Info("inotify tells of new and deleted blobs again")
	case trouble != nil && trouble.Error() != said:
		w.trouble = trouble.Error()
		log.G(ctx).WithError(trouble).Warn("inotify cannot tell of new and deleted blobs; looking once a second")
	}
}

func (w *watcher) add(dir string) (err error) {
	if w.inotify == nil {
		if w.inotify, err = fsnotify.NewWatcher(); err != nil {
			w.inotify = nil
			return outOfInotify(err)
		}
	}
	return outOfInotify(w.inotify.Add(dir))
}

// outOfInotify says what to do if a limit of inotify is reached (inotify_add_watch(2),
// inotify_init(2)). The limits are for all processes of a user together.
func outOfInotify(err error) error {
	var name string
	switch {
	case errors.Is(err, unix.ENOSPC):
		name = "max_user_watches"
	case errors.Is(err, unix.EMFILE):
		name = "max_user_instances"
	default:
		return err
	}
	value, _ := os.ReadFile(filepath.Join("/proc/sys/fs/inotify", name))
	return fmt.Errorf("raise the kernel parameter fs.inotify.%s, now %s: the processes of this user have reached it: %w", name, bytes.TrimSpace(value), err)
}

// CanWatch checks that a daemon that starts now could watch the directories of blobs by
// inotify. The error says what to do.
func CanWatch(blobs blobs.Source) error {
	inotify, err := fsnotify.NewWatcher()
	if err != nil {
		return outOfInotify(err)
	}
	defer func() { _ = inotify.Close() }()
	for _, dir := range blobs.All() {
		if err := inotify.Add(string(dir)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return outOfInotify(err)
		}
	}
	return nil
}

// arrivedSince looks for blobs that have arrived in dir since then. Artifacts that arrived
// before the store was opened are unpacked when a pod asks.
func (s *Store) arrivedSince(ctx context.Context, dir string, since time.Time) {
	d, err := os.Open(dir)
	if err != nil {
		return // it has just been removed
	}
	defer d.Close()
	if fi, err := d.Stat(); err != nil || !fi.ModTime().After(since) {
		return // nothing has arrived
	}
	for ctx.Err() == nil {
		entries, err := d.ReadDir(256) // there may be many, and most are old
		for _, e := range entries {
			if fi, err := e.Info(); err == nil && renamed(fi).After(since) {
				s.arrived(ctx, filepath.Join(dir, e.Name()))
			}
		}
		if err != nil {
			return
		}
	}
}

// renamed returns a time at or after which the file was not renamed any more: a blob is written
// elsewhere, and renamed into its place.
func renamed(fi os.FileInfo) time.Time {
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok {
		return fi.ModTime()
	}
	return time.Unix(st.Ctim.Unix())
}

// blobDirs returns all directories in which there may be blobs.
func (s *Store) blobDirs() (dirs []string) {
	for _, content := range s.content.All() {
		for _, algorithm := range []string{"sha256", "sha384", "sha512"} {
			dirs = append(dirs, filepath.Join(string(content), "blobs", algorithm))
		}
	}
	return dirs
}

// refDigest matches the end of the name that containerd gives to a blob that it receives
// (core/remotes/handlers.go, MakeRefKey).
var refDigest = regexp.MustCompile(`[@-]sha(?:256|384|512):([0-9a-f]{64,128})$`)

// receiving returns how many bytes containerd has of each blob that it is receiving, by the
// encoded digest (plugins/content/local/store.go, ingestPaths).
func (s *Store) receiving() map[string]int64 {
	sizes := map[string]int64{}
	for _, content := range s.content.All() {
		ingests := filepath.Join(string(content), "ingest")
		names, err := list(ingests)
		if err != nil {
			continue // CRI-O has none
		}
		for _, name := range names {
			data, err := os.Lstat(filepath.Join(ingests, name, "data"))
			if err != nil {
				continue // it has just been completed
			}
			if of := refDigest.FindStringSubmatch(readRef(filepath.Join(ingests, name, "ref"))); of != nil {
				sizes[of[1]] += data.Size() // more than one namespace may pull it
			}
		}
	}
	return sizes
}

func readRef(path string) string {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return ""
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxRef))
	if err != nil {
		return ""
	}
	return string(b)
}
