// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

//go:build amd64

package crash

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"golang.org/x/sys/unix"
)

// A disk is a loop device over the file that the recorder program serves. The recorder
// logs every write and cache flush in order. From the log we reproduce the disk's
// content after a power cut at any moment, as often as needed.

const (
	diskSize = 96 << 20
	// sector is the unit that a disk writes atomically. It is the block size of the file
	// system, since the journal relies on atomic blocks.
	sector = 4096
)

type disk struct {
	dir      string // directory of its files
	base     string // the initial content
	mounted  string // mount point of its file system
	files    string // directory that the recorder serves
	recorder *exec.Cmd

	mu     sync.Mutex
	record *os.File
	log    []write // the entries read from record so far
}

// write is a log entry; one without data is a flush.
type write struct {
	off  int64
	data []byte
}

// newDisk creates a disk with an empty ext4, mounted below dir.
func newDisk(dir string) (_ *disk, err error) {
	d := &disk{dir: dir, base: filepath.Join(dir, "base"), mounted: filepath.Join(dir, "disk"), files: filepath.Join(dir, "fuse")}
	current, record, program := filepath.Join(dir, "current"), filepath.Join(dir, "record"), filepath.Join(dir, "recorder")
	if err := errors.Join(os.MkdirAll(d.mounted, 0o755), os.Mkdir(d.files, 0o755)); err != nil {
		return nil, err
	}
	if err := makeFS(d.base); err != nil {
		return nil, err
	}
	if err := copySparse(current, d.base); err != nil {
		return nil, err
	}
	if d.record, err = os.Create(record); err != nil {
		return nil, err
	}
	if out, err := exec.Command("go", "build", "-C", "recorder", "-o", program).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build the recorder: %w\n%s", err, out)
	}
	d.recorder = exec.Command(program, current, d.files, record)
	d.recorder.Stderr = os.Stderr
	d.recorder.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	serving, err := d.recorder.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := d.recorder.Start(); err != nil {
		return nil, err
	}
	if _, err := serving.Read(make([]byte, 1)); err != nil {
		return nil, errors.Join(fmt.Errorf("the recorder did not start: %w", err), d.recorder.Wait())
	}
	// ext4 commits every second, so the disk changes while the daemon works even if
	// no program calls sync.
	return d, mountFS(filepath.Join(d.files, "disk"), d.mounted, "commit=1")
}

func makeFS(image string) error {
	f, err := os.Create(image)
	if err != nil {
		return err
	}
	if err := errors.Join(f.Truncate(diskSize), f.Close()); err != nil {
		return err
	}
	if out, err := exec.Command("mkfs.ext4", "-q", "-b", fmt.Sprint(sector), "-E", "lazy_itable_init=0,lazy_journal_init=0", image).CombinedOutput(); err != nil {
		return fmt.Errorf("mkfs.ext4: %w\n%s", err, out)
	}
	return nil
}

// mountFS mounts the ext4 in a file through a loop device that is freed at the unmount.
func mountFS(image, target, options string) error {
	loop, err := mount.SetupLoop(image, mount.LoopParams{Autoclear: true})
	if err != nil {
		return err
	}
	defer loop.Close()
	return unix.Mount(loop.Name(), target, "ext4", 0, options)
}

// position returns the number of entries in the log.
func (d *disk) position() (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for {
		// The recorder logs an entry before it acknowledges the write. An incomplete
		// last entry is still being written.
		var header [16]byte
		start, err := d.record.Seek(0, io.SeekCurrent)
		if err != nil {
			return 0, err
		}
		if _, err = io.ReadFull(d.record, header[:]); err == nil {
			w := write{off: int64(binary.BigEndian.Uint64(header[:]))}
			if n := binary.BigEndian.Uint64(header[8:]); n > 0 {
				w.data = make([]byte, n)
				_, err = io.ReadFull(d.record, w.data)
			}
			if err == nil {
				d.log = append(d.log, w)
				continue
			}
		}
		if !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
			return 0, err
		}
		_, err = d.record.Seek(start, io.SeekStart)
		return len(d.log), err
	}
}

// close unmounts the disk, stops its recorder and reads the rest of the log.
func (d *disk) close() error {
	errs := []error{unmountFS(d.mounted), unmountFS(d.files), d.recorder.Wait()}
	_, err := d.position()
	return errors.Join(append(errs, err, d.record.Close())...)
}

// unmountFS unmounts a file system. It retries until the processes that use it have ended.
func unmountFS(target string) (err error) {
	for limit := time.Now().Add(patience); time.Now().Before(limit); {
		if err = unix.Unmount(target, 0); !errors.Is(err, unix.EBUSY) {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	return os.NewSyscallError("umount "+target, err)
}

// cut is a power cut after position log entries. A disk with a cache may have stored any
// part of the writes since the last flush: all of them, or, with some, the sectors that
// seed selects.
type cut struct {
	position int
	some     bool
	seed     uint64
}

// after writes the content of the disk after the cut to image.
func (d *disk) after(c cut, image string) error {
	if err := copySparse(image, d.base); err != nil {
		return err
	}
	f, err := os.OpenFile(image, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	d.mu.Lock()
	log := d.log[:c.position]
	d.mu.Unlock()
	flushed := len(log)
	for flushed > 0 && log[flushed-1].data != nil {
		flushed--
	}
	random := rand.New(rand.NewPCG(c.seed, 0))
	for i, w := range log {
		if i < flushed || !c.some {
			if _, err := f.WriteAt(w.data, w.off); err != nil {
				return err
			}
			continue
		}
		for n := 0; n < len(w.data); n += sector {
			if random.IntN(2) == 0 {
				continue
			}
			if _, err := f.WriteAt(w.data[n:min(n+sector, len(w.data))], w.off+int64(n)); err != nil {
				return err
			}
		}
	}
	return nil
}

// copySparse copies a file and preserves its holes.
func copySparse(target, source string) error {
	if out, err := exec.Command("cp", "--sparse=always", source, target).CombinedOutput(); err != nil {
		return fmt.Errorf("cp: %w\n%s", err, out)
	}
	return nil
}

// The emulated disk loses unflushed writes. Otherwise the other tests would prove nothing.
func TestAPowerCutLosesUnflushedWrites(t *testing.T) {
	dir := t.TempDir()
	d, err := newDisk(dir)
	check(t, err)
	defer func() { check(t, d.close()) }()
	name := filepath.Join(d.mounted, "file")
	check(t, os.WriteFile(name, []byte("not synced"), 0o644))
	before, err := d.position()
	check(t, err)
	f, err := os.OpenFile(name, os.O_WRONLY, 0)
	check(t, err)
	check(t, errors.Join(f.Sync(), f.Close()))
	synced, err := d.position()
	check(t, err)
	for _, c := range []struct {
		cut
		want string
	}{
		{cut{before, false, 0}, ""},
		{cut{synced, false, 0}, "not synced"},
		{cut{synced, true, 1}, "not synced"},
	} {
		image, target := filepath.Join(dir, "image"), filepath.Join(dir, "after")
		check(t, d.after(c.cut, image))
		check(t, os.MkdirAll(target, 0o755))
		check(t, mountFS(image, target, ""))
		got, err := os.ReadFile(filepath.Join(target, "file"))
		if string(got) != c.want {
			t.Errorf("after a cut at %+v the file has %q, %v; want %q", c.cut, got, err, c.want)
		}
		check(t, errors.Join(unmountFS(target), os.Remove(image)))
	}
}
