// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package plugin

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/opencontainers/go-digest"

	"github.com/artifact-snapshotter/artifact-snapshotter/internal/containerdtest"
	"github.com/artifact-snapshotter/artifact-snapshotter/snapshot"
)

// buildContainerd compiles containerd with this package from another module, and returns the
// path of the binary.
func buildContainerd(t *testing.T) string {
	t.Helper()
	const module = "github.com/artifact-snapshotter/artifact-snapshotter"
	here, err := filepath.Abs("..")
	if err != nil {
		t.Fatal(err)
	}
	main, err := os.ReadFile(filepath.Join("testdata", "containerd", "main.go"))
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for name, text := range map[string]string{
		"main.go": string(main),
		"go.mod": fmt.Sprintf("module containerd\n\ngo 1.26\n\nrequire %[1]s v0.0.0\n\nreplace %[1]s => %[2]s\n",
			module, here),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	build := exec.Command("go", "build", "-mod=mod", "-o", "containerd", ".")
	build.Dir = dir
	if output, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build containerd: %v\n%s", err, output)
	}
	return filepath.Join(dir, "containerd")
}

// nativeUnpack configures containerd's own unpacker to use the compiled-in differ.
const nativeUnpack = `
[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
  platform = "linux"
  snapshotter = "artifact"
  differ = "walking"
[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
  platform = "linux(+modelpack)"
  snapshotter = "artifact"
  differ = "artifact"
  config_type = "application/vnd.cncf.model.config.v1+json"
  layer_types = ["application/vnd.cncf.model.weight.v1.raw"]
`

func TestAContainerdWithThePlugin(t *testing.T) {
	containerd := buildContainerd(t)

	t.Run("mounts artifacts, with containerd's directories", func(t *testing.T) {
		n := containerdtest.New(t, "")
		n.Start(t, containerd)
		details := listed(t, n, "--detailed")
		root := filepath.Join(n.Dir, "root", "io.containerd.snapshotter.v1.artifact")
		for _, want := range []string{"artifact", "linux/", root, snapshot.RemapIDs} {
			if !strings.Contains(details, want) {
				t.Errorf("the plugin does not say %q:\n%s", want, details)
			}
		}
		wantOK(t, n)
		if output, err := n.Ctr(t, "snapshots", "--snapshotter", "artifact", "prepare", "key"); err != nil {
			t.Errorf("prepare a snapshot: %v\n%s", err, output)
		}
		for _, entry := range []string{"lock", "overlayfs"} {
			if _, err := os.Stat(filepath.Join(root, entry)); err != nil {
				t.Error(err)
			}
		}
		// It has found containerd's content store and address.
		wantVolume(t, n, filepath.Join(n.Dir, "state", "io.containerd.snapshotter.v1.artifact", "mounts"))
		containerdtest.Eventually(t, "the empty blob is pre-created", func() error {
			_, err := n.ContentStore(t).Info(namespaces.WithNamespace(t.Context(), "k8s.io"), digest.FromBytes(nil))
			return err
		})
		n.Stop()
	})

	t.Run("uses the configuration of its table", func(t *testing.T) {
		dir := t.TempDir()
		n := containerdtest.New(t, fmt.Sprintf("[plugins.'io.containerd.snapshotter.v1.artifact']\n  root = %q\n  namespaces = ['other']\n  [plugins.'io.containerd.snapshotter.v1.artifact'.overlayfs]\n    mount_options = ['volatile']\n", dir+"/r"))
		n.Start(t, containerd)
		wantOK(t, n)
		if _, err := os.Stat(filepath.Join(dir, "r", "lock")); err != nil {
			t.Error(err)
		}
		containerdtest.Eventually(t, "the empty blob is pre-created", func() error {
			_, err := n.ContentStore(t).Info(namespaces.WithNamespace(t.Context(), "other"), digest.FromBytes(nil))
			return err
		})
		var mounts string
		for _, args := range [][]string{{"prepare", "a"}, {"commit", "layer", "a"}, {"prepare", "b", "layer"}, {"mounts", dir, "b"}} {
			var err error
			if mounts, err = n.Ctr(t, append([]string{"snapshots", "--snapshotter", "artifact"}, args...)...); err != nil {
				t.Fatalf("ctr snapshots %q: %v\n%s", args, err, mounts)
			}
		}
		if !strings.Contains(mounts, "volatile") {
			t.Errorf("a container would be mounted by %s, want volatile among the options", mounts)
		}
	})

	t.Run("unpacks artifacts with containerd's own unpacker and the differ", func(t *testing.T) {
		n := containerdtest.New(t, nativeUnpack)
		n.Start(t, containerd)
		if output, err := n.Ctr(t, "plugins", "ls", "type==io.containerd.differ.v1,id==artifact"); err != nil || !strings.Contains(output, " ok") {
			t.Errorf("the differ is missing: %v\n%s", err, output)
		}
		weights := []byte("weights")
		reference, _ := containerdtest.ServeArtifact(t, weights)
		if output, err := n.Ctr(t, "images", "pull", "--plain-http", "--snapshotter", "artifact", "--platform", "linux(+modelpack)", reference); err != nil {
			t.Fatalf("pull: %v\n%s\n%s", err, output, n.Log())
		}
		// The chain ID of one layer is its DiffID.
		chain := digest.FromBytes(weights).String()
		ctx := namespaces.WithNamespace(t.Context(), "default")
		// Without the label containerd's garbage collector removes it.
		keep := snapshots.WithLabels(map[string]string{"containerd.io/gc.root": "test"})
		if _, err := containerdtest.DialSnapshotter(t, n.Address).View(ctx, "view", chain, keep); err != nil {
			t.Fatal(err)
		}
		wantMounted(t, n, "view", filepath.Join(n.Dir, "state", "io.containerd.snapshotter.v1.artifact", "mounts"), weights)
	})

	t.Run("logs the keys that it ignores", func(t *testing.T) {
		n := containerdtest.New(t, "[plugins.'io.containerd.snapshotter.v1.artifact']\n  metrics_address = '127.0.0.1:9477'\n")
		n.Start(t, containerd)
		wantOK(t, n)
		if !regexp.MustCompile(`level=warning msg="Ignoring unknown key in TOML for plugin".* key=metrics_address`).MatchString(n.Log()) {
			t.Errorf("nothing is logged about a key of the daemon's:\n%s", n.Log())
		}
	})

	t.Run("refuses the root of a daemon with NRI", func(t *testing.T) {
		root := t.TempDir()
		if err := os.Mkdir(filepath.Join(root, "nri"), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(root, "nri", "container.json"), []byte("{}"), 0o600); err != nil {
			t.Fatal(err)
		}
		n := containerdtest.New(t, fmt.Sprintf("[plugins.'io.containerd.snapshotter.v1.artifact']\n  root = %q\n", root))
		n.Start(t, containerd)
		if details := listed(t, n, "--detailed"); !strings.Contains(details, filepath.Join(root, "nri")+" records containers") {
			t.Errorf("the plugin does not say what is wrong:\n%s", details)
		}
	})
}

// listed returns what `ctr plugins ls` prints about the snapshotter.
func listed(t *testing.T, n *containerdtest.Containerd, args ...string) string {
	t.Helper()
	output, err := n.Ctr(t, append(append([]string{"plugins", "ls"}, args...), "type==io.containerd.snapshotter.v1,id==artifact")...)
	if err != nil {
		t.Fatalf("list plugins: %v\n%s", err, output)
	}
	return output
}

func wantOK(t *testing.T, n *containerdtest.Containerd) {
	t.Helper()
	list := listed(t, n)
	if !regexp.MustCompile(`(?m)^io\.containerd\.snapshotter\.v1 +artifact +linux/\S+ +ok *$`).MatchString(list) {
		t.Errorf("the plugin is not ok:\n%s\n%s", list, n.Log())
	}
}

// wantVolume pulls an artifact and checks that the snapshotter mounts it, like an image
// volume, below the directory mounts.
func wantVolume(t *testing.T, n *containerdtest.Containerd, mounts string) {
	t.Helper()
	weights := []byte("weights")
	reference, manifest := containerdtest.ServeArtifact(t, weights)
	key := "/image-volumes/sandbox/" + manifest.Encoded()
	for _, args := range [][]string{
		{"content", "fetch", "--plain-http", reference},
		{"snapshots", "--snapshotter", "artifact", "prepare", key},
	} {
		if output, err := n.Ctr(t, args...); err != nil {
			t.Fatalf("ctr %s: %v\n%s", strings.Join(args, " "), err, output)
		}
	}
	wantMounted(t, n, key, mounts, weights)
}

// wantMounted checks that the only mount has the artifact's file, removes the snapshot, and
// waits until the artifact is unmounted.
func wantMounted(t *testing.T, n *containerdtest.Containerd, key, mounts string, weights []byte) {
	t.Helper()
	// The file of a raw layer without a path is named after the digest.
	files, err := filepath.Glob(filepath.Join(mounts, "*", digest.FromBytes(weights).Encoded()))
	if err != nil || len(files) != 1 {
		t.Fatalf("the mount has the files %q, %v; want one", files, err)
	}
	if got, err := os.ReadFile(files[0]); err != nil || !bytes.Equal(got, weights) {
		t.Errorf("the file reads %q, %v; want %q", got, err, weights)
	}
	if output, err := n.Ctr(t, "snapshots", "--snapshotter", "artifact", "rm", key); err != nil {
		t.Fatalf("remove the snapshot: %v\n%s", err, output)
	}
	containerdtest.Eventually(t, "the artifact is unmounted", func() error {
		left, err := os.ReadDir(mounts)
		if err == nil && len(left) > 0 {
			err = fmt.Errorf("%s is left", left[0].Name())
		}
		return err
	})
}
