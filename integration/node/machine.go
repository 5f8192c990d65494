// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package node

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// machineScript becomes systemd, the first process of a machine with its own namespaces for
// mounts, processes, control groups, host name and IPC. It shares the host's network unless
// it is a Member, and cannot change /usr or kernel parameters: those that kubelet sets
// already have its values. Its /etc, /var, /usr/local and containerd's files in /run are in
// the node's directory, which has the same path as on the host, like the tools. Every boot
// has its own ID, from which kubelet recognizes a reboot.
const machineScript = `set -e
root='{{.Dir}}/machine/root'
mkdir -p "$root"
mount -t tmpfs -o mode=755 tmpfs "$root"
cd "$root"
mkdir -p usr proc sys dev etc var tmp run root opt mnt ".{{.Dir}}"
for dir in bin sbin lib lib64; do ln -s "usr/$dir" "$dir"; done
mount --bind /usr usr
mount -o remount,bind,ro usr
mount -t proc proc proc
mount --bind proc/sys proc/sys
mount -o remount,bind,ro proc/sys
mount --bind /proc/sys/net proc/sys/net # for CNI
for parameter in vm/overcommit_memory=1 vm/panic_on_oom=0 kernel/panic=10 kernel/panic_on_oops=1 \
	kernel/keys/root_maxkeys=1000000 kernel/keys/root_maxbytes=25000000 \
	"kernel/random/boot_id=$(cat /proc/sys/kernel/random/uuid)"; do
	file='{{.Dir}}/machine/sysctl/'"${parameter%=*}"
	mkdir -p "${file%/*}"
	echo "${parameter#*=}" > "$file"
	mount --bind "$file" "proc/sys/${parameter%=*}"
done
mount -t sysfs sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs dev
for device in null zero full random urandom tty kmsg loop-control; do cp -a "/dev/$device" dev/; done
for number in $(seq 0 63); do mknod "dev/loop$number" b 7 "$number"; done
mkdir dev/pts dev/shm
mount -t devpts -o newinstance,ptmxmode=666 devpts dev/pts
ln -s pts/ptmx dev/ptmx
mount -t tmpfs tmpfs dev/shm
mount -t tmpfs -o mode=755 tmpfs run
chmod 1777 tmp
mount --bind '{{.Dir}}' ".{{.Dir}}"
mount --bind '{{.Dir}}/machine/etc' etc
mount --bind '{{.Dir}}/machine/var' var
mount --bind '{{.Dir}}/machine/local' usr/local
mkdir -p opt/cni/bin
mount --bind /usr/lib/cni opt/cni/bin
for dir in '{{.Tools}}' '{{.Containerd}}'; do
	mkdir -p ".$dir"
	mount --bind "$dir" ".$dir"
done
rm -rf '{{.Dir}}/run'
mkdir -p run/containerd '{{.Dir}}/run'
mount --bind '{{.Dir}}/run' run/containerd
mkdir old
pivot_root . old
umount -l /old
rmdir /old
mount --make-rshared / # systemd does this only outside of containers
exec env -i container=other PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin \
	/lib/systemd/systemd --system --log-target=console --show-status=no < /dev/null
`

const machineUnit = `[Unit]
Description=containerd

[Service]
Type=notify
Environment='PATH={{.Containerd}}:{{.Tools}}:/usr/sbin:/usr/bin'
ExecStart='{{.Containerd}}/containerd'
Delegate=yes
KillMode=process
Restart=always
TasksMax=infinity

[Install]
WantedBy=multi-user.target
`

// machineKubelet is a standalone kubelet as a service.
const machineKubelet = `[Unit]
Description=kubelet
After=containerd.service

[Service]
Environment='PATH={{.Tools}}:/usr/sbin:/usr/bin'
ExecStart='{{.Tools}}/kubelet' --config '{{.Dir}}/kubelet.json' --root-dir '{{.Dir}}/kubelet' --cert-dir '{{.Dir}}/kubelet/pki' \
	--hostname-override ` + kubeletName + ` --v 2
KillMode=process

[Install]
WantedBy=multi-user.target
`

// machineConfig is an administrator's /etc/containerd/config.toml.
const machineConfig = `# Ours. Ask before you change it.
version = 3

[debug]
  level = 'warn'

[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = '{{.GuestImage}}'

[plugins.'io.containerd.cri.v1.runtime']
  restrict_oom_score_adj = true # no sandbox may lower the score of a process
  [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
    runtime_type = 'io.containerd.runc.v2'
    [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
      BinaryName = '{{.Dir}}/machine-runc.sh'
`

// machineRunc sets no limits, so that pods run where control groups version 2 has no
// controllers because the host uses version 1.
const machineRunc = `#!/bin/sh
set -e
previous=
for argument; do
	if [ "$previous" = --bundle ]; then
		sed -i -E -e 's/"(cpu|memory|unified)":\{[^}]*\}/"\1":{}/g' "$argument/config.json"
	fi
	previous=$argument
done
exec '{{.Runc}}' "$@"
`

// masked are systemd units that need hardware or would affect the host's kernel.
var masked = []string{
	"dev-hugepages.mount", "sys-kernel-debug.mount", "sys-kernel-tracing.mount", "sys-fs-fuse-connections.mount",
	"proc-sys-fs-binfmt_misc.automount", "systemd-sysctl.service", "systemd-modules-load.service", "systemd-binfmt.service",
	"systemd-udevd.service", "systemd-udev-trigger.service", "systemd-journald-audit.socket", "systemd-timesyncd.service",
	"systemd-logind.service", "systemd-networkd.service", "systemd-resolved.service", "getty.target", "timers.target",
}

// startMachine boots a machine on which containerd runs.
func (n *Node) startMachine() error {
	n.Address = n.path("run/containerd.sock") // /run/containerd/containerd.sock
	n.Root = n.path("machine/var/lib/containerd")
	n.ContentRoot = filepath.Join(n.Root, "io.containerd.content.v1.content")
	n.DaemonRoot = n.path("machine/var/lib/artifact-snapshotter")
	errs := []error{
		n.writeFile("machine.sh", machineScript),
		n.writeFile("machine-runc.sh", machineRunc), os.Chmod(n.path("machine-runc.sh"), 0o755),
		n.writeFile("crictl.yaml", crictlConfig),
		n.writeFile("machine/etc/containerd/config.toml", machineConfig),
		n.writeFile("machine/etc/systemd/system/containerd.service", machineUnit),
		n.writeVerbatim("machine/etc/hosts", "127.0.0.1 localhost\n"),
		n.writeVerbatim("machine/etc/resolv.conf", ""),
		n.writeFile("machine/etc/cni/net.d/10-test.conflist", cniConfig),
		n.writeVerbatim("machine/etc/systemd/journald.conf", "[Journal]\nReadKMsg=no\n"),
		n.writeVerbatim("machine/etc/tmpfiles.d/tmp.conf", ""), // otherwise systemd clears /tmp
		n.writeVerbatim("machine/etc/machine-id", strings.Repeat("0123456789abcdef", 2)+"\n"),
		n.link("../containerd.service", "machine/etc/systemd/system/multi-user.target.wants/containerd.service"),
		n.link("/lib/systemd/system/multi-user.target", "machine/etc/systemd/system/default.target"),
		os.MkdirAll(n.path("machine/var"), 0o755),
		os.MkdirAll(n.path("machine/local/bin"), 0o755),
	}
	for _, name := range []string{"passwd", "group", "nsswitch.conf"} { // dbus-daemon runs as a user of its own
		text, err := os.ReadFile("/etc/" + name)
		errs = append(errs, err, n.writeVerbatim("machine/etc/"+name, string(text)))
	}
	for _, unit := range masked {
		errs = append(errs, n.link("/dev/null", "machine/etc/systemd/system/"+unit))
	}
	if n.options.Member != nil {
		errs = append(errs, n.writeKubelet(), n.writeMember())
	} else if n.options.Kubelet {
		errs = append(errs, n.writeKubelet(), n.writeFile("machine/etc/systemd/system/kubelet.service", machineKubelet))
	}
	errs = append(errs, os.Chmod(n.path("machine/etc"), 0o755))
	if err := errors.Join(errs...); err != nil {
		return err
	}
	return n.Boot()
}

func (n *Node) link(target, name string) error {
	if err := os.MkdirAll(filepath.Dir(n.path(name)), 0o755); err != nil {
		return err
	}
	return os.Symlink(target, n.path(name))
}

// Boot starts the machine of a node with Options.Systemd after Shutdown, and returns
// when systemd has started all units and CRI answers.
func (n *Node) Boot() error {
	// With control groups version 1, version 2 has its own directory next to them.
	groups := "/sys/fs/cgroup/unified"
	if _, err := os.Stat(groups); errors.Is(err, fs.ErrNotExist) {
		groups = "/sys/fs/cgroup"
	}
	group := filepath.Join(groups, n.cgroup)
	if err := os.MkdirAll(group, 0o755); err != nil {
		return err
	}
	command := []string{"sh", "-c", `echo 0 > "$0/cgroup.procs" && exec "$@"`, group}
	if n.options.Member != nil {
		command = append(command, "nsenter", "--net="+n.options.Member.Network)
	}
	p, err := n.spawn("systemd", append(command,
		"unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "--uts", "--ipc", "--cgroup",
		"sh", n.path("machine.sh"),
	), false)
	if err != nil {
		return err
	}
	n.machine = p
	if err := n.await("systemd", func() error {
		if err := p.Ended(); err != nil {
			return err
		}
		_, err := n.Run("systemctl", "is-system-running", "--wait")
		return err
	}); err != nil {
		return err
	}
	return n.await("CRI", func() error {
		_, err := n.Crictl("version")
		return err
	})
}

// saveJournal writes the journal of this boot to the node's logs.
func (n *Node) saveJournal() error {
	journal, err := n.Run("journalctl", "--no-pager", "--boot", "--output", "short-precise")
	return errors.Join(err, n.writeVerbatim("logs/journal", journal))
}

// Shutdown ends the machine like `systemctl poweroff`: services stop, pods end, mounts and
// /run are gone.
func (n *Node) Shutdown() error {
	if !n.machine.Running() {
		return nil
	}
	err := n.saveJournal()
	if _, err := n.Run("systemctl", "--no-block", "poweroff"); err != nil {
		return errors.Join(err, n.machine.Stop(syscall.SIGKILL))
	}
	// unshare forwards SIGTERM to systemd, and ends with it.
	return errors.Join(err, n.machine.Stop(syscall.SIGTERM), n.removeCgroups())
}

// Cut ends every process of the machine at once, as a power cut does. What was written
// to its disk is there at the next Boot, even if it was not synced.
func (n *Node) Cut() error {
	if !n.machine.Running() {
		return nil
	}
	// --kill-child takes systemd, and with the first process of a PID namespace all end.
	if err := n.machine.Stop(syscall.SIGKILL); err != nil {
		return err
	}
	return n.await("the control groups of the machine to be empty", n.removeCgroups)
}

// Run runs a command as root in the machine of a node with Options.Systemd and returns
// its output. The error includes standard error.
func (n *Node) Run(args ...string) (string, error) {
	pid := n.machine.PID()
	children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	if err != nil {
		return "", err
	}
	init, err := strconv.Atoi(strings.TrimSpace(string(children)))
	if err != nil {
		return "", fmt.Errorf("find the machine's first process: %w", err)
	}
	enter := []string{"--target", strconv.Itoa(init), "--mount", "--pid", "--net", "--uts", "--ipc", "--cgroup", "--",
		"env", "-i", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:" + n.containerd + ":" + n.tools}
	return n.run("nsenter", append(enter, args...)...)
}
