// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

//go:build amd64

package crash

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/treelist"
)

// checkPods checks that every running pod still reads the right bytes.
func (h *host) checkPods(when string) error {
	for _, p := range h.pods {
		if err := p.check(); err != nil {
			return fmt.Errorf("%s, a running pod with the model %q: %w", when, p.model.name, err)
		}
	}
	return nil
}

// checkSnapshots checks that exactly the acknowledged snapshots exist and have the
// right files.
func (h *host) checkSnapshots() error {
	found, err := h.list()
	if err != nil {
		return err
	}
	for key := range found {
		if _, ok := h.must[key]; !ok && !h.may[key] {
			return fmt.Errorf("unexpected snapshot, which was removed or never requested: %s", key)
		}
	}
	for key, m := range h.must {
		info, ok := found[key]
		if !ok {
			return fmt.Errorf("the snapshot %s is lost", key)
		}
		if m == nil || info.Kind == snapshots.KindCommitted || m.refused != "" {
			continue
		}
		ctx, cancel := h.context()
		mounts, err := h.Mounts(ctx, key)
		cancel()
		if err == nil {
			err = h.compare(mounts, m)
		}
		if err != nil {
			return fmt.Errorf("the snapshot %s of the model %q: %w", key, m.name, err)
		}
	}
	return nil
}

// compare mounts a volume and compares it with the model.
func (h *host) compare(mounts []mount.Mount, m *model) error {
	target := filepath.Join(h.dir, "mounted")
	if err := os.MkdirAll(target, 0o755); err != nil {
		return err
	}
	if err := mount.All(mounts, target); err != nil {
		return err
	}
	err := compare(target, m, h.exact)
	return errors.Join(err, mount.UnmountAll(target, unix.MNT_DETACH))
}

func compare(dir string, m *model, exact bool) error {
	got, err := treelist.List(dir)
	if err != nil {
		return err
	}
	want := m.want
	if !exact { // files have the attributes of the runtime's blobs
		want = slices.Clone(want)
		for _, list := range [][]treelist.Entry{want, got} {
			for i := range list {
				list[i].Mode, list[i].UID, list[i].GID, list[i].ModTime = 0, 0, 0, 0
			}
		}
	}
	if difference := treelist.Diff(want, got); difference != "" {
		return fmt.Errorf("the volume differs:\n%s", difference)
	}
	return nil
}

// checkNext runs the next pod of each model and checks that it gets the right files or
// a clear error.
func (h *host) checkNext(all []*model) error {
	for _, m := range all {
		err := h.run(m)
		switch {
		case m.refused == "" && err != nil:
			return fmt.Errorf("the next pod with the model %q: %w", m.name, err)
		case m.refused != "" && (err == nil || !strings.Contains(err.Error(), m.refused)):
			return fmt.Errorf("the next pod with the model %q got the error %v", m.name, err)
		}
	}
	return h.checkPods("after the next pods started")
}

// checkIdle checks that nothing is mounted and that the disk has only the files of an idle
// daemon and besides.
func (h *host) checkIdle(besides ...string) error {
	left, err := h.leftovers()
	for _, name := range left {
		if !slices.Contains(idle, name) && !slices.Contains(besides, name) {
			err = errors.Join(err, fmt.Errorf("left over: %s", name))
		}
	}
	return err
}

// leftovers lists all files and mounts.
func (h *host) leftovers() (left []string, err error) {
	walk := func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(filepath.Dir(h.root), path)
		if !filepath.IsLocal(rel) {
			rel, err = filepath.Rel(h.dir, path)
		}
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		if d.Type().IsRegular() && filepath.Base(rel) != "metadata.db" {
			rel += fmt.Sprintf(", %d bytes", info.Size())
		}
		left = append(left, rel)
		return nil
	}
	if err := errors.Join(filepath.WalkDir(h.root, walk), filepath.WalkDir(h.state, walk)); err != nil {
		return nil, err
	}
	mounts, err := node.Mounts(h.dir)
	if err != nil {
		return nil, err
	}
	for _, m := range mounts {
		if m != h.content && m != filepath.Dir(h.root) { // mounted by the harness
			left = append(left, "mount "+strings.TrimPrefix(m, h.dir))
		}
	}
	loops, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return nil, err
	}
	for _, loop := range loops {
		if file, err := os.ReadFile(loop); err == nil && strings.HasPrefix(string(file), h.root+"/") {
			left = append(left, "loop device of "+strings.TrimSpace(string(file)))
		}
	}
	return left, nil
}

// maxDatabase exceeds the database's size in every run.
const maxDatabase = 256 << 10

// checkDatabase checks the stopped daemon's database.
func (h *host) checkDatabase() error {
	name := filepath.Join(h.root, "overlayfs", "metadata.db")
	info, err := os.Stat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if info.Size() > maxDatabase {
		return fmt.Errorf("the database has %d bytes", info.Size())
	}
	if info.Size() == 0 {
		return nil // the daemon was killed before it wrote to it
	}
	if err := node.CheckDatabase(name); err != nil {
		return fmt.Errorf("the database: %w", err)
	}
	return nil
}
