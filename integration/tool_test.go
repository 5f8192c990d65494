// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode"

	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/treelist"
)

// The JSON output of the commands, as documented in docs/cli.md.
type (
	jsonPulled struct {
		Reference string        `json:"reference"`
		Digest    digest.Digest `json:"digest"`
		Manifest  digest.Digest `json:"manifest"`
		Size      int64         `json:"size"`
		Snapshot  string        `json:"snapshot"`
	}
	jsonListed struct {
		Reference string        `json:"reference"`
		Digest    digest.Digest `json:"digest"`
		Manifest  digest.Digest `json:"manifest"`
		Config    digest.Digest `json:"config"`
		Size      int64         `json:"size"`
		Layout    *struct {
			Raw    string `json:"raw_mode"`
			Tar    string `json:"tar_mode"`
			Shared int64  `json:"shared"`
		} `json:"layout"`
		Snapshots []string `json:"snapshots"`
		Pods      []struct {
			Namespace string `json:"namespace"`
			Name      string `json:"name"`
			Sandbox   string `json:"sandbox"`
		} `json:"pods"`
		Mounts     []string `json:"mounts"`
		Containers []string `json:"containers"`
		Conflicts  []string `json:"conflicts"`
	}
	jsonMount struct {
		Target     string        `json:"target"`
		References []string      `json:"references"`
		Manifest   digest.Digest `json:"manifest"`
		Mounted    bool          `json:"mounted"`
	}
	jsonInspected struct {
		Image *struct {
			Reference string        `json:"reference"`
			Digest    digest.Digest `json:"digest"`
			Snapshot  string        `json:"snapshot"`
			Conflicts []string      `json:"conflicts"`
		} `json:"image"`
		Manifest digest.Digest `json:"manifest"`
		Config   digest.Digest `json:"config"`
		Type     string        `json:"type"`
		Created  string        `json:"created"`
		Layers   []struct {
			Digest      digest.Digest `json:"digest"`
			Size        int64         `json:"size"`
			MediaType   string        `json:"media_type"`
			Format      string        `json:"format"`
			Compression string        `json:"compression"`
			Members     []struct {
				Path  string `json:"path"`
				Type  string `json:"type"`
				Size  int64  `json:"size"`
				Mode  string `json:"mode"`
				UID   uint32 `json:"uid"`
				GID   uint32 `json:"gid"`
				MTime string `json:"mtime"`
				Link  string `json:"link"`
			} `json:"members"`
			Unlisted string        `json:"unlisted"`
			DiffID   digest.Digest `json:"diff_id"`
			File     *struct {
				Path  string `json:"path"`
				Mode  string `json:"mode"`
				UID   uint32 `json:"uid"`
				GID   uint32 `json:"gid"`
				MTime string `json:"mtime"`
			} `json:"file"`
		} `json:"layers"`
	}
	jsonVerified struct {
		Reference string `json:"reference"`
		OK        bool   `json:"ok"`
		Blobs     []struct {
			Kind    string        `json:"kind"`
			Digest  digest.Digest `json:"digest"`
			Size    int64         `json:"size"`
			Path    string        `json:"path"`
			Paths   []string      `json:"paths"`
			DiffID  digest.Digest `json:"diff_id"`
			Problem string        `json:"problem"`
		} `json:"blobs"`
	}
	jsonPruned struct {
		DryRun    bool `json:"dry_run"`
		Artifacts []struct {
			References []string      `json:"references"`
			Manifest   digest.Digest `json:"manifest"`
			Size       int64         `json:"size"`
		} `json:"artifacts"`
		Size  int64 `json:"size"`
		Freed int64 `json:"freed"`
	}
)

// toolJSON runs a command and decodes its complete output.
func toolJSON[T any](t *testing.T, n *node.Node, args ...string) T {
	t.Helper()
	out, _, err := n.Artifact(append(args, "--output", "json", "--config", n.ConfigFile())...)
	check(t, err)
	return decoded[T](t, out)
}

func decoded[T any](t *testing.T, out string) (v T) {
	t.Helper()
	d := json.NewDecoder(strings.NewReader(out))
	d.DisallowUnknownFields()
	if err := d.Decode(&v); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if d.More() {
		t.Fatalf("the output has more than one value:\n%s", out)
	}
	return v
}

// tool runs a command and returns its output.
func tool(t *testing.T, n *node.Node, args ...string) string {
	t.Helper()
	out, _, err := n.Artifact(append(args, "--config", n.ConfigFile())...)
	check(t, err)
	return out
}

// wantRefusal runs a command that must fail with exit code 1. It must print nothing but one
// sentence, with all texts of want.
func wantRefusal(t *testing.T, n *node.Node, want []string, args ...string) {
	t.Helper()
	cmd, err := n.ArtifactCommand(args...)
	check(t, err)
	var out, errs strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &errs
	_ = cmd.Run() // the exit code is checked below
	if code := cmd.ProcessState.ExitCode(); code != 1 || out.Len() > 0 {
		t.Errorf("%q: exit code %d, standard output %q; want 1 and nothing", args, code, out.String())
	}
	line := errs.String()
	sentence, rest, ended := strings.Cut(line, "\n")
	unprintable := strings.ContainsFunc(sentence, func(r rune) bool { return !unicode.IsPrint(r) })
	if !ended || rest != "" || unprintable || !strings.HasPrefix(line, "artifact-snapshotter: ") {
		t.Errorf("%q: the error is not one line of text:\n%q", args, line)
	}
	if internal := regexp.MustCompile(`: (invalid argument|failed precondition|unavailable|not found|already exists|unknown)$|rpc error|desc = |dial unix`).FindString(sentence); internal != "" {
		t.Errorf("%q: the error contains %q, which users do not understand:\n%s", args, internal, line)
	}
	for _, w := range want {
		if !strings.Contains(line, w) {
			t.Errorf("%q: the error does not contain %q:\n%s", args, w, line)
		}
	}
}

// state returns everything that a command could change.
func state(t *testing.T, n *node.Node, dir string) string {
	t.Helper()
	var text strings.Builder
	for _, namespace := range []string{"default", "k8s.io"} {
		for _, args := range [][]string{
			{"images", "ls"}, {"content", "ls", "-q"}, {"leases", "ls", "-q"}, {"snapshots", "--snapshotter", "artifact", "ls"},
		} {
			out, err := n.Ctr(append([]string{"--namespace", namespace}, args...)...)
			check(t, err)
			fmt.Fprintln(&text, namespace, args, out)
		}
	}
	mounts, err := node.Mounts(dir)
	check(t, err)
	entries, err := os.ReadDir(dir)
	check(t, err)
	fmt.Fprintln(&text, mounts, entries)
	return text.String()
}

// wantFiles compares the mount at target with the source.
func wantFiles(t *testing.T, target string, want []treelist.Entry) {
	t.Helper()
	got, err := treelist.List(target)
	check(t, err)
	if diff := treelist.Diff(want, got); diff != "" {
		t.Errorf("%s differs from the source:\n%s", target, diff)
	}
}

// toolTarget returns an empty directory for a mount.
func toolTarget(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	t.Cleanup(func() { // in case the test fails
		for unix.Unmount(dir, unix.UMOUNT_NOFOLLOW) == nil {
		}
	})
	return dir
}

// The life of an artifact on a node, with our commands only.
func TestTheToolPullsMountsVerifiesAndPrunes(t *testing.T) {
	t.Parallel()
	n := node.ForTest(t, node.Options{})
	before := daemonUsage(t, n)
	src := writeModel(t)
	for _, form := range []pack.Form{pack.Raw, pack.TarGzip} {
		t.Run(string(form), func(t *testing.T) {
			tag := strings.ReplaceAll(string(form), "+", "-")
			d := pushModel(t, n, src, form, tag)
			ref := n.Registry + "/models/tiny:" + tag
			out, progress, err := n.Artifact("pull", ref, "--output", "json")
			check(t, err)
			pulled := decoded[jsonPulled](t, out)
			if pulled.Reference != ref || pulled.Digest != d || pulled.Manifest != d || pulled.Size == 0 {
				t.Errorf("pulled %+v, want %s with digest %s", pulled, ref, d)
			}
			for _, file := range []string{"model-00001.safetensors: pulled", "src/__init__.py: ", "tokenizer/Wörter 语.txt: "} {
				if strings.Count(progress, file) != 1 {
					t.Errorf("the progress output needs exactly one line for %q:\n%s", file, progress)
				}
			}

			list := toolJSON[[]jsonListed](t, n, "ls")
			if len(list) != 1 {
				t.Fatalf("ls lists %+v, want one artifact", list)
			}
			for _, args := range [][]string{
				{"-n", "k8s.io", "-a", n.Address, "--output", "json", "ls"},
				{"-n", "nowhere", "ls", "-n", "k8s.io", "--output", "json"}, // the last one counts
			} {
				out, _, err := n.Artifact(append(args, "--config", n.ConfigFile())...)
				check(t, err)
				if !reflect.DeepEqual(decoded[[]jsonListed](t, out), list) {
					t.Errorf("%q lists %s", args, out)
				}
			}
			l := list[0]
			mode := map[pack.Form]string{pack.Raw: "overlay", pack.TarGzip: "erofs"}[form]
			if l.Reference != ref || l.Digest != d || l.Size != pulled.Size || l.Layout == nil || l.Layout.Raw+l.Layout.Tar != mode ||
				!slices.Equal(l.Snapshots, []string{pulled.Snapshot}) || len(l.Pods)+len(l.Mounts)+len(l.Conflicts) != 0 {
				t.Errorf("ls lists %+v", l)
			}
			// Decompressed tars are not shared with containerd.
			if want := map[pack.Form]int64{pack.Raw: l.Size}[form]; l.Layout.Shared != want {
				t.Errorf("%d bytes are shared with the content store, want %d", l.Layout.Shared, want)
			}

			// A pod and two mounts have the same content.
			pod, err := n.RunPod(node.PodSpec{Name: "llama", Volumes: []node.Volume{{Image: ref, Path: "/model"}}})
			check(t, err)
			dir := t.TempDir()
			fresh, empty := filepath.Join(dir, "fresh"), toolTarget(t)
			t.Cleanup(func() { _ = unix.Unmount(fresh, unix.UMOUNT_NOFOLLOW) }) // in case the test fails
			check(t, os.Symlink(empty, filepath.Join(dir, "link")))
			want := wantTree(t, src, form)
			tool(t, n, "mount", ref, fresh)
			tool(t, n, "mount", d.Encoded()[:12], filepath.Join(dir, "link"))
			var inodes []uint64
			for _, target := range []string{fresh, empty} {
				wantFiles(t, target, want)
				if err := os.WriteFile(filepath.Join(target, "new"), nil, 0o600); !os.IsExist(err) && !strings.Contains(fmt.Sprint(err), "read-only") {
					t.Errorf("writing to %s: %v, want EROFS", target, err)
				}
				var st unix.Stat_t
				check(t, unix.Stat(filepath.Join(target, "config.json"), &st))
				inodes = append(inodes, st.Ino, st.Dev)
			}
			if inodes[0] != inodes[2] || inodes[1] != inodes[3] {
				t.Errorf("two mounts have different files: %v", inodes)
			}
			l = toolJSON[[]jsonListed](t, n, "ls")[0]
			if len(l.Pods) != 1 || l.Pods[0].Namespace != "default" || l.Pods[0].Name != "llama" || l.Pods[0].Sandbox != pod.ID {
				t.Errorf("the pods are %+v", l.Pods)
			}
			targets := []string{empty, fresh}
			slices.Sort(targets)
			if !slices.Equal(l.Mounts, targets) {
				t.Errorf("the mounts are %q, want %q", l.Mounts, targets)
			}
			mounts := toolJSON[[]jsonMount](t, n, "ls", "--mounts")
			if len(mounts) != 2 || mounts[0].Target != targets[0] || !mounts[0].Mounted || !slices.Equal(mounts[0].References, []string{ref}) || mounts[0].Manifest != d {
				t.Errorf("ls --mounts lists %+v", mounts)
			}
			text := tool(t, n, "ls")
			for _, w := range []string{"REFERENCE", ref, d.Encoded()[:12], mode, "default/llama"} {
				if !strings.Contains(text, w) {
					t.Errorf("the output of ls does not contain %q:\n%s", w, text)
				}
			}

			if text := tool(t, n, "ls", "--wide", "--no-trunc"); !strings.Contains(text, d.String()) || !strings.Contains(text, "own") || !strings.Contains(text, "SHARED") {
				t.Errorf("ls --wide --no-trunc prints\n%s", text)
			}
			inspected := toolJSON[jsonInspected](t, n, "inspect", ref)
			if inspected.Image == nil || inspected.Image.Reference != ref || inspected.Image.Snapshot != pulled.Snapshot || inspected.Manifest != d || len(inspected.Layers) != 8 {
				t.Errorf("inspect prints %+v", inspected)
			}
			for _, l := range inspected.Layers {
				if l.Unlisted != "" || (l.File == nil) != (len(l.Members) > 0) {
					t.Errorf("inspect lists %+v", l)
				}
			}
			verified := toolJSON[jsonVerified](t, n, "verify", d.String()[:19])
			if !verified.OK || len(verified.Blobs) < 8 {
				t.Errorf("verify prints %+v", verified)
			}
			var paths []string
			for _, b := range verified.Blobs {
				paths = append(paths, b.Paths...)
			}
			if len(paths) != len(inspected.Layers) { // two files have the same content
				t.Errorf("verify lists the paths %q", paths)
			}

			// prune deletes nothing that is in use.
			for _, stop := range []func(){
				func() { check(t, pod.Remove()) },
				func() { tool(t, n, "unmount", filepath.Join(dir, "link")) },
				func() { tool(t, n, "unmount", fresh) },
			} {
				if got := toolJSON[jsonPruned](t, n, "prune", "-f"); len(got.Artifacts) != 0 || got.Freed != 0 {
					t.Fatalf("prune deleted an artifact in use: %+v", got)
				}
				stop()
			}
			wantFiles(t, fresh, nil)
			dry := toolJSON[jsonPruned](t, n, "prune", "--dry-run")
			if !dry.DryRun || len(dry.Artifacts) != 1 || dry.Artifacts[0].Manifest != d || !slices.Equal(dry.Artifacts[0].References, []string{ref}) || dry.Size != pulled.Size || dry.Freed != 0 {
				t.Errorf("prune --dry-run prints %+v", dry)
			}
			if len(toolJSON[[]jsonListed](t, n, "ls")) != 1 {
				t.Error("prune --dry-run deleted an artifact")
			}
			pruned := toolJSON[jsonPruned](t, n, "prune", "--force")
			if len(pruned.Artifacts) != 1 || pruned.Freed != pulled.Size {
				t.Errorf("prune prints %+v, want %d bytes freed", pruned, pulled.Size)
			}
			if list := toolJSON[[]jsonListed](t, n, "ls"); len(list) != 0 {
				t.Errorf("after prune, ls lists %+v", list)
			}
			out, err = n.Ctr("snapshots", "--snapshotter", "artifact", "ls")
			check(t, err)
			if strings.Contains(out, pulled.Snapshot) {
				t.Errorf("prune did not delete the snapshot:\n%s", out)
			}
			wantUsage(t, n, before)
		})
	}
}

// After restarts and the deletion of the image, the mount still works. After an unmount it
// can be mounted again, until `unmount`.
func TestAMountSurvivesEverythingExceptAReboot(t *testing.T) {
	n := node.ForTest(t, node.Options{})
	src := writeModel(t)
	want := wantTree(t, src, pack.TarGzip)
	ref := pulled(t, n, src, pack.TarGzip)
	manifest := blobPath(n, manifestOf(t, n, ref))
	target := toolTarget(t)
	tool(t, n, "mount", ref, target)
	check(t, n.StopContainerd())
	check(t, n.KillDaemon())
	wantFiles(t, target, want)
	check(t, n.StartDaemon())
	check(t, n.StartContainerd())
	waitForDaemon(t, n)
	_, err := n.Crictl("rmi", ref)
	check(t, err)
	wantFiles(t, target, want)

	// As after a reboot.
	check(t, unix.Unmount(target, 0))
	mounts := toolJSON[[]jsonMount](t, n, "ls", "--mounts")
	if len(mounts) != 1 || mounts[0].Target != target || mounts[0].Mounted {
		t.Errorf("ls --mounts lists %+v, want %s as not mounted", mounts, target)
	}
	// crictl has deleted all names of the image. The content is retained for this target
	// until `unmount`.
	wantRefusal(t, n, []string{"no image"}, "mount", ref, filepath.Join(t.TempDir(), "new"))
	wantRefusal(t, n, []string{"no image"}, "mount", n.Registry+"/models/another:v1", target)
	for _, name := range []string{ref, "sha256:" + filepath.Base(manifest)} {
		tool(t, n, "mount", name, target)
		wantFiles(t, target, want)
		check(t, unix.Unmount(target, 0))
	}
	_, err = n.Pull(ref)
	check(t, err)
	tool(t, n, "mount", ref, target)
	wantFiles(t, target, want)
	check(t, unix.Unmount(target, 0))
	check(t, os.Remove(target))
	tool(t, n, "unmount", target)
	if mounts := toolJSON[[]jsonMount](t, n, "ls", "--mounts"); len(mounts) != 0 {
		t.Errorf("ls --mounts lists %+v, want nothing", mounts)
	}
	wantRefusal(t, n, []string{"no artifact is mounted at " + target}, "unmount", target)
	tool(t, n, "prune", "--force")
	if _, err := os.Stat(manifest); !os.IsNotExist(err) {
		t.Errorf("the content of an unused artifact was not deleted: %v", err)
	}
}

// The owner of a directory above a target can replace the target by anything.
func TestAReplacedTargetBlocksNothing(t *testing.T) {
	n := node.ForTest(t, node.Options{})
	ref := pulled(t, n, writeModel(t), pack.Raw)
	for name, change := range map[string]func(dir string) error{
		"nothing": os.RemoveAll,
		"a file":  func(dir string) error { return errors.Join(os.RemoveAll(dir), os.WriteFile(dir, nil, 0o600)) },
		"a loop":  func(dir string) error { return errors.Join(os.RemoveAll(dir), os.Symlink(dir, dir)) },
		"another": func(dir string) error { return errors.Join(os.RemoveAll(dir), os.Symlink("/", dir)) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "dir")
			check(t, os.Mkdir(dir, 0o755))
			target, other := filepath.Join(dir, "proc"), toolTarget(t)
			tool(t, n, "mount", ref, target)
			check(t, unix.Unmount(target, 0))
			check(t, change(dir))
			tool(t, n, "pull", ref)
			tool(t, n, "mount", ref, other)
			for _, m := range toolJSON[[]jsonMount](t, n, "ls", "--mounts") {
				if m.Mounted != (m.Target == other) {
					t.Errorf("ls --mounts lists %+v", m)
				}
			}
			tool(t, n, "unmount", other)
			if name == "another" { // the same path now leads elsewhere
				wantRefusal(t, n, []string{"no artifact is mounted at /proc"}, "unmount", target)
				check(t, os.Remove(dir))
			}
			tool(t, n, "unmount", target)
			if mounts := toolJSON[[]jsonMount](t, n, "ls", "--mounts"); len(mounts) != 0 {
				t.Errorf("ls --mounts lists %+v, want nothing", mounts)
			}
		})
	}
}

// Only one of two concurrent mounts at one target succeeds.
func TestATargetIsForOneMount(t *testing.T) {
	n := node.ForTest(t, node.Options{})
	src := writeModel(t)
	refs := []string{pulled(t, n, src, pack.Raw), pulled(t, n, src, pack.Tar)}
	for round := range 5 {
		target := toolTarget(t)
		var commands []*exec.Cmd
		for _, ref := range refs {
			cmd, err := n.ArtifactCommand("mount", ref, target)
			check(t, err)
			check(t, cmd.Start())
			commands = append(commands, cmd)
		}
		succeeded := 0
		for _, cmd := range commands {
			if cmd.Wait() == nil {
				succeeded++
			}
		}
		if mounts := toolJSON[[]jsonMount](t, n, "ls", "--mounts"); succeeded != 1 || len(mounts) != 1 || !mounts[0].Mounted {
			t.Errorf("round %d: %d mounts succeeded, want one; ls --mounts lists %+v", round, succeeded, mounts)
		}
		tool(t, n, "unmount", target)
		wantFiles(t, target, nil)
	}
}

// If no manifest of an index is for this platform and there is only one, that one is used.
func TestTheToolPullsAnIndex(t *testing.T) {
	t.Parallel()
	n := node.ForTest(t, node.Options{})
	here := platforms.DefaultSpec()
	src, little := writeModel(t), writeModel(t, "README.md")
	model, err := pack.Model(src, pack.Options{})
	check(t, err)
	other, err := pack.Model(little, pack.Options{})
	check(t, err)
	alien := &ocispec.Platform{OS: "linux", Architecture: "s390x"}
	for name, c := range map[string]struct {
		entries []pack.IndexEntry
		want    string
	}{
		"both":   {[]pack.IndexEntry{{Artifact: other, Platform: alien}, {Artifact: model, Platform: &here}}, src},
		"nobody": {[]pack.IndexEntry{{Artifact: model}}, src},
		"alien":  {[]pack.IndexEntry{{Artifact: other, Platform: alien}}, little},
	} {
		index := &pack.Index{Manifests: c.entries}
		d, err := index.Push(t.Context(), n.Registry, "models/"+name, "v1")
		check(t, err)
		ref := n.Registry + "/models/" + name + ":v1"
		out, _, err := n.Artifact("pull", ref, "--output", "json")
		check(t, err)
		if pulled := decoded[jsonPulled](t, out); pulled.Digest != d || pulled.Manifest == d {
			t.Errorf("pulled %+v, want the index %s", pulled, d)
		}
		target := toolTarget(t)
		tool(t, n, "mount", ref, target)
		wantFiles(t, target, wantTree(t, c.want, pack.Raw))
		if v := toolJSON[jsonVerified](t, n, "verify", ref); !v.OK || v.Blobs[0].Kind != "index" || v.Blobs[1].Kind != "manifest" {
			t.Errorf("verify prints %+v", v)
		}
		tool(t, n, "unmount", target)
	}
}

// A snapshot by containerd's own unpacker is reported too.
func TestInspectNamesTheSnapshotOfContainerdsUnpacker(t *testing.T) {
	n := nativeNode(t, node.Options{NativeUnpack: true})
	if n == nil {
		return
	}
	got := mustPullNatively(t, n, tarred(t, writeModel(t), ""), "artifact", dockerPlatform, "tar")
	if i := toolJSON[jsonInspected](t, n, "inspect", got.ref); i.Image == nil || i.Image.Snapshot != got.last() {
		t.Errorf("inspect prints %+v, want the snapshot %s", i.Image, got.last())
	}
	if text := tool(t, n, "inspect", got.ref); !strings.Contains(text, "committed snapshot "+got.last()) {
		t.Errorf("inspect prints\n%s", text)
	}
}
