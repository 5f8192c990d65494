// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

//go:build amd64

package crash

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/treelist"
)

// pod stands for a container that uses a volume: it has its own mount, keeps a file open
// and mapped, and reads continuously.
type pod struct {
	dir   string
	key   string
	model *model
	exact bool

	stop   chan struct{}
	ended  chan error
	file   *os.File
	mapped []byte
	sum    string
}

func startPod(dir, key string, m *model, mounts []mount.Mount, exact bool) (_ *pod, err error) {
	p := &pod{dir: dir, key: key, model: m, exact: exact, stop: make(chan struct{}), ended: make(chan error, 1)}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	if err := mount.All(mounts, dir); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, mount.UnmountAll(dir, unix.MNT_DETACH))
		}
	}()
	i := slices.IndexFunc(m.want, func(e treelist.Entry) bool { return e.Path == weightsFile })
	p.sum = m.want[i].SHA256
	if p.file, err = os.Open(filepath.Join(dir, weightsFile)); err != nil {
		return nil, err
	}
	if p.mapped, err = unix.Mmap(int(p.file.Fd()), 0, int(m.want[i].Size), unix.PROT_READ, unix.MAP_SHARED); err != nil {
		return nil, errors.Join(err, p.file.Close())
	}
	go p.read()
	return p, nil
}

// read reads the open file until the pod ends, in small parts, so that a hundred pods can
// run.
func (p *pod) read() {
	buf := make([]byte, 64<<10)
	for off := int64(0); ; off += int64(len(buf)) {
		if off >= int64(len(p.mapped)) {
			off = 0
		}
		n, err := p.file.ReadAt(buf, off)
		if errors.Is(err, io.EOF) {
			err = nil
		}
		if err == nil && !bytes.Equal(buf[:n], p.mapped[off:off+int64(n)]) {
			err = fmt.Errorf("at %d the file and the mapped file differ", off)
		}
		if err != nil {
			p.ended <- err
			return
		}
		select {
		case <-p.stop:
			p.ended <- nil
			return
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// check checks everything that the pod sees.
func (p *pod) check() (err error) {
	select {
	case err := <-p.ended:
		p.ended <- err
		return fmt.Errorf("reading: %w", err)
	default:
	}
	// An unreadable page of a mapped file raises SIGBUS.
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("reading the mapped file: %v", r)
		}
	}()
	if sum := sha256.Sum256(p.mapped); hex.EncodeToString(sum[:]) != p.sum {
		return errors.New("the mapped file has other bytes")
	}
	return compare(p.dir, p.model, p.exact)
}

// end ends the pod.
func (p *pod) end() error {
	close(p.stop)
	return errors.Join(<-p.ended, unix.Munmap(p.mapped), p.file.Close(),
		mount.UnmountAll(p.dir, 0), os.Remove(p.dir))
}
