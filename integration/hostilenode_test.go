// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/fswatch"
	corpus "github.com/artifact-snapshotter/artifact-snapshotter/integration/hostile"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
)

// sample has the cases that run through a registry, a pull and a pod: some of each kind,
// and odd ones that containerd accepts.
var sample = []string{
	"path/raw, above the volume", "path/tar, absolute", "path/tar, a newline", "path/raw, an escape sequence", "path/tar, a path of 4095 bytes",
	"unicode/tar, composed and decomposed", "unicode/raw, written from right to left", "unicode/invalid UTF-8 in a tar, a lone byte", "unicode/invalid UTF-8 in a manifest, Latin 1",
	"link/symlink to a file of the node", "link/through a symlink, a file through it", "link/hard link to a symlink", "link/hard link to nothing", "type/a block device with the device numbers of a disk",
	"field/mode of a file, all special bits", "field/user 4294967295", "field/size 2^62", "pax/global header with path /etc/passwd", "pax/time with nanoseconds",
	"gnu/a long name that leaves the volume", "sparse/1.0", "sparse/1.0, a hole of 2^60 bytes", "sparse/of an unknown format, 2.0", "xattr/removed, file capabilities",
	"xattr/removed, an attribute of overlayfs, redirect", "end/a trailing archive", "end/no block of zeros", "end/no bytes at all", "end/4 MiB of zeros", "gnu/a volume's label", "gnu/a listed directory",
	"path/tar, a slash after a file makes a directory", "stream/gzip, no bytes", "stream/gzip of no bytes", "stream/gzip, seven trailing bytes", "stream/gzip, a wrong checksum", "stream/zstd, a window of 256 MiB",
	"manifest/layers twice", "manifest/with 100,000 keys", "descriptor/annotations is a list", "config/a list (application/vnd.cncf.model.config.v1+json)", "metadata/mode, as text",
	"type of a layer/application/vnd.cncf.model.weight.v1.tar+encrypted", "layers/a raw file through a symlink", "layers/two raw layers of one path",
	"bomb/gzip, a thousand to one, of zeros", "bomb/zstd, thirty thousand to one", "bomb/one archive in 1,000 layers",
}

// putHostile uploads the artifact byte by byte as it is, which no client would do.
func putHostile(t *testing.T, host, repo string, a *corpus.Artifact) (ref string, err error) {
	t.Helper()
	do := func(method, to, contentType string, body []byte) (http.Header, error) {
		req, err := http.NewRequestWithContext(t.Context(), method, to, bytes.NewReader(body))
		if err != nil {
			return nil, err
		}
		req.Header.Set("Content-Type", contentType)
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return nil, err
		}
		defer resp.Body.Close()
		text, err := io.ReadAll(resp.Body)
		if err == nil && resp.StatusCode >= 300 {
			err = fmt.Errorf("%s %.200s: %s: %.500s", method, to, resp.Status, text)
		}
		return resp.Header, err
	}
	base := "http://" + host + "/v2/" + repo + "/"
	manifest := func(d digest.Digest, mediaType string) error {
		_, err := do(http.MethodPut, base+"manifests/"+d.String(), mediaType, a.Blobs[d])
		return err
	}
	for d, b := range a.Blobs {
		if d == a.Target || d.Validate() != nil {
			continue
		}
		if bytes.Contains(b, []byte(`"schemaVersion"`)) && bytes.HasPrefix(b, []byte("{")) { // a manifest of an index
			if err := manifest(d, "application/vnd.oci.image.manifest.v1+json"); err == nil {
				continue
			}
		}
		header, err := do(http.MethodPost, base+"blobs/uploads/", "", nil)
		if err != nil {
			return "", err
		}
		upload, err := url.Parse(header.Get("Location"))
		if err != nil {
			return "", err
		}
		query := upload.Query()
		query.Set("digest", d.String())
		upload.RawQuery = query.Encode()
		if _, err := do(http.MethodPut, upload.String(), "application/octet-stream", b); err != nil {
			return "", err
		}
	}
	return host + "/" + repo + "@" + a.Target.String(), manifest(a.Target, a.MediaType)
}

// A bad artifact is refused with the reason: by the registry, by containerd's pull, or by
// the daemon when the container is created. A good one is mounted in a container. The
// daemon changes only its own files.
func TestHostileArtifactsOnANode(t *testing.T) {
	n := node.ForTest(t, node.Options{})
	pod, err := n.RunSandbox(node.PodSpec{})
	check(t, err)
	watch, err := fswatch.Start([]int{n.DaemonPID()}, n.Dir, "/sys/devices/virtual/bdi/*/read_ahead_kb", "/sys/devices/virtual/block/*/queue/read_ahead_kb")
	check(t, err)
	cases := corpus.Cases()
	var byRegistry, byPull, byDaemon, mounted int
	for i, name := range sample {
		at := slices.IndexFunc(cases, func(c corpus.Case) bool { return c.Name == name })
		if at < 0 {
			t.Fatalf("no case has the name %q", name)
		}
		t.Run(name, func(t *testing.T) {
			c := cases[at]
			want := c.For(corpus.Index)
			ref, err := putHostile(t, n.Registry, fmt.Sprintf("hostile/%d", i), c.Make())
			if err == nil {
				_, err = n.Pull(ref)
				if err != nil {
					byPull++
				}
			} else {
				byRegistry++
			}
			if err != nil {
				if want.Refused == nil {
					t.Errorf("the registry or containerd refused it: %v", err)
				}
				t.Logf("%.300v", err)
				return
			}
			defer func() {
				_, err := n.Crictl("rmi", ref)
				check(t, err)
			}()
			err = pod.Start(node.Container{Name: fmt.Sprintf("c%d", i), Volumes: []node.Volume{{Image: ref, Path: "/model"}}})
			switch {
			case errors.Is(want.Refused, artifact.ErrNotArtifact):
				check(t, err)
			case want.Refused != nil && err == nil:
				t.Error("the container started")
			case want.Refused != nil:
				byDaemon++
				text := answer(t, err)
				for _, says := range want.Says {
					if !strings.Contains(text, says) {
						t.Errorf("the error does not contain %q: %.1000s", says, text)
					}
				}
			case err != nil:
				t.Errorf("the daemon refused it: %v", err)
			default:
				mounted++
				mounts, err := node.Mounts(n.DaemonState)
				check(t, err)
				if len(mounts) != 1 {
					t.Fatalf("the daemon's mounts are %q, want one", mounts)
				}
				got, err := corpus.List(mounts[0])
				check(t, err)
				if diff := want.Diff(corpus.Index, got); diff != "" {
					t.Errorf("the volume differs:\n%s", diff)
				}
				check(t, pod.Remove())
				pod, err = n.RunSandbox(node.PodSpec{})
				check(t, err)
			}
		})
	}
	changes, seen, err := watch.Stop()
	if err != nil || len(changes) > 0 || seen[n.Dir] == 0 {
		t.Errorf("changes outside of the node's directory: %q; inside: %v (%v)", changes, seen, err)
	}
	check(t, pod.Remove())
	t.Logf("%d artifacts: %d mounted, refused by the daemon %d, by containerd's pull %d, by the registry %d", len(sample), mounted, byDaemon, byPull, byRegistry)
	if byDaemon < 15 || mounted < 10 {
		t.Error("too few artifacts reached the daemon")
	}
}

// Without metrics and traces, the daemon has only Unix sockets; only root may connect to
// its own one; and all its mounts are read-only, nosuid and nodev.
func TestTheDaemonsSocketsAndMounts(t *testing.T) {
	n := node.ForTest(t, node.Options{})
	ref := pulled(t, n, writeModel(t), "raw")
	pod, err := n.RunPod(node.PodSpec{Volumes: []node.Volume{{Image: ref, Path: "/model"}}})
	check(t, err)

	fi, err := os.Stat(filepath.Join(n.Dir, "daemon.sock"))
	check(t, err)
	if fi.Mode() != os.ModeSocket|0o600 {
		t.Errorf("the socket has the mode %v, want %v", fi.Mode(), os.ModeSocket|0o600)
	}
	inodes := map[string]bool{}
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", n.DaemonPID()))
	check(t, err)
	for _, fd := range fds {
		to, err := os.Readlink(fd)
		if err == nil && strings.HasPrefix(to, "socket:[") {
			inodes[strings.Trim(to, "socket:[]")] = true
		}
	}
	unixSockets, others := map[string]bool{}, map[string]string{}
	for _, table := range []string{"unix", "tcp", "tcp6", "udp", "udp6", "raw", "raw6", "netlink", "packet"} {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/%s", n.DaemonPID(), table))
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		check(t, err)
		for line := range strings.Lines(string(text)) {
			for field := range strings.FieldsSeq(line) {
				if inodes[field] && table == "unix" {
					unixSockets[field] = true
				} else if inodes[field] {
					others[field] = table
				}
			}
		}
	}
	if len(inodes) < 2 || len(unixSockets) != len(inodes) {
		t.Errorf("the daemon has the sockets %v; Unix sockets: %v, others: %v", inodes, unixSockets, others)
	}

	text, err := os.ReadFile("/proc/self/mountinfo")
	check(t, err)
	ours := 0
	for line := range strings.Lines(string(text)) {
		fields := strings.Fields(line)
		if !strings.HasPrefix(fields[4], n.DaemonState) && !strings.HasPrefix(fields[4], n.DaemonRoot) {
			continue
		}
		ours++
		for _, option := range []string{"ro", "nosuid", "nodev"} {
			if !slices.Contains(strings.Split(fields[5], ","), option) {
				t.Errorf("%s is not mounted %s: %s", fields[4], option, fields[5])
			}
		}
	}
	if ours == 0 {
		t.Error("the daemon has no mounts")
	}
	check(t, pod.Remove())
}
