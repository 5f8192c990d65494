// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package plugin

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// tool returns the path of a real program that integration/tools pins.
func tool(t *testing.T, name string) string {
	t.Helper()
	path, err := filepath.Abs(filepath.Join("..", "integration", "tools", "bin", name))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("%s is not built, run `make tools`: %v", name, err)
	}
	return path
}

// node is a containerd in a directory of its own, started from a test.
type node struct {
	dir, address string
	config       string
	stop         func() // lets it shut down; called at the end of the test, too
}

// newNode writes the configuration of a containerd that touches nothing
// outside of its directory. extra is added to it.
func newNode(t *testing.T, extra string) *node {
	t.Helper()
	dir := t.TempDir()
	n := &node{dir: dir, address: filepath.Join(dir, "c.sock"), config: filepath.Join(dir, "config.toml")}
	text := fmt.Sprintf(`version = 3
root = "%[1]s/root"
state = "%[1]s/state"
[grpc]
  address = "%[1]s/c.sock"
[debug]
  address = "%[1]s/debug.sock"
[plugins.'io.containerd.cri.v1.runtime'.cni]
  conf_dir = "%[1]s/cni"
[plugins.'io.containerd.internal.v1.opt']
  path = "%[1]s/opt"
[plugins.'io.containerd.nri.v1.nri']
  disable = true
%[2]s`, dir, extra)
	if err := os.WriteFile(n.config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return n
}

// start runs the containerd binary and waits until it answers.
func (n *node) start(t *testing.T, binary string) {
	t.Helper()
	output, err := os.Create(filepath.Join(n.dir, "containerd.log"))
	if err != nil {
		t.Fatal(err)
	}
	defer output.Close()
	daemon := exec.Command(binary, "--config", n.config)
	daemon.Stdout, daemon.Stderr = output, output
	if err := daemon.Start(); err != nil {
		t.Fatal(err)
	}
	exited := make(chan error, 1)
	go func() { exited <- daemon.Wait() }()
	n.stop = func() {
		n.stop = func() {}
		if err := daemon.Process.Signal(unix.SIGTERM); err != nil {
			t.Errorf("stop containerd: %v", err)
			return
		}
		select {
		case err := <-exited:
			if err != nil {
				t.Errorf("containerd: %v\n%s", err, n.log())
			}
		case <-time.After(30 * time.Second):
			t.Errorf("containerd does not stop\n%s", n.log())
			_ = daemon.Process.Kill()
			<-exited
		}
	}
	t.Cleanup(func() { n.stop() })
	eventually(t, "containerd answers", func() error {
		conn, err := net.Dial("unix", n.address)
		if err != nil {
			return fmt.Errorf("%w\n%s", err, n.log())
		}
		return conn.Close()
	})
}

func (n *node) log() string {
	text, err := os.ReadFile(filepath.Join(n.dir, "containerd.log"))
	if err != nil {
		return err.Error()
	}
	return string(text)
}

func (n *node) ctr(t *testing.T, args ...string) (string, error) {
	t.Helper()
	output, err := exec.Command(tool(t, "ctr"), append([]string{"--address", n.address}, args...)...).CombinedOutput()
	return string(output), err
}

// eventually polls a condition until it holds.
func eventually(t *testing.T, what string, holds func() error) {
	t.Helper()
	var err error
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); {
		if err = holds(); err == nil {
			return
		}
		<-time.After(20 * time.Millisecond)
	}
	t.Fatalf("not so after 30 s: %s: %v", what, err)
}
