// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"time"
)

// machine is a virtual machine with two processors and 3 GiB of memory.
type machine struct {
	accel             string // kvm or tcg, qemu's software emulation
	kernel, initramfs string
	disk              string // opened with snapshot=on, so it does not change
	console, results  string // files for the two serial ports
}

// limit is the time limit of a machine. Software emulation is at least ten times slower.
func (m machine) limit() time.Duration {
	if m.accel == "kvm" {
		return 10 * time.Minute
	}
	return 90 * time.Minute
}

// firstLine is the beginning of the kernel's first message.
var firstLine = []byte("Linux version ")

// errNoBoot means that the kernel printed nothing for a minute. On some hosts /dev/kvm can
// run only kernels that are built for them.
var errNoBoot = errors.New("the kernel did not start")

// trouble matches the kernel's reports of its own errors (kernel/panic.c,
// kernel/hung_task.c, fs/ext4/super.c).
var trouble = regexp.MustCompile(`(?m)^.*(Kernel panic|Oops|BUG: |general protection fault|blocked for more than|EXT4-fs error).*$`)

// run boots the machine and waits until it powers off.
func (m machine) run(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, m.limit(), fmt.Errorf("the machine did not power off within %s", m.limit()))
	defer cancel()
	cpu := "host"
	if m.accel == "tcg" {
		cpu = "Nehalem" // newer features are not needed and are slow to emulate
	}
	if err := errors.Join(os.WriteFile(m.console, nil, 0o644), os.WriteFile(m.results, nil, 0o644)); err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64", "-machine", "q35", "-accel", m.accel, "-cpu", cpu,
		"-smp", "2", "-m", "3072", "-nodefaults", "-display", "none", "-no-reboot", "-kernel", m.kernel, "-initrd", m.initramfs,
		"-append", "console=ttyS0 panic=-1 oops=panic mitigations=off edd=off",
		"-drive", "if=virtio,format=raw,snapshot=on,cache=unsafe,file="+m.disk,
		"-serial", "file:"+m.console, "-serial", "file:"+m.results)
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := cmd.Start(); err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	var err error
	tick, deadline := time.NewTicker(time.Second), time.Now().Add(time.Minute)
	defer tick.Stop()
	for waiting, began := true, false; waiting; {
		select {
		case err = <-ended:
			waiting = false
		case <-tick.C:
			if !began {
				began = m.began()
			}
			if m.accel == "kvm" && !began && time.Now().After(deadline) {
				cancel()
				<-ended
				return errNoBoot
			}
		}
	}
	if m.accel == "kvm" && !m.began() {
		return fmt.Errorf("%w: %s", errors.Join(errNoBoot, err), said.String())
	}
	console, rerr := os.ReadFile(m.console)
	if found := trouble.Find(console); found != nil {
		err = errors.Join(fmt.Errorf("the kernel says: %s", bytes.TrimSpace(found)), err)
	}
	if err = errors.Join(rerr, err, context.Cause(ctx)); err != nil {
		return fmt.Errorf("%w: %s", err, said.String())
	}
	return nil
}

func (m machine) began() bool {
	text, err := os.ReadFile(m.console)
	return err == nil && bytes.Contains(text, firstLine)
}

// bestAccel returns kvm if there is a /dev/kvm, whether or not it can boot these kernels.
func bestAccel() string {
	if f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0); err == nil {
		f.Close()
		return "kvm"
	}
	return "tcg"
}

func logPath(series, what string) string {
	return filepath.Join("bin", "kernels", series+"-"+what+".log")
}
