// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/pkg/stub"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/treelist"
)

// Stock containerd with overlayfs, and the daemon as its NRI plugin.

func TestByNRIAModelIsMountedAsItWasPacked(t *testing.T) {
	t.Parallel()
	n := node.ForTest(t, node.Options{NRI: true})
	src := writeModel(t)
	for _, form := range allForms {
		t.Run(string(form), func(t *testing.T) {
			tag := strings.ReplaceAll(string(form), "+", "-")
			d := pushModel(t, n, src, form, tag)
			for _, ref := range []string{n.Registry + "/models/tiny:" + tag, n.Registry + "/models/tiny@" + d.String()} {
				_, err := n.Pull(ref)
				check(t, err)
				wantServed(t, n, ref, wantTree(t, src, form))
			}
		})
	}
	ref := pulledIndex(t, n, src)
	wantServed(t, n, ref, wantTree(t, src, pack.Raw))
	wantRecords(t, n, 0)
}

// records returns the files of the daemon's NRI records, one per container.
func records(t *testing.T, n *node.Node) []string {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(n.DaemonRoot, "nri", "*"))
	check(t, err)
	return found
}

// wantRecords waits until there is this number of records.
func wantRecords(t *testing.T, n *node.Node, want int) {
	t.Helper()
	var found []string
	waitFor(t, "the expected number of NRI records", func() bool {
		found = records(t, n)
		return len(found) == want
	})
}

func TestByNRITwoContainersAndTwoPodsShareOneMount(t *testing.T) {
	t.Parallel()
	n := node.ForTest(t, node.Options{NRI: true})
	src := writeModel(t)
	before := daemonUsage(t, n)
	ref := pulled(t, n, src, pack.Raw)
	want := wantTree(t, src, pack.Raw)
	spec := node.PodSpec{
		Volumes:    []node.Volume{{Image: ref, Path: "/model"}, {Image: ref, Path: "/models/again/"}},
		Containers: []node.Container{{Name: "a"}, {Name: "b"}},
	}
	first, err := n.RunPod(spec)
	check(t, err)
	second, err := n.RunPod(spec)
	check(t, err)
	for _, pod := range []*node.Pod{first, second} {
		for _, c := range []string{"a", "b"} {
			wantVolume(t, pod, c, "/model", want)
			wantVolume(t, pod, c, "/models/again", want)
			out, err := pod.Exec(c, node.Guest, "write", "/model/config.json")
			check(t, err)
			if out != "EROFS\n" {
				t.Errorf("writing: %q, want EROFS", out)
			}
		}
	}
	wantRecords(t, n, 4)
	mounts, err := node.Mounts(n.DaemonState)
	check(t, err)
	if len(mounts) != 1 {
		t.Errorf("the daemon's mounts are %q, want one for all containers", mounts)
	}
	// A container can end before its pod.
	_, err = n.Crictl("stop", first.Containers["a"])
	check(t, err)
	wantRecords(t, n, 3)
	wantVolume(t, first, "b", "/model", want)
	check(t, first.Remove())
	wantRecords(t, n, 2)
	wantVolume(t, second, "a", "/model", want)
	// The image can be deleted before the pod.
	_, err = n.Crictl("rmi", ref)
	check(t, err)
	wantVolume(t, second, "b", "/model", want)
	check(t, second.Remove())
	wantRecords(t, n, 0)
	wantUsage(t, n, before)
}

// specMounts returns the mounts that containerd requested from the OCI runtime.
func specMounts(t *testing.T, n *node.Node, container string) []specs.Mount {
	t.Helper()
	out, err := n.Crictl("inspect", container)
	check(t, err)
	var answer struct {
		Info struct {
			RuntimeSpec specs.Spec `json:"runtimeSpec"`
		} `json:"info"`
	}
	check(t, json.Unmarshal([]byte(out), &answer))
	return answer.Info.RuntimeSpec.Mounts
}

func TestByNRIOtherMountsAreLeftAlone(t *testing.T) {
	n := node.ForTest(t, node.Options{NRI: true})
	src := writeModel(t)
	ref := pulled(t, n, src, pack.Raw)
	layer, err := pack.TarDir(src)
	check(t, err)
	image, err := pack.Image(ocispec.ImageConfig{}, true, layer)
	check(t, err)
	_, err = image.Push(t.Context(), n.Registry, "images/tiny", "latest")
	check(t, err)
	ordinary := n.Registry + "/images/tiny:latest"
	_, err = n.Pull(ordinary)
	check(t, err)
	shared := t.TempDir()
	check(t, os.WriteFile(filepath.Join(shared, "file"), []byte("the host's"), 0o644))
	check(t, os.Chmod(shared, 0o755))

	volumes := []node.Volume{
		{HostPath: shared, Path: "/data"},
		{Image: ordinary, Path: "/image"},
		{HostPath: shared, Path: "/model/src"}, // inside the model's volume
		{Image: ref, Path: "/model"},
		{HostPath: shared, Path: "/a/b/c/d"},
	}
	pod, err := n.RunPod(node.PodSpec{Volumes: volumes})
	check(t, err)
	want, err := treelist.List(src)
	check(t, err)
	wantVolume(t, pod, "main", "/image", want)
	host, err := treelist.List(shared)
	check(t, err)
	for _, path := range []string{"/data", "/a/b/c/d", "/model/src"} {
		wantVolume(t, pod, "main", path, host)
	}
	// Except for the model's, every mount is the same as without the model.
	plain, err := n.RunPod(node.PodSpec{Volumes: slices.DeleteFunc(slices.Clone(volumes), func(v node.Volume) bool { return v.Image == ref })})
	check(t, err)
	var others []string
	for _, m := range specMounts(t, n, pod.Containers["main"]) {
		if m.Destination != "/model" {
			others = append(others, mountLine(m))
			continue
		}
		if !strings.HasPrefix(m.Source, n.DaemonState) || !slices.Equal(m.Options, []string{"bind", "ro", "nosuid", "nodev", "rprivate"}) {
			t.Errorf("the model's mount is %+v", m)
		}
	}
	var before []string
	for _, m := range specMounts(t, n, plain.Containers["main"]) {
		before = append(before, mountLine(m))
	}
	own := strings.NewReplacer(pod.ID, "ID", plain.ID, "ID")
	if got, want := own.Replace(sorted(others)), own.Replace(sorted(before)); got != want {
		t.Errorf("the other mounts are\n%s\nwant\n%s", got, want)
	}
	check(t, pod.Remove())
	check(t, plain.Remove())
	wantRecords(t, n, 0)
}

func mountLine(m specs.Mount) string {
	return strings.Join(append([]string{m.Destination, m.Type, m.Source}, m.Options...), " ")
}

func sorted(lines []string) string {
	return strings.Join(slices.Sorted(slices.Values(lines)), "\n")
}

func TestByNRIAPodWithAUserNamespaceSeesItsOwnOwners(t *testing.T) {
	t.Parallel()
	n := node.ForTest(t, node.Options{NRI: true})
	src := writeOwnedModel(t)
	before := daemonUsage(t, n)
	for _, form := range []pack.Form{pack.Raw, pack.TarGzip} {
		t.Run(string(form), func(t *testing.T) {
			ref := pulled(t, n, src, form)
			volumes := []node.Volume{{Image: ref, Path: "/model"}}
			plain := wantTree(t, src, form)
			var pods []*node.Pod
			for _, base := range []uint32{0, node.UserNamespaceBase, otherBase} {
				want := plain
				if base > 0 {
					want = mapped(plain)
				}
				pod, err := n.RunPod(node.PodSpec{OwnNetwork: base > 0, UserNamespace: base > 0, HostID: base, Volumes: volumes})
				check(t, err)
				wantVolume(t, pod, "main", "/model", want)
				pods = append(pods, pod)
			}
			// The record of a user namespace survives the daemon.
			check(t, n.KillDaemon())
			check(t, n.StartDaemon())
			check(t, n.WaitForNRI())
			wantRecords(t, n, 3)
			if found := trees(t, n, manifestOf(t, n, ref)); len(found) != 3 {
				t.Errorf("the trees are %q, want one for each ID map", found)
			}
			for _, pod := range pods {
				check(t, pod.Remove())
			}
			_, err := n.Crictl("rmi", ref)
			check(t, err)
			wantUsage(t, n, before)
		})
	}
}

// containerd checks a sub path before it asks NRI, in its own empty directory.
func TestByNRIASubPathIsRefusedByContainerd(t *testing.T) {
	n := node.ForTest(t, node.Options{NRI: true})
	if older(t, n, 2, noSubPaths) {
		return
	}
	ref := pulled(t, n, writeModel(t), pack.Raw)
	_, err := n.RunPod(node.PodSpec{Volumes: []node.Volume{{Image: ref, Path: "/model", SubPath: "tokenizer/deep"}}})
	if want := `failed to ensure image subpath "tokenizer/deep"`; err == nil || !strings.Contains(answer(t, err), want) {
		t.Errorf("got %v, want %s", err, want)
	}
	wantRecords(t, n, 0)
}

// wantRefusedByNRI checks that a container with the volume is not created, and the reason.
func wantRefusedByNRI(t *testing.T, pod *node.Pod, ref string, wanted ...string) {
	t.Helper()
	err := pod.Start(node.Container{Name: "refused", Volumes: []node.Volume{{Image: ref, Path: "/model"}}})
	if err == nil {
		t.Fatal("the container started")
	}
	said := answer(t, err)
	for _, want := range append(wanted, "artifact-snapshotter: image volume /model: ") {
		if !strings.Contains(said, want) {
			t.Errorf("the error does not contain %q: %.4096s", want, said)
		}
	}
	if len(said) > 4096 || strings.Contains(said, "\n") {
		t.Errorf("the error is not one short line: %d bytes: %.1000q", len(said), said)
	}
}

func TestByNRIARefusedArtifactStopsTheContainer(t *testing.T) {
	n := node.ForTest(t, node.Options{NRI: true})
	h := hostile{t, t.TempDir()}
	bad := push(t, n, "bad", h.raw("good.txt"), h.raw("../../etc/passwd"))
	good := pulled(t, n, writeModel(t), pack.Raw)
	pod, err := n.RunSandbox(node.PodSpec{})
	check(t, err)
	wantRefusedByNRI(t, pod, bad, "layer 1 (application/vnd.cncf.model.weight.v1.raw, sha256:", `path "../../etc/passwd" contains ".."`)
	// An artifact that can be mounted does not change this.
	err = pod.Start(node.Container{Name: "both", Volumes: []node.Volume{{Image: good, Path: "/good"}, {Image: bad, Path: "/bad"}}})
	if err == nil || !strings.Contains(err.Error(), "image volume /bad: ") {
		t.Errorf("got %v, want a refusal of /bad", err)
	}
	wantRecords(t, n, 0)
	check(t, pod.Remove())
}

func TestByNRIARefusedArtifactCanBeLeftToTheRuntime(t *testing.T) {
	n := node.ForTest(t, node.Options{NRI: true, NRIConfig: `on_error = "passthrough"`})
	h := hostile{t, t.TempDir()}
	bad := push(t, n, "bad", h.raw("../../etc/passwd"))
	src := writeModel(t)
	good := pulled(t, n, src, pack.Raw)
	pod, err := n.RunPod(node.PodSpec{Volumes: []node.Volume{{Image: bad, Path: "/bad"}, {Image: good, Path: "/good"}}})
	check(t, err)
	wantVolume(t, pod, "main", "/bad", nil)
	wantVolume(t, pod, "main", "/good", wantTree(t, src, pack.Raw))
	check(t, pod.Remove())
}

func TestByNRINoArtifactIsMountedForAnother(t *testing.T) {
	n := node.ForTest(t, node.Options{NRI: true})
	a, _ := pulledPlain(t, n, "a", "a")
	wantServed(t, n, a, plainVolume("a"))
	b, _ := pulledPlain(t, n, "b", "b")
	pod, err := n.RunSandbox(node.PodSpec{})
	check(t, err)
	for _, ref := range []string{a, b} {
		wantRefusedByNRI(t, pod, ref, "has the same config", a, b, "give each a config of its own")
	}
	check(t, pod.Remove())
}

// The build takes longer than NRI's time-out. The plugin answers in time and stays
// registered.
func TestByNRIASlowArtifactIsMountedByARetry(t *testing.T) {
	t.Parallel()
	n := node.ForTest(t, node.Options{
		NRI:              true,
		DaemonConfig:     "max_expansion = 100000\ndecompress_on_pull = false\n",
		ContainerdConfig: "[plugins.'io.containerd.nri.v1.nri']\n  plugin_request_timeout = '500ms'\n",
	})
	layer, want := zeros(t, "zeros")
	ref := push(t, n, "slow", layer)
	pod, err := n.RunSandbox(node.PodSpec{})
	check(t, err)
	wantRefusedByNRI(t, pod, ref, "is still being unpacked (", "unpacking goes on, try again")
	waitFor(t, "start of the container", func() bool {
		return pod.Start(node.Container{Volumes: []node.Volume{{Image: ref, Path: "/model"}}}) == nil
	})
	wantVolume(t, pod, "main", "/model", []treelist.Entry{want})
	check(t, pod.Remove())
	wantRecords(t, n, 0)
}

func TestByNRIAPodGoesOnReadingWhenTheDaemonOrContainerdEnds(t *testing.T) {
	t.Parallel()
	n := node.ForTest(t, node.Options{NRI: true})
	src := writeModel(t)
	before := daemonUsage(t, n)
	ref := pulled(t, n, src, pack.Raw)
	want := wantTree(t, src, pack.Raw)
	pod, err := n.RunPod(reading(ref))
	check(t, err)
	for _, c := range []struct {
		name       string
		end, start func() error
	}{
		{"daemon, SIGTERM", n.StopDaemon, n.StartDaemon},
		{"daemon, SIGKILL", n.KillDaemon, n.StartDaemon},
		{"containerd, SIGTERM", n.StopContainerd, n.StartContainerd},
		{"containerd, SIGKILL", n.KillContainerd, n.StartContainerd},
	} {
		t.Run(c.name, func(t *testing.T) {
			gone, err := n.RunPod(node.PodSpec{Volumes: []node.Volume{{Image: ref, Path: "/model"}}})
			check(t, err)
			wantRecords(t, n, 3)
			check(t, c.end())
			if strings.HasPrefix(c.name, "daemon") { // the plugin does not see this removal
				wantReading(t, pod)
				check(t, gone.Remove())
				wantRecords(t, n, 3)
			}
			check(t, c.start())
			check(t, n.WaitForNRI())
			if !strings.HasPrefix(c.name, "daemon") {
				wantRecords(t, n, 3)
				check(t, gone.Remove())
			}
			wantRecords(t, n, 2)
			wantReading(t, pod)
			wantVolume(t, pod, "main", "/model", want)
			wantServed(t, n, ref, want)
			wantReading(t, pod)
		})
	}
	// Lost records are restored.
	check(t, n.KillDaemon())
	check(t, os.RemoveAll(filepath.Join(n.DaemonRoot, "nri")))
	check(t, n.StartDaemon())
	check(t, n.WaitForNRI())
	wantRecords(t, n, 2)
	_, err = n.Crictl("rmi", ref)
	check(t, err)
	wantReading(t, pod)
	wantVolume(t, pod, "main", "/model", want)
	check(t, pod.Remove())
	wantRecords(t, n, 0)
	wantUsage(t, n, before)
}

// breaker is an NRI plugin that runs after the daemon's and refuses every container.
type breaker struct{}

func (breaker) CreateContainer(context.Context, *api.PodSandbox, *api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate, error) {
	return nil, nil, errors.New("the breaker refuses it")
}

func TestByNRIAContainerThatFailsLaterLeavesNothing(t *testing.T) {
	n := node.ForTest(t, node.Options{NRI: true})
	ref := pulled(t, n, writeModel(t), pack.Raw)
	volumes := []node.Volume{{Image: ref, Path: "/model"}}
	pod, err := n.RunSandbox(node.PodSpec{})
	check(t, err)

	// runc fails when the container is started. containerd notifies plugins only when the
	// container is removed.
	if err := pod.Start(node.Container{Name: "start", Command: []string{"/no/such/program"}, Volumes: volumes}); err == nil {
		t.Fatal("a container without a program started")
	}
	_, err = n.Crictl("rm", pod.Containers["start"])
	check(t, err)
	wantRecords(t, n, 0)

	// Another plugin refuses the container after ours has mounted the volume.
	s, err := stub.New(breaker{}, stub.WithSocketPath(filepath.Join(n.Dir, "nri.sock")), stub.WithPluginName("breaker"), stub.WithPluginIdx("99"))
	check(t, err)
	check(t, s.Start(t.Context()))
	err = pod.Start(node.Container{Name: "create", Volumes: volumes})
	if err == nil || !strings.Contains(err.Error(), "the breaker refuses it") {
		t.Errorf("got %v, want the breaker's error", err)
	}
	wantRecords(t, n, 0)
	s.Stop()
	check(t, pod.Remove())
	waitFor(t, "removal of the mount", func() bool {
		mounts, err := node.Mounts(n.DaemonState)
		return err == nil && len(mounts) == 0
	})
}

// The daemon logs and counts containers that were created without it.
func TestByNRIAContainerCreatedWithoutThePluginIsReported(t *testing.T) {
	n, socket := metered(t, node.Options{NRI: true})
	missed := func() float64 {
		return families(t, socket)["artifact_snapshotter_containers_without_artifact"].GetMetric()[0].GetGauge().GetValue()
	}
	ref := pulled(t, n, writeModel(t), pack.Raw)
	check(t, n.StopDaemon())
	pod, err := n.RunPod(node.PodSpec{Volumes: []node.Volume{{Image: ref, Path: "/model"}}})
	check(t, err)
	wantVolume(t, pod, "main", "/model", nil)
	check(t, n.StartDaemon())
	check(t, n.WaitForNRI())
	if logs := n.Logs(); !strings.Contains(logs, "a container was created without the NRI plugin") || !strings.Contains(logs, "sandbox="+pod.ID) {
		t.Errorf("the log does not name pod %s:\n%s", pod.ID, logs)
	}
	if got := missed(); got != 1 {
		t.Errorf("the metric counts %v containers, want 1", got)
	}
	check(t, pod.Remove())
	waitFor(t, "the metric to count none", func() bool { return missed() == 0 })
}

// NRI can require a plugin.
func TestByNRIARequiredPluginThatIsNotThereStopsContainers(t *testing.T) {
	n := node.ForTest(t, node.Options{NRI: true, ContainerdConfig: requiredPlugins})
	src := writeModel(t)
	ref := pulled(t, n, src, pack.Raw)
	if older(t, n, 2, "no required plugins: the container starts with an empty directory") {
		return
	}
	wantServed(t, n, ref, wantTree(t, src, pack.Raw))
	check(t, n.StopDaemon())
	pod, err := n.RunSandbox(node.PodSpec{})
	check(t, err)
	err = pod.Start(node.Container{Volumes: []node.Volume{{Image: ref, Path: "/model"}}})
	if err == nil || !strings.Contains(answer(t, err), notPresent) {
		t.Errorf("got %v, want %s", err, notPresent)
	}
	check(t, n.StartDaemon())
	check(t, n.WaitForNRI())
	check(t, pod.Start(node.Container{Volumes: []node.Volume{{Image: ref, Path: "/model"}}}))
	wantVolume(t, pod, "main", "/model", wantTree(t, src, pack.Raw))
	check(t, pod.Remove())
}

// Both front ends in one daemon: the snapshotter mounts the volume before NRI is asked.
func TestByNRIAndBySnapshotterAVolumeIsTheSame(t *testing.T) {
	n := node.ForTest(t, node.Options{DaemonFlags: []string{"--nri"}, NRIConfig: "name = 'second-front-end'"})
	check(t, n.WaitForNRI())
	src := writeModel(t)
	ref := pulled(t, n, src, pack.TarGzip)
	pod, err := n.RunPod(node.PodSpec{Volumes: []node.Volume{{Image: ref, Path: "/model"}, {Image: ref, Path: "/deep", SubPath: "tokenizer"}}})
	check(t, err)
	wantVolume(t, pod, "main", "/model", wantTree(t, src, pack.TarGzip))
	wantRecords(t, n, 0) // the snapshotter's snapshot is enough
	check(t, pod.Remove())
}
