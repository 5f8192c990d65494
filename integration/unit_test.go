// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/artifact-snapshotter/artifact-snapshotter/deploy"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
)

const unitName = "artifact-snapshotter.service"

// run runs a command in the machine and returns its output without the final newline.
func run(t *testing.T, n *node.Node, args ...string) string {
	t.Helper()
	out, err := n.Run(args...)
	check(t, err)
	return strings.TrimSuffix(out, "\n")
}

// property returns a property of `systemctl show`.
func property(t *testing.T, n *node.Node, unit, name string) string {
	t.Helper()
	return run(t, n, "systemctl", "show", "--value", "--property", name, unit)
}

// started returns the time when the unit's process started or its state was entered, in
// microseconds since the kernel started.
func started(t *testing.T, n *node.Node, unit, name string) int {
	t.Helper()
	at, err := strconv.Atoi(property(t, n, unit, name))
	check(t, err)
	if at == 0 {
		t.Fatalf("%s of %s is not set", name, unit)
	}
	return at
}

// machineFile returns the host's path of a file of the machine in /etc or /usr/local.
func machineFile(n *node.Node, path string) string {
	return filepath.Join(n.Dir, "machine", strings.Replace(path, "/usr/local/", "/local/", 1))
}

func writeFile(t *testing.T, path, text string, mode os.FileMode) {
	t.Helper()
	check(t, os.MkdirAll(filepath.Dir(path), 0o755))
	check(t, os.WriteFile(path, []byte(text), mode))
}

// copyBinary copies the program to a path in the machine.
func copyBinary(t *testing.T, n *node.Node, path string) {
	t.Helper()
	cmd, err := n.ArtifactCommand()
	check(t, err)
	binary, err := os.ReadFile(cmd.Path)
	check(t, err)
	writeFile(t, path, string(binary), 0o755)
}

// installByHand follows the manual installation in docs/install.md.
func installByHand(t *testing.T, n *node.Node) {
	t.Helper()
	copyBinary(t, n, machineFile(n, deploy.UnitBinary))
	writeFile(t, machineFile(n, "/etc/systemd/system/"+unitName), deploy.Unit, 0o644)
	snippet := run(t, n, deploy.UnitBinary, "config", "containerd", "--scope", "node")
	writeFile(t, machineFile(n, "/etc/containerd/conf.d/artifact-snapshotter.toml"), snippet, 0o644)
	config := machineFile(n, "/etc/containerd/config.toml")
	text, err := os.ReadFile(config)
	check(t, err)
	writeFile(t, config, "imports = [\"/etc/containerd/conf.d/*.toml\"]\n"+string(text), 0o644)
	run(t, n, "systemctl", "daemon-reload")
	run(t, n, "systemctl", "enable", "--now", unitName)
	run(t, n, "systemctl", "restart", "containerd")
	waitForCRI(t, n)
	waitForEmptyBlob(t, n)
}

func waitForCRI(t *testing.T, n *node.Node) {
	t.Helper()
	waitFor(t, "an answer of CRI", func() bool {
		_, err := n.Crictl("version")
		return err == nil
	})
}

// waitForEmptyBlob waits until an artifact with an empty file can be pulled.
func waitForEmptyBlob(t *testing.T, n *node.Node) {
	t.Helper()
	waitFor(t, "the pre-created empty blob", func() bool {
		_, err := n.Ctr("--namespace", "k8s.io", "content", "get", digest.FromString("").String())
		return err == nil
	})
}

// mountNamespace returns the mount namespace of the unit's process, or "" if it is not
// running.
func mountNamespace(t *testing.T, n *node.Node, unit string) string {
	t.Helper()
	return run(t, n, "readlink", "/proc/"+property(t, n, unit, "MainPID")+"/ns/mnt")
}

// A real systemd runs the unit with all its restrictions.
func TestTheUnit(t *testing.T) {
	t.Parallel()
	n := node.ForTest(t, node.Options{Systemd: true})
	installByHand(t, n)
	src := writeModel(t)
	refs := map[pack.Form]string{}
	for _, form := range []pack.Form{pack.Raw, pack.TarGzip} {
		refs[form] = pulled(t, n, src, form)
	}
	wantServed := func(t *testing.T) {
		t.Helper()
		for form, ref := range refs {
			pod, err := n.RunPod(node.PodSpec{Volumes: []node.Volume{{Image: ref, Path: "/model"}}})
			check(t, err)
			wantVolume(t, pod, "main", "/model", wantTree(t, src, form))
			check(t, pod.Remove())
		}
	}
	wantServed(t)

	t.Run("the mounts are the host's", func(t *testing.T) {
		host := run(t, n, "readlink", "/proc/1/ns/mnt")
		if got := mountNamespace(t, n, unitName); got != host {
			t.Errorf("the daemon is in the mount namespace %s, systemd in %s", got, host)
		}
		// The check detects a mount namespace: with another setting the daemon has its own.
		drop := machineFile(n, "/etc/systemd/system/"+unitName+".d/private.conf")
		writeFile(t, drop, "[Service]\nPrivateTmp=yes\n", 0o644)
		run(t, n, "systemctl", "daemon-reload")
		run(t, n, "systemctl", "restart", unitName)
		if got := mountNamespace(t, n, unitName); got == host {
			t.Error("PrivateTmp=yes did not give the daemon its own mount namespace, so the check proves nothing")
		}
		check(t, os.Remove(drop))
		run(t, n, "systemctl", "daemon-reload")
		run(t, n, "systemctl", "restart", unitName)
		wantServed(t)
	})

	t.Run("the daemon is confined", func(t *testing.T) {
		status := run(t, n, "cat", "/proc/"+property(t, n, unitName, "MainPID")+"/status")
		for _, want := range []string{"\nNoNewPrivs:\t1\n", "\nSeccomp:\t2\n"} {
			if !strings.Contains(status, want) {
				t.Errorf("the daemon's status does not contain %q:\n%s", want, status)
			}
		}
	})

	// EROFS on loop devices needs more permissions of the unit than this kernel's best
	// mode.
	t.Run("every mode", func(t *testing.T) {
		config := machineFile(n, "/etc/artifact-snapshotter/config.toml")
		for _, modes := range []string{
			"raw_mode = 'overlay'\ntar_mode = 'erofs-loop'\n",
			"raw_mode = 'link'\ntar_mode = 'extract'\n",
			"raw_mode = 'copy'\ntar_mode = 'extract'\n",
		} {
			writeFile(t, config, modes, 0o644)
			run(t, n, "systemctl", "restart", unitName) // fails if the mode does not work
		}
		check(t, os.Remove(config))
		run(t, n, "systemctl", "restart", unitName)
	})

	t.Run("a restart", func(t *testing.T) {
		for form, ref := range refs {
			pod, err := n.RunPod(reading(ref))
			check(t, err)
			runtime := property(t, n, "containerd", "MainPID")
			for _, end := range [][]string{
				{"systemctl", "restart", unitName},
				{"systemctl", "kill", "--signal", "KILL", unitName},
				{"systemctl", "stop", unitName},
			} {
				before := property(t, n, unitName, "MainPID")
				run(t, n, end...)
				wantReading(t, pod)
				if end[1] == "stop" {
					run(t, n, "systemctl", "start", unitName)
				}
				waitFor(t, "the restart of the daemon", func() bool {
					return property(t, n, unitName, "ActiveState") == "active" && property(t, n, unitName, "MainPID") != before
				})
				waitForDaemon(t, n)
				wantReading(t, pod)
				wantVolume(t, pod, "main", "/model", wantTree(t, src, form))
				wantServed(t)
			}
			if got := property(t, n, "containerd", "MainPID"); got != runtime {
				t.Errorf("containerd was restarted: its process is %s, and was %s", got, runtime)
			}
			check(t, pod.Remove())
		}
	})

	t.Run("a boot", func(t *testing.T) {
		check(t, n.Shutdown())
		check(t, n.Boot())
		ready := started(t, n, unitName, "ActiveEnterTimestampMonotonic")
		if containerd := started(t, n, "containerd", "ExecMainStartTimestampMonotonic"); containerd < ready {
			t.Errorf("containerd started %d µs before the daemon was ready", ready-containerd)
		}
		wantServed(t)
	})

	// A daemon that cannot start must not affect other pods, and systemd must retry without
	// a limit.
	t.Run("a boot with a daemon that cannot start", func(t *testing.T) {
		config := machineFile(n, "/etc/artifact-snapshotter/config.toml")
		writeFile(t, config, "rooot = \"/data\"\n", 0o644)
		check(t, n.Shutdown())
		check(t, n.Boot())
		waitFor(t, "six attempts of systemd to start the daemon", func() bool {
			tries, err := strconv.Atoi(property(t, n, unitName, "NRestarts"))
			check(t, err)
			return tries > 5 // by default systemd gives up after five attempts
		})
		check(t, os.Remove(config))
		waitFor(t, "the running daemon", func() bool { return property(t, n, unitName, "ActiveState") == "active" })
		waitForDaemon(t, n)
		wantServed(t)
	})
}

// systemd-analyze accepts the unit without a message.
func TestTheUnitIsValid(t *testing.T) {
	dir := t.TempDir()
	cmd, err := exec.LookPath("systemd-analyze")
	check(t, err)
	verify := func(unit string) string {
		// Use a program that exists.
		unit = strings.Replace(unit, deploy.UnitBinary, "/bin/true", 1)
		path := filepath.Join(dir, unitName)
		writeFile(t, path, unit, 0o644)
		out, err := exec.Command(cmd, "verify", "--man=no", path).CombinedOutput()
		if err != nil {
			return string(out) + err.Error()
		}
		return string(out)
	}
	if said := verify(deploy.Unit); said != "" {
		t.Errorf("systemd-analyze verify: %s", said)
	}
	if said := verify(strings.Replace(deploy.Unit, "Restart=always", "Restart=allways", 1)); !strings.Contains(said, "allways") {
		t.Errorf("systemd-analyze verify does not find a wrong value: %q", said)
	}
}
