// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package hostile

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/nri/pkg/adaptation"
	"github.com/containerd/nri/pkg/api"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/protobuf/proto"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
	"github.com/artifact-snapshotter/artifact-snapshotter/daemon"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
	"github.com/artifact-snapshotter/artifact-snapshotter/unpack"
)

// nriFrontEnd is the runtime's side of NRI. It calls the daemon's plugin before it creates
// a container that has the runtime's mounts of an image volume.
type nriFrontEnd struct {
	*process
	way     Way
	runtime *adaptation.Adaptation
	// mounts returns the runtime's mounts and annotations for an artifact.
	mounts func(a *Artifact) (mounts []*api.Mount, annotations map[string]string)
}

const (
	sandbox = "0123456789abcdef"
	volume  = "/model"
	// patience replaces the default plugin timeout of two seconds, which is too short on a
	// busy machine.
	patience = 10 * time.Second
)

// startNRI starts a runtime and a daemon that is its plugin.
func startNRI(t *testing.T, dir string, blobs shelf, way Way) nriFrontEnd {
	t.Helper()
	dir = filepath.Join(dir, string(way))
	if err := os.Mkdir(dir, 0o711); err != nil {
		t.Fatal(err)
	}
	frontEnd := nriFrontEnd{way: way}
	config := "content_root = %q\ncontainerd_address = %q\n"
	name := "containerd"
	if way == NRIOfCRIO {
		name = "cri-o"
		config = fmt.Sprintf(config+"blob_roots = [%q]\n", filepath.Join(dir, "none"), filepath.Join(dir, "none.sock"), string(blobs))
		frontEnd.mounts = blobs.ofCRIO
	} else {
		config = fmt.Sprintf(config, string(blobs), startContainerd(t, dir))
		frontEnd.mounts = func(a *Artifact) ([]*api.Mount, map[string]string) {
			return []*api.Mount{{
				Type: "bind", Source: filepath.Join(dir, "image-volumes", sandbox, a.Target.Encoded()), Destination: volume, Options: []string{"rbind", "rprivate", "ro"},
			}}, nil
		}
	}
	socket, none := filepath.Join(dir, "nri.sock"), filepath.Join(dir, "none")
	adaptation.SetPluginRequestTimeout(patience)
	var err error
	frontEnd.runtime, err = adaptation.New(name, "1.0.0",
		func(ctx context.Context, f adaptation.SyncCB) error {
			_, err := f(ctx, nil, nil)
			return err
		},
		func(context.Context, []*api.ContainerUpdate) ([]*api.ContainerUpdate, error) { return nil, nil },
		adaptation.WithSocketPath(socket), adaptation.WithPluginPath(none), adaptation.WithPluginConfigPath(none))
	if err != nil {
		t.Fatal(err)
	}
	if err := frontEnd.runtime.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(frontEnd.runtime.Stop) // after the plugin has ended
	config += fmt.Sprintf("[nri]\nenabled = true\nsocket = %q\n", socket)
	if frontEnd.process, err = start(t, dir, config, unpack.Modes{Raw: unpack.Overlay, Tar: unpack.EROFS}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "registration of the plugin", func() error { return daemon.HealthOfNRI(t.Context(), frontEnd.socket()) })
	return frontEnd
}

// startContainerd starts a containerd without CRI and without images, because the daemon
// asks containerd for its images.
func startContainerd(t *testing.T, dir string) (socket string) {
	t.Helper()
	program, err := node.Containerd()
	if err != nil {
		t.Fatal(err)
	}
	socket = filepath.Join(dir, "c.sock")
	config := fmt.Sprintf(`version = 3
root = %q
state = %q
disabled_plugins = ['io.containerd.grpc.v1.cri', 'io.containerd.cri.v1.images', 'io.containerd.cri.v1.runtime', 'io.containerd.nri.v1.nri', 'io.containerd.internal.v1.opt']
[grpc]
  address = %q
`, filepath.Join(dir, "containerd"), filepath.Join(dir, "containerd.run"), socket)
	file := filepath.Join(dir, "containerd.toml")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	log, err := os.Create(filepath.Join(dir, "containerd.log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd := exec.Command(program, "--config", file)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(cmd.Process.Signal(syscall.SIGTERM), cmd.Wait()); err != nil {
			t.Errorf("containerd: %v\n%s", err, tail(log.Name()))
		}
	})
	return socket
}

func eventually(t *testing.T, what string, f func() error) {
	t.Helper()
	for deadline := time.Now().Add(3 * time.Minute); ; time.Sleep(20 * time.Millisecond) {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within three minutes: %v", what, err)
		}
	}
}

// crioLayers returns the layers that CRI-O mounts, by name: the title, or else ModelPack's
// path (internal/ociartifact/store.go, artifactName). Like CRI-O it parses the manifest
// with encoding/json.
func crioLayers(a *Artifact) (names []string, layers []descriptor) {
	var m ocispec.Manifest
	if a.MediaType != ocispec.MediaTypeImageManifest || json.Unmarshal(a.Blobs[a.Target], &m) != nil {
		return nil, nil
	}
	for _, l := range m.Layers {
		name, ok := l.Annotations[titleKey]
		if !ok {
			name = l.Annotations[filepathKey]
		}
		if name != "" && l.Digest.Validate() == nil {
			names, layers = append(names, path.Join(volume, path.Join("/", name))), append(layers, l)
		}
	}
	return names, layers
}

// ofCRIO returns CRI-O's mounts of an artifact, one per layer, and an annotation that
// identifies the artifact.
func (s shelf) ofCRIO(a *Artifact) (mounts []*api.Mount, annotations map[string]string) {
	type image struct {
		Image string `json:"image"`
	}
	type said struct {
		ContainerPath string `json:"container_path"`
		HostPath      string `json:"host_path"`
		Image         image  `json:"image"`
	}
	var list []said
	names, layers := crioLayers(a)
	for i, l := range layers {
		source, _ := s.path(l.Digest)
		mounts = append(mounts, &api.Mount{Type: "bind", Source: source, Destination: names[i], Options: []string{"bind", "ro", "rprivate", "nosuid", "nodev"}})
		list = append(list, said{volume, source, image{a.Target.Encoded()}})
	}
	text, err := json.Marshal(list)
	if err != nil {
		panic(err)
	}
	return mounts, map[string]string{"io.kubernetes.cri-o.Volumes": string(text)}
}

func (d nriFrontEnd) Way() Way { return d.way }

func (d nriFrontEnd) Skip(_ Case, a *Artifact) (why string) {
	if d.way != NRIOfCRIO {
		return ""
	}
	if _, layers := crioLayers(a); len(layers) == 0 {
		return "CRI-O mounts no layer of it, so NRI sees no mount"
	}
	return ""
}

// maxMessage is the maximum size of a ttrpc message, and therefore of an NRI message
// (channel.go, messageLengthMax).
const maxMessage = 4 << 20

// Rule follows docs/nri.md: CRI-O's mounts must fit into one message; NRI can remove only
// one of two mounts at the same path; a layer with the path of the volume is mounted over
// the volume. Before these rules, the runtime keeps its mounts if it is not an artifact.
// Errors in the manifest come after the first rule and before the second.
func (d nriFrontEnd) Rule(v Verdict, a *Artifact) Verdict {
	if d.way != NRIOfCRIO || errors.Is(v.Refused, artifact.ErrNotArtifact) {
		return v
	}
	mounts, annotations := d.mounts(a)
	if proto.Size(&api.Container{Mounts: mounts, Annotations: annotations}) > maxMessage {
		return Verdict{Refused: errdefs.ErrResourceExhausted, Says: []string{"exceed maximum message size"}}
	}
	seen := map[string]bool{}
	names, _ := crioLayers(a)
	for _, name := range names {
		if seen[name] {
			return refused("NRI can remove only one: give each layer a name of its own")
		}
		seen[name] = true
	}
	if seen[volume] && v.Refused == nil {
		return refused("something else is mounted at")
	}
	return v
}

func (d nriFrontEnd) Mount(ctx context.Context, a *Artifact) (_ string, done func() error, err error) {
	pod := &api.PodSandbox{Id: sandbox}
	c := &api.Container{Id: fmt.Sprintf("hostile-%d", d.count.Add(1)), PodSandboxId: sandbox}
	c.Mounts, c.Annotations = d.mounts(a)
	var answer *adaptation.CreateContainerResponse
	err = again(func() (err error) {
		// A runtime creates no container during the registration of a plugin.
		defer d.runtime.BlockPluginSync().Unblock()
		answer, err = d.runtime.CreateContainer(ctx, &adaptation.CreateContainerRequest{Pod: pod, Container: c})
		return kindOf(err)
	})
	if err != nil {
		return "", nil, err
	}
	done = func() error {
		_, err := d.runtime.StopContainer(ctx, &adaptation.StopContainerRequest{Pod: pod, Container: c})
		return err
	}
	var mounted []*api.Mount
	removed := map[string]bool{}
	for _, m := range answer.GetAdjust().GetMounts() {
		if at, ok := m.IsMarkedForRemoval(); ok {
			removed[at] = true
		} else {
			mounted = append(mounted, m)
		}
	}
	if len(mounted) == 0 && len(removed) == 0 {
		// In both cases the runtime keeps its own mounts.
		return "", nil, errors.Join(fmt.Errorf("the plugin did not change the mounts: %w", artifact.ErrNotArtifact), done())
	}
	path, err := d.adjusted(mounted, removed, c.Mounts)
	return path, done, err
}

// adjusted returns the source of the mount that replaces the runtime's mounts.
func (d nriFrontEnd) adjusted(mounted []*api.Mount, removed map[string]bool, before []*api.Mount) (string, error) {
	if len(mounted) != 1 || mounted[0].Destination != volume {
		return "", fmt.Errorf("the mounts are %+v, want one at %s", mounted, volume)
	}
	for _, m := range before {
		if m.Destination != volume && !removed[m.Destination] {
			return "", fmt.Errorf("the runtime's mount at %q was not removed", m.Destination)
		}
	}
	return bound(mounted[0].Type, mounted[0].Source, mounted[0].Options)
}

// kindOf restores the kind of an error from its text, because NRI transports only text:
// from its end, or else from the advice in it.
func kindOf(err error) error {
	if err == nil {
		return nil
	}
	for _, kind := range []error{
		errdefs.ErrUnavailable, errdefs.ErrInvalidArgument, errdefs.ErrNotFound, errdefs.ErrFailedPrecondition, errdefs.ErrDataLoss, errdefs.ErrResourceExhausted, errdefs.ErrNotImplemented,
	} {
		if text, ok := strings.CutSuffix(err.Error(), kind.Error()); ok {
			return fmt.Errorf("%s%w", text, kind)
		}
	}
	if strings.Contains(err.Error(), "try again") {
		return fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
	}
	return errgrpc.ToNative(err) // errors of ttrpc itself
}
