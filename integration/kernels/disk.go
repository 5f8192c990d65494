// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
)

var (
	//go:embed init.sh
	initScript []byte
	//go:embed guest.sh
	guestScript []byte
)

// guestModules are the modules that a node needs and no kernel has built in: for the disk
// and its file system, for the modes, and for the pods' network.
var guestModules = []string{"virtio_pci", "virtio_blk", checksums, "ext4", "xfs", "overlay", "erofs", "loop", "veth"}

// checksums is needed by ext4, which requests it by an alias, so modules.dep does not list
// it as a dependency. Linux 7.3 does not have it: the file systems there call a library.
const checksums = "crc32c_generic"

// makeInitramfs makes a cpio initramfs of busybox, init.sh and the modules.
func makeInitramfs(ctx context.Context, path, scratch string, modules []string) error {
	if err := errors.Join(
		os.MkdirAll(filepath.Join(scratch, "bin"), 0o755), os.MkdirAll(filepath.Join(scratch, "modules"), 0o755),
		copyFile(filepath.Join(scratch, "bin/busybox"), "/bin/busybox"),
		os.WriteFile(filepath.Join(scratch, "init"), initScript, 0o755),
	); err != nil {
		return err
	}
	for i, m := range modules {
		name := filepath.Join(scratch, "modules", fmt.Sprintf("%03d-%s", i, filepath.Base(m)))
		if err := copyFile(name, m); err != nil {
			return err
		}
		if strings.HasSuffix(name, ".xz") {
			if _, err := command(ctx, "", "busybox", "unxz", name); err != nil {
				return err
			}
		}
	}
	_, err := command(ctx, scratch, "sh", "-c", `find . | busybox cpio -o -H newc -F "$0"`, path)
	return err
}

// makeDisk makes an ext4 image with everything that a node and its tests need. It collects
// the files in scratch, which must exist.
func makeDisk(ctx context.Context, path, scratch, tools string) error {
	at := func(name string) string { return filepath.Join(scratch, name) }
	for _, dir := range []string{"bin", "tools", "tests", "usr/sbin", "usr/lib/cni", "dev", "proc", "sys", "run", "tmp", "root", "etc", "var"} {
		if err := os.MkdirAll(at(dir), 0o755); err != nil {
			return err
		}
	}
	errs := []error{
		os.Chmod(at("tmp"), 0o1777),
		os.WriteFile(at("init"), guestScript, 0o755),
		os.WriteFile(at("etc/passwd"), []byte("root:x:0:0:root:/root:/bin/sh\n"), 0o644),
		os.WriteFile(at("etc/group"), []byte("root:x:0:\n"), 0o644),
		os.WriteFile(at("etc/hosts"), []byte("127.0.0.1 localhost\n"), 0o644),
		os.WriteFile(at("etc/resolv.conf"), nil, 0o644),
		copyFile(at("bin/busybox"), "/bin/busybox"),
		node.BuildGuest(ctx, at("tools/guest")),
	}
	daemon, err := node.Program()
	errs = append(errs, err, copyFile(at("tests/artifact-snapshotter"), daemon))
	programs := []string{}
	for _, name := range []string{"containerd", "containerd-shim-runc-v2", "ctr", "runc", "crictl", "registry"} {
		programs = append(programs, filepath.Join(tools, name))
		errs = append(errs, copyFile(at("tools/"+name), filepath.Join(tools, name)))
	}
	for _, name := range []string{"mkfs.ext4", "mkfs.xfs"} {
		found, err := exec.LookPath(name)
		programs = append(programs, found)
		errs = append(errs, err, copyFile(at("usr/sbin/"+name), found))
	}
	for _, name := range []string{"ptp", "host-local", "loopback"} {
		errs = append(errs, copyFile(at("usr/lib/cni/"+name), "/usr/lib/cni/"+name))
	}
	applets, err := command(ctx, "", "busybox", "--list")
	errs = append(errs, err)
	for name := range strings.FieldsSeq(applets) {
		if name != "busybox" {
			errs = append(errs, os.Symlink("busybox", at("bin/"+name)))
		}
	}
	for _, s := range suites {
		dir := at("tests/" + s.name())
		errs = append(errs, os.MkdirAll(dir, 0o755))
		build := exec.CommandContext(ctx, "go", "test", "-c", "-trimpath", "-ldflags=-s -w", "-o", filepath.Join(dir, "test"), "./"+s.pkg)
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w\n%s", build, err, out))
		}
	}
	errs = append(errs, copyLibraries(ctx, scratch, programs))
	if err := errors.Join(errs...); err != nil {
		return err
	}
	if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, 8<<30)); err != nil {
		return err
	}
	_, err = command(ctx, "", "mke2fs", "-q", "-t", "ext4", "-E", "lazy_itable_init=1", "-d", scratch, path)
	return err
}

var library = regexp.MustCompile(`/\S+`)

// copyLibraries copies the shared libraries of the programs, as listed by ldd(1), to the
// same paths below root.
func copyLibraries(ctx context.Context, root string, programs []string) error {
	for _, p := range programs {
		out, err := command(ctx, "", "ldd", p)
		if err != nil {
			return err
		}
		for line := range strings.Lines(out) {
			from := library.FindString(line)
			if from == "" {
				continue // the vDSO
			}
			to := filepath.Join(root, from)
			if err := errors.Join(os.MkdirAll(filepath.Dir(to), 0o755), copyFile(to, from)); err != nil {
				return err
			}
		}
	}
	return nil
}

// copyFile copies a program; it follows a symlink.
func copyFile(to, from string) error {
	src, err := os.Open(from)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o755)
	if err != nil {
		return err
	}
	_, err = io.Copy(dst, src)
	return errors.Join(err, dst.Close())
}
