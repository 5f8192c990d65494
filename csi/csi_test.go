// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package csi

import (
	"context"
	"encoding/base64"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	csiapi "github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/containerd/containerd/v2/core/mount"
	modelspec "github.com/modelpack/model-spec/specs-go/v1"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/artifact-snapshotter/artifact-snapshotter/blobs"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
	"github.com/artifact-snapshotter/artifact-snapshotter/internal/registrytest"
	"github.com/artifact-snapshotter/artifact-snapshotter/pull"
	"github.com/artifact-snapshotter/artifact-snapshotter/store"
)

// node is a node with a driver, whose parts can be opened again.
type node struct {
	dir    string
	driver *Driver
	store  *store.Store
	puller *pull.Puller
}

func newNode(t *testing.T) *node {
	t.Helper()
	n := &node{dir: t.TempDir()}
	n.open(t)
	t.Cleanup(func() {
		n.close(t)
		if err := mount.UnmountRecursive(n.dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return n
}

func (n *node) open(t *testing.T) {
	t.Helper()
	var err error
	root := filepath.Join(n.dir, "root")
	content := blobs.Dir(filepath.Join(root, "content"))
	if n.store, err = store.Open(t.Context(), store.Config{Root: root, State: filepath.Join(n.dir, "state"), Content: blobs.Dirs{content}}); err != nil {
		t.Fatal(err)
	}
	if n.puller, err = pull.Open(t.Context(), pull.Config{Root: string(content)}); err != nil {
		t.Fatal(err)
	}
	n.driver, err = New(t.Context(), Config{Root: root, Node: "node-1", Version: "v0", Store: n.store, Puller: n.puller, DockerConfig: filepath.Join(n.dir, "config.json")})
	if err != nil {
		t.Fatal(err)
	}
}

func (n *node) close(t *testing.T) {
	t.Helper()
	if err := n.puller.Close(); err != nil {
		t.Error(err)
	}
	if err := n.store.Close(); err != nil {
		t.Error(err)
	}
}

// target is the path of the volume of a pod, as kubelet has it.
func (n *node) target(pod string) string {
	return filepath.Join(n.dir, "pods", pod, "volumes/kubernetes.io~csi/model/mount")
}

// request is that of kubelet for an inline volume of a pod.
func (n *node) request(pod, reference string) *csiapi.NodePublishVolumeRequest {
	return &csiapi.NodePublishVolumeRequest{
		VolumeId:   "csi-" + pod,
		TargetPath: n.target(pod),
		Readonly:   true,
		VolumeCapability: &csiapi.VolumeCapability{
			AccessType: &csiapi.VolumeCapability_Mount{Mount: &csiapi.VolumeCapability_MountVolume{}},
			AccessMode: &csiapi.VolumeCapability_AccessMode{Mode: csiapi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
		},
		VolumeContext: map[string]string{
			attributeReference: reference, podName: pod, podNamespace: "default", podUID: pod,
			kubernetes + "ephemeral": "true", kubernetes + "serviceAccount.name": "default",
		},
	}
}

func (n *node) publish(t *testing.T, pod, reference string) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	_, err := n.driver.NodePublishVolume(ctx, n.request(pod, reference))
	return err
}

func (n *node) unpublish(t *testing.T, pod string) {
	t.Helper()
	_, err := n.driver.NodeUnpublishVolume(t.Context(), &csiapi.NodeUnpublishVolumeRequest{VolumeId: "csi-" + pod, TargetPath: n.target(pod)})
	if err != nil {
		t.Errorf("unpublish: %v", err)
	}
}

// collect collects the store's garbage, and returns how many shared mounts are left.
func (n *node) collect(t *testing.T) int {
	t.Helper()
	if err := n.store.CollectGarbage(t.Context()); err != nil {
		t.Fatal(err)
	}
	mounts, err := os.ReadDir(filepath.Join(n.dir, "state", "mounts"))
	if err != nil {
		t.Fatal(err)
	}
	return len(mounts)
}

func layer(path, text string) pack.Layer {
	return pack.Layer{
		MediaType: modelspec.MediaTypeModelWeightRaw, Data: []byte(text),
		Annotations: map[string]string{modelspec.AnnotationFilepath: path},
	}
}

func push(t *testing.T, registry, name string, a *pack.Artifact) string {
	t.Helper()
	if _, err := a.Push(t.Context(), registry, name, "v1"); err != nil {
		t.Fatal(err)
	}
	return registry + "/" + name + ":v1"
}

func wantFile(t *testing.T, path, want string) {
	t.Helper()
	if got, err := os.ReadFile(path); err != nil || string(got) != want {
		t.Errorf("%s has %q, %v; want %q", path, got, err, want)
	}
}

func wantCode(t *testing.T, err error, code codes.Code, texts ...string) {
	t.Helper()
	if status.Code(err) != code {
		t.Errorf("error %v, want %s", err, code)
		return
	}
	for _, text := range texts {
		if !strings.Contains(status.Convert(err).Message(), text) {
			t.Errorf("error %v, want %q in it", err, text)
		}
	}
}

func TestPodsShareOneReadOnlyMount(t *testing.T) {
	registry := registrytest.Start(t, t.TempDir(), false)
	model := &pack.Artifact{ArtifactType: modelspec.ArtifactTypeModelManifest, Layers: []pack.Layer{layer("a/b.txt", "one"), layer("c.txt", "three")}}
	ref := push(t, registry, "models/tiny", model)
	n := newNode(t)
	for range 2 { // a second call for what is published
		if err := n.publish(t, "one", ref); err != nil {
			t.Fatal(err)
		}
	}
	if err := n.publish(t, "two", ref); err != nil {
		t.Fatal(err)
	}
	for _, pod := range []string{"one", "two"} {
		wantFile(t, filepath.Join(n.target(pod), "a/b.txt"), "one")
		if err := os.WriteFile(filepath.Join(n.target(pod), "new"), nil, 0o644); err == nil {
			t.Error("the volume is writable")
		}
	}
	var one, two unix.Stat_t
	if err := unix.Stat(n.target("one"), &one); err != nil {
		t.Fatal(err)
	}
	if err := unix.Stat(n.target("two"), &two); err != nil || one.Dev != two.Dev {
		t.Errorf("the devices of the volumes are %d and %d, %v", one.Dev, two.Dev, err)
	}
	if got := n.collect(t); got != 1 {
		t.Errorf("%d shared mounts", got)
	}
	stats, err := n.driver.NodeGetVolumeStats(t.Context(), &csiapi.NodeGetVolumeStatsRequest{VolumeId: "csi-one", VolumePath: n.target("one")})
	if err != nil || len(stats.GetUsage()) != 1 || stats.GetUsage()[0].GetUsed() != 8 {
		t.Errorf("stats %v, %v", stats, err)
	}
	n.unpublish(t, "one")
	n.collect(t)
	wantFile(t, filepath.Join(n.target("two"), "c.txt"), "three")
	for range 2 { // it is idempotent
		n.unpublish(t, "two")
	}
	if got := n.collect(t); got != 0 {
		t.Errorf("%d shared mounts are left", got)
	}
	for _, pod := range []string{"one", "two"} {
		if _, err := os.Lstat(n.target(pod)); !os.IsNotExist(err) {
			t.Errorf("the directory of the volume is left: %v", err)
		}
	}
	if left, err := os.ReadDir(n.driver.records.Dir); err != nil || len(left) > 0 {
		t.Errorf("records are left: %v, %v", left, err)
	}
}

// What `oras push` makes in its usual ways, which CRI refuses as an image volume: two of them
// share the config {}, and one has the layer types of images.
func TestArtifactsThatCRIRefuses(t *testing.T) {
	registry := registrytest.Start(t, t.TempDir(), false)
	n := newNode(t)
	for i, mediaType := range []string{"application/x-text", "application/x-text", ocispec.MediaTypeImageLayer} {
		l := pack.Layer{MediaType: mediaType, Data: fmt.Append(nil, "content ", i), Annotations: map[string]string{ocispec.AnnotationTitle: "notes.txt"}}
		ref := push(t, registry, fmt.Sprint("notes/", i), &pack.Artifact{ConfigType: ocispec.MediaTypeEmptyJSON, Layers: []pack.Layer{l}})
		pod := fmt.Sprint("pod-", i)
		if err := n.publish(t, pod, ref); err != nil {
			t.Errorf("%s: %v", mediaType, err)
			continue
		}
		wantFile(t, filepath.Join(n.target(pod), "notes.txt"), fmt.Sprint("content ", i))
	}
}

func TestVolumesOutliveTheDaemon(t *testing.T) {
	registry := registrytest.Start(t, t.TempDir(), false)
	ref := push(t, registry, "models/tiny", &pack.Artifact{ArtifactType: modelspec.ArtifactTypeModelManifest, Layers: []pack.Layer{layer("a", "one")}})
	n := newNode(t)
	if err := n.publish(t, "pod", ref); err != nil {
		t.Fatal(err)
	}
	n.close(t)
	wantFile(t, filepath.Join(n.target("pod"), "a"), "one")
	// A daemon without the driver keeps it, too.
	s, err := store.Open(t.Context(), store.Config{Root: filepath.Join(n.dir, "root"), State: filepath.Join(n.dir, "state"), Content: blobs.Dir(filepath.Join(n.dir, "none"))})
	if err != nil {
		t.Fatal(err)
	}
	if err := ProtectRecorded(t.Context(), filepath.Join(n.dir, "root"), s); err != nil {
		t.Fatal(err)
	}
	if err := s.CollectGarbage(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	n.open(t)
	if got := n.collect(t); got != 1 {
		t.Errorf("%d shared mounts after a restart", got)
	}
	wantFile(t, filepath.Join(n.target("pod"), "a"), "one")
	if err := n.publish(t, "pod", ref); err != nil {
		t.Errorf("the same volume again: %v", err)
	}
	n.unpublish(t, "pod")
	if got := n.collect(t); got != 0 {
		t.Errorf("%d shared mounts are left", got)
	}
}

// Killed after the record and before the mount, or after the unmount and before the end of the
// record.
func TestARecordWithoutAMountIsNoVolume(t *testing.T) {
	registry := registrytest.Start(t, t.TempDir(), false)
	ref := push(t, registry, "models/tiny", &pack.Artifact{ArtifactType: modelspec.ArtifactTypeModelManifest, Layers: []pack.Layer{layer("a", "one")}})
	n := newNode(t)
	for _, next := range []string{"publish", "unpublish"} {
		if err := n.publish(t, "pod", ref); err != nil {
			t.Fatal(err)
		}
		if err := mount.UnmountAll(n.target("pod"), 0); err != nil {
			t.Fatal(err)
		}
		n.close(t)
		n.open(t)
		if next == "publish" {
			if err := n.publish(t, "pod", ref); err != nil {
				t.Error(err)
			}
			wantFile(t, filepath.Join(n.target("pod"), "a"), "one")
		}
		n.unpublish(t, "pod")
		if got := n.collect(t); got != 0 {
			t.Errorf("%d shared mounts are left", got)
		}
	}
}

func TestAMountWhoseRecordIsLostIsReplaced(t *testing.T) {
	registry := registrytest.Start(t, t.TempDir(), false)
	ref := push(t, registry, "models/tiny", &pack.Artifact{ArtifactType: modelspec.ArtifactTypeModelManifest, Layers: []pack.Layer{layer("a", "one")}})
	n := newNode(t)
	if err := os.MkdirAll(n.target("pod"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := (&mount.Mount{Type: "tmpfs", Source: "tmpfs"}).Mount(n.target("pod")); err != nil {
		t.Fatal(err)
	}
	if err := n.publish(t, "pod", ref); err != nil {
		t.Fatal(err)
	}
	wantFile(t, filepath.Join(n.target("pod"), "a"), "one")
	n.unpublish(t, "pod")
	if _, err := os.Lstat(n.target("pod")); !os.IsNotExist(err) {
		t.Errorf("left: %v", err)
	}
}

func TestACallAnswersBeforeItsDeadlineWithTheProgress(t *testing.T) {
	registry := registrytest.Start(t, t.TempDir(), false)
	l := layer("weights", strings.Repeat("0123456789abcdef", 1<<18))
	ref := push(t, registry, "models/tiny", &pack.Artifact{ArtifactType: modelspec.ArtifactTypeModelManifest, Layers: []pack.Layer{l}})
	goOn := make(chan struct{})
	var once sync.Once
	t.Cleanup(func() { once.Do(func() { close(goOn) }) })
	proxy := registrytest.NewProxy(t, registry, func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		if r.Method == http.MethodGet && strings.HasSuffix(r.URL.Path, digest.FromBytes(l.Data).Encoded()) {
			<-goOn
		}
		next.ServeHTTP(w, r)
	})
	n := newNode(t)
	ref = strings.Replace(ref, registry, proxy.Host, 1)
	ctx, cancel := context.WithTimeout(t.Context(), 6*time.Second)
	defer cancel()
	_, err := n.driver.NodePublishVolume(ctx, n.request("pod", ref))
	wantCode(t, err, codes.DeadlineExceeded, "pulling: 0.0 of 4.0 MiB (0 %)")
	if ctx.Err() != nil {
		t.Error("the answer came after the deadline")
	}
	if _, err := os.Lstat(n.target("pod")); !os.IsNotExist(err) {
		t.Errorf("something is at the target already: %v", err)
	}
	once.Do(func() { close(goOn) })
	if err := n.publish(t, "pod", ref); err != nil {
		t.Fatal(err)
	}
	wantFile(t, filepath.Join(n.target("pod"), "weights"), string(l.Data))
	if got := proxy.Requests("GET .*" + digest.FromBytes(l.Data).Encoded()); len(got) != 1 {
		t.Errorf("fetched %q", got)
	}
}

func dockerConfig(registry, password string) string {
	auth := base64.StdEncoding.EncodeToString([]byte(registrytest.User + ":" + password))
	return fmt.Sprintf(`{"auths": {%q: {"auth": %q}}}`, registry, auth)
}

func TestTheSecretOfThePodAndTheNodesConfigAreUsed(t *testing.T) {
	data := t.TempDir()
	public, private := registrytest.Start(t, data, false), registrytest.Start(t, data, true)
	ref := push(t, public, "models/tiny", &pack.Artifact{ArtifactType: modelspec.ArtifactTypeModelManifest, Layers: []pack.Layer{layer("a", "one")}})
	ref = strings.Replace(ref, public, private, 1)
	n := newNode(t)
	with := func(pod, secret string) error {
		req := n.request(pod, ref)
		req.Secrets = map[string]string{secretKey: secret}
		_, err := n.driver.NodePublishVolume(t.Context(), req)
		if err != nil && strings.Contains(err.Error(), "s3cr3t") {
			t.Errorf("the secret is in the error: %v", err)
		}
		return err
	}
	if err := n.publish(t, "without", ref); err == nil {
		t.Fatal("a private registry needs no secret")
	}
	if err := with("wrong", dockerConfig(private, "s3cr3t")); err == nil {
		t.Error("a wrong password is accepted")
	}
	wantCode(t, with("malformed", `{"auths": {"x": {"auth": "s3cr3t"`), codes.InvalidArgument, "nodePublishSecretRef")
	if err := with("right", dockerConfig(private, registrytest.Password)); err != nil {
		t.Fatal(err)
	}
	// It is on the node now, and still not everybody's.
	if err := n.publish(t, "without", ref); err == nil {
		t.Error("a pod without a secret gets what another pod has pulled")
	}
	if err := os.WriteFile(filepath.Join(n.dir, "config.json"), []byte(dockerConfig(private, registrytest.Password)), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := n.publish(t, "without", ref); err != nil {
		t.Errorf("with the node's credentials: %v", err)
	}
	for _, path := range []string{"content/meta.db", "csi"} {
		err := filepath.WalkDir(filepath.Join(n.dir, "root", path), func(path string, e os.DirEntry, err error) error {
			if err != nil || e.IsDir() {
				return err
			}
			text, err := os.ReadFile(path)
			if strings.Contains(string(text), registrytest.Password) {
				t.Errorf("%s has the password", path)
			}
			return err
		})
		if err != nil {
			t.Error(err)
		}
	}
}

func TestRequestsThatCannotBeServedSayWhy(t *testing.T) {
	registry := registrytest.Start(t, t.TempDir(), false)
	ref := push(t, registry, "models/tiny", &pack.Artifact{ArtifactType: modelspec.ArtifactTypeModelManifest, Layers: []pack.Layer{layer("a", "one")}})
	image := push(t, registry, "library/image", &pack.Artifact{ConfigType: ocispec.MediaTypeImageConfig, Config: []byte("{}"), Layers: []pack.Layer{{MediaType: ocispec.MediaTypeImageLayer, Data: []byte("x")}}})
	bad := push(t, registry, "models/bad", &pack.Artifact{ArtifactType: modelspec.ArtifactTypeModelManifest, Layers: []pack.Layer{layer("../escaped", "x")}})
	n := newNode(t)
	for name, test := range map[string]struct {
		change func(*csiapi.NodePublishVolumeRequest)
		code   codes.Code
		text   string
	}{
		"no volume ID":     {func(r *csiapi.NodePublishVolumeRequest) { r.VolumeId = "" }, codes.InvalidArgument, "volume_id"},
		"no target":        {func(r *csiapi.NodePublishVolumeRequest) { r.TargetPath = "" }, codes.InvalidArgument, "target_path"},
		"a relative path":  {func(r *csiapi.NodePublishVolumeRequest) { r.TargetPath = "x" }, codes.InvalidArgument, "target_path"},
		"the root":         {func(r *csiapi.NodePublishVolumeRequest) { r.TargetPath = "/.." }, codes.InvalidArgument, "target_path"},
		"no capability":    {func(r *csiapi.NodePublishVolumeRequest) { r.VolumeCapability = nil }, codes.InvalidArgument, "volume_capability"},
		"a writable one":   {func(r *csiapi.NodePublishVolumeRequest) { r.Readonly = false }, codes.InvalidArgument, "readOnly: true"},
		"no reference":     {func(r *csiapi.NodePublishVolumeRequest) { delete(r.VolumeContext, attributeReference) }, codes.InvalidArgument, "reference is missing"},
		"no registry":      {func(r *csiapi.NodePublishVolumeRequest) { r.VolumeContext[attributeReference] = "llama:v1" }, codes.InvalidArgument, "full reference"},
		"another policy":   {func(r *csiapi.NodePublishVolumeRequest) { r.VolumeContext[attributePullPolicy] = "Sometimes" }, codes.InvalidArgument, "Sometimes"},
		"not there":        {func(r *csiapi.NodePublishVolumeRequest) { r.VolumeContext[attributePullPolicy] = "Never" }, codes.NotFound, "Never"},
		"an attribute":     {func(r *csiapi.NodePublishVolumeRequest) { r.VolumeContext["paths"] = "*" }, codes.InvalidArgument, `"paths" is not known`},
		"not a secret":     {func(r *csiapi.NodePublishVolumeRequest) { r.Secrets = map[string]string{"x": "y"} }, codes.InvalidArgument, "kubernetes.io/dockerconfigjson"},
		"another tag":      {func(r *csiapi.NodePublishVolumeRequest) { r.VolumeContext[attributeReference] += "0" }, codes.NotFound, "not found"},
		"an image":         {func(r *csiapi.NodePublishVolumeRequest) { r.VolumeContext[attributeReference] = image }, codes.InvalidArgument, "is a container image"},
		"a hostile path":   {func(r *csiapi.NodePublishVolumeRequest) { r.VolumeContext[attributeReference] = bad }, codes.InvalidArgument, `contains ".."`},
		"no such registry": {func(r *csiapi.NodePublishVolumeRequest) { r.VolumeContext[attributeReference] = "nowhere.invalid/x:v1" }, codes.Unknown, "nowhere.invalid"},
	} {
		t.Run(name, func(t *testing.T) {
			req := n.request("pod", ref)
			test.change(req)
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			_, err := n.driver.NodePublishVolume(ctx, req)
			wantCode(t, err, test.code, test.text)
		})
	}
	if n.collect(t) != 0 {
		t.Error("a refused volume has left a mount")
	}
	if err := n.publish(t, "pod", ref); err != nil {
		t.Fatal(err)
	}
	other := n.request("pod", image)
	_, err := n.driver.NodePublishVolume(t.Context(), other)
	wantCode(t, err, codes.AlreadyExists, ref)
}
