// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	bolterrors "go.etcd.io/bbolt/errors"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/unpack"
)

// explaining is a snapshotter whose errors say what to do about the disk with the database and
// the directories of snapshots. The errors of bbolt and overlayfs have no kind of errdefs, and
// no path if the database cannot be synced.
type explaining struct{ *snapshotter }

func (s explaining) Prepare(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	mounts, err := s.snapshotter.Prepare(ctx, key, parent, opts...)
	return mounts, s.explain(err)
}

func (s explaining) View(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	mounts, err := s.snapshotter.View(ctx, key, parent, opts...)
	return mounts, s.explain(err)
}

func (s explaining) Mounts(ctx context.Context, key string) ([]mount.Mount, error) {
	mounts, err := s.snapshotter.Mounts(ctx, key)
	return mounts, s.explain(err)
}

func (s explaining) Commit(ctx context.Context, name, key string, opts ...snapshots.Opt) error {
	return s.explain(s.snapshotter.Commit(ctx, name, key, opts...))
}

func (s explaining) Remove(ctx context.Context, key string) error {
	return s.explain(s.snapshotter.Remove(ctx, key))
}

func (s explaining) Update(ctx context.Context, info snapshots.Info, fieldpaths ...string) (snapshots.Info, error) {
	info, err := s.snapshotter.Update(ctx, info, fieldpaths...)
	return info, s.explain(err)
}

// Cleanup implements snapshots.Cleaner.
func (s explaining) Cleanup(ctx context.Context) error {
	return s.explain(s.snapshotter.Cleanup(ctx))
}

func (s explaining) explain(err error) error {
	var (
		errno unix.Errno
		path  *fs.PathError
		link  *os.LinkError
	)
	switch {
	case err == nil, errdefs.IsResourceExhausted(err), !errors.As(err, &errno):
		return err
	case errno == unix.ENOSPC, errno == unix.EDQUOT:
		return unpack.OutOfSpace(err, s.root)
	case errors.As(err, &path), errors.As(err, &link), !strings.Contains(err.Error(), "commit failed: "):
		return err
	default: // fdatasync(2) failed in bbolt
		return fmt.Errorf("%w: %s", err, filepath.Join(s.root, "metadata.db"))
	}
}

// explainInvalid returns the error of the disk if there is one. bbolt ignores it and calls the
// database invalid (getPageSize in db.go), as if its bytes were wrong.
func explainInvalid(root string, err error) error {
	if !errors.Is(err, bolterrors.ErrInvalid) {
		return err
	}
	file, openErr := os.Open(filepath.Join(root, "metadata.db"))
	if openErr != nil {
		return openErr
	}
	defer func() { _ = file.Close() }()
	if _, readErr := file.ReadAt(make([]byte, 1), 0); readErr != nil && !errors.Is(readErr, io.EOF) {
		return readErr
	}
	return err
}
