// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package csi

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	csiapi "github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/dialer"
	"github.com/containerd/errdefs"
	modelspec "github.com/modelpack/model-spec/specs-go/v1"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	registerapi "k8s.io/kubelet/pkg/apis/pluginregistration/v1"

	"github.com/artifact-snapshotter/artifact-snapshotter/daemon"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
	"github.com/artifact-snapshotter/artifact-snapshotter/internal/registrytest"
)

const driverName = "artifact-snapshotter.dev"

// testDaemon is a daemon with the CSI driver on a node without a container runtime.
type testDaemon struct {
	cfg    daemon.Config
	cancel context.CancelFunc
	ended  chan error
}

// start starts a daemon below dir, and waits until it serves.
func start(t *testing.T, dir string) *testDaemon {
	t.Helper()
	cfg := daemon.Default()
	cfg.Root, cfg.State = filepath.Join(dir, "root"), filepath.Join(dir, "state")
	cfg.ContentRoot = filepath.Join(dir, "no-containerd")
	cfg.ContainerdAddress = filepath.Join(dir, "no.sock")
	cfg.CSI.Enabled, cfg.CSI.KubeletRoot, cfg.CSI.NodeName = true, filepath.Join(dir, "kubelet"), "node-1"
	cfg.CSI.HostsDir, cfg.CSI.DockerConfig = "", ""
	d := &testDaemon{cfg: cfg}
	d.serve(t)
	t.Cleanup(func() {
		d.stop(t)
		if err := mount.UnmountRecursive(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return d
}

func (d *testDaemon) serve(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	d.cancel, d.ended = cancel, make(chan error, 1)
	go func() { d.ended <- daemon.Serve(ctx, d.cfg, "v0") }()
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if conn, err := net.Dial("unix", d.registration()); err == nil {
			_ = conn.Close()
			return
		}
		select {
		case err := <-d.ended:
			t.Fatalf("the daemon ends: %v", err)
		default:
		}
		if time.Now().After(deadline) {
			t.Fatal("the daemon does not serve kubelet")
		}
	}
}

func (d *testDaemon) stop(t *testing.T) {
	t.Helper()
	if d.cancel == nil {
		return
	}
	d.cancel()
	d.cancel = nil
	select {
	case err := <-d.ended:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(30 * time.Second):
		t.Error("the daemon does not end")
	}
}

func (d *testDaemon) socket() string {
	return filepath.Join(d.cfg.CSI.KubeletRoot, "plugins", driverName, "csi.sock")
}

func (d *testDaemon) registration() string {
	return filepath.Join(d.cfg.CSI.KubeletRoot, "plugins_registry", driverName+"-reg.sock")
}

func dial(t *testing.T, socket string) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient(dialer.DialAddress(socket), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// kubelet finds the socket of the registration, asks for the driver's, and calls it there.
func TestADaemonServesKubelet(t *testing.T) {
	registry := registrytest.Start(t, t.TempDir(), false)
	model := &pack.Artifact{ArtifactType: modelspec.ArtifactTypeModelManifest, Layers: []pack.Layer{{
		MediaType: modelspec.MediaTypeModelWeightRaw, Data: []byte("weights"),
		Annotations: map[string]string{modelspec.AnnotationFilepath: "model.bin"},
	}}}
	if _, err := model.Push(t.Context(), registry, "models/tiny", "v1"); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	d := start(t, dir)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	health := func() error { return daemon.HealthOfCSI(ctx, d.cfg.SocketAddress()) }
	if err := health(); !errdefs.IsUnavailable(err) {
		t.Errorf("the health before the registration: %v", err)
	}
	kubelet := registerapi.NewRegistrationClient(dial(t, d.registration()))
	info, err := kubelet.GetInfo(ctx, &registerapi.InfoRequest{})
	if err != nil || info.GetName() != driverName || info.GetType() != registerapi.CSIPlugin || info.GetEndpoint() != d.socket() {
		t.Fatalf("the driver says it is %v, %v", info, err)
	}
	if _, err := kubelet.NotifyRegistrationStatus(ctx, &registerapi.RegistrationStatus{PluginRegistered: true}); err != nil {
		t.Fatal(err)
	}
	if err := health(); err != nil {
		t.Errorf("the health after the registration: %v", err)
	}
	for _, socket := range []string{d.socket(), d.registration()} {
		if fi, err := os.Stat(socket); err != nil || fi.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", socket, fi.Mode(), err)
		}
	}

	target := filepath.Join(dir, "kubelet/pods/1/volumes/kubernetes.io~csi/model/mount")
	publish := &csiapi.NodePublishVolumeRequest{
		VolumeId: "model", TargetPath: target, Readonly: true,
		VolumeContext: map[string]string{"reference": registry + "/models/tiny:v1"},
		VolumeCapability: &csiapi.VolumeCapability{
			AccessType: &csiapi.VolumeCapability_Mount{Mount: &csiapi.VolumeCapability_MountVolume{}},
			AccessMode: &csiapi.VolumeCapability_AccessMode{Mode: csiapi.VolumeCapability_AccessMode_MULTI_NODE_READER_ONLY},
		},
	}
	read := func() {
		t.Helper()
		if got, err := os.ReadFile(filepath.Join(target, "model.bin")); err != nil || string(got) != "weights" {
			t.Errorf("the volume has %q, %v", got, err)
		}
	}
	node := csiapi.NewNodeClient(dial(t, d.socket()))
	if info, err := node.NodeGetInfo(ctx, &csiapi.NodeGetInfoRequest{}); err != nil || info.GetNodeId() != "node-1" {
		t.Errorf("the node is %v, %v", info, err)
	}
	if _, err := node.NodePublishVolume(ctx, publish); err != nil {
		t.Fatal(err)
	}
	read()

	// The volume outlives the daemon, also one whose driver is disabled.
	d.stop(t)
	read()
	for _, socket := range []string{d.socket(), d.registration()} {
		if _, err := os.Lstat(socket); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is left: %v", socket, err)
		}
	}
	d.serve(t)
	read()
	node = csiapi.NewNodeClient(dial(t, d.socket()))
	if _, err := node.NodePublishVolume(ctx, publish); err != nil {
		t.Errorf("again: %v", err)
	}
	for range 2 {
		if _, err := node.NodeUnpublishVolume(ctx, &csiapi.NodeUnpublishVolumeRequest{VolumeId: "model", TargetPath: target}); err != nil {
			t.Errorf("unpublish: %v", err)
		}
	}
	if _, err := os.Lstat(target); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the directory of the volume is left: %v", err)
	}
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		mounts, err := os.ReadDir(filepath.Join(d.cfg.State, "mounts"))
		if err == nil && len(mounts) == 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("shared mounts are left: %v, %v", mounts, err)
		}
	}
}
