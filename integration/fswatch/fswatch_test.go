// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package fswatch

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func start(t *testing.T, pids []int, allowed ...string) *Watch {
	t.Helper()
	w, err := Start(pids, append(allowed, OfTheTest()...)...)
	if err != nil {
		t.Fatal(err)
	}
	return w
}

func TestEveryChangeIsSeen(t *testing.T) {
	for _, parent := range []string{t.TempDir(), "/dev/shm"} {
		dir, err := os.MkdirTemp(parent, "fswatch")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.RemoveAll(dir) })
		old := filepath.Join(dir, "old")
		if err := os.WriteFile(old, []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
		for what, change := range map[string]func(to string) error{
			"made":             func(to string) error { return os.WriteFile(to, nil, 0o600) },
			"made, directory":  func(to string) error { return os.Mkdir(to, 0o700) },
			"made, symlink":    func(to string) error { return os.Symlink("x", to) },
			"made, link":       func(to string) error { return os.Link(old, to) },
			"made, FIFO":       func(to string) error { return unix.Mkfifo(to, 0o600) },
			"moved here":       func(to string) error { return os.Rename(old, to) },
			"moved away":       func(to string) error { return os.Rename(to, old) },
			"written to":       func(string) error { return os.WriteFile(old, []byte("y"), 0o600) },
			"cut off":          func(string) error { return os.Truncate(old, 0) },
			"other mode":       func(string) error { return os.Chmod(old, 0o644) },
			"other owner":      func(string) error { return os.Lchown(old, 1, 1) },
			"other time":       func(string) error { return os.Chtimes(old, time.Unix(1, 0), time.Unix(1, 0)) },
			"other attributes": func(string) error { return unix.Setxattr(old, "user.x", []byte("x"), 0) },
			"removed":          func(string) error { return os.Remove(old) },
			"made, by a child": func(to string) error {
				// The child must exist until the watch has read the event.
				child := exec.Command("sh", "-c", `echo > "$0"; echo done; read line`, to)
				in, err := child.StdinPipe()
				if err != nil {
					return err
				}
				out, err := child.StdoutPipe()
				if err != nil {
					return err
				}
				if err := child.Start(); err != nil {
					return err
				}
				t.Cleanup(func() { _ = in.Close(); _ = child.Wait() })
				_, err = io.ReadFull(out, make([]byte, len("done")))
				return err
			},
		} {
			t.Run(filepath.Base(parent)+"/"+what, func(t *testing.T) {
				if err := os.WriteFile(old, []byte("x"), 0o600); err != nil {
					t.Fatal(err)
				}
				to := filepath.Join(dir, strings.ReplaceAll(what, " ", "-"))
				if what == "moved away" {
					if err := os.Rename(old, to); err != nil {
						t.Fatal(err)
					}
				}
				w := start(t, []int{os.Getpid()})
				if err := change(to); err != nil {
					t.Fatal(err)
				}
				changes, _, err := w.Stop()
				if err != nil {
					t.Fatal(err)
				}
				if !slices.ContainsFunc(changes, func(c string) bool { return strings.HasPrefix(c, dir+"/") }) {
					t.Errorf("the change was not seen; seen: %q", changes)
				}
			})
		}
	}
}

func TestWhatIsAllowedIsNoChange(t *testing.T) {
	dir, other := t.TempDir(), t.TempDir()
	pattern := filepath.Dir(other) + "/*/sub"
	w := start(t, []int{os.Getpid()}, dir, pattern)
	for _, d := range []string{dir, other} {
		if err := os.MkdirAll(filepath.Join(d, "sub", "sub"), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	changes, seen, err := w.Stop()
	if err != nil || len(changes) != 0 || seen[dir] != 2 || seen[pattern] != 2 {
		t.Errorf("changes %q, %v where they are allowed: %v", changes, seen, err)
	}
}

// Only runs of events in one directory are cached, so allowed changes must not hide others
// between them.
func TestAChangeBetweenThoseThatAreAllowedIsSeen(t *testing.T) {
	dir := t.TempDir()
	allowed := filepath.Join(dir, "allowed")
	if err := os.Mkdir(allowed, 0o700); err != nil {
		t.Fatal(err)
	}
	w := start(t, []int{os.Getpid()}, allowed)
	var want []string
	for i := range 100 {
		outside := filepath.Join(dir, fmt.Sprintf("outside-%d", i))
		want = append(want, outside)
		for _, d := range []string{filepath.Join(allowed, fmt.Sprint(i)), filepath.Join(allowed, fmt.Sprint(i), "sub"), outside} {
			if err := os.Mkdir(d, 0o700); err != nil {
				t.Fatal(err)
			}
		}
	}
	changes, seen, err := w.Stop()
	if err != nil || seen[allowed] != 200 || len(changes) != len(want) {
		t.Fatalf("%d changes, %v where they are allowed: %v", len(changes), seen, err)
	}
	for _, outside := range want {
		if !slices.ContainsFunc(changes, func(c string) bool { return strings.HasPrefix(c, outside+" ") }) {
			t.Errorf("%s was not seen", outside)
		}
	}
}

func TestOthersAreNotWatched(t *testing.T) {
	dir := t.TempDir()
	other := exec.Command("sleep", "60")
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = other.Process.Kill(); _ = other.Wait() }()
	w := start(t, []int{other.Process.Pid})
	if err := os.Mkdir(filepath.Join(dir, "d"), 0o700); err != nil {
		t.Fatal(err)
	}
	if changes, _, err := w.Stop(); err != nil || len(changes) != 0 {
		t.Errorf("changes %q: %v", changes, err)
	}
}
