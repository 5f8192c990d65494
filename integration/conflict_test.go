// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"syscall"
	"testing"

	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/treelist"
)

// CRI identifies an image by its config, so it treats artifacts with one config as one
// image. Most tools give all artifacts the same empty config.

// plain returns an artifact with the empty config and one file, whose content is its name.
func plain(name string) *pack.Artifact {
	return &pack.Artifact{
		ArtifactType: pack.GenericType,
		ConfigType:   ocispec.MediaTypeEmptyJSON,
		Layers: []pack.Layer{{
			MediaType:   "application/octet-stream",
			Data:        []byte(name),
			Annotations: map[string]string{ocispec.AnnotationTitle: name},
		}},
	}
}

// plainVolume returns its expected volume.
func plainVolume(name string) []treelist.Entry {
	entry := fileEntry(name, []byte(name))
	entry.ModTime = 0 // the empty config has no time
	return []treelist.Entry{entry}
}

// pulledPlain pushes it to files/<repository>:v1 and pulls it.
func pulledPlain(t *testing.T, n *node.Node, repository, name string) (ref string, manifest digest.Digest) {
	t.Helper()
	manifest, err := plain(name).Push(t.Context(), n.Registry, "files/"+repository, "v1")
	check(t, err)
	ref = n.Registry + "/files/" + repository + ":v1"
	_, err = n.Pull(ref)
	check(t, err)
	return ref, manifest
}

// wantServed runs a pod with the volume ref and checks the volume.
func wantServed(t *testing.T, n *node.Node, ref string, want []treelist.Entry) {
	t.Helper()
	pod, err := n.RunPod(node.PodSpec{Volumes: []node.Volume{{Image: ref, Path: "/model"}}})
	check(t, err)
	wantVolume(t, pod, "main", "/model", want)
	check(t, pod.Remove())
}

// wantEventuallyServed retries until containerd's CRI plugin has processed a deletion.
func wantEventuallyServed(t *testing.T, n *node.Node, ref string, want []treelist.Entry) {
	t.Helper()
	waitFor(t, ref+" to be served", func() bool {
		pod, err := n.RunPod(node.PodSpec{Volumes: []node.Volume{{Image: ref, Path: "/model"}}})
		if err != nil {
			return false
		}
		wantVolume(t, pod, "main", "/model", want)
		check(t, pod.Remove())
		return true
	})
}

func TestArtifactsWithOneConfigAreNotMixedUp(t *testing.T) {
	t.Parallel()
	n := node.ForTest(t, node.Options{})
	rmi := func(ref string) {
		t.Helper()
		_, err := n.Crictl("rmi", ref)
		check(t, err)
	}
	// Alone, each of them is mounted.
	one, _ := pulledPlain(t, n, "one", "one")
	wantServed(t, n, one, plainVolume("one"))
	rmi(one)
	two, second := pulledPlain(t, n, "two", "two")
	wantServed(t, n, two, plainVolume("two"))

	_, first := pulledPlain(t, n, "one", "one")
	names := []string{
		`"` + one + `" (` + first.String()[:len("sha256:")+12] + `)`,
		`"` + two + `" (` + second.String()[:len("sha256:")+12] + `)`,
		"sha256:44136fa355b3", // the config
		"give each a config of its own",
	}
	pod, err := n.RunSandbox(node.PodSpec{})
	check(t, err)
	both := func(t *testing.T) {
		t.Helper()
		wantRefused(t, pod, one, names...)
		wantRefused(t, pod, two, names...)
		wantRefused(t, pod, n.Registry+"/files/two@"+second.String(), names...)
	}
	t.Run("together", both)
	for _, c := range []struct {
		name       string
		end, start func() error
	}{
		{"the daemon is restarted", n.StopDaemon, n.StartDaemon},
		{"the daemon is killed", n.KillDaemon, n.StartDaemon},
		{"containerd is restarted", n.StopContainerd, n.StartContainerd},
		{"containerd is killed", n.KillContainerd, n.StartContainerd},
	} {
		t.Run(c.name, func(t *testing.T) {
			check(t, c.end())
			check(t, c.start())
			waitForDaemon(t, n)
			both(t)
		})
	}
	t.Run("artifacts with other configs are not affected", func(t *testing.T) {
		src := writeModel(t)
		wantServed(t, n, pulled(t, n, src, pack.Raw), wantTree(t, src, pack.Raw))
	})
	t.Run("the client lists the conflict", func(t *testing.T) {
		conflicts, err := connect(t, n).Conflicts(t.Context())
		check(t, err)
		for config, sharing := range conflicts {
			for _, i := range sharing.Images {
				others, more := sharing.With(*i, 1)
				if config != i.Config || i.IsID() || more > 0 || len(others) != 1 || others[0].Manifest == i.Manifest {
					t.Errorf("%q conflicts with %v and %d more", i.Name, others, more)
				}
			}
		}
		if sharing := conflicts[ocispec.DescriptorEmptyJSON.Digest]; len(conflicts) != 1 || sharing == nil || len(sharing.Images) != 2 {
			t.Errorf("the conflicts are %v, want one of two images", conflicts)
		}
	})
	t.Run("the other's names are removed", func(t *testing.T) {
		_, err := n.Ctr("images", "rm", "--sync", two, n.Registry+"/files/two@"+second.String())
		check(t, err)
		wantEventuallyServed(t, n, one, plainVolume("one"))
	})
	t.Run("a second name of one artifact", func(t *testing.T) {
		again, _ := pulledPlain(t, n, "one-again", "one")
		wantServed(t, n, one, plainVolume("one"))
		wantServed(t, n, again, plainVolume("one"))
	})
	t.Run("an index", func(t *testing.T) {
		here := platforms.DefaultSpec()
		index := pack.Index{Manifests: []pack.IndexEntry{
			{Artifact: plain("elsewhere"), Platform: &ocispec.Platform{OS: "linux", Architecture: "s390x"}},
			{Artifact: plain("indexed"), Platform: &here},
		}}
		_, err := index.Push(t.Context(), n.Registry, "files/index", "v1")
		check(t, err)
		ref := n.Registry + "/files/index:v1"
		_, err = n.Pull(ref)
		check(t, err)
		again := n.Registry + "/files/one-again:v1" // CRI names the image by its first reference
		wantRefused(t, pod, ref, again, ref)
		wantRefused(t, pod, one, again, ref)

		// Run the command that the error recommends.
		err = pod.Start(node.Container{Name: "refused", Volumes: []node.Volume{{Image: ref, Path: "/model"}}})
		if err == nil {
			t.Fatal("a container started")
		}
		command := regexp.MustCompile("`crictl rmi ([0-9a-f]+)`").FindStringSubmatch(answer(t, err))
		if command == nil {
			t.Fatalf("the error recommends no command: %v", err)
		}
		rmi(command[1])
		_, err = n.Pull(ref)
		check(t, err)
		wantServed(t, n, ref, plainVolume("indexed"))
		rmi(ref)
	})
	t.Run("an image", func(t *testing.T) {
		ref, _ := pulledPlain(t, n, "one", "one")
		image := plain("an image")
		image.ConfigType, image.Config = ocispec.MediaTypeImageConfig, []byte("{}")
		_, err := image.Push(t.Context(), n.Registry, "files/an-image", "v1")
		check(t, err)
		other := n.Registry + "/files/an-image:v1"
		_, err = n.Pull(other)
		check(t, err)
		wantRefused(t, pod, ref, ref, other)
		wantRefused(t, pod, other, ref, other)
		rmi(ref)
	})
	t.Run("a tag that has moved", func(t *testing.T) {
		// The image with the old digest remains in containerd.
		ref, old := pulledPlain(t, n, "moving", "before")
		pulledPlain(t, n, "moving", "after")
		wantRefused(t, pod, ref, ref, n.Registry+"/files/moving@"+old.String())
		rmi(ref)
		pulledPlain(t, n, "moving", "after")
		wantServed(t, n, ref, plainVolume("after"))
	})
	check(t, pod.Remove())
}

// CRI also confuses an artifact that the daemon refuses with another one that has its
// config.
func TestARefusedArtifactIsInConflictToo(t *testing.T) {
	n := node.ForTest(t, node.Options{})
	pod, err := n.RunSandbox(node.PodSpec{})
	check(t, err)
	// CRI mounts the first of the two names.
	for _, names := range []struct{ good, bad string }{{"aaa", "zzz"}, {"zzz", "aaa"}} {
		t.Run(names.bad+" is refused", func(t *testing.T) {
			bad := plain("bad")
			bad.Layers[0].Annotations[ocispec.AnnotationTitle] = "/etc/passwd"
			manifest, err := bad.Push(t.Context(), n.Registry, "files/"+names.bad, "v1")
			check(t, err)
			refused := n.Registry + "/files/" + names.bad + ":v1"
			_, err = n.Pull(refused)
			check(t, err)
			wantRefused(t, pod, refused, "/etc/passwd")

			ref, _ := pulledPlain(t, n, names.good, "good")
			both := func() {
				t.Helper()
				for _, i := range []string{ref, refused} {
					wantRefused(t, pod, i, `"`+ref+`"`, `"`+refused+`"`, "has the same config")
				}
			}
			both()
			check(t, n.StopDaemon())
			check(t, n.StartDaemon())
			waitForDaemon(t, n)
			both()

			for _, l := range toolJSON[[]jsonListed](t, n, "ls") {
				if l.Reference == ref && !slices.Equal(l.Conflicts, []string{refused}) {
					t.Errorf("ls prints %+v", l)
				}
			}
			if i := toolJSON[jsonInspected](t, n, "inspect", ref); !slices.Equal(i.Image.Conflicts, []string{refused}) {
				t.Errorf("inspect prints %+v", i.Image)
			}

			_, err = n.Ctr("images", "rm", "--sync", refused, n.Registry+"/files/"+names.bad+"@"+manifest.String())
			check(t, err)
			wantEventuallyServed(t, n, ref, plainVolume("good"))
			_, err = n.Crictl("rmi", ref)
			check(t, err)
		})
	}
	check(t, pod.Remove())
}

// A conflict that CRI knows when it asks must be detected, even if the daemon has not yet
// read the image event and CRI asks for an artifact that the daemon has known for a long
// time.
func TestAConflictIsSeenBeforeItsEvent(t *testing.T) {
	n := node.ForTest(t, node.Options{})
	one, _ := pulledPlain(t, n, "aaa", "one")
	for i := range 4 {
		name := fmt.Sprint("two", i)
		pod, err := n.RunSandbox(node.PodSpec{})
		check(t, err)
		check(t, syscall.Kill(n.DaemonPID(), syscall.SIGSTOP))
		two, manifest := pulledPlain(t, n, "zzz", name)
		started := make(chan error)
		go func() {
			started <- pod.Start(node.Container{Name: "main", Volumes: []node.Volume{{Image: two, Path: "/model"}}})
		}()
		waitFor(t, "containerd to ask for the volume", func() bool { return unread(t, n) > 0 })
		check(t, syscall.Kill(n.DaemonPID(), syscall.SIGCONT))
		if err := <-started; err == nil {
			wantVolume(t, pod, "main", "/model", plainVolume(name))
			t.Error("the container started, want a refusal")
		}
		wantRefused(t, pod, one, one, two)
		check(t, pod.Remove())
		_, err = n.Ctr("images", "rm", "--sync", two, n.Registry+"/files/zzz@"+manifest.String())
		check(t, err)
		wantEventuallyServed(t, n, one, plainVolume("one"))
	}
}

// unread returns the number of bytes of containerd's requests that the daemon has not read.
func unread(t *testing.T, n *node.Node) (bytes int) {
	t.Helper()
	pid, err := unix.PidfdOpen(n.DaemonPID(), 0)
	check(t, err)
	defer unix.Close(pid)
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", n.DaemonPID()))
	check(t, err)
	for _, e := range entries {
		number, err := strconv.Atoi(e.Name())
		check(t, err)
		fd, err := unix.PidfdGetfd(pid, number, 0)
		check(t, err)
		local, err := unix.Getsockname(fd)
		if socket, ok := local.(*unix.SockaddrUnix); err == nil && ok && socket.Name == filepath.Join(n.Dir, "daemon.sock") {
			// TIOCINQ fails on a listening socket.
			if queued, err := unix.IoctlGetInt(fd, unix.TIOCINQ); err == nil {
				bytes += queued
			}
		}
		check(t, unix.Close(fd))
	}
	return bytes
}

// Images in different namespaces are not in conflict.
func TestTheSameConfigInAnotherNamespaceIsNoConflict(t *testing.T) {
	n := node.ForTest(t, node.Options{})
	one, _ := pulledPlain(t, n, "one", "one")
	_, err := plain("two").Push(t.Context(), n.Registry, "files/two", "v1")
	check(t, err)
	_, err = n.Tool("ctr", "--address", n.Address, "--namespace", "other", "images", "pull", "--plain-http", n.Registry+"/files/two:v1")
	check(t, err)
	wantServed(t, n, one, plainVolume("one"))
}

func TestAWrongContainerdAddressIsReported(t *testing.T) {
	t.Parallel()
	n := node.ForTest(t, node.Options{})
	ref, _ := pulledPlain(t, n, "one", "one")
	pod, err := n.RunSandbox(node.PodSpec{})
	check(t, err)
	check(t, n.StopDaemon())
	address := n.Address
	n.Address = filepath.Join(n.Dir, "none.sock")
	err = n.StartDaemon()
	none := n.Address
	n.Address = address
	check(t, err)
	waitForDaemon(t, n)
	wantRefused(t, pod, ref, "containerd does not answer on "+none, "check containerd_address in the snapshotter's configuration")
	check(t, pod.Remove())

	check(t, n.StopDaemon())
	check(t, n.StartDaemon())
	waitForDaemon(t, n)
	wantServed(t, n, ref, plainVolume("one"))
}
