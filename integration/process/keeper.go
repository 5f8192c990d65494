// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package process

import (
	"fmt"
	"io"
	"os/exec"
	"syscall"
)

// Keeper cleans up after a test program that ends without doing so: a panic or a time-out
// of Go's tests skips what TestMain would do.
type Keeper struct {
	cmd   *exec.Cmd
	stdin io.WriteCloser
}

// keeperScript reads until the test program has ended or calls Release. Every process of
// a test has its directory in its environment; machines end with their first process.
const keeperScript = `read -r done
[ "$done" = "" ] || exit 0
for process in /proc/[0-9]*; do
	[ "$process" = "/proc/$$" ] || ! grep -qF "$1/" "$process/environ" || kill -9 "${process#/proc/}"
done 2>/dev/null
sleep 1
for node in "$1"/as-*; do
	for group in /sys/fs/cgroup/"${node##*/}" /sys/fs/cgroup/*/"${node##*/}"; do
		find "$group" -depth -type d -exec rmdir {} +
	done
done 2>/dev/null
rm -rf --one-file-system "$1"
`

// Keep starts the keeper of dir, a test's temporary directory: when this program ends,
// all processes with dir in their environment are killed, and dir is removed.
func Keep(dir string) (*Keeper, error) {
	k := &Keeper{cmd: exec.Command("sh", "-c", keeperScript, "keeper", dir)}
	k.cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}
	k.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // no Ctrl-C
	var err error
	if k.stdin, err = k.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	if err := k.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start a keeper of %s: %w", dir, err)
	}
	return k, nil
}

// Release ends the keeper, since the caller has cleaned up.
func (k *Keeper) Release() error {
	if _, err := io.WriteString(k.stdin, "done\n"); err != nil {
		return err
	}
	return k.cmd.Wait()
}
