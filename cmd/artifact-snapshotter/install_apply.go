// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package main

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
)

// change is what becomes of a file.
type change struct {
	path string
	// before and after are its contents, nil if it is not there.
	before, after []byte
	// owner and mode are those of the file that is there, or is to be.
	owner
	// note stands for the lines that need not be shown.
	note string
	// folder is the directory of the file if that is not there either, and base the
	// nearest one above it that is.
	folder, base string
}

// owner is whose a file is, and who may read it.
type owner struct {
	uid, gid uint32
	mode     fs.FileMode
}

// changed is the change of the file at path from what is there. A new file is root's
// and has the mode.
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
		return c, notRegular(path)
	}
	c.owner = owner{st.Uid, st.Gid, fs.FileMode(st.Mode & 0o777)}
	c.before, err = os.ReadFile(path)
	if err == nil && c.before == nil {
		c.before = []byte{}
	}
	return c, err
}

// notRegular is the error of something that is no file. To read a FIFO could last for
// ever.
func notRegular(path string) error {
	return fmt.Errorf("%s is not a regular file: %w", path, errdefs.ErrInvalidArgument)
}

func (c change) none() bool {
	return (c.before == nil) == (c.after == nil) && bytes.Equal(c.before, c.after)
}

// String says it for a person.
func (c change) String() string {
	switch {
	case c.before == nil:
		return "made " + c.path
	case c.after == nil:
		return "removed " + c.path
	}
	return "changed " + c.path
}

// diff shows the change as `diff -u` does.
func (c change) diff() (string, error) {
	from, to := c.path, c.path
	if c.before == nil {
		from = os.DevNull
	}
	if c.after == nil {
		to = os.DevNull
	}
	if c.note != "" {
		return fmt.Sprintf("--- %s\n+++ %s\n(%s)\n", from, to, c.note), nil
	}
	return difflib.GetUnifiedDiffString(difflib.UnifiedDiff{
		A: lines(c.before), B: lines(c.after),
		FromFile: from, ToFile: to, Context: 3,
	})
}

// lines are those of a text, each with its newline.
func lines(text []byte) []string {
	split := strings.SplitAfter(string(text), "\n")
	if last := len(split) - 1; split[last] == "" {
		return split[:last]
	}
	split[len(split)-1] += "\n\\ No newline at end of file\n" // as diff has it
	return split
}

// writable returns an error if the change cannot be made, without making it.
func (c change) writable() error {
	if c.before == nil && exists(c.path) {
		return fmt.Errorf("%s is a link to nothing: remove it, or make the file: %w", c.path, errdefs.ErrFailedPrecondition)
	}
	what := c.path
	err := unix.Access(what, unix.W_OK) // also of a file that may not be changed (chattr +i)
	if c.before == nil || err == nil {
		what = nearest(filepath.Dir(c.path)) // what is below will be made
		err = unix.Access(what, unix.W_OK)
	}
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.EROFS):
		return fmt.Errorf("%s is on a filesystem that is read-only, so %s cannot be written: make it writable (mount -o remount,rw), or choose another place: %w", what, c.path, errdefs.ErrFailedPrecondition)
	}
	return fmt.Errorf("%s may not be written to (%v), so %s cannot be changed: check its permissions and attributes (lsattr): %w", what, err, c.path, errdefs.ErrFailedPrecondition)
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// nearest is the directory, or the first one above it that is there.
func nearest(dir string) string {
	for !exists(dir) {
		dir = filepath.Dir(dir)
	}
	return dir
}

// tempName is how the files are called that become others by renaming, so that no
// import of *.toml has them.
const tempName = ".artifact-snapshotter-*.tmp"

// apply makes the change: at any instant the file is the old one or the new one, also
// after the power has failed. A link stays, and what it points to is changed.
func (c change) apply() (err error) {
	now, err := changed(c.path, c.before, 0)
	if err != nil {
		return err
	}
	if !now.none() {
		return fmt.Errorf("it has been changed meanwhile by somebody else: try again: %w", errdefs.ErrAborted)
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
	left, _ := filepath.Glob(filepath.Join(base, tempName)) // by a process that was killed
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

// create makes the file that is to be at path when temp has been renamed to the other
// path. base is the nearest directory that is there: a folder that is missing comes
// together with the file in it, which says whose it is.
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

// applyAll makes the changes in order, or none.
func applyAll(changes []change) error {
	for i, c := range changes {
		if err := c.apply(); err != nil {
			return takeBack(changes[:i], fmt.Errorf("%s could not be written: %w", c.path, err))
		}
	}
	return nil
}

// takeBack undoes changes for that reason, the last first.
func takeBack(changes []change, why error) error {
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
		return fmt.Errorf("%w; and it could not be taken back: %s", why, strings.Join(failed, ", "))
	}
	return fmt.Errorf("%w; the files are as they were", why)
}

// lockFor keeps other installations from the files of a directory, which may not be
// there yet, until the file is closed.
func lockFor(dir string) (*os.File, error) {
	dir = nearest(dir)
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		err = fmt.Errorf("another `%s install` or `uninstall` is at work in %s: wait for it: %w", name, dir, errdefs.ErrUnavailable)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}
