// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// keyring has the keys that sign Debian's suites. It belongs to the package
// debian-archive-keyring.
const keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"

// command runs a program in dir and returns its standard output. An error includes its
// standard error.
func command(ctx context.Context, dir, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	out, err := cmd.Output()
	if failed := (*exec.ExitError)(nil); errors.As(err, &failed) {
		err = fmt.Errorf("%s: %w\n%s", cmd, err, failed.Stderr)
	}
	return string(out), err
}

// download fetches the newest kernel of a line of sources.list(5) and unpacks it below dir:
// <dir>/boot/vmlinuz-<release> and <dir>/lib/modules/<release>. It returns the release. apt
// checks the signatures; its state is in dir, so the machine's package state does not
// change.
func download(ctx context.Context, dir, source string) (release string, err error) {
	for _, d := range []string{"lists/partial", "cache/archives/partial"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return "", err
		}
	}
	line := fmt.Sprintf("deb [arch=amd64 signed-by=%s] %s main\n", keyring, source)
	if err := errors.Join(
		os.WriteFile(filepath.Join(dir, "sources.list"), []byte(line), 0o644),
		os.WriteFile(filepath.Join(dir, "status"), nil, 0o644),
	); err != nil {
		return "", err
	}
	apt := func(name string, args ...string) (string, error) {
		var options []string
		for key, value := range map[string]string{
			"Dir::Etc::SourceList": filepath.Join(dir, "sources.list"), "Dir::Etc::SourceParts": "-",
			"Dir::State": dir, "Dir::State::Lists": filepath.Join(dir, "lists"), "Dir::State::Status": filepath.Join(dir, "status"),
			"Dir::Cache": filepath.Join(dir, "cache"), "APT::Architecture": "amd64", "APT::Sandbox::User": "root", "Acquire::Languages": "none",
		} {
			options = append(options, "-o", key+"="+value)
		}
		return command(ctx, dir, name, append(options, args...)...)
	}
	if _, err := apt("apt-get", "-qq", "-o", "APT::Update::Error-Mode=any", "update"); err != nil {
		return "", err
	}
	// linux-image-amd64 depends on the newest kernel.
	depends, err := apt("apt-cache", "depends", "--important", "linux-image-amd64")
	if err != nil {
		return "", err
	}
	_, name, found := strings.Cut(depends, "Depends: linux-image-")
	release, _, _ = strings.Cut(name, "\n")
	if release = strings.TrimSpace(release); !found || release == "" {
		return "", fmt.Errorf("linux-image-amd64 of %q depends on no kernel: %s", source, depends)
	}
	// modules.dep is written last, so if it exists an earlier download is complete.
	if _, err := os.Stat(filepath.Join(dir, "lib/modules", release, "modules.dep")); err == nil {
		return release, nil
	}
	fmt.Fprintf(os.Stderr, "==> downloading linux-image-%s\n", release)
	// Debian splits its 7.3 kernel into several packages; linux-image-<release> depends on
	// them.
	parts, err := apt("apt-cache", "depends", "--important", "linux-image-"+release)
	if err != nil {
		return "", err
	}
	get := []string{"-qq", "download", "linux-image-" + release}
	for _, part := range []string{"linux-base-", "linux-binary-", "linux-modules-"} {
		if strings.Contains(parts, "Depends: "+part+release+"\n") {
			get = append(get, part+release)
		}
	}
	if _, err := apt("apt-get", get...); err != nil {
		return "", err
	}
	packages, err := filepath.Glob(filepath.Join(dir, "*.deb"))
	if err != nil {
		return "", err
	}
	for _, p := range packages {
		if _, err := command(ctx, "", "dpkg-deb", "--extract", p, dir); err != nil {
			return "", err
		}
		if err := os.Remove(p); err != nil {
			return "", err
		}
	}
	if err := merge(dir, release); err != nil {
		return "", err
	}
	_, err = command(ctx, "", "depmod", "--basedir", dir, release)
	return release, err
}

// merge gives packages with the kernel in /usr/lib/modules/<release> the layout of older
// ones: /lib/modules/<release> and /boot/vmlinuz-<release>.
func merge(dir, release string) error {
	if _, err := os.Lstat(filepath.Join(dir, "lib")); !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return errors.Join(
		os.Symlink("usr/lib", filepath.Join(dir, "lib")),
		os.Mkdir(filepath.Join(dir, "boot"), 0o755),
		os.Symlink(filepath.Join("../lib/modules", release, "vmlinuz"), filepath.Join(dir, "boot", "vmlinuz-"+release)),
	)
}

// modules returns the files of the modules and of their dependencies, in load order. A
// module that is built into the kernel has no file.
func modules(dir string, names ...string) (files []string, err error) {
	built, err := os.ReadFile(filepath.Join(dir, "modules.builtin"))
	if err != nil {
		return nil, err
	}
	index, err := os.Open(filepath.Join(dir, "modules.dep"))
	if err != nil {
		return nil, err
	}
	defer index.Close()
	needs, err := dependencies(index)
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		chain, ok := needs[name]
		if !ok && name != checksums && !strings.Contains(string(built), "/"+name+".ko\n") {
			return nil, fmt.Errorf("the kernel of %s has no module %s", dir, name)
		}
		for _, file := range chain {
			if !slices.Contains(files, filepath.Join(dir, file)) {
				files = append(files, filepath.Join(dir, file))
			}
		}
	}
	return files, nil
}

// dependencies parses modules.dep(5). It returns the files to load for each module, with
// the module's own file last.
func dependencies(index io.Reader) (map[string][]string, error) {
	needs := map[string][]string{}
	lines := bufio.NewScanner(index)
	for lines.Scan() {
		file, rest, _ := strings.Cut(lines.Text(), ":")
		name, _, _ := strings.Cut(filepath.Base(file), ".ko")
		chain := strings.Fields(rest)
		slices.Reverse(chain) // modules.dep lists a module before those that it needs
		needs[name] = append(chain, file)
	}
	return needs, lines.Err()
}
