// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package nri

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/containerd/nri/pkg/api"
	modelspec "github.com/modelpack/model-spec/specs-go/v1"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
	"github.com/artifact-snapshotter/artifact-snapshotter/blobs"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
)

// layout is an artifact store of CRI-O's: an OCI layout.
type layout struct {
	t    *testing.T
	dir  blobs.Dir
	list []ocispec.Descriptor
}

func newStore(t *testing.T) *layout {
	t.Helper()
	return &layout{t: t, dir: blobs.Dir(filepath.Join(t.TempDir(), "artifacts"))}
}

// add puts an artifact into the store, as a pull does.
func (s *layout) add(a pack.Artifact) ocispec.Descriptor {
	s.t.Helper()
	d, err := a.WriteTo(string(s.dir))
	if err != nil {
		s.t.Fatal(err)
	}
	s.index(d)
	return d
}

func (s *layout) index(d ocispec.Descriptor) {
	s.t.Helper()
	s.list = append(s.list, d)
	b, err := json.Marshal(ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: s.list})
	if err != nil {
		s.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(string(s.dir), "index.json"), b, 0o644); err != nil {
		s.t.Fatal(err)
	}
}

func (s *layout) plugin() *Plugin {
	return &Plugin{Config: Config{Blobs: s.dir, Layouts: []blobs.Dir{s.dir}}}
}

// raw is a layer of one file, whose content is data.
func raw(name, data string) pack.Layer {
	return pack.Layer{MediaType: modelspec.MediaTypeModelWeightRaw, Data: []byte(data), Annotations: map[string]string{modelspec.AnnotationFilepath: name}}
}

func artifactOf(layers ...pack.Layer) pack.Artifact { return pack.Artifact{Layers: layers} }

// mountOf is CRI-O's mount of a blob.
func (s *layout) mountOf(at, data string) *api.Mount {
	return &api.Mount{Type: "bind", Source: s.dir.Path(digest.FromString(data)), Destination: at, Options: []string{"bind", "ro"}}
}

// said is what CRI-O says of what it has mounted.
type said struct {
	path string
	of   ocispec.Descriptor
	data []string // of the layers
}

func (s *layout) annotate(volumes ...said) map[string]string {
	s.t.Helper()
	list := []map[string]any{{"container_path": "/etc/hosts", "host_path": "/var/run/hosts"}}
	for _, v := range volumes {
		for _, data := range v.data {
			list = append(list, map[string]any{
				"container_path": v.path,
				"host_path":      s.dir.Path(digest.FromString(data)),
				"image":          map[string]any{"image": v.of.Digest.Encoded()},
			})
		}
	}
	b, err := json.Marshal(list)
	if err != nil {
		s.t.Fatal(err)
	}
	return map[string]string{volumesAnnotation: string(b)}
}

// wanted is a volume that is to be found, or why there is none.
type wanted struct {
	path, sub string
	of        ocispec.Descriptor
	remove    []string
}

func (s *layout) wantFound(annotations map[string]string, mounts []*api.Mount, want ...wanted) {
	s.t.Helper()
	c := &api.Container{Mounts: mounts, Annotations: annotations}
	got := s.plugin().find(s.t.Context(), crio, &api.PodSandbox{Id: "sandbox"}, c)
	slices.SortFunc(got, func(a, b volume) int { return strings.Compare(a.destination, b.destination) })
	if len(got) != len(want) {
		s.t.Fatalf("found %+v, want %d volumes", got, len(want))
	}
	for i, v := range got {
		slices.Sort(v.remove)
		if v.Refused != nil || v.destination != want[i].path || v.sub != want[i].sub || v.Target.Digest != want[i].of.Digest || !slices.Equal(v.remove, want[i].remove) {
			s.t.Errorf("found %+v, want %+v", v, want[i])
		}
	}
}

// wantRefused wants that none of the mounts is touched, and the reason.
func (s *layout) wantRefused(kind error, annotations map[string]string, mounts []*api.Mount, texts ...string) {
	s.t.Helper()
	c := &api.Container{Mounts: mounts, Annotations: annotations}
	got := s.plugin().find(s.t.Context(), crio, &api.PodSandbox{Id: "sandbox"}, c)
	if len(got) != 1 || got[0].Refused == nil {
		s.t.Fatalf("found %+v, want one that is refused", got)
	}
	err := got[0].Refused
	if !errors.Is(err, kind) {
		s.t.Errorf("%v is not %v", err, kind)
	}
	for _, text := range texts {
		if !strings.Contains(err.Error(), text) {
			s.t.Errorf("%q does not say %q", err, text)
		}
	}
}

func TestAnArtifactIsFoundByItsMounts(t *testing.T) {
	s := newStore(t)
	d := s.add(artifactOf(raw("config.json", "c"), raw("dir/weights", "w")))
	s.add(artifactOf(raw("config.json", "c"), raw("dir/weights", "other")))
	mounts := []*api.Mount{
		{Destination: "/proc", Type: "proc", Source: "proc"},
		s.mountOf("/models/a/dir/weights", "w"),
		{Destination: "/etc/hosts", Type: "bind", Source: "/var/run/hosts", Options: []string{"bind"}},
		s.mountOf("/models/a/config.json", "c"),
	}
	want := wanted{path: "/models/a", of: d, remove: []string{"/models/a/config.json", "/models/a/dir/weights"}}
	s.wantFound(s.annotate(said{"/models/a", d, []string{"c", "w"}}), mounts, want)
	// What CRI-O says is not needed where there is no doubt.
	s.wantFound(nil, mounts, want)
	s.wantFound(map[string]string{volumesAnnotation: "{"}, mounts, want)
	s.wantFound(s.annotate(said{"/models/a", d, []string{"c"}}), mounts, want)
}

func TestSeveralArtifactsAreToldApart(t *testing.T) {
	s := newStore(t)
	a := s.add(artifactOf(raw("config.json", "c"), raw("a", "a")))
	b := s.add(artifactOf(raw("config.json", "c"), raw("b", "b"), raw("again", "b")))
	inner := s.add(artifactOf(raw("config.json", "c")))
	mounts := []*api.Mount{
		s.mountOf("/a/config.json", "c"), s.mountOf("/a/a", "a"),
		s.mountOf("/twice/config.json", "c"), s.mountOf("/twice/a", "a"),
		s.mountOf("/b/config.json", "c"), s.mountOf("/b/b", "b"), s.mountOf("/b/again", "b"),
		s.mountOf("/a/sub/config.json", "c"), // in the volume of another one
	}
	want := []wanted{
		{path: "/a", of: a, remove: []string{"/a/a", "/a/config.json"}},
		{path: "/a/sub", of: inner, remove: []string{"/a/sub/config.json"}},
		{path: "/b", of: b, remove: []string{"/b/again", "/b/b", "/b/config.json"}},
		{path: "/twice", of: a, remove: []string{"/twice/a", "/twice/config.json"}},
	}
	s.wantFound(s.annotate(
		said{"/a", a, []string{"c", "a"}}, said{"/twice", a, []string{"c", "a"}},
		said{"/b", b, []string{"c", "b", "b"}}, said{"/a/sub", inner, []string{"c"}},
	), mounts, want...)
	s.wantFound(nil, mounts, want...)
}

func TestLayersAreNamedAsByCRIO(t *testing.T) {
	s := newStore(t)
	titled := raw("path", "t")
	titled.Annotations[ocispec.AnnotationTitle] = "title"
	empty := raw("path of none", "e")
	empty.Annotations[ocispec.AnnotationTitle] = ""
	legacy := raw("", "l")
	legacy.Annotations = map[string]string{"org.cnai.model.filepath": "legacy"}
	untitled := pack.Layer{MediaType: "application/vnd.cncf.model.weight.v1.tar", Data: []byte("not looked at")}
	d := s.add(artifactOf(titled, empty, legacy, untitled, raw("./dir//unclean", "u")))
	mounts := []*api.Mount{s.mountOf("/model/title", "t"), s.mountOf("/model/dir/unclean", "u")}
	want := wanted{path: "/model", of: d, remove: []string{"/model/dir/unclean", "/model/title"}}
	s.wantFound(s.annotate(said{"/model", d, []string{"t", "u"}}), mounts, want)
	s.wantFound(nil, mounts, want)
}

func TestASubPathIsFoundWhereThereIsNoDoubt(t *testing.T) {
	s := newStore(t)
	d := s.add(artifactOf(raw("config.json", "c"), raw("dir/a", "a"), raw("dir/deep/b", "b"), raw("directory", "x"), raw("alone/in/there", "t")))
	mounts := []*api.Mount{s.mountOf("/sub/a", "a"), s.mountOf("/sub/deep/b", "b")}
	want := wanted{path: "/sub", sub: "dir", of: d, remove: []string{"/sub/a", "/sub/deep/b"}}
	s.wantFound(s.annotate(said{"/sub", d, []string{"a", "b"}}), mounts, want)
	s.wantFound(nil, mounts, want)
	// All below alone is in alone/in, and what is mounted looks the same.
	mounts = []*api.Mount{s.mountOf("/volume/in/there", "t")}
	want = wanted{path: "/volume", sub: "alone", of: d, remove: []string{"/volume/in/there"}}
	s.wantFound(s.annotate(said{"/volume", d, []string{"t"}}), mounts, want)
	s.wantRefused(errdefs.ErrFailedPrecondition, nil, mounts, "may be the directory alone/in of artifact "+d.Digest.String()+" at /volume/in, or the directory alone of")
}

func TestAnAmbiguousSubPathIsRefused(t *testing.T) {
	s := newStore(t)
	d := s.add(artifactOf(raw("one/file", "same"), raw("two/file", "same")))
	s.wantRefused(errdefs.ErrFailedPrecondition, s.annotate(said{"/model", d, []string{"same"}}),
		[]*api.Mount{s.mountOf("/model/file", "same")}, "the directory one of", "the directory two of")
}

func TestArtifactsThatShowTheSameAreNoAmbiguity(t *testing.T) {
	s := newStore(t)
	a := artifactOf(raw("file", "f"))
	d := s.add(a)
	a.Annotations = map[string]string{"packed": "again"}
	again := s.add(a)
	if d.Digest == again.Digest {
		t.Fatal("they are one artifact")
	}
	mounts := []*api.Mount{s.mountOf("/model/file", "f")}
	s.wantFound(nil, mounts, wanted{path: "/model", of: d, remove: []string{"/model/file"}})

	// With another mode it is another volume, and only CRI-O knows.
	layer := raw("file", "f")
	layer.Annotations[modelspec.AnnotationFileMetadata] = `{"name":"file","mode":420,"uid":7,"gid":7,"size":1,"mtime":"2024-02-03T04:05:06Z","typeflag":0}`
	other := s.add(artifactOf(layer))
	s.wantRefused(errdefs.ErrFailedPrecondition, nil, mounts, d.Digest.String(), other.Digest.String())
	for _, d := range []ocispec.Descriptor{d, again, other} {
		s.wantFound(s.annotate(said{"/model", d, []string{"f"}}), mounts, wanted{path: "/model", of: d, remove: []string{"/model/file"}})
	}
	// So it is where two artifacts together look like one.
	both := s.add(artifactOf(raw("file", "f"), raw("sub/file", "f")))
	mounts = append(mounts, s.mountOf("/model/sub/file", "f"))
	s.wantRefused(errdefs.ErrFailedPrecondition, nil, mounts)
	s.wantFound(s.annotate(said{"/model", both, []string{"f", "f"}}), mounts,
		wanted{path: "/model", of: both, remove: []string{"/model/file", "/model/sub/file"}})
}

func TestWhatIsNotExactlyAnArtifactIsRefused(t *testing.T) {
	s := newStore(t)
	d := s.add(artifactOf(raw("config.json", "c"), raw("weights", "w")))
	all := []*api.Mount{s.mountOf("/model/config.json", "c"), s.mountOf("/model/weights", "w")}
	annotated := s.annotate(said{"/model", d, []string{"c", "w"}})
	elsewhere := s.annotate(said{"/elsewhere", d, []string{"c", "w"}})
	unknown := s.annotate(said{"/model", ocispec.Descriptor{Digest: digest.FromString("unknown")}, []string{"c", "w"}})
	for name, tt := range map[string]struct {
		kind        error
		annotations map[string]string
		mounts      []*api.Mount
		text        string
	}{
		"a layer is missing":           {errdefs.ErrNotFound, annotated, all[:1], "no artifact in CRI-O's store has exactly the layers"},
		"a layer is missing, unsaid":   {errdefs.ErrNotFound, nil, all[:1], "no artifact"},
		"a layer too many":             {errdefs.ErrNotFound, nil, append(slices.Clone(all), s.mountOf("/model/more", "c")), "(3, of which"},
		"a layer at another place":     {errdefs.ErrNotFound, annotated, []*api.Mount{all[0], s.mountOf("/model/weight", "w")}, "no artifact"},
		"a layer of another content":   {errdefs.ErrNotFound, nil, []*api.Mount{all[0], s.mountOf("/model/weights", "x")}, "no artifact"},
		"at another path than is said": {errdefs.ErrNotFound, elsewhere, all, "no artifact"},
		"said to be one that is gone":  {errdefs.ErrNotFound, unknown, all, "no blob sha256:"},
		"two layers with one name":     {errdefs.ErrInvalidArgument, annotated, append(slices.Clone(all), s.mountOf("/model/weights", "c")), "2 mounts at /model/weights"},
		"hidden by another mount":      {errdefs.ErrInvalidArgument, annotated, append(slices.Clone(all), &api.Mount{Destination: "/model/weights/", Source: "/x"}), "2 mounts at /model/weights"},
		"something is at the path":     {errdefs.ErrInvalidArgument, annotated, append(slices.Clone(all), &api.Mount{Destination: "/model/", Source: "/x", Type: "bind"}), "something else is mounted at /model"},
		"another store": {errdefs.ErrFailedPrecondition, annotated, []*api.Mount{{
			Type: "bind", Destination: "/model/x", Source: "/other/artifacts/blobs/sha256/" + d.Digest.Encoded(),
		}}, "blob_roots"},
	} {
		t.Run(name, func(t *testing.T) {
			s.t = t
			s.wantRefused(tt.kind, tt.annotations, tt.mounts, tt.text)
		})
	}
}

func TestTheReasonOfARefusedArtifactIsSaid(t *testing.T) {
	s := newStore(t)
	d := s.add(artifactOf(raw("../../etc/passwd", "p")))
	// CRI-O keeps the name in the volume.
	s.wantRefused(errdefs.ErrInvalidArgument, s.annotate(said{"/model", d, []string{"p"}}),
		[]*api.Mount{s.mountOf("/model/etc/passwd", "p")}, `contains ".."`)
}

func TestAnImageThatCRIOTakesForAnArtifactIsLeftAlone(t *testing.T) {
	s := newStore(t)
	image := artifactOf(raw("file", "f"))
	image.ConfigType, image.ArtifactType, image.Config = ocispec.MediaTypeImageConfig, "application/example", []byte("{}")
	d := s.add(image)
	mounts := []*api.Mount{s.mountOf("/model/file", "f")}
	s.wantFound(s.annotate(said{"/model", d, []string{"f"}}), mounts)
	// It may be mounted beside an artifact, with a blob that both have.
	other := s.add(artifactOf(raw("other", "o"), raw("same", "f")))
	mounts = append(mounts, s.mountOf("/other/other", "o"), s.mountOf("/other/same", "f"))
	s.wantFound(s.annotate(said{"/model", d, []string{"f"}}, said{"/other", other, []string{"o", "f"}}), mounts,
		wanted{path: "/other", of: other, remove: []string{"/other/other", "/other/same"}})
}

func TestABlobThatThePodMountsByAnotherVolumeIsLeftAlone(t *testing.T) {
	s := newStore(t)
	d := s.add(artifactOf(raw("file", "f"), raw("dir/more", "m")))
	none := ocispec.Descriptor{Digest: ":"} // encoded it is ""
	mounts := []*api.Mount{s.mountOf("/model/file", "f"), s.mountOf("/host/file", "f"), s.mountOf("/model/dir/more", "m")}
	s.wantFound(s.annotate(said{"/host/file", none, []string{"f"}}, said{"/model", d, []string{"f", "m"}}), mounts,
		wanted{path: "/model", of: d, remove: []string{"/model/dir/more", "/model/file"}})
	s.wantFound(s.annotate(said{"/host/file", none, []string{"f"}}), mounts[1:2])
	// Without what CRI-O says nobody can tell.
	s.wantRefused(errdefs.ErrNotFound, nil, mounts, "no artifact")
}

func TestANestedIndexIsResolved(t *testing.T) {
	s := newStore(t)
	a := artifactOf(raw("file", "f"))
	x := pack.Index{Manifests: []pack.IndexEntry{{Artifact: &a}}}
	d, err := x.WriteTo(string(s.dir))
	if err != nil {
		t.Fatal(err)
	}
	s.index(d)
	manifest, err := a.WriteTo(string(s.dir))
	if err != nil {
		t.Fatal(err)
	}
	s.wantFound(nil, []*api.Mount{s.mountOf("/model/file", "f")}, wanted{path: "/model", of: manifest, remove: []string{"/model/file"}})
}

func TestOtherMountsOfBlobsAreNoneOfCRIOs(t *testing.T) {
	s := newStore(t)
	s.add(artifactOf(raw("file", "f")))
	hex := digest.FromString("f").Encoded()
	s.wantFound(nil, []*api.Mount{
		{Type: "bind", Destination: "/a", Source: "/somewhere/blobs/sha256/" + hex},
		{Type: "bind", Destination: "/b", Source: string(s.dir) + "/blobs/sha256/" + hex[:63]},
		{Type: "bind", Destination: "/c", Source: string(s.dir) + "/blobs/md5/" + hex},
		{Type: "bind", Destination: "/d", Source: string(s.dir) + "/blobs/sha256/../../index.json"},
		{Type: "tmpfs", Destination: "/e", Source: s.dir.Path(digest.FromString("f"))},
	})
}

func TestAStoreIsFoundByWhateverPath(t *testing.T) {
	s := newStore(t)
	d := s.add(artifactOf(raw("file", "f")))
	link := filepath.Join(t.TempDir(), "artifacts")
	if err := os.Symlink(string(s.dir), link); err != nil {
		t.Fatal(err)
	}
	m := s.mountOf("/model/file", "f")
	m.Source = blobs.Dir(link).Path(digest.FromString("f"))
	s.wantFound(nil, []*api.Mount{m}, wanted{path: "/model", of: d, remove: []string{"/model/file"}})
}

// Names and digests are the artifact's, and its author may want the search to take long.
func TestTheSearchIsBounded(t *testing.T) {
	var layers []artifact.Layer
	var binds []bind
	blob := digest.FromString("same")
	for i := range 3000 {
		name := fmt.Sprintf("%s%d", strings.Repeat("a/", 100), i)
		layers = append(layers, artifact.Layer{Descriptor: ocispec.Descriptor{Digest: blob, Annotations: map[string]string{ocispec.AnnotationTitle: name}}})
		binds = append(binds, bind{destination: "/" + path.Join("m", name+"x"), blob: blob})
	}
	binds[0].destination = "/m/" + strings.Repeat("a/", 100) + "0"
	c := newCandidate(&artifact.Artifact{Manifest: ocispec.Descriptor{Digest: blob}, Layers: layers}, nil)
	candidates := slices.Repeat([]candidate{c}, 50)
	s := newSearch(t.Context(), binds, candidates)
	if groups, err := s.resolve(); !errors.Is(err, errTooManySteps) {
		t.Errorf("found %v, %v", groups, err)
	}
	if s.steps > maxSteps+len(layers) { // the last one may be for all layers of a candidate
		t.Errorf("it took %d steps", s.steps)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	s = newSearch(ctx, binds, candidates)
	if groups, err := s.resolve(); !errors.Is(err, errBusy) || s.steps > lookEvery+len(layers) {
		t.Errorf("nobody waits: found %v, %v after %d steps", groups, err, s.steps)
	}
}

// TestEveryMountIsExplainedOnce packs artifacts of few names and blobs, mounts some of
// them, and wants to have back what covers each mount once.
func TestEveryMountIsExplainedOnce(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	found := 0
	for range 5000 {
		data := make([]byte, 1+r.IntN(16))
		for i := range data {
			data[i] = byte(r.Uint32())
		}
		found += resolveRandom(t, data, uint8(r.Uint32()))
	}
	if found < 500 {
		t.Errorf("only %d times something was found", found)
	}
}

func FuzzResolve(f *testing.F) {
	f.Add([]byte("\x01a\x02b\x00c"), uint8(1))
	f.Fuzz(func(t *testing.T, data []byte, mounted uint8) { resolveRandom(t, data, mounted) })
}

// resolveRandom returns how many groups are found.
func resolveRandom(t *testing.T, data []byte, mounted uint8) int {
	names := []string{"a", "b", "a/a", "a/b", "b/a", "b/a/a", "./a", "a//b", "../a"}
	var all []*artifact.Artifact
	a := &artifact.Artifact{}
	for _, b := range data {
		name, blob := names[int(b)%len(names)], digest.FromString(fmt.Sprint(b/16%4))
		a.Layers = append(a.Layers, artifact.Layer{
			Descriptor: ocispec.Descriptor{Digest: blob, Annotations: map[string]string{ocispec.AnnotationTitle: name}},
		})
		if b%5 == 0 || len(a.Layers) > 4 {
			a.Manifest.Digest = digest.FromString(fmt.Sprint("manifest ", len(all)))
			all = append(all, a)
			a = &artifact.Artifact{}
		}
		if len(all) > 4 {
			break
		}
	}
	var candidates []candidate
	for _, a := range all {
		candidates = append(candidates, newCandidate(a, nil))
	}
	var binds []bind
	seen := map[string]bool{}
	for i, c := range candidates {
		if mounted>>i&1 == 0 {
			continue
		}
		for _, l := range c.under("") {
			at := path.Join([]string{"/m", "/n", "/m/a"}[i%3], l.name)
			if seen[at] {
				return 0
			}
			seen[at] = true
			binds = append(binds, bind{destination: at, blob: l.blob})
		}
	}
	if len(binds) == 0 {
		return 0
	}
	groups, err := resolve(t.Context(), binds, candidates)
	if err != nil {
		if errdefs.IsNotFound(err) {
			t.Errorf("%v, but they are mounted", err)
		}
		return 0
	}
	times := make([]int, len(binds))
	for _, g := range groups {
		for n, l := range g.under(g.sub) {
			if b := binds[g.binds[n]]; b.blob != l.blob || b.destination != path.Join(g.path, l.name) {
				t.Errorf("layer %+v is %+v", l, b)
			}
			times[g.binds[n]]++
		}
	}
	for i, n := range times {
		if n != 1 {
			t.Errorf("mount %+v is explained %d times", binds[i], n)
		}
	}
	return len(groups)
}
