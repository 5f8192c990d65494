// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/platforms"
	modelspec "github.com/modelpack/model-spec/specs-go/v1"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/treelist"
)

// soaked is an artifact or image that pods mount during the soak.
type soaked struct {
	ref      string        // with its tag
	target   digest.Digest // of ref
	manifest digest.Digest // of the artifact; "" for a container image
	want     []treelist.Entry
	// refused is the reason if it is always refused; mayConflict means that it is refused
	// while another one with its config is on the node.
	refused     string
	mayConflict bool
	// removals are the removals of this one, and of those that are the same image for CRI.
	removals *windows
}

// refs returns the names for pulling it.
func (a *soaked) refs() []string {
	return []string{a.ref, strings.TrimSuffix(a.ref, ":v1") + "@" + a.target.String()}
}

// small returns the path of its smallest file, which is quick to read.
func (a *soaked) small() (path string) {
	var size int64
	for _, e := range a.want {
		if e.Type == "file" && e.Size > 0 && (path == "" || e.Size < size) {
			path, size = e.Path, e.Size
		}
	}
	return path
}

// below returns the content of a volume with this sub path.
func (a *soaked) below(sub string) (entries []treelist.Entry) {
	for _, e := range a.want {
		if sub == "" {
			entries = append(entries, e)
		} else if rest, ok := strings.CutPrefix(e.Path, sub+"/"); ok {
			e.Path = rest
			entries = append(entries, e)
		}
	}
	return entries
}

// subPaths returns its directories.
func (a *soaked) subPaths() (dirs []string) {
	for _, e := range a.want {
		if e.Type == "dir" {
			dirs = append(dirs, e.Path)
		}
	}
	return dirs
}

// pusher is an artifact or an index.
type pusher interface {
	Push(ctx context.Context, host, repo, tag string) (digest.Digest, error)
}

func pushSoaked(t *testing.T, n *node.Node, name string, p pusher) *soaked {
	t.Helper()
	target, err := p.Push(t.Context(), n.Registry, "soak/"+name, "v1")
	check(t, err)
	return &soaked{ref: n.Registry + "/soak/" + name + ":v1", target: target, manifest: target, removals: &windows{}}
}

// soakedMounted pushes artifacts of every form, some with common layers, and a container
// image.
func soakedMounted(t *testing.T, n *node.Node) (all []*soaked) {
	t.Helper()
	add := func(name string, p pusher, want []treelist.Entry) *soaked {
		a := pushSoaked(t, n, name, p)
		a.want = want
		all = append(all, a)
		return a
	}

	src := writeOwnedModel(t)
	for _, form := range []pack.Form{pack.Raw, pack.Tar, pack.TarGzip, pack.TarZstd, pack.Legacy, pack.LegacyTar} {
		model, err := pack.Model(src, pack.Options{Form: form, Scratch: t.TempDir()})
		check(t, err)
		add(strings.ReplaceAll(string(form), "+", "-"), model, wantTree(t, src, form))
	}
	layers, want := mixture(t)
	add("mixture", &pack.Artifact{ArtifactType: modelspec.ArtifactTypeModelManifest, Name: "mixture", Layers: layers}, want)
	// Two artifacts have a common compressed layer; one of them has it twice.
	big := random(200_005, "big")
	shared := tarLayer(t, modelspec.MediaTypeModelWeightGzip, archiveOf(t, pack.Member{Header: file("big").Header, Data: big}))
	for i, more := range [][]pack.Layer{{shared}, {tarLayer(t, modelspec.MediaTypeModelWeightZstd, archiveOf(t, file("more")))}} {
		name := fmt.Sprintf("shared-%d", i)
		want := []treelist.Entry{fileEntry("big", big)}
		if i > 0 {
			want = append(want, fileEntry("more", []byte("more")))
		}
		add(name, &pack.Artifact{ArtifactType: modelspec.ArtifactTypeModelManifest, Name: name, Layers: append([]pack.Layer{shared}, more...)}, want)
	}

	other := writeModel(t, "README.md")
	model, err := pack.Model(other, pack.Options{})
	check(t, err)
	elsewhere, err := pack.Model(writeModel(t, "config.json"), pack.Options{})
	check(t, err)
	here := platforms.DefaultSpec()
	index := add("index", &pack.Index{Manifests: []pack.IndexEntry{
		{Artifact: elsewhere, Platform: &ocispec.Platform{OS: "linux", Architecture: "s390x"}}, {Artifact: model, Platform: &here},
	}}, wantTree(t, other, pack.Raw))
	index.manifest, err = model.Push(t.Context(), n.Registry, "soak/index", "")
	check(t, err)

	layer, err := pack.TarDir(src)
	check(t, err)
	image, err := pack.Image(ocispec.ImageConfig{}, true, layer)
	check(t, err)
	entries, err := treelist.List(src)
	check(t, err)
	add("image", image, entries).manifest = ""

	// CRI treats these two as one image.
	one := add("one", plain("one"), plainVolume("one"))
	two := add("two", plain("two"), plainVolume("two"))
	one.mayConflict, two.mayConflict, two.removals = true, true, one.removals
	return all
}

// soakedRefused pushes artifacts that are always refused.
func soakedRefused(t *testing.T, n *node.Node) (all []*soaked) {
	t.Helper()
	reasons := refusals(hostile{t, t.TempDir()})
	for i, name := range []string{"dot dot that leaves the volume, tar", "wrong DiffID, gzip", "truncated zstd", "no gzip at all", "encrypted layer"} {
		r := reasons[name]
		bad := r.artifact()
		bad.Name = name // otherwise it might have the same config as another one
		a := pushSoaked(t, n, fmt.Sprintf("bad-%d", i), bad)
		a.refused = strings.ReplaceAll(r.reason, `"`, `\"`) // crictl quotes the runtime's error
		all = append(all, a)
	}
	return all
}

// ownModel pushes a model that only one worker pulls and removes. Its layers also belong to
// other models.
func ownModel(t *testing.T, n *node.Node, number int, form pack.Form) (ref string, want []treelist.Entry) {
	t.Helper()
	src := writeModel(t)
	name := filepath.Join(src, "number")
	check(t, os.WriteFile(name, fmt.Append(nil, number), 0o600))
	check(t, os.Chtimes(name, pack.Created, pack.Created))
	model, err := pack.Model(src, pack.Options{Form: form, Scratch: t.TempDir()})
	check(t, err)
	repository := fmt.Sprintf("own/%d", number)
	_, err = model.Push(t.Context(), n.Registry, repository, "v1")
	check(t, err)
	return n.Registry + "/" + repository + ":v1", wantTree(t, src, form)
}
