// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package node

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Mounts returns the mount points at or below dir in mount order.
func Mounts(dir string) ([]string, error) {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	var found []string
	for line := range strings.Lines(string(text)) {
		// proc_pid_mountinfo(5): the fifth field is the mount point, with \040 for a space.
		point, err := strconv.Unquote(`"` + strings.ReplaceAll(strings.Fields(line)[4], `"`, `\"`) + `"`)
		if err != nil {
			return nil, fmt.Errorf("mountinfo line %q: %w", line, err)
		}
		if within(point, dir) {
			found = append(found, point)
		}
	}
	return found, nil
}

func within(path, dir string) bool { return path == dir || strings.HasPrefix(path, dir+"/") }

// Processes returns the processes that have an argument at or below dir: process ID to
// command line. It includes the node's shims, whose arguments name containerd's socket.
func Processes(dir string) (map[int]string, error) {
	names, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return nil, err
	}
	found := map[int]string{}
	for _, name := range names {
		text, err := os.ReadFile(name)
		if err != nil {
			continue // it has ended in the meantime
		}
		args := strings.Split(strings.TrimSuffix(string(text), "\x00"), "\x00")
		if slices.ContainsFunc(args, func(arg string) bool { return within(arg, dir) }) {
			pid, err := strconv.Atoi(filepath.Base(filepath.Dir(name)))
			if err != nil {
				return nil, err
			}
			found[pid] = strings.Join(args, " ")
		}
	}
	return found, nil
}

// cleanUp removes leftovers after all daemons have ended. The error lists those that the
// daemons should have removed.
func (n *Node) cleanUp() error {
	var errs []error
	if err := n.endProcesses(); err != nil {
		errs = append(errs, err)
	}
	if err := n.unmount(); err != nil {
		errs = append(errs, err)
	}
	if err := n.removeCgroups(); err != nil {
		errs = append(errs, err)
	}
	for _, stray := range n.strays {
		errs = append(errs, os.RemoveAll(stray))
	}
	n.lastLogs = n.Logs()
	// Never delete through a remaining mount.
	if left, err := Mounts(n.Dir); err != nil || len(left) > 0 {
		errs = append(errs, fmt.Errorf("not removed because of remaining mounts: %q", left), err)
	} else {
		errs = append(errs, os.RemoveAll(n.Dir))
	}
	return errors.Join(errs...)
}

// endProcesses waits for shims and conmons, which end after their last container. It kills
// what remains after a minute: containers, and shims of this node's containerd.
func (n *Node) endProcesses() error {
	left, err := n.waitForProcesses(time.Minute)
	errs := []error{err}
	for pid, command := range left {
		errs = append(errs, fmt.Errorf("process %d: %s", pid, command))
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			errs = append(errs, fmt.Errorf("kill %d: %w", pid, err))
		}
	}
	if left, err = n.waitForProcesses(time.Minute); err != nil || len(left) > 0 {
		errs = append(errs, fmt.Errorf("still alive after SIGKILL: %v", left), err)
	}
	return errors.Join(errs...)
}

// waitForProcesses waits until the node has no containers and shims, and returns those that
// remain after the limit.
func (n *Node) waitForProcesses(limit time.Duration) (left map[int]string, err error) {
	for deadline := time.Now().Add(limit); ; time.Sleep(10 * time.Millisecond) {
		if left, err = n.processes(); err != nil || len(left) == 0 || time.Now().After(deadline) {
			return left, err
		}
	}
}

// processes returns the node's containers and shims.
func (n *Node) processes() (map[int]string, error) {
	mark := n.Address
	if n.options.CRIO { // conmon's arguments have no socket, but a container's directory
		mark = n.State
	}
	found, err := Processes(mark)
	if err != nil {
		return nil, err
	}
	for _, dir := range n.cgroups() {
		text, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
		if err != nil {
			continue // it has been removed in the meantime
		}
		for field := range strings.FieldsSeq(string(text)) {
			if pid, err := strconv.Atoi(field); err == nil {
				found[pid] = "in the control group " + dir
			}
		}
	}
	return found, nil
}

// unmount unmounts everything below the node's directory and the daemon's root in
// reverse mount order.
func (n *Node) unmount() error {
	points, err := Mounts(n.Dir)
	if err != nil {
		return err
	}
	if !within(n.DaemonRoot, n.Dir) {
		daemons, err := Mounts(n.DaemonRoot)
		if err != nil {
			return err
		}
		// DaemonRoot may be a mount of the caller.
		points = append(points, slices.DeleteFunc(daemons, func(point string) bool { return point == n.DaemonRoot })...)
	}
	var errs []error
	for _, point := range slices.Backward(points) {
		if !within(point, n.DaemonRoot) && !within(point, n.DaemonState) {
			errs = append(errs, fmt.Errorf("mount %s", point))
		}
		if err := unix.Unmount(point, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH); err != nil {
			errs = append(errs, fmt.Errorf("unmount %s: %w", point, err))
		}
	}
	return errors.Join(errs...)
}

// cgroups returns the pods' parent control group and all below it, parents first, in
// every hierarchy: version 1 has one per controller, version 2 a single one.
func (n *Node) cgroups() []string {
	var found []string
	tops, _ := filepath.Glob("/sys/fs/cgroup/*/" + n.cgroup) // the pattern is not malformed
	for _, top := range append(tops, "/sys/fs/cgroup/"+n.cgroup) {
		_ = filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				found = append(found, path)
			}
			return nil // entries may disappear during the walk
		})
	}
	return found
}

func (n *Node) removeCgroups() error {
	var errs []error
	for _, dir := range slices.Backward(n.cgroups()) {
		if err := os.Remove(dir); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, fmt.Errorf("control group: %w", err))
		}
	}
	return errors.Join(errs...)
}
