// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package pull

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	modelspec "github.com/modelpack/model-spec/specs-go/v1"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"go.etcd.io/bbolt"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
	"github.com/artifact-snapshotter/artifact-snapshotter/blobs"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
	"github.com/artifact-snapshotter/artifact-snapshotter/internal/registrytest"
)

// testLimits make the tests of stalls and disk space quick, and independent of the disk.
var testLimits = Limits{Blobs: 3, Connections: 12, Memory: 64 << 20, Stall: 2 * time.Second, Reserve: 0}

const repository = "models/tiny"

// content are the blobs of a model with files of these sizes.
func contents(t *testing.T, sizes ...int) (layers []pack.Layer) {
	t.Helper()
	for i, size := range sizes {
		data := make([]byte, size)
		if _, err := rand.Read(data); err != nil {
			t.Fatal(err)
		}
		layers = append(layers, pack.Layer{
			MediaType: modelspec.MediaTypeModelWeightRaw, Data: data,
			Annotations: map[string]string{modelspec.AnnotationFilepath: fmt.Sprintf("part-%d", i)},
		})
	}
	return layers
}

// push pushes a model as that tag, and returns the digest of its manifest.
func push(t *testing.T, registry, tag string, layers []pack.Layer) digest.Digest {
	t.Helper()
	model := &pack.Artifact{ArtifactType: modelspec.ArtifactTypeModelManifest, Layers: layers}
	manifest, err := model.Push(t.Context(), registry, repository, tag)
	if err != nil {
		t.Fatal(err)
	}
	return manifest
}

func open(t *testing.T, c Config) *Puller {
	t.Helper()
	if c.Root == "" {
		c.Root = filepath.Join(t.TempDir(), "content")
	}
	if c.Limits == (Limits{}) {
		c.Limits = testLimits
	}
	p, err := Open(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	return p
}

func ref(t *testing.T, text string) Reference {
	t.Helper()
	r, err := ParseReference(text)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// pull pulls host/models/tiny:v1.
func pull(t *testing.T, p *Puller, host string, credentials ...Credential) (ocispec.Descriptor, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	return p.Pull(ctx, Request{Reference: ref(t, host+"/"+repository+":v1"), Policy: IfNotPresent, Credentials: credentials})
}

// wantBlobs fails unless the directory has exactly these bytes of every layer.
func wantBlobs(t *testing.T, p *Puller, layers []pack.Layer) {
	t.Helper()
	for _, l := range layers {
		got, err := os.ReadFile(p.Dir().Path(digest.FromBytes(l.Data)))
		if err != nil || !bytes.Equal(got, l.Data) {
			t.Errorf("%s has %d bytes, %v; want %d", l.Annotations[modelspec.AnnotationFilepath], len(got), err, len(l.Data))
		}
	}
}

// wantClean fails if anything half-made is left.
func wantClean(t *testing.T, p *Puller) {
	t.Helper()
	if err := p.CollectGarbage(t.Context()); err != nil {
		t.Fatal(err)
	}
	left, err := filepath.Glob(filepath.Join(p.root, "ingest", "*"))
	if err != nil || len(left) > 0 {
		t.Errorf("ingests are left: %q, %v", left, err)
	}
	leases, err := p.leases.List(in(t.Context()))
	if err != nil || len(leases) > 0 {
		t.Errorf("leases are left: %v, %v", leases, err)
	}
}

func TestAnArtifactIsPulledOnceAndReadBack(t *testing.T) {
	registry := registrytest.Start(t, t.TempDir(), false)
	proxy := registrytest.NewProxy(t, registry, nil)
	layers := contents(t, 3<<20, 1, 0, 70_000, 3<<20)
	layers = append(layers, layers[0]) // one blob, two files
	layers[5].Annotations = map[string]string{modelspec.AnnotationFilepath: "again"}
	manifest := push(t, registry, "v1", layers)
	p := open(t, Config{})
	target, err := pull(t, p, proxy.Host)
	if err != nil || target.Digest != manifest {
		t.Fatalf("pulled %s, %v; want %s", target.Digest, err, manifest)
	}
	wantBlobs(t, p, layers)
	a, err := artifact.Read(t.Context(), p.Dir(), target)
	if err != nil || len(a.Layers) != len(layers) {
		t.Fatalf("read %+v, %v", a, err)
	}
	for _, d := range []digest.Digest{digest.FromBytes(layers[0].Data), manifest} {
		if got := proxy.Requests("GET .*" + d.Encoded()); len(got) != 1 {
			t.Errorf("%s was fetched %d times: %q", d, len(got), got)
		}
	}
	wantClean(t, p)
	wantBlobs(t, p, layers) // its image keeps it from garbage collection

	// Everybody may read it, so nobody is asked.
	proxy.Reset()
	if again, err := pull(t, p, proxy.Host); err != nil || again.Digest != manifest {
		t.Errorf("again %s, %v", again.Digest, err)
	}
	if got := proxy.Requests(""); len(got) != 0 {
		t.Errorf("requests for what is there: %q", got)
	}
}

func TestAnArtifactOutlivesTheProcess(t *testing.T) {
	registry := registrytest.Start(t, t.TempDir(), false)
	layers := contents(t, 100_000)
	push(t, registry, "v1", layers)
	root := filepath.Join(t.TempDir(), "content")
	p, err := Open(t.Context(), Config{Root: root, Limits: testLimits})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := pull(t, p, registry); err != nil {
		t.Error(err)
	}
	if _, err := Open(t.Context(), Config{Root: root, Limits: testLimits}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a second process: %v", err)
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	p = open(t, Config{Root: root})
	wantClean(t, p)
	wantBlobs(t, p, layers)
	r := Request{Reference: ref(t, registry+"/"+repository+":v1"), Policy: Never}
	if _, err := p.Pull(t.Context(), r); err != nil {
		t.Error(err)
	}
}

func TestThePullPolicySaysWhenToAsk(t *testing.T) {
	registry := registrytest.Start(t, t.TempDir(), false)
	p := open(t, Config{})
	r := Request{Reference: ref(t, registry+"/"+repository+":v1"), Policy: Never}
	if _, err := p.Pull(t.Context(), r); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "is not on this node, and the pull policy is Never") {
		t.Errorf("Never, and nothing there: %v", err)
	}
	old, current := contents(t, 100_000), contents(t, 100_000)
	before := push(t, registry, "v1", old)
	r.Policy = IfNotPresent
	if got, err := p.Pull(t.Context(), r); err != nil || got.Digest != before {
		t.Fatalf("IfNotPresent: %s, %v", got.Digest, err)
	}
	after := push(t, registry, "v1", current)
	for _, test := range []struct {
		policy Policy
		want   digest.Digest
	}{{IfNotPresent, before}, {Never, before}, {Always, after}, {IfNotPresent, after}} {
		r.Policy = test.policy
		if got, err := p.Pull(t.Context(), r); err != nil || got.Digest != test.want {
			t.Errorf("%s: %s, %v; want %s", test.policy, got.Digest, err, test.want)
		}
	}
	wantClean(t, p)
	wantBlobs(t, p, current)
	if _, err := os.Lstat(p.Dir().Path(digest.FromBytes(old[0].Data))); !os.IsNotExist(err) {
		t.Errorf("the blob of an artifact that no name leads to any more: %v", err)
	}
}

func TestAnImageIsRefusedBeforeItsLayersAreFetched(t *testing.T) {
	registry := registrytest.Start(t, t.TempDir(), false)
	proxy := registrytest.NewProxy(t, registry, nil)
	layers := contents(t, 1000)
	layers[0].MediaType = ocispec.MediaTypeImageLayer
	image := &pack.Artifact{ConfigType: ocispec.MediaTypeImageConfig, Config: []byte("{}"), Layers: layers}
	if _, err := image.Push(t.Context(), registry, repository, "v1"); err != nil {
		t.Fatal(err)
	}
	p := open(t, Config{})
	if _, err := pull(t, p, proxy.Host); !errors.Is(err, artifact.ErrNotArtifact) {
		t.Errorf("an image: %v", err)
	}
	if got := proxy.Requests("GET .*/blobs/"); len(got) != 0 {
		t.Errorf("fetched %q", got)
	}
}

func TestOnlyThoseWhoMayReadItGetWhatIsOnTheNode(t *testing.T) {
	data := t.TempDir()
	open1 := registrytest.Start(t, data, false)
	proxy := registrytest.NewProxy(t, registrytest.Start(t, data, true), nil)
	layers := contents(t, 100_000)
	manifest := push(t, open1, "v1", layers)
	p := open(t, Config{})
	good, wrong := Credential{registrytest.User, registrytest.Password}, Credential{registrytest.User, "wrong"}
	for _, denied := range [][]Credential{nil, {wrong}} {
		if _, err := pull(t, p, proxy.Host, denied...); !isDenied(err) {
			t.Errorf("nothing is there, %v: %v", denied, err)
		}
	}
	if _, err := pull(t, p, proxy.Host, wrong, good); err != nil {
		t.Fatal(err)
	}
	wantBlobs(t, p, layers)
	for _, denied := range [][]Credential{nil, {wrong}} {
		if _, err := pull(t, p, proxy.Host, denied...); !isDenied(err) {
			t.Errorf("it is there, %v: %v", denied, err)
		}
	}
	proxy.Reset()
	if _, err := pull(t, p, proxy.Host, good); err != nil {
		t.Error(err)
	}
	if got := proxy.Requests(""); len(got) != 0 {
		t.Errorf("credentials that have read it are asked for again: %q", got)
	}
	// After a reboot pods come back without the registry, and what is on the disk does not have
	// the password.
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	p = open(t, Config{Root: p.root})
	if _, err := pull(t, p, proxy.Host, good); err != nil {
		t.Error(err)
	}
	if got := proxy.Requests(""); len(got) != 0 {
		t.Errorf("requests after a restart: %q", got)
	}
	for _, denied := range [][]Credential{nil, {wrong}} {
		if _, err := pull(t, p, proxy.Host, denied...); !isDenied(err) {
			t.Errorf("after a restart, %v: %v", denied, err)
		}
	}
	meta, err := os.ReadFile(filepath.Join(p.root, "meta.db"))
	if err != nil || bytes.Contains(meta, []byte(registrytest.Password)) {
		t.Errorf("meta.db has the password, or cannot be read: %v", err)
	}
	// Only so many are remembered.
	if err := p.bolt.Update(func(tx *bbolt.Tx) (err error) {
		for i := range maxReaders {
			err = errors.Join(err, tx.Bucket(bucketReaders).Put(fmt.Appendf(nil, "%d", i), []byte{1}))
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	p.permit(t.Context(), ref(t, proxy.Host+"/"+repository+":v1"), good, digest.FromString("another"))
	if p.permitted(Request{Reference: ref(t, proxy.Host+"/"+repository+":v1"), Credentials: []Credential{good}}, manifest) {
		t.Error("there is no bound on what is remembered")
	}
}

// Whoever knows the digest of a private blob could write it into a manifest of his own.
func TestABlobThatTheRepositoryDoesNotHaveIsNotTakenFromTheNode(t *testing.T) {
	theirs := registrytest.Start(t, t.TempDir(), false)
	layers := contents(t, 100_000)
	push(t, theirs, "v1", layers)
	mine := registrytest.Start(t, t.TempDir(), false)
	secret := digest.FromBytes(layers[0].Data)
	forged := pack.Layer{
		MediaType: layers[0].MediaType, Digest: secret, Size: int64(len(layers[0].Data)),
		Annotations: layers[0].Annotations,
	}
	// The registry refuses a manifest without its blobs, so the proxy hides one.
	push(t, mine, "v1", layers)
	proxy := registrytest.NewProxy(t, mine, func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		if strings.HasSuffix(r.URL.Path, forged.Digest.Encoded()) {
			http.NotFound(w, r)
			return
		}
		next.ServeHTTP(w, r)
	})
	other := blobDir(t, layers)
	for name, p := range map[string]*Puller{"pulled before": open(t, Config{}), "in another directory": open(t, Config{Others: []blobs.Dir{other}})} {
		if name == "pulled before" {
			if _, err := pull(t, p, theirs); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := pull(t, p, proxy.Host); !errdefs.IsNotFound(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// blobDir is a directory with the layers' blobs, as a runtime has it.
func blobDir(t *testing.T, layers []pack.Layer) blobs.Dir {
	t.Helper()
	d := blobs.Dir(t.TempDir())
	for _, l := range layers {
		path := d.Path(digest.FromBytes(l.Data))
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, l.Data, 0o444); err != nil {
			t.Fatal(err)
		}
	}
	return d
}

func TestABlobThatTheNodeHasIsLinked(t *testing.T) {
	registry := registrytest.Start(t, t.TempDir(), false)
	proxy := registrytest.NewProxy(t, registry, nil)
	layers := contents(t, 1<<20, 100_000, 5)
	push(t, registry, "v1", layers)
	runtime := blobDir(t, layers[:2])
	p := open(t, Config{Others: []blobs.Dir{blobs.Dir(t.TempDir()), runtime}})
	if _, err := pull(t, p, proxy.Host); err != nil {
		t.Fatal(err)
	}
	wantBlobs(t, p, layers)
	for i, l := range layers {
		d := digest.FromBytes(l.Data)
		theirs, terr := os.Stat(runtime.Path(d))
		ours, err := os.Stat(p.Dir().Path(d))
		if linked := terr == nil && err == nil && os.SameFile(theirs, ours); linked != (i < 2) {
			t.Errorf("layer %d is linked: %v", i, linked)
		}
		if got := proxy.Requests("GET .*" + d.Encoded()); (len(got) == 0) != (i < 2) {
			t.Errorf("layer %d: %q", i, got)
		}
	}
	wantClean(t, p)
	wantBlobs(t, p, layers)
}

func TestRequestsShareADownloadAndHearOfItsProgress(t *testing.T) {
	registry := registrytest.Start(t, t.TempDir(), false)
	layers := contents(t, 4<<20)
	push(t, registry, "v1", layers)
	goOn := make(chan struct{})
	proxy := registrytest.NewProxy(t, registry, func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		if r.Method == http.MethodGet && strings.Contains(r.URL.Path, digest.FromBytes(layers[0].Data).Encoded()) {
			w = &pausing{ResponseWriter: w, after: 1 << 20, goOn: goOn}
		}
		next.ServeHTTP(w, r)
	})
	limits := testLimits
	limits.Stall = time.Minute
	p := open(t, Config{Limits: limits})
	r := Request{Reference: ref(t, proxy.Host+"/"+repository+":v1"), Policy: IfNotPresent}
	text := waitForProgress(t, p, r, "pulling: 1.0 of 4.0 MiB (25 %), ")
	if !strings.HasSuffix(text, " left") {
		t.Errorf("the progress does not say how long it takes: %s", text)
	}
	results := make(chan error, 3)
	for range cap(results) {
		go func() {
			_, err := p.Pull(t.Context(), r)
			results <- err
		}()
	}
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(time.Millisecond) {
		p.mu.Lock()
		waiting := 0
		for _, d := range p.downloads {
			waiting += d.waiting
		}
		p.mu.Unlock()
		if waiting == cap(results) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("they do not join the download")
		}
	}
	close(goOn)
	for range cap(results) {
		if err := <-results; err != nil {
			t.Error(err)
		}
	}
	wantBlobs(t, p, layers)
	if got := proxy.Requests("GET .*" + digest.FromBytes(layers[0].Data).Encoded()); len(got) != 1 {
		t.Errorf("fetched %q", got)
	}
}

// waitForProgress asks again and again until the progress begins so, and returns it.
func waitForProgress(t *testing.T, p *Puller, r Request, want string) (text string) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; {
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		_, err := p.Pull(ctx, r)
		cancel()
		if _, ok := errors.AsType[*UnfinishedError](err); !ok {
			t.Fatalf("the pull does not wait: %v", err)
		}
		if text = err.Error(); strings.HasPrefix(text, want) {
			return text
		}
		if time.Now().After(deadline) {
			t.Fatalf("the progress is %q, want %q", text, want)
		}
	}
}

// pausing passes so many bytes, and the rest after goOn is closed.
type pausing struct {
	http.ResponseWriter
	after int
	goOn  <-chan struct{}
}

func (p *pausing) Write(b []byte) (int, error) {
	n := min(len(b), p.after)
	p.after -= n
	if _, err := p.ResponseWriter.Write(b[:n]); err != nil {
		return 0, err
	}
	if n == len(b) {
		return n, nil
	}
	if err := http.NewResponseController(p.ResponseWriter).Flush(); err != nil {
		return n, err
	}
	<-p.goOn
	m, err := p.ResponseWriter.Write(b[n:])
	p.after = 1 << 30
	return n + m, err
}

func TestWhatDoesNotFitIsRefusedBeforeItIsFetched(t *testing.T) {
	registry := registrytest.Start(t, t.TempDir(), false)
	layers := contents(t, 1000)
	push(t, registry, "small", layers)
	layers[0].Digest, layers[0].Size, layers[0].Data = digest.FromBytes(layers[0].Data), 1<<60, nil
	model := &pack.Artifact{ArtifactType: modelspec.ArtifactTypeModelManifest, Layers: layers}
	if _, err := model.Push(t.Context(), registry, repository, "v1"); err != nil {
		t.Fatal(err)
	}
	proxy := registrytest.NewProxy(t, registry, nil)
	p := open(t, Config{})
	_, err := pull(t, p, proxy.Host)
	if !errdefs.IsResourceExhausted(err) || !strings.Contains(err.Error(), "needs 1024 PiB") {
		t.Errorf("no room: %v", err)
	}
	if got := proxy.Requests("GET .*" + layers[0].Digest.Encoded()); len(got) != 0 {
		t.Errorf("fetched %q", got)
	}
	wantClean(t, p)
	if left, _ := filepath.Glob(filepath.Join(p.root, "blobs", "*", "*")); len(left) > 0 {
		t.Errorf("blobs are left: %q", left)
	}
}
