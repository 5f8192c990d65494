// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/client"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
	"github.com/artifact-snapshotter/artifact-snapshotter/snapshot"
)

// Every wrong input gets a one-line error and changes nothing.
func TestTheToolRefusesBadInput(t *testing.T) {
	n := node.ForTest(t, node.Options{})
	src := writeModel(t)
	ref := pulled(t, n, src, pack.TarGzip)
	dir := t.TempDir()
	full, plain, free := filepath.Join(dir, "full"), filepath.Join(dir, "plain"), filepath.Join(dir, "free")
	check(t, os.MkdirAll(filepath.Join(full, "child"), 0o755))
	check(t, os.Mkdir(free, 0o755))
	check(t, os.WriteFile(plain, nil, 0o600))
	other := mounted(t, "tmpfs", "size=1m")
	image, err := pack.Image(ocispec.ImageConfig{}, false, []byte("no tar, but nobody looks"))
	check(t, err)
	_, err = image.Push(t.Context(), n.Registry, "test/other", "latest")
	check(t, err)
	hostile := &pack.Artifact{Layers: []pack.Layer{goodLayer(), {MediaType: "application/vnd.cncf.model.doc.v1.raw", Data: []byte("x"), Annotations: map[string]string{"org.cncf.model.filepath": "../../etc/passwd"}}}}
	_, err = hostile.Push(t.Context(), n.Registry, "test/hostile", "latest")
	check(t, err)

	twice := &pack.Artifact{}
	for _, data := range []string{"x", "y"} {
		twice.Layers = append(twice.Layers, pack.Layer{MediaType: "application/vnd.cncf.model.doc.v1.raw", Data: []byte(data), Annotations: map[string]string{"org.cncf.model.filepath": "README.md"}})
	}
	_, err = twice.Push(t.Context(), n.Registry, "test/twice", "latest")
	check(t, err)

	rude := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusForbidden)
		_, _ = io.WriteString(w, `{"errors":[{"code":"DENIED","message":"\u001b[2J\u009b31mowned"}]}`)
	}))
	defer rude.Close()

	unknown := n.Registry + "/models/nobody:v1"
	digestOfNothing := digest.FromString("nothing").String()
	cases := map[string]struct {
		args []string
		want []string
	}{
		"mount of an unknown reference":   {[]string{"mount", unknown, free}, []string{unknown, "in namespace k8s.io", "pull"}},
		"inspect of an unknown reference": {[]string{"inspect", unknown}, []string{unknown, "in namespace k8s.io"}},
		"verify of an unknown reference":  {[]string{"verify", unknown}, []string{unknown, "in namespace k8s.io"}},
		"verify of an unknown digest":     {[]string{"verify", digestOfNothing}, []string{digestOfNothing}},
		"inspect of an unknown digest":    {[]string{"inspect", digestOfNothing, "--config", n.ConfigFile()}, []string{digestOfNothing}},
		"a digest of no digits":           {[]string{"verify", "sha256:llama"}, []string{"sha256:llama", "0-9 and a-f"}},
		"a reference with a space":        {[]string{"inspect", "a b", "--address", "/none"}, []string{`"a b"`, "neither the name of an image", "it has a space"}},
		"no reference":                    {[]string{"unpack", ""}, []string{"it is empty"}},
		"digits that nothing begins with": {[]string{"mount", "0123456789ab", free}, []string{`no image "0123456789ab"`}},
		"the wrong namespace, by digest":  {[]string{"mount", "-n", "default", "sha256:" + manifestOf(t, n, ref)[:12], free}, []string{"use -n k8s.io"}},
		"a pull into no containerd":       {[]string{"pull", "llama", "--address", "/none"}, []string{"full reference"}},
		"no such directory of hosts":      {[]string{"pull", "--hosts-dir", "/nowhere", ref, "--address", "/none"}, []string{"--hosts-dir /nowhere is not a directory"}},
		"the wrong namespace":             {[]string{"mount", "-n", "default", ref, free}, []string{ref, "use -n k8s.io"}},
		"no such namespace":               {[]string{"ls", "-n", "nowhere"}, []string{"nowhere", "k8s.io"}},
		"no such namespace, mount":        {[]string{"mount", "-n", "nowhere", ref, free}, []string{ref, "use -n k8s.io"}},
		"no containerd":                   {[]string{"ls", "--address", filepath.Join(dir, "none.sock")}, []string{"containerd does not answer on " + filepath.Join(dir, "none.sock")}},
		"no containerd, pull":             {[]string{"pull", "--address", filepath.Join(dir, "none.sock"), ref}, []string{"containerd does not answer"}},
		"no such snapshotter":             {[]string{"mount", "--snapshotter", "nothing", ref, free}, []string{`no snapshotter "nothing"`, "artifact-snapshotter config containerd"}},
		"no such snapshotter, pull":       {[]string{"pull", "--snapshotter", "nothing", n.Registry + "/models/tiny:tar-gzip"}, []string{`no snapshotter "nothing"`}},
		"another snapshotter":             {[]string{"mount", "--snapshotter", "overlayfs", ref, free}, []string{"overlayfs", "not artifact-snapshotter"}},
		"a target that is not empty":      {[]string{"mount", ref, full}, []string{full, "not empty"}},
		"a target that is a file":         {[]string{"mount", ref, plain}, []string{plain, "not a directory"}},
		"a target that is a mount point":  {[]string{"mount", ref, other}, []string{other, "mount point"}},
		"a target in no directory":        {[]string{"mount", ref, filepath.Join(dir, "a", "b")}, []string{"the directory " + filepath.Join(dir, "a") + " above the target does not exist"}},
		"an empty target":                 {[]string{"mount", ref, ""}, []string{"empty"}},
		"mount of a container image":      {[]string{"mount", n.GuestImage, free}, []string{n.GuestImage, "container image"}},
		"inspect of a container image":    {[]string{"inspect", n.GuestImage}, []string{n.GuestImage, "container image"}},
		"verify of a container image":     {[]string{"verify", n.GuestImage}, []string{n.GuestImage, "container image"}},
		"pull of a container image":       {[]string{"pull", n.Registry + "/test/other:latest"}, []string{"/test/other:latest", "container image"}},
		"pull of a hostile artifact":      {[]string{"pull", n.Registry + "/test/hostile:latest"}, []string{"layer 1", "../../etc/passwd"}},
		"pull of a path twice":            {[]string{"pull", n.Registry + "/test/twice:latest"}, []string{"layer 1", "README.md", "has the same path and other bytes"}},
		"pull of a missing artifact":      {[]string{"pull", unknown}, []string{unknown, "the registry does not have it"}},
		"pull from nowhere":               {[]string{"pull", "127.0.0.1:1/models/tiny:v1"}, []string{"127.0.0.1:1", "connection refused"}},
		"pull from no host":               {[]string{"pull", "nowhere.invalid/models/tiny:v1"}, []string{"there is no host nowhere.invalid: "}},
		"pull from a rude registry":       {[]string{"pull", strings.TrimPrefix(rude.URL, "http://") + "/models/tiny:v1"}, []string{`\x1b[2J\u009b31mowned`}},
		"pull without a tag":              {[]string{"pull", n.Registry + "/models/tiny"}, []string{"neither a tag nor a digest"}},
		"pull a digest alone":             {[]string{"pull", digest.FromString("").String()}, []string{"a digest does not say which registry has it"}},
		"pull of no reference":            {[]string{"pull", "llama"}, []string{"llama", "full reference"}},
		"pull without a password":         {[]string{"pull", "-u", "reader", unknown}, []string{"password"}},
		"unmount of a directory":          {[]string{"unmount", free}, []string{"no artifact is mounted at " + free}},
		"no namespace":                    {[]string{"mount", "-n", "", ref, free}, []string{"the namespace is empty", "-n"}},
		"unmount of another mount":        {[]string{"unmount", other}, []string{"no artifact is mounted at " + other}},
		"an unknown form of output":       {[]string{"ls", "--output", "xml"}, []string{"xml", "json"}},
		"an argument too few":             {[]string{"mount", ref}, []string{"mount requires exactly 2 arguments (REF TARGET), got 1"}},
		"prune without a terminal":        {[]string{"prune"}, []string{"prune would delete 1 artifact (3.0 MiB): use --force, or --dry-run"}},
		"prune by no such filter":         {[]string{"prune", "-f", "--filter", "before=1h"}, []string{`"before=1h"`, "until, label and reference"}},
		"rm of a container image":         {[]string{"rm", n.GuestImage}, []string{n.GuestImage, "is a container image, not an artifact; `ctr -n k8s.io images rm` removes it"}},
		"rm of nothing":                   {[]string{"rm"}, []string{"rm requires at least 1 argument (REF), got 0"}},
		"rm of a missing artifact":        {[]string{"rm", ref, unknown}, []string{unknown, "in namespace k8s.io"}},
		"an argument too many":            {[]string{"prune", ref}, []string{"prune accepts no arguments"}},
	}
	before := state(t, n, dir)
	for name, c := range cases {
		t.Run(name, func(t *testing.T) { wantRefusal(t, n, c.want, c.args...) })
	}
	if after := state(t, n, dir); after != before {
		t.Errorf("the state changed from\n%s\nto\n%s", before, after)
	}
}

// On this node containerd does not know the snapshotter.
func TestTheToolNeedsTheProxyPlugin(t *testing.T) {
	n := node.ForTest(t, node.Options{Stock: true})
	pushModel(t, n, writeModel(t, "src/__init__.py"), pack.Raw, "raw")
	ref := n.Registry + "/models/tiny:raw"
	_, err := n.Pull(ref)
	check(t, err)
	want := []string{`no snapshotter "artifact"`, "artifact-snapshotter config containerd"}
	target := filepath.Join(t.TempDir(), "target")
	for _, args := range [][]string{{"pull", ref}, {"mount", ref, target}, {"unmount", target}, {"ls"}, {"ls", "--mounts"}, {"prune"}} {
		wantRefusal(t, n, want, args...)
	}
	if _, err := os.Stat(target); !os.IsNotExist(err) {
		t.Errorf("%s exists: %v", target, err)
	}
	if v := decodedTool[jsonVerified](t, n, "verify", ref); !v.OK { // verify does not need the snapshotter
		t.Errorf("verify prints %+v", v)
	}
}

// decodedTool is toolJSON on a node without a daemon.
func decodedTool[T any](t *testing.T, n *node.Node, args ...string) T {
	t.Helper()
	out, _, err := n.Artifact(append(args, "--output", "json")...)
	check(t, err)
	return decoded[T](t, out)
}

// A kill between the two steps of a mount leaves a view without a mount.
func TestAMountThatWasCutOffIsRepaired(t *testing.T) {
	n := node.ForTest(t, node.Options{})
	src := writeModel(t)
	ref := pulled(t, n, src, pack.Raw)
	want := wantTree(t, src, pack.Raw)
	c, err := client.Connect(t.Context(), n.Address, "k8s.io", "artifact")
	check(t, err)
	defer c.Close()
	image, err := c.Image(t.Context(), ref)
	check(t, err)
	cutOff := func(target string) {
		_, err := c.SnapshotService("artifact").View(c.Context(t.Context()), snapshot.MountKey(target), "", snapshots.WithLabels(map[string]string{
			"containerd.io/gc.root": "now", snapshot.LabelTarget: image.Target.Digest.String(),
		}))
		check(t, err)
		mounts := toolJSON[[]jsonMount](t, n, "ls", "--mounts")
		if len(mounts) != 1 || mounts[0].Target != target || mounts[0].Mounted {
			t.Errorf("ls --mounts lists %+v, want %s as not mounted", mounts, target)
		}
	}
	target := toolTarget(t)
	cutOff(target)
	if got := toolJSON[jsonPruned](t, n, "prune", "--dry-run"); len(got.Artifacts) != 0 {
		t.Errorf("prune would delete an artifact that is to be mounted: %+v", got)
	}
	another := &pack.Artifact{Layers: []pack.Layer{goodLayer()}}
	_, err = another.Push(t.Context(), n.Registry, "models/another", "v1")
	check(t, err)
	tool(t, n, "pull", n.Registry+"/models/another:v1")
	wantRefusal(t, n, []string{target, "unmount it first"}, "mount", n.Registry+"/models/another:v1", target)
	tool(t, n, "mount", ref, target)
	wantFiles(t, target, want)
	wantRefusal(t, n, []string{target, "in namespace default", "use -n k8s.io"}, "unmount", "-n", "default", target)
	// unmount does not remove another mount on top.
	check(t, unix.Mount("tmpfs", target, "tmpfs", 0, "size=1m"))
	wantRefusal(t, n, []string{target, "is not the artifact"}, "unmount", target)
	check(t, unix.Unmount(target, 0))
	tool(t, n, "unmount", target)
	cutOff(target)
	// A mount that has created its view and not mounted yet locks the directory.
	busy, err := os.Open(target)
	check(t, err)
	check(t, unix.Flock(int(busy.Fd()), unix.LOCK_EX))
	wantRefusal(t, n, []string{"another process is about to mount at " + target, "try again"}, "unmount", target)
	check(t, busy.Close())
	tool(t, n, "unmount", target)
	wantNone := func() {
		t.Helper()
		if mounts := toolJSON[[]jsonMount](t, n, "ls", "--mounts"); len(mounts) != 0 {
			t.Errorf("ls --mounts lists %+v, want nothing", mounts)
		}
	}
	wantNone()
	// After a kill before the end of the first step, the view is not retained and does not
	// block other commands.
	for _, command := range []string{"mount", "unmount"} {
		ctx, done, err := c.WithLease(c.Context(t.Context()))
		check(t, err)
		_, err = c.SnapshotService("artifact").View(ctx, snapshot.MountKey(target), "", snapshots.WithLabels(map[string]string{
			snapshot.LabelTarget: image.Target.Digest.String(),
		}))
		check(t, err)
		wantNone()
		if command == "mount" {
			tool(t, n, "mount", n.Registry+"/models/another:v1", target)
		}
		tool(t, n, "unmount", target)
		check(t, done(ctx))
	}
	wantRefusal(t, n, []string{"no artifact is mounted at " + target}, "unmount", target)
}

// A mount without the permission to mount leaves neither a view nor a directory.
func TestAMountThatFailsLeavesNothing(t *testing.T) {
	n := node.ForTest(t, node.Options{})
	ref := pulled(t, n, writeModel(t), pack.Raw)
	tool(t, n, "unpack", ref) // so that its snapshot exists before
	dir := t.TempDir()
	before := state(t, n, dir)
	cmd, err := n.ArtifactCommand("mount", ref, filepath.Join(dir, "new"))
	check(t, err)
	weak := exec.Command("setpriv", append([]string{"--bounding-set=-sys_admin", "--"}, cmd.Args...)...)
	weak.Env = cmd.Env
	out, err := weak.CombinedOutput()
	if weak.ProcessState.ExitCode() != 1 || !strings.Contains(string(out), "operation not permitted") || strings.Count(string(out), "\n") != 1 {
		t.Errorf("mount without the right to mount: %v, with\n%s", err, out)
	}
	if after := state(t, n, dir); after != before {
		t.Errorf("the state changed from\n%s\nto\n%s", before, after)
	}
}

// A client that disconnects at any time during a mount leaves nothing: containerd and the
// daemon may still create a view for it, but nothing retains it, and garbage collection
// deletes it.
func TestACancelledMountLeavesNothing(t *testing.T) {
	t.Parallel()
	n := node.ForTest(t, node.Options{})
	ref := pulled(t, n, writeModel(t), pack.Raw)
	c := connect(t, n)
	image, err := c.Image(t.Context(), ref)
	check(t, err)
	// Writers of containerd's database wait for each other and readers do not. So a view
	// may be recorded long after its client has disconnected and unmounted.
	collecting, stop := context.WithCancel(t.Context())
	var collectors errgroup.Group
	for range 16 {
		collectors.Go(func() error {
			for collecting.Err() == nil {
				if err := collectGarbage(t.Context(), c); err != nil {
					return err
				}
			}
			return nil
		})
	}
	defer func() { stop(); check(t, collectors.Wait()) }()
	wantNoViews := func(t *testing.T) {
		t.Helper()
		eventually(t, func() string {
			check(t, collectGarbage(t.Context(), c))
			var known []string
			check(t, c.SnapshotService("artifact").Walk(c.Context(t.Context()), func(_ context.Context, i snapshots.Info) error {
				known = append(known, i.Name)
				return nil
			}))
			keys := daemonKeys(t, n)
			if !slices.ContainsFunc(slices.Concat(known, keys), func(key string) bool { return strings.Contains(key, "artifact-mount/") }) {
				return ""
			}
			return fmt.Sprintf("remaining views: containerd has %q, the daemon %q", known, keys)
		})
		if t.Failed() {
			t.FailNow()
		}
	}
	// giveUp cancels the mount after longer and longer times, and unmounts. Each target is
	// used only once, because another mount at it would take over the view.
	giveUp := func(t *testing.T, times int, mount func(ctx context.Context, target string) error, then func()) {
		t.Helper()
		dir := t.TempDir()
		took, made := time.Duration(0), 0
		for i := -1; i < times; i++ {
			target := filepath.Join(dir, strconv.Itoa(i))
			t.Cleanup(func() { _ = unix.Unmount(target, unix.UMOUNT_NOFOLLOW) }) // in case the test fails
			ctx, cancel := context.WithCancel(t.Context())
			if i >= 0 {
				ctx, cancel = context.WithTimeout(t.Context(), took*time.Duration(2*i)/time.Duration(times))
			}
			began := time.Now()
			err := mount(ctx, target)
			if i < 0 {
				check(t, err)
				took = time.Since(began)
			} else if err == nil {
				made++
			}
			cancel()
			if _, err := c.Unmount(t.Context(), target); err != nil && !errdefs.IsNotFound(err) {
				t.Fatal(err)
			}
			then()
		}
		t.Logf("%d mounts, cancelled after up to %v: %d completed", times, 2*took, made)
		if made == times {
			t.Error("no mount was cancelled before its end")
		}
	}
	t.Run("cancelled", func(t *testing.T) {
		giveUp(t, 60, func(ctx context.Context, target string) error {
			_, err := c.Mount(ctx, image, target)
			return err
		}, func() { wantNoViews(t) })
	})
	t.Run("killed", func(t *testing.T) {
		mount := func(ctx context.Context, target string) error {
			cmd, err := n.ArtifactCommand("mount", ref, target)
			if err != nil {
				return err
			}
			if err := cmd.Start(); err != nil {
				return err
			}
			defer context.AfterFunc(ctx, func() { _ = cmd.Process.Kill() })()
			return cmd.Wait()
		}
		giveUp(t, 60, mount, func() {})
		// The lease of a killed command expires. containerd makes the daemon delete its
		// leftover snapshots when it next removes a snapshot (core/metadata/db.go,
		// dirtySS).
		(&soak{n: n, c: c}).giveUpLeases(t)
		target := toolTarget(t)
		check(t, mount(t.Context(), target))
		_, err := c.Unmount(t.Context(), target)
		check(t, err)
		wantNoViews(t)
	})
}

func TestVerifyFindsEachProblem(t *testing.T) {
	n := node.ForTest(t, node.Options{})
	src := writeModel(t)
	model, err := pack.Model(src, pack.Options{Form: pack.TarZstd, Scratch: t.TempDir()})
	check(t, err)
	model.Layers[1].DiffID = digest.FromString("another content")
	raw, err := pack.Model(src, pack.Options{})
	check(t, err)
	model.Layers = append(model.Layers, raw.Layers...)
	_, err = model.Push(t.Context(), n.Registry, "models/wrong", "v1")
	check(t, err)
	ref := n.Registry + "/models/wrong:v1"
	_, err = n.Pull(ref)
	check(t, err)
	manifest, top := pulledManifest(t, n, ref)
	// The runtime's files change on disk, as with a failing disk.
	spoil := func(hex string, change func([]byte) []byte) {
		path := blobPath(n, hex)
		text, err := os.ReadFile(path)
		check(t, err)
		check(t, os.WriteFile(path, change(slices.Clone(text)), 0o444))
	}
	flip := func(b []byte) []byte { b[len(b)/2] ^= 1; return b }
	spoil(manifest.Layers[0].Digest.Encoded(), flip)
	spoil(manifest.Layers[8].Digest.Encoded(), func(b []byte) []byte { return b[:len(b)-1] })
	spoil(manifest.Layers[10].Digest.Encoded(), flip)
	check(t, os.Remove(blobPath(n, manifest.Layers[9].Digest.Encoded())))

	want := map[digest.Digest]string{
		manifest.Layers[0].Digest:  "it has the digest",
		manifest.Layers[1].Digest:  "the config lists the DiffID " + model.Layers[1].DiffID.String(),
		manifest.Layers[8].Digest:  "its descriptor says",
		manifest.Layers[9].Digest:  "not found",
		manifest.Layers[10].Digest: "it has the digest",
	}
	verify := func() jsonVerified {
		out, _, err := n.Artifact("verify", ref, "--output", "json")
		if exit, ok := errors.AsType[*exec.ExitError](err); !ok || exit.ExitCode() != 1 {
			t.Errorf("verify ends with %v, want exit code 1", err)
		}
		return decoded[jsonVerified](t, out)
	}
	wantProblems := func(v jsonVerified) {
		t.Helper()
		for _, b := range v.Blobs {
			if problem := want[b.Digest]; problem == "" && b.Problem != "" || !strings.Contains(b.Problem, problem) {
				t.Errorf("the problem of blob %s is %q, want %q", b.Digest, b.Problem, problem)
			}
		}
	}
	v := verify()
	if v.OK || len(v.Blobs) < 16 || v.Blobs[0].Kind != "manifest" || v.Blobs[1].Kind != "config" {
		t.Errorf("verify prints %+v", v)
	}
	wantProblems(v)
	out, _, err := n.Artifact("verify", ref)
	if err == nil || strings.Count(out, "BAD") != len(want) || !strings.Contains(out, "  ok  ") {
		t.Errorf("verify: %v, with\n%s", err, out)
	}

	// With a corrupt config the layers can still be checked; with a corrupt manifest they
	// cannot.
	spoil(manifest.Config.Digest.Encoded(), flip)
	want[manifest.Config.Digest] = "it has the digest"
	delete(want, manifest.Layers[1].Digest) // its DiffID is unknown now
	v = verify()
	wantProblems(v)
	if len(v.Blobs) < 16 {
		t.Errorf("verify lists %d blobs without a config", len(v.Blobs))
	}
	spoil(top.Encoded(), func(b []byte) []byte { return bytes.Replace(b, []byte("{"), []byte(" "), 1) })
	want[top] = "it has the digest"
	v = verify()
	wantProblems(v)
	if len(v.Blobs) != 1 {
		t.Errorf("verify of an artifact with a corrupt manifest prints %+v", v)
	}
}

// The daemon does not pre-create the empty blob in the namespace "default". ls marks
// artifacts that share a config, because CRI would confuse them.
func TestLsMarksArtifactsThatShareAConfig(t *testing.T) {
	n := node.ForTest(t, node.Options{})
	var refs []string
	for i, src := range []string{writeModel(t), writeModel(t, "README.md")} {
		model, err := pack.Model(src, pack.Options{Form: pack.Generic})
		check(t, err)
		name := []string{"models/one", "models/two"}[i]
		_, err = model.Push(t.Context(), n.Registry, name, "v1")
		check(t, err)
		refs = append(refs, n.Registry+"/"+name+":v1")
		_, said, err := n.Artifact("pull", "-n", "default", refs[i])
		check(t, err)
		if warned := strings.Contains(said, "warning: "+refs[i]+" has the same config as "+refs[0]); warned != (i == 1) {
			t.Errorf("pull %s says\n%s", refs[i], said)
		}
		if l := toolJSON[[]jsonListed](t, n, "ls", "-n", "default")[0]; i == 0 && len(l.Conflicts) != 0 {
			t.Errorf("ls reports a conflict of %+v", l)
		}
	}
	// And what no image volume can show, as `oras push REF FILE` makes it.
	plain := &pack.Artifact{ConfigType: ocispec.MediaTypeEmptyJSON, Layers: []pack.Layer{{
		MediaType: ocispec.MediaTypeImageLayer, Data: []byte("hello"),
		Annotations: map[string]string{ocispec.AnnotationTitle: "hello.txt"},
	}}}
	_, err := plain.Push(t.Context(), n.Registry, "models/plain", "v1")
	check(t, err)
	_, said, err := n.Artifact("pull", "-n", "k8s.io", n.Registry+"/models/plain:v1")
	check(t, err)
	if want := "warning: containerd refuses " + n.Registry + "/models/plain:v1 as an image volume"; !strings.Contains(said, want) {
		t.Errorf("pull of a file with the type of an image's layer says\n%s", said)
	}
	for i, l := range toolJSON[[]jsonListed](t, n, "ls", "-n", "default") {
		other := refs[1-i]
		if l.Reference != refs[i] || !slices.Equal(l.Conflicts, []string{other}) {
			t.Errorf("ls lists %+v, want a conflict with %s", l, other)
		}
		inspected := toolJSON[jsonInspected](t, n, "inspect", "-n", "default", l.Reference)
		if inspected.Image == nil || !slices.Equal(inspected.Image.Conflicts, []string{other}) {
			t.Errorf("inspect prints %+v, want a conflict with %s", inspected, other)
		}
	}
	for _, text := range []string{tool(t, n, "ls", "-n", "default"), tool(t, n, "inspect", "-n", "default", refs[1])} {
		if !strings.Contains(text, refs[0]) {
			t.Errorf("the text does not contain %s:\n%s", refs[0], text)
		}
	}
	if pruned := toolJSON[jsonPruned](t, n, "prune", "-f", "-n", "default"); len(pruned.Artifacts) != 2 {
		t.Errorf("prune prints %+v", pruned)
	}
}

// CRI gives an image three names. prune ignores container images.
func TestPruneDeletesAllNamesButNothingPinnedOrRunning(t *testing.T) {
	n := node.ForTest(t, node.Options{})
	src := writeModel(t)
	gone, pinned := pulled(t, n, src, pack.Raw), pulled(t, n, src, pack.TarGzip)
	_, err := n.Ctr("images", "label", pinned, "io.cri-containerd.pinned=pinned")
	check(t, err)
	hex := manifestOf(t, n, gone)
	// A container that references the image although its root is another one.
	c := connect(t, n)
	ctx := c.Context(t.Context())
	running := containers.Container{ID: "odd", Image: gone, Runtime: containers.RuntimeInfo{Name: "io.containerd.runc.v2"}}
	_, err = c.ContainerService().Create(ctx, running)
	check(t, err)
	if got := toolJSON[jsonPruned](t, n, "prune", "--dry-run"); len(got.Artifacts) != 0 {
		t.Errorf("prune would delete the image of a container: %+v", got)
	}
	if l := toolJSON[[]jsonListed](t, n, "ls"); len(l) != 2 || !slices.Equal(slices.Concat(l[0].Containers, l[1].Containers), []string{"odd"}) {
		t.Errorf("ls lists %+v", l)
	}
	check(t, c.ContainerService().Delete(ctx, "odd"))
	got := toolJSON[jsonPruned](t, n, "prune", "-f")
	if len(got.Artifacts) != 1 || !slices.Equal(got.Artifacts[0].References, []string{gone}) || got.Freed == 0 {
		t.Errorf("prune prints %+v", got)
	}
	left, err := n.Ctr("images", "ls")
	check(t, err)
	if strings.Contains(left, hex) || !strings.Contains(left, pinned) || !strings.Contains(left, n.GuestImage) {
		t.Errorf("the remaining images are\n%s", left)
	}
	waitFor(t, "CRI to forget the image", func() bool {
		out, err := n.Crictl("images", "--no-trunc", "-o", "json")
		return err == nil && !strings.Contains(out, gone) && strings.Contains(out, pinned)
	})
	if v := toolJSON[jsonVerified](t, n, "verify", pinned); !v.OK {
		t.Errorf("verify of the remaining artifact prints %+v", v)
	}
	// As after a pull that was killed.
	lease, err := c.LeasesService().Create(ctx, leases.WithRandomID())
	check(t, err)
	check(t, c.LeasesService().AddResource(ctx, lease, leases.Resource{ID: "sha256:" + manifestOf(t, n, pinned), Type: "content"}))
	_, err = n.Ctr("images", "label", pinned, "io.cri-containerd.pinned=")
	check(t, err)
	_, progress, err := n.Artifact("prune", "-f")
	check(t, err)
	if !strings.HasPrefix(progress, "total: 1 artifact (3.0 MiB), 0 B freed; ") || !strings.Contains(progress, "a lease needs it") {
		t.Errorf("prune prints %q", progress)
	}
}

// Either the daemon or containerd is down.
func TestTheToolReportsWhatIsNotRunning(t *testing.T) {
	t.Parallel()
	n := node.ForTest(t, node.Options{})
	ref := pulled(t, n, writeModel(t), pack.Raw)
	target := filepath.Join(t.TempDir(), "target")
	snapshot := strings.TrimSpace(tool(t, n, "unpack", ref))
	mounted := toolTarget(t)
	tool(t, n, "mount", ref, mounted)
	check(t, n.StopDaemon())
	// inspect prints what it knows without the daemon.
	if i := toolJSON[jsonInspected](t, n, "inspect", ref); i.Image == nil || i.Image.Reference != ref || i.Image.Snapshot != "" || len(i.Layers) != 8 {
		t.Errorf("inspect prints %+v", i)
	}
	if text := tool(t, n, "inspect", ref); !strings.Contains(text, "unknown whether it has a committed snapshot: containerd cannot reach the daemon") || !strings.Contains(text, "model-00001.safetensors") {
		t.Errorf("inspect prints\n%s", text)
	}
	for _, args := range [][]string{{"ls"}, {"mount", ref, target}, {"unmount", mounted}, {"prune"}, {"pull", ref}} {
		wantRefusal(t, n, []string{"containerd cannot reach the daemon", "artifact-snapshotter serve"}, args...)
	}
	wantRefusal(t, n, []string{"no artifact is mounted at " + target}, "unmount", target) // containerd knows it without the daemon
	check(t, n.StartDaemon())
	waitForDaemon(t, n)
	tool(t, n, "unmount", mounted)
	check(t, n.StopContainerd())
	for _, args := range [][]string{{"ls"}, {"mount", ref, target}, {"unmount", target}, {"prune"}, {"pull", ref}, {"verify", ref}, {"inspect", ref}} {
		wantRefusal(t, n, []string{"containerd does not answer on " + n.Address}, args...)
	}
	check(t, n.StartContainerd())
	waitForDaemon(t, n)
	tool(t, n, "mount", ref, target)
	tool(t, n, "unmount", target)
	if i := toolJSON[jsonInspected](t, n, "inspect", ref); i.Image == nil || i.Image.Snapshot != snapshot {
		t.Errorf("inspect prints %+v, want the snapshot %s", i, snapshot)
	}
}
