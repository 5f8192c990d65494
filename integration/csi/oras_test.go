// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package csi

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	csiapi "github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/artifact-snapshotter/artifact-snapshotter/internal/containerdtest"
	"github.com/artifact-snapshotter/artifact-snapshotter/internal/registrytest"
)

// None of these can be an image volume on containerd while all are on the node: CRI refuses the
// layer types of images, and artifacts that share the config {}.
func TestWhatOrasPushes(t *testing.T) {
	registry := registrytest.Start(t, t.TempDir(), false)
	src := t.TempDir()
	for name, text := range map[string]string{"notes.txt": "notes", "other.txt": "other", "config.json": `{"a": 1}`, "dir/a.txt": "a", "dir/sub/b.txt": "b"} {
		path := filepath.Join(src, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	dir := t.TempDir()
	d := start(t, dir)
	node := csiapi.NewNodeClient(dial(t, d.socket()))
	for i, test := range []struct {
		flags, files []string
		want         map[string]string
	}{
		{nil, []string{"notes.txt"}, map[string]string{"notes.txt": "notes"}},
		{nil, []string{"other.txt"}, map[string]string{"other.txt": "other"}},
		{nil, []string{"dir"}, map[string]string{"dir/a.txt": "a", "dir/sub/b.txt": "b"}},
		{nil, []string{"notes.txt:text/plain"}, map[string]string{"notes.txt": "notes"}},
		{nil, []string{"notes.txt", "other.txt:text/plain"}, map[string]string{"notes.txt": "notes", "other.txt": "other"}},
		{[]string{"--config", "config.json:application/vnd.example.config+json"}, []string{"notes.txt"}, map[string]string{"notes.txt": "notes"}},
	} {
		ref := fmt.Sprintf("%s/oras/%d:v1", registry, i)
		args := slices.Concat([]string{"push", "--plain-http"}, test.flags, []string{ref}, test.files)
		push := exec.Command(containerdtest.Tool(t, "oras"), args...)
		push.Dir = src
		if out, err := push.CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", push, err, out)
		}
		target := filepath.Join(dir, "kubelet/pods", fmt.Sprint(i), "volumes/kubernetes.io~csi/model/mount")
		_, err := node.NodePublishVolume(t.Context(), &csiapi.NodePublishVolumeRequest{
			VolumeId: fmt.Sprint(i), TargetPath: target, Readonly: true, VolumeContext: map[string]string{"reference": ref},
			VolumeCapability: &csiapi.VolumeCapability{
				AccessType: &csiapi.VolumeCapability_Mount{Mount: &csiapi.VolumeCapability_MountVolume{}},
				AccessMode: &csiapi.VolumeCapability_AccessMode{Mode: csiapi.VolumeCapability_AccessMode_SINGLE_NODE_READER_ONLY},
			},
		})
		if err != nil {
			t.Errorf("oras %q: %v", args, err)
			continue
		}
		found := map[string]string{}
		if err := filepath.WalkDir(target, func(path string, e os.DirEntry, err error) error {
			if err != nil || e.IsDir() {
				return err
			}
			text, err := os.ReadFile(path)
			name, _ := filepath.Rel(target, path)
			found[name] = string(text)
			return err
		}); err != nil {
			t.Error(err)
		}
		if fmt.Sprint(found) != fmt.Sprint(test.want) {
			t.Errorf("oras %q: the volume has %q, want %q", args, found, test.want)
		}
	}
}
