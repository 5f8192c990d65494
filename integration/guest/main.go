// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

// Command guest is the only program in the test image: the pause process of sandboxes, the
// default command of containers, and the tests' tool inside a pod. It is built without cgo,
// so that the image needs no libraries.
package main

import (
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/treelist"
)

const usage = `usage:
  guest pause           wait for SIGTERM or SIGINT
  guest tree DIR        every entry below DIR as a JSON array
  guest ls DIR          every entry below DIR for people
  guest direct PATH     read PATH with O_DIRECT, print its SHA-256 or the errno's name
  guest write PATH      append to PATH, print "written" or the errno's name
  guest loop PATH       read PATH 20 times a second, print a counter; exit 1 if its content changes
  guest mountinfo       the mount table`

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "guest:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	switch {
	case len(args) == 1 && args[0] == "pause":
		return pause()
	case len(args) == 1 && args[0] == "mountinfo":
		return mountinfo()
	case len(args) != 2:
		return errors.New(usage)
	}
	commands := map[string]func(string) error{"tree": tree, "ls": ls, "direct": direct, "write": write, "loop": loop}
	command, ok := commands[args[0]]
	if !ok {
		return errors.New(usage)
	}
	return command(args[1])
}

func pause() error {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)
	<-signals
	return nil
}

func mountinfo() error {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.Copy(os.Stdout, f)
	return err
}

func tree(dir string) error {
	entries, err := treelist.List(dir)
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(entries)
}

func ls(dir string) error {
	empty := true
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == dir {
			return err
		}
		empty = false
		info, err := d.Info()
		if err != nil {
			return err
		}
		st, ok := info.Sys().(*syscall.Stat_t)
		if !ok {
			return fmt.Errorf("%s: no owner", path)
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		_, err = fmt.Printf("%s %5d:%-5d %10d %s %s\n", info.Mode(), st.Uid, st.Gid, info.Size(),
			info.ModTime().UTC().Format("2006-01-02 15:04:05.000000000"), rel)
		return err
	})
	if err == nil && empty {
		fmt.Println("(empty)")
	}
	return err
}

// direct also succeeds if the kernel refuses; see write.
func direct(path string) error {
	h := sha256.New()
	err := func() error {
		f, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECT, 0)
		if err != nil {
			return err
		}
		defer f.Close()
		// A page is enough alignment for any disk.
		buffer, err := unix.Mmap(-1, 0, 1<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
		if err != nil {
			return err
		}
		defer func() { _ = unix.Munmap(buffer) }()
		for {
			n, err := f.Read(buffer)
			h.Write(buffer[:n])
			if n < len(buffer) && (err == nil || errors.Is(err, io.EOF)) {
				return nil
			}
			if err != nil {
				return err
			}
		}
	}()
	if errno := syscall.Errno(0); errors.As(err, &errno) {
		fmt.Println(unix.ErrnoName(errno))
		return nil
	}
	if err == nil {
		fmt.Printf("%x\n", h.Sum(nil))
	}
	return err
}

// write also succeeds if the kernel refuses, because the caller wants to know the error
// number.
func write(path string) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	if err == nil {
		defer f.Close()
		_, err = f.WriteString("written by the guest\n")
	}
	if errno := syscall.Errno(0); errors.As(err, &errno) {
		fmt.Println(unix.ErrnoName(errno))
		return nil
	}
	if err != nil {
		return err
	}
	fmt.Println("written")
	return nil
}

// loop reads through a descriptor that stays open and through a new one each time, so it
// notices both lost data and lost names. It drops the page cache first, so that the reads
// reach the file system.
func loop(path string) error {
	signal.Ignore(syscall.SIGPIPE) // if the reader of the log ends, the reads must go on
	held, err := os.Open(path)
	if err != nil {
		return err
	}
	defer held.Close()
	first, err := sum(held)
	if err != nil {
		return err
	}
	fmt.Println(1)
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for n := 2; ; n++ {
		<-tick.C
		if err := unix.Fadvise(int(held.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
			return fmt.Errorf("pass %d: drop the page cache: %w", n, err)
		}
		again, err := sum(held)
		if err != nil {
			return fmt.Errorf("pass %d: read through the open file: %w", n, err)
		}
		fresh, err := os.Open(path)
		if err != nil {
			return fmt.Errorf("pass %d: %w", n, err)
		}
		reopened, err := sum(fresh)
		fresh.Close()
		if err != nil {
			return fmt.Errorf("pass %d: %w", n, err)
		}
		if again != first || reopened != first {
			return fmt.Errorf("pass %d: %s changed: sha256 was %x, is %x through the open file and %x through a new one", n, path, first, again, reopened)
		}
		fmt.Println(n)
	}
}

func sum(f *os.File) (digest [sha256.Size]byte, err error) {
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return digest, err
	}
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return digest, err
	}
	copy(digest[:], h.Sum(nil))
	return digest, nil
}
