// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

// Package fswatch watches all file systems for changes that given processes make outside
// allowed paths: files and directories created, removed, renamed, written to, or given
// other attributes. It is for tests only and needs root.
package fswatch

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Watch uses fanotify(7) with one mark per file system. It covers the file systems that are
// mounted at its start and support marks; read-only ones need none.
type Watch struct {
	fd, wake int
	mounts   map[[2]int32]int // an open directory of each file system, by its fsid
	done     chan struct{}

	// last is the directory of the last event, if it is in an allowed path. Most events are
	// in the same directory as the one before, so this saves the look-up.
	last struct{ handle, prefix string }

	mu      sync.Mutex
	pids    map[int32]bool
	allowed []string
	changes map[string]bool
	seen    map[string]int // allowed changes, by the prefix that allows them
	err     error
}

const mask = unix.FAN_CREATE | unix.FAN_DELETE | unix.FAN_MOVED_FROM | unix.FAN_MOVED_TO | unix.FAN_MODIFY | unix.FAN_ATTRIB | unix.FAN_ONDIR

// Start watches the processes pids and their children for changes that are not at or below
// an allowed path. A child is recognised only if it still exists when its event is read. In
// an allowed path "*" matches one name.
func Start(pids []int, allowed ...string) (*Watch, error) {
	fd, err := unix.FanotifyInit(unix.FAN_CLASS_NOTIF|unix.FAN_REPORT_DFID_NAME|unix.FAN_CLOEXEC|unix.FAN_NONBLOCK|unix.FAN_UNLIMITED_QUEUE, unix.O_RDONLY)
	if err != nil {
		return nil, os.NewSyscallError("fanotify_init", err)
	}
	w := &Watch{fd: fd, mounts: map[[2]int32]int{}, done: make(chan struct{}), pids: map[int32]bool{}, allowed: allowed, changes: map[string]bool{}, seen: map[string]int{}}
	for _, pid := range pids {
		w.pids[int32(pid)] = true
	}
	if w.wake, err = unix.Eventfd(0, unix.EFD_CLOEXEC); err != nil {
		return nil, errors.Join(os.NewSyscallError("eventfd", err), unix.Close(fd))
	}
	if err := w.mark(); err != nil {
		w.close()
		return nil, err
	}
	go w.run()
	return w, nil
}

// mark adds a mark to every file system of the mount namespace. Those without file handles,
// such as proc, do not support marks.
func (w *Watch) mark() error {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(text)) {
		at, err := strconv.Unquote(`"` + strings.ReplaceAll(strings.Fields(line)[4], `"`, `\"`) + `"`)
		if err != nil {
			return fmt.Errorf("mountinfo line %q: %w", line, err)
		}
		var st unix.Statfs_t
		if err := unix.Statfs(at, &st); err != nil || st.Flags&unix.ST_RDONLY != 0 || w.mounts[st.Fsid.Val] != 0 {
			continue
		}
		dir, err := unix.Open(at, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			continue // a file mount, or unmounted in the meantime
		}
		if err := unix.FanotifyMark(w.fd, unix.FAN_MARK_ADD|unix.FAN_MARK_FILESYSTEM, mask, dir, "."); err != nil {
			_ = unix.Close(dir)
			if at == "/" {
				return fmt.Errorf("watch %s: %w", at, err)
			}
			continue
		}
		w.mounts[st.Fsid.Val] = dir
	}
	return nil
}

// FileSystems returns the number of watched file systems.
func (w *Watch) FileSystems() int { return len(w.mounts) }

// Add watches one more process.
func (w *Watch) Add(pid int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.pids[int32(pid)] = true
}

func (w *Watch) run() {
	defer close(w.done)
	buf := make([]byte, 256<<10)
	for {
		ready := []unix.PollFd{{Fd: int32(w.fd), Events: unix.POLLIN}, {Fd: int32(w.wake), Events: unix.POLLIN}}
		if _, err := unix.Poll(ready, -1); err != nil && !errors.Is(err, unix.EINTR) {
			w.fail(os.NewSyscallError("poll", err))
			return
		}
		for {
			n, err := unix.Read(w.fd, buf)
			if errors.Is(err, unix.EAGAIN) {
				break
			}
			if err != nil {
				w.fail(os.NewSyscallError("read events", err))
				return
			}
			w.last.handle = "" // the directory may have been renamed
			w.events(buf[:n])
		}
		if ready[1].Revents != 0 {
			return
		}
	}
}

func (w *Watch) fail(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.err = errors.Join(w.err, err)
}

// The layout of struct fanotify_event_metadata and of the info record that follows it
// (linux/fanotify.h).
const (
	metadataLen = 24
	infoHeader  = 4
	fsidLen     = 8
	handleLen   = 8
)

func (w *Watch) events(b []byte) {
	for len(b) >= metadataLen {
		length := int(binary.NativeEndian.Uint32(b))
		eventMask := binary.NativeEndian.Uint64(b[8:])
		pid := int32(binary.NativeEndian.Uint32(b[20:]))
		if eventMask&unix.FAN_Q_OVERFLOW != 0 {
			w.fail(errors.New("events were lost"))
		}
		if w.ours(pid) {
			w.event(eventMask, pid, b[metadataLen:length])
		}
		b = b[length:]
	}
}

// ours reports whether the process is watched, or a child of one that is.
func (w *Watch) ours(pid int32) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	is, known := w.pids[pid]
	if known {
		return is
	}
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	// The program's name, in parentheses, may contain any byte.
	fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
	parent, err := strconv.ParseInt(fields[1], 10, 32)
	is = err == nil && w.pids[int32(parent)]
	if is {
		w.pids[pid] = true
	}
	return is
}

func (w *Watch) event(eventMask uint64, pid int32, info []byte) {
	if len(info) < infoHeader+fsidLen+handleLen {
		w.fail(errors.New("an event has no file name"))
		return
	}
	info = info[infoHeader:]
	fsid := [2]int32{int32(binary.NativeEndian.Uint32(info)), int32(binary.NativeEndian.Uint32(info[4:]))}
	size, kind := binary.NativeEndian.Uint32(info[fsidLen:]), int32(binary.NativeEndian.Uint32(info[fsidLen+4:]))
	rest := info[fsidLen+handleLen:]
	if last := string(info[:fsidLen+handleLen+int(size)]); last == w.last.handle {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.seen[w.last.prefix]++
		return
	}
	handle := unix.NewFileHandle(kind, rest[:size])
	name, _, _ := bytes.Cut(rest[size:], []byte{0})
	dir, err := unix.OpenByHandleAt(w.mounts[fsid], handle, unix.O_PATH|unix.O_CLOEXEC)
	for range 100 { // the kernel returns ENOMEM for some directories that are just being removed
		if !errors.Is(err, unix.ENOMEM) {
			break
		}
		time.Sleep(10 * time.Millisecond)
		dir, err = unix.OpenByHandleAt(w.mounts[fsid], handle, unix.O_PATH|unix.O_CLOEXEC)
	}
	if errors.Is(err, unix.ESTALE) {
		// The directory no longer exists. Its removal is an event in its parent, and so is
		// its creation.
		return
	}
	if err != nil {
		w.fail(fmt.Errorf("open the directory that contains %q: %w", name, err))
		return
	}
	defer func() { _ = unix.Close(dir) }()
	at, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", dir))
	if err != nil {
		w.fail(err)
		return
	}
	of := strings.TrimSuffix(at, " (deleted)")
	at = filepath.Join(of, string(name))
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, prefix := range w.allowed {
		if within(at, prefix) {
			if within(of, prefix) {
				w.last.handle, w.last.prefix = string(info[:fsidLen+handleLen+int(size)]), prefix
			}
			w.seen[prefix]++
			return
		}
	}
	w.changes[fmt.Sprintf("%s by process %d: %s", at, pid, what(eventMask))] = true
}

// within reports whether at matches a pattern or is below a path that does.
func within(at, pattern string) bool {
	names, wanted := strings.Split(at, "/"), strings.Split(pattern, "/")
	if len(names) < len(wanted) {
		return false
	}
	for i, name := range wanted {
		if ok, err := filepath.Match(name, names[i]); !ok || err != nil {
			return false
		}
	}
	return true
}

func what(eventMask uint64) string {
	var all []string
	for bit, text := range map[uint64]string{
		unix.FAN_CREATE: "made", unix.FAN_DELETE: "removed", unix.FAN_MOVED_FROM: "moved away", unix.FAN_MOVED_TO: "moved here",
		unix.FAN_MODIFY: "written to", unix.FAN_ATTRIB: "other attributes",
	} {
		if eventMask&bit != 0 {
			all = append(all, text)
		}
	}
	slices.Sort(all)
	return strings.Join(all, ", ")
}

// Changes returns the changes so far outside the allowed paths.
func (w *Watch) Changes() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Sorted(func(yield func(string) bool) {
		for c := range w.changes {
			if !yield(c) {
				return
			}
		}
	})
}

// Stop handles all events so far and ends the watch. It returns the changes outside the
// allowed paths, and the number of those within each allowed path.
func (w *Watch) Stop() (changes []string, seen map[string]int, err error) {
	one := binary.NativeEndian.AppendUint64(nil, 1)
	if _, err := unix.Write(w.wake, one); err != nil {
		return nil, nil, err
	}
	select {
	case <-w.done:
	case <-time.After(2 * time.Minute):
		return nil, nil, errors.New("the watch did not end")
	}
	w.close()
	return w.Changes(), w.seen, w.err
}

func (w *Watch) close() {
	for _, fd := range w.mounts {
		_ = unix.Close(fd)
	}
	_ = unix.Close(w.fd)
	_ = unix.Close(w.wake)
}

// OfTheTest returns the files that go test lets this process write: its test log, its
// coverage profile and its output.
func OfTheTest() (files []string) {
	for _, arg := range os.Args {
		for _, name := range []string{"-test.testlogfile=", "-test.coverprofile="} {
			if file, ok := strings.CutPrefix(arg, name); ok {
				files = append(files, file)
			}
		}
	}
	for _, fd := range []string{"1", "2"} {
		if file, err := os.Readlink("/proc/self/fd/" + fd); err == nil && filepath.IsAbs(file) {
			files = append(files, file)
		}
	}
	return files
}
