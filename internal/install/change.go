// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package install

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/pmezard/go-difflib/difflib"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/internal/tomlfile"
)

// change is a change of one file.
type change struct {
	path string
	// before and after are its contents, nil if it does not exist.
	before, after []byte
	owner
	// note replaces the lines in a diff.
	note string
	// folder is the directory of the file if it does not exist, and base the nearest
	// existing one above it.
	folder, base string
}

// owner is the owner of a file, with its mode.
type owner struct {
	uid, gid uint32
	mode     fs.FileMode
}

// changed is the change of the file at path to after. A new file belongs to root and has
// the mode.
func changed(path string, after []byte, mode fs.FileMode) (change, error) {
	c := change{path: path, after: after, owner: owner{mode: mode}}
	var st unix.Stat_t
	err := unix.Stat(path, &st)
	if errors.Is(err, fs.ErrNotExist) {
		if dir := filepath.Dir(path); !exists(dir) {
			c.folder, c.base = dir, nearest(dir)
		}
		return c, nil
	}
	if err != nil {
		return c, &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return c, tomlfile.NotRegular(path)
	}
	c.owner = owner{st.Uid, st.Gid, fs.FileMode(st.Mode & 0o777)}
	c.before, err = os.ReadFile(path)
	if err == nil && c.before == nil {
		c.before = []byte{}
	}
	return c, err
}

// none reports whether nothing changes.
func (c change) none() bool {
	return (c.before == nil) == (c.after == nil) && bytes.Equal(c.before, c.after)
}

// String describes the change for a person.
func (c change) String() string {
	switch {
	case c.before == nil:
		return "made " + c.path
	case c.after == nil:
		return "removed " + c.path
	}
	return "changed " + c.path
}

// diff is the change as `diff -u` prints it.
func (c change) diff() (string, error) {
	from, to := c.path, c.path
	if c.before == nil {
		from = os.DevNull
	}
	if c.after == nil {
		to = os.DevNull
	}
	if c.note != "" {
		return fmt.Sprintf("--- %s\n+++ %s\n(%s)", from, to, c.note), nil
	}
	text, err := difflib.GetUnifiedDiffString(difflib.UnifiedDiff{
		A: lines(c.before), B: lines(c.after),
		FromFile: from, ToFile: to, Context: 3,
	})
	return strings.TrimSuffix(text, "\n"), err
}

// lines splits a text into lines, each with its newline.
func lines(text []byte) []string {
	split := strings.SplitAfter(string(text), "\n")
	if last := len(split) - 1; split[last] == "" {
		return split[:last]
	}
	split[len(split)-1] += "\n\\ No newline at end of file\n" // as diff writes it
	return split
}

// writable returns an error if the change cannot be made. It does not make it.
func (c change) writable() error {
	if c.before == nil && exists(c.path) {
		return fmt.Errorf("%s is a dangling link: remove it, or create its target: %w", c.path, errdefs.ErrFailedPrecondition)
	}
	path := c.path
	err := unix.Access(path, unix.W_OK) // fails for an immutable file (chattr +i), too
	if c.before == nil || err == nil {
		path = nearest(filepath.Dir(c.path)) // directories below it will be made
		err = unix.Access(path, unix.W_OK)
	}
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.EROFS):
		return fmt.Errorf("%s is on a read-only filesystem, so %s cannot be written: make it writable (mount -o remount,rw), or choose another place: %w", path, c.path, errdefs.ErrFailedPrecondition)
	}
	return fmt.Errorf("%s is not writable (%v), so %s cannot be changed: check its permissions and attributes (lsattr): %w", path, err, c.path, errdefs.ErrFailedPrecondition)
}

func writable(changes []change) error {
	for _, c := range changes {
		if err := c.writable(); err != nil {
			return err
		}
	}
	return nil
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// nearest is the directory, or the first existing one above it.
func nearest(dir string) string {
	for !exists(dir) {
		dir = filepath.Dir(dir)
	}
	return dir
}

// tempName is the name of temporary files and directories. No import of *.toml matches it,
// and the next run recognizes what a killed one has left, for which the random names of
// containerd's pkg/atomicfile would not do.
const tempName = ".artifact-snapshotter-*.tmp"

// apply makes the change. At any instant, even after a power failure, the file is the old
// one or the new one. If it is a link, its target changes.
func (c change) apply() (err error) {
	now, err := changed(c.path, c.before, 0)
	if err != nil {
		return err
	}
	if !now.none() {
		return fmt.Errorf("it has changed in the meantime: try again: %w", errdefs.ErrAborted)
	}
	path := c.path
	if real, err := filepath.EvalSymlinks(path); err == nil {
		path = real
	}
	if c.after == nil {
		if err := os.Remove(c.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return syncDir(filepath.Dir(c.path))
	}
	base := nearest(filepath.Dir(path))
	left, _ := filepath.Glob(filepath.Join(base, tempName)) // by a killed process
	for _, path := range left {
		_ = os.RemoveAll(path)
	}
	temp, f, to, err := create(base, path)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = f.Close()
			_ = os.RemoveAll(temp)
		}
	}()
	if _, err := f.Write(c.after); err != nil {
		return err
	}
	if err := errors.Join(f.Chown(int(c.uid), int(c.gid)), f.Chmod(c.mode), f.Sync()); err != nil {
		return err
	}
	if err := errors.Join(f.Close(), syncDir(filepath.Dir(f.Name()))); err != nil {
		return err
	}
	if err := os.Rename(temp, to); err != nil {
		return err
	}
	return syncDir(base)
}

// create makes a temporary file that is at path as soon as temp is renamed to to. base is
// the nearest existing directory: a missing folder appears together with the file in it,
// which says who made the folder.
func create(base, path string) (temp string, f *os.File, to string, err error) {
	if base == filepath.Dir(path) {
		if f, err = os.CreateTemp(base, tempName); err != nil {
			return "", nil, "", err
		}
		return f.Name(), f, path, nil
	}
	below, err := filepath.Rel(base, path)
	if err != nil {
		return "", nil, "", err
	}
	first, rest, _ := strings.Cut(below, "/")
	if temp, err = os.MkdirTemp(base, tempName); err != nil {
		return "", nil, "", err
	}
	file := filepath.Join(temp, rest)
	if err = errors.Join(os.Chmod(temp, 0o755), os.MkdirAll(filepath.Dir(file), 0o755)); err == nil {
		f, err = os.OpenFile(file, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	}
	if err != nil {
		return "", nil, "", errors.Join(err, os.RemoveAll(temp))
	}
	return temp, f, filepath.Join(base, first), nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// applyAll makes all changes in order, or none.
func applyAll(changes []change) error {
	for i, c := range changes {
		if err := c.apply(); err != nil {
			return undo(changes[:i], fmt.Errorf("cannot write %s: %w", c.path, err))
		}
	}
	return nil
}

// undo undoes changes, the last one first, and adds to why how that went.
func undo(changes []change, why error) error {
	var failed []string
	for i := len(changes) - 1; i >= 0; i-- {
		c := changes[i]
		c.before, c.after = c.after, c.before
		if err := c.apply(); err != nil {
			failed = append(failed, fmt.Sprintf("%s: %v", c.path, err))
		}
		for dir := c.folder; dir != c.base && unix.Rmdir(dir) == nil; {
			dir = filepath.Dir(dir)
		}
	}
	if failed != nil {
		return fmt.Errorf("%w; and this could not be undone: %s", why, strings.Join(failed, ", "))
	}
	return fmt.Errorf("%w; the files are as they were", why)
}

// lockDir locks a directory, or the nearest existing one above it, against other
// installations until the file is closed.
func lockDir(dir string) (*os.File, error) {
	dir = nearest(dir)
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		err = fmt.Errorf("another `%s install` or `uninstall` is running in %s: wait for it: %w", program, dir, errdefs.ErrUnavailable)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}
