// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

// Package containerdtest starts real containerds for the tests of packages that need
// nothing else of a node, and serves artifacts to them. Package integration/node has whole
// nodes.
package containerdtest

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/content"
	contentproxy "github.com/containerd/containerd/v2/core/content/proxy"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/pkg/dialer"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// Tool returns the path of a program that integration/tools pins.
func Tool(t *testing.T, name string) string {
	t.Helper()
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for ; !exists(filepath.Join(dir, "integration", "tools", "go.mod")); dir = filepath.Dir(dir) {
		if dir == filepath.Dir(dir) {
			t.Fatal("the test runs outside of the repository")
		}
	}
	path := filepath.Join(dir, "integration", "tools", "bin", name)
	if !exists(path) {
		t.Fatalf("%s is missing: run `make tools`", path)
	}
	return path
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// Dirs returns what the configuration of a snapshotter needs, below a temporary directory.
// content can hold blobs of sha256. Nothing listens on the address.
func Dirs(t *testing.T) (root, state, content, address string) {
	t.Helper()
	dir := t.TempDir()
	content = filepath.Join(dir, "content")
	if err := os.MkdirAll(filepath.Join(content, "blobs", "sha256"), 0o755); err != nil {
		t.Fatal(err)
	}
	return filepath.Join(dir, "root"), filepath.Join(dir, "state"), content, filepath.Join(dir, "c.sock")
}

// Containerd is a containerd in a temporary directory.
type Containerd struct {
	// Dir is the directory, Address the socket in it.
	Dir, Address string
	// Stop shuts containerd down. The end of the test does so, too.
	Stop   func()
	config string
}

// New writes the configuration of a containerd that touches nothing outside of its
// directory. extra is added to it.
func New(t *testing.T, extra string) *Containerd {
	t.Helper()
	dir := t.TempDir()
	n := &Containerd{Dir: dir, Address: filepath.Join(dir, "c.sock"), config: filepath.Join(dir, "config.toml")}
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

// Start runs the containerd binary and waits until it answers.
func (c *Containerd) Start(t *testing.T, binary string) {
	t.Helper()
	output, err := os.Create(filepath.Join(c.Dir, "containerd.log"))
	if err != nil {
		t.Fatal(err)
	}
	defer output.Close()
	daemon := exec.Command(binary, "--config", c.config)
	daemon.Stdout, daemon.Stderr = output, output
	if err := daemon.Start(); err != nil {
		t.Fatal(err)
	}
	exited := make(chan error, 1)
	go func() { exited <- daemon.Wait() }()
	c.Stop = func() {
		c.Stop = func() {}
		if err := daemon.Process.Signal(unix.SIGTERM); err != nil {
			t.Errorf("stop containerd: %v", err)
			return
		}
		select {
		case err := <-exited:
			if err != nil {
				t.Errorf("containerd: %v\n%s", err, c.Log())
			}
		case <-time.After(30 * time.Second):
			t.Errorf("containerd does not stop\n%s", c.Log())
			_ = daemon.Process.Kill()
			<-exited
		}
	}
	t.Cleanup(func() { c.Stop() })
	Eventually(t, "containerd answers", func() error {
		conn, err := net.Dial("unix", c.Address)
		if err != nil {
			return fmt.Errorf("%w\n%s", err, c.Log())
		}
		return conn.Close()
	})
}

// Log returns what containerd has logged.
func (c *Containerd) Log() string {
	text, err := os.ReadFile(filepath.Join(c.Dir, "containerd.log"))
	if err != nil {
		return err.Error()
	}
	return string(text)
}

// Ctr runs ctr and returns what it prints.
func (c *Containerd) Ctr(t *testing.T, args ...string) (string, error) {
	t.Helper()
	output, err := exec.Command(Tool(t, "ctr"), append([]string{"--address", c.Address}, args...)...).CombinedOutput()
	return string(output), err
}

// Eventually polls a condition for up to 30 seconds until it holds.
func Eventually(t *testing.T, what string, holds func() error) {
	t.Helper()
	var err error
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); {
		if err = holds(); err == nil {
			return
		}
		<-time.After(20 * time.Millisecond)
	}
	t.Fatalf("not after 30 s: %s: %v", what, err)
}

// ContentStore returns the content store of containerd.
func (c *Containerd) ContentStore(t *testing.T) content.Store {
	t.Helper()
	return contentproxy.NewContentStore(Dial(t, c.Address))
}

// DialSnapshotter returns the snapshotter "artifact" that is served on a Unix socket, by
// containerd or by the daemon.
func DialSnapshotter(t *testing.T, address string) snapshots.Snapshotter {
	t.Helper()
	return proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(Dial(t, address)), "artifact")
}

// Dial connects to a Unix socket until the end of the test.
func Dial(t *testing.T, address string) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient(dialer.DialAddress(address), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// ServeArtifact serves an artifact with the given raw layers from a read-only registry and
// returns its reference and the digest of its manifest.
func ServeArtifact(t *testing.T, layers ...[]byte) (string, digest.Digest) {
	t.Helper()
	blobs := map[string][]byte{}
	add := func(mediaType string, data []byte) ocispec.Descriptor {
		desc := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
		blobs[desc.Digest.String()] = data
		return desc
	}
	manifest := ocispec.Manifest{
		Versioned:    specs.Versioned{SchemaVersion: 2},
		MediaType:    ocispec.MediaTypeImageManifest,
		ArtifactType: "application/vnd.cncf.model.manifest.v1+json",
	}
	var ids []string
	for _, layer := range layers {
		manifest.Layers = append(manifest.Layers, add("application/vnd.cncf.model.weight.v1.raw", layer))
		ids = append(ids, digest.FromBytes(layer).String())
	}
	// With rootfs, so that containerd's own unpacker can unpack it.
	config, err := json.Marshal(map[string]any{"rootfs": map[string]any{"diff_ids": ids}})
	if err != nil {
		t.Fatal(err)
	}
	manifest.Config = add("application/vnd.cncf.model.config.v1+json", config)
	data, err := json.Marshal(manifest)
	if err != nil {
		t.Fatal(err)
	}
	top := add(ocispec.MediaTypeImageManifest, data)
	blobs["v1"] = data

	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		last := r.URL.Path[strings.LastIndex(r.URL.Path, "/")+1:]
		data, ok := blobs[last]
		switch {
		case r.URL.Path == "/v2/":
		case !ok:
			http.NotFound(w, r)
		default:
			w.Header().Set("Content-Type", "application/octet-stream")
			if strings.Contains(r.URL.Path, "/manifests/") {
				w.Header().Set("Content-Type", top.MediaType)
				w.Header().Set("Docker-Content-Digest", top.Digest.String())
			}
			http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(data))
		}
	}))
	t.Cleanup(server.Close)
	return strings.TrimPrefix(server.URL, "http://") + "/model:v1", top.Digest
}
