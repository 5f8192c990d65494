// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"bytes"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	modelspec "github.com/modelpack/model-spec/specs-go/v1"
	"github.com/opencontainers/go-digest"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/treelist"
)

// The recipes are read from docs/kubernetes.md, so that the documentation is tested.

// recipe returns the block of docs/kubernetes.md that follows the line <!-- recipe: name
// -->. It replaces strings in it, each of which must occur.
func recipe(t *testing.T, name string, oldnew ...string) string {
	t.Helper()
	text, err := os.ReadFile("../docs/kubernetes.md")
	check(t, err)
	_, rest, found := strings.Cut(string(text), "<!-- recipe: "+name+" -->\n```")
	_, rest, fence := strings.Cut(rest, "\n")
	block, _, end := strings.Cut(rest, "\n```\n")
	if !found || !fence || !end {
		t.Fatalf("docs/kubernetes.md has no recipe %q", name)
	}
	for i := 0; i < len(oldnew); i += 2 {
		if !strings.Contains(block, oldnew[i]) {
			t.Fatalf("the recipe %q has no %q:\n%s", name, oldnew[i], block)
		}
		block = strings.ReplaceAll(block, oldnew[i], oldnew[i+1])
	}
	return block + "\n"
}

// writeHosts writes hosts.toml for a host into a directory for containerd's config_path.
func writeHosts(t *testing.T, dir, host, text string) {
	t.Helper()
	check(t, os.MkdirAll(filepath.Join(dir, host), 0o755))
	check(t, os.WriteFile(filepath.Join(dir, host, "hosts.toml"), []byte(text), 0o600))
}

// configPath returns containerd's configuration for this directory.
func configPath(dir string) string {
	return "[plugins.'io.containerd.cri.v1.images'.registry]\n  config_path = '" + dir + "'\n"
}

// Mirrors in hosts.toml serve artifacts like images, whether the mirror is a registry or a
// peer-to-peer cache. The name of the origin does not resolve.
func TestMirrorServesArtifacts(t *testing.T) {
	dir := t.TempDir()
	n := node.ForTest(t, node.Options{ContainerdConfig: configPath(dir)})
	mirror, err := n.StartMirror()
	check(t, err)
	const origin = "registry.example.com"
	src := writeModel(t)
	refs := map[pack.Form]string{}
	for _, form := range []pack.Form{pack.Raw, pack.TarGzip} {
		_, refs[form], _ = strings.Cut(pushTo(t, n, "models/"+strings.ReplaceAll(string(form), "+", "-"), src, form), "/")
		refs[form] = origin + "/" + refs[form]
	}
	check(t, n.StopRegistry())
	if _, err := n.Pull(refs[pack.Raw]); err == nil {
		t.Fatal("the origin can be reached, so the test proves nothing")
	}

	// No restart is needed: containerd reads the directory at each pull.
	writeHosts(t, dir, origin, recipe(t, "mirror", "http://mirror.example.com:5000", "http://"+mirror))
	for form, ref := range refs {
		_, err := n.Pull(ref)
		check(t, err)
		pod, err := n.RunPod(node.PodSpec{Volumes: []node.Volume{{Image: ref, Path: "/model"}}})
		check(t, err)
		wantVolume(t, pod, "main", "/model", wantTree(t, src, form))
	}
	// A peer-to-peer cache serves the blobs of containerd to other nodes, so they must be
	// complete.
	manifest, target := pulledManifest(t, n, refs[pack.Raw])
	for _, blob := range append(manifest.Layers, manifest.Config) {
		st := stat(t, blobPath(n, blob.Digest.Encoded()))
		if st.Size != blob.Size {
			t.Errorf("blob %s of %s has %d bytes in the content store, want %d", blob.Digest, target, st.Size, blob.Size)
		}
	}
	// The pull command reads its own --hosts-dir, not CRI's config_path.
	out, _, err := n.Artifact("pull", "--hosts-dir", dir, refs[pack.Raw])
	check(t, err)
	if !strings.Contains(out, refs[pack.Raw]) {
		t.Errorf("pull printed: %s", out)
	}
}

// With the configuration of docs/kubernetes.md containerd fetches a layer in parts.
func TestOneLayerIsFetchedInParts(t *testing.T) {
	dir := t.TempDir()
	n := node.ForTest(t, node.Options{ContainerdConfig: configPath(dir) + recipe(t, "parts of a layer")})
	ref := n.Registry + "/models/parts:v1"
	big := bytes.Repeat([]byte("0123456789abcdef"), 3<<20) // six parts of 8 MiB
	model := &pack.Artifact{Layers: []pack.Layer{{
		MediaType:   modelspec.MediaTypeModelWeightRaw,
		Data:        big,
		Annotations: map[string]string{modelspec.AnnotationFilepath: "model.gguf"},
	}}}
	_, err := model.Push(t.Context(), n.Registry, "models/parts", "v1")
	check(t, err)

	var mu sync.Mutex
	parts := map[string]bool{}
	forward := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: n.Registry})
	counter := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasSuffix(r.URL.Path, digest.FromBytes(big).String()) && r.Header.Get("Range") != "" {
			mu.Lock()
			parts[r.Header.Get("Range")] = true
			mu.Unlock()
		}
		forward.ServeHTTP(w, r)
	}))
	defer counter.Close()
	const origin = "registry.example.com"
	writeHosts(t, dir, origin, recipe(t, "mirror", "http://mirror.example.com:5000", counter.URL))
	_, path, _ := strings.Cut(ref, "/")
	_, err = n.Pull(origin + "/" + path)
	check(t, err)
	mu.Lock()
	ranges := slices.Collect(maps.Keys(parts))
	mu.Unlock()
	if len(ranges) != 6 {
		t.Errorf("the layer was fetched with the ranges %v, want 6", ranges)
	}
	wantServed(t, n, origin+"/"+path, []treelist.Entry{fileEntry("model.gguf", big)})
}
