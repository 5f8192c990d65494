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
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/nri/pkg/api"
	modelspec "github.com/modelpack/model-spec/specs-go/v1"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
	"github.com/artifact-snapshotter/artifact-snapshotter/blobs"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
)

// layout is an artifact store of CRI-O: an OCI layout, of which only the blobs are read.
type layout struct {
	t   *testing.T
	dir blobs.Dir
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
	return d
}

func (s *layout) plugin() *Plugin {
	return &Plugin{Config: Config{Blobs: s.dir, Layouts: []blobs.Dir{s.dir}}}
}

// raw returns a layer that is one file with that content.
func raw(name, data string) pack.Layer {
	return pack.Layer{MediaType: modelspec.MediaTypeModelWeightRaw, Data: []byte(data), Annotations: map[string]string{modelspec.AnnotationFilepath: name}}
}

func artifactOf(layers ...pack.Layer) pack.Artifact { return pack.Artifact{Layers: layers} }

// mountOf returns CRI-O's mount of a blob with that content.
func (s *layout) mountOf(at, data string) *api.Mount {
	return &api.Mount{Type: "bind", Source: s.dir.Path(digest.FromString(data)), Destination: at, Options: []string{"bind", "ro"}}
}

// listing is a volume in CRI-O's annotation.
type listing struct {
	path string
	of   ocispec.Descriptor
	data []string // of the mounted layers
}

// annotate returns the annotations of a container as CRI-O writes them.
func (s *layout) annotate(volumes ...listing) map[string]string {
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

// wanted is a volume that the plugin must find.
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

// wantRefused fails the test unless no mount is replaced, for a reason of that kind,
// if it is not nil, with the texts.
func (s *layout) wantRefused(kind error, annotations map[string]string, mounts []*api.Mount, texts ...string) {
	s.t.Helper()
	c := &api.Container{Mounts: mounts, Annotations: annotations}
	got := s.plugin().find(s.t.Context(), crio, &api.PodSandbox{Id: "sandbox"}, c)
	if len(got) != 1 || got[0].Refused == nil {
		s.t.Fatalf("found %+v, want one that is refused", got)
	}
	err := got[0].Refused
	if kind != nil && !errors.Is(err, kind) {
		s.t.Errorf("%v is not %v", err, kind)
	}
	for _, text := range texts {
		if !strings.Contains(err.Error(), text) {
			s.t.Errorf("%q does not say %q", err, text)
		}
	}
}

func TestTheAnnotationNamesTheArtifactAndItsMountsAreReplaced(t *testing.T) {
	s := newStore(t)
	d := s.add(artifactOf(raw("config.json", "c"), raw("dir/weights", "w")))
	same := s.add(artifactOf(raw("config.json", "c"), raw("dir/weights", "w"), pack.Layer{MediaType: "application/vnd.cncf.model.weight.v1.tar", Data: []byte("unnamed")}))
	mounts := []*api.Mount{
		{Destination: "/proc", Type: "proc", Source: "proc"},
		s.mountOf("/models/a/dir/weights", "w"),
		{Destination: "/etc/hosts", Type: "bind", Source: "/var/run/hosts", Options: []string{"bind"}},
		s.mountOf("/models/a/config.json", "c"),
	}
	for _, of := range []ocispec.Descriptor{d, same} {
		s.wantFound(s.annotate(listing{"/models/a", of, []string{"c", "w"}}), mounts,
			wanted{path: "/models/a", of: of, remove: []string{"/models/a/config.json", "/models/a/dir/weights"}})
	}
	s.wantFound(s.annotate(listing{"/models/a/", d, []string{"c", "w"}}), mounts,
		wanted{path: "/models/a", of: d, remove: []string{"/models/a/config.json", "/models/a/dir/weights"}})
}

func TestWithoutTheAnnotationAVolumeIsRefused(t *testing.T) {
	s := newStore(t)
	d := s.add(artifactOf(raw("config.json", "c"), raw("dir/weights", "w")))
	mounts := []*api.Mount{s.mountOf("/model/config.json", "c"), s.mountOf("/model/dir/weights", "w")}
	s.wantRefused(errdefs.ErrNotFound, s.annotate(listing{"/model", d, []string{"c"}}), mounts, "not exactly the named layers of artifact "+d.Digest.String())
	for _, annotations := range []map[string]string{nil, {volumesAnnotation: "{"}, s.annotate()} {
		s.wantRefused(errdefs.ErrNotFound, annotations, mounts, "CRI-O mounts a layer at /model/config.json", volumesAnnotation)
	}
}

func TestAForgedAnnotationExposesNoArtifactThatCRIODoesNotMount(t *testing.T) {
	s := newStore(t)
	own := s.add(artifactOf(raw("config.json", "c"), raw("notes", "n")))
	for name, secret := range map[string]ocispec.Descriptor{
		"another content":    s.add(artifactOf(raw("config.json", "secret"), raw("notes", "n"))),
		"one layer more":     s.add(artifactOf(raw("config.json", "c"), raw("notes", "n"), raw("secret", "secret"))),
		"another name":       s.add(artifactOf(raw("config.json", "c"), raw("secret/notes", "n"))),
		"one layer twice":    s.add(artifactOf(raw("config.json", "c"), raw("notes", "n"), raw("notes", "n"))),
		"in a directory":     s.add(artifactOf(raw("a/config.json", "c"), raw("a/notes", "n"), raw("a/secret", "secret"))),
		"in two of them":     s.add(artifactOf(raw("a/config.json", "c"), raw("b/notes", "n"))),
		"one layer less":     s.add(artifactOf(raw("config.json", "c"))),
		"no layer in common": s.add(artifactOf(raw("secret", "secret"))),
	} {
		t.Run(name, func(t *testing.T) {
			s.t = t
			mounts := []*api.Mount{s.mountOf("/model/config.json", "c"), s.mountOf("/model/notes", "n")}
			for _, forged := range []map[string]string{
				s.annotate(listing{"/model", secret, []string{"c", "n"}}),
				s.annotate(listing{"/model", secret, []string{"c"}}),
				s.annotate(listing{"/model", secret, []string{"c", "n", "secret"}}),
				s.annotate(listing{"/model", own, []string{"c", "n"}}, listing{"/model", secret, []string{"c", "n"}}),
			} {
				s.wantRefused(nil, forged, mounts)
			}
		})
	}
}

func TestAPodWithTheAnnotationOfCRIOIsRefused(t *testing.T) {
	s := newStore(t)
	d := s.add(artifactOf(raw("file", "f")))
	annotations := s.annotate(listing{"/model", d, []string{"f"}})
	c := &api.Container{Mounts: []*api.Mount{s.mountOf("/model/file", "f")}, Annotations: annotations}
	got := s.plugin().find(t.Context(), crio, &api.PodSandbox{Id: "sandbox", Annotations: annotations}, c)
	if len(got) != 1 || !errdefs.IsInvalidArgument(got[0].Refused) || !strings.Contains(got[0].Refused.Error(), "the pod has the annotation "+volumesAnnotation) {
		t.Errorf("found %+v, want one that is refused", got)
	}
	// A pod without artifacts may have the annotation.
	c.Mounts = []*api.Mount{{Type: "bind", Source: "/etc", Destination: "/etc"}}
	if got := s.plugin().find(t.Context(), crio, &api.PodSandbox{Id: "sandbox", Annotations: annotations}, c); len(got) != 0 {
		t.Errorf("found %+v, want nothing", got)
	}
}

func TestSeveralArtifactsInOneContainerAreDistinguished(t *testing.T) {
	s := newStore(t)
	a := s.add(artifactOf(raw("config.json", "c"), raw("a", "a")))
	b := s.add(artifactOf(raw("config.json", "c"), raw("b", "b"), raw("again", "b")))
	inner := s.add(artifactOf(raw("config.json", "c")))
	mounts := []*api.Mount{
		s.mountOf("/a/config.json", "c"), s.mountOf("/a/a", "a"),
		s.mountOf("/twice/config.json", "c"), s.mountOf("/twice/a", "a"),
		s.mountOf("/b/config.json", "c"), s.mountOf("/b/b", "b"), s.mountOf("/b/again", "b"),
		s.mountOf("/a/sub/config.json", "c"), // a volume in another one
	}
	s.wantFound(s.annotate(
		listing{"/a", a, []string{"c", "a"}}, listing{"/twice", a, []string{"c", "a"}},
		listing{"/b", b, []string{"c", "b", "b"}}, listing{"/a/sub", inner, []string{"c"}},
	), mounts,
		wanted{path: "/a", of: a, remove: []string{"/a/a", "/a/config.json"}},
		wanted{path: "/a/sub", of: inner, remove: []string{"/a/sub/config.json"}},
		wanted{path: "/b", of: b, remove: []string{"/b/again", "/b/b", "/b/config.json"}},
		wanted{path: "/twice", of: a, remove: []string{"/twice/a", "/twice/config.json"}},
	)
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
	s.wantFound(s.annotate(listing{"/model", d, []string{"t", "u"}}), mounts,
		wanted{path: "/model", of: d, remove: []string{"/model/dir/unclean", "/model/title"}})
}

func TestASubPathIsFoundByTheMounts(t *testing.T) {
	s := newStore(t)
	d := s.add(artifactOf(raw("config.json", "c"), raw("dir/a", "a"), raw("dir/deep/b", "b"), raw("directory", "x"), raw("alone/in/there", "t"), raw("odd//u", "u")))
	for _, tt := range []struct {
		sub    string
		data   []string
		mounts []string
	}{
		{"dir", []string{"a", "b"}, []string{"a", "deep/b"}},
		{"dir/deep", []string{"b"}, []string{"b"}},
		{"alone", []string{"t"}, []string{"in/there"}},
		{"alone/in", []string{"t"}, []string{"there"}},
		{"odd", []string{"u"}, []string{"u"}},
	} {
		want := wanted{path: "/volume", sub: tt.sub, of: d}
		var mounts []*api.Mount
		for i, at := range tt.mounts {
			mounts = append(mounts, s.mountOf("/volume/"+at, tt.data[i]))
			want.remove = append(want.remove, "/volume/"+at)
		}
		s.wantFound(s.annotate(listing{"/volume", d, tt.data}), mounts, want)
	}
}

func TestAnAmbiguousSubPathIsRefused(t *testing.T) {
	s := newStore(t)
	d := s.add(artifactOf(raw("one/file", "same"), raw("two/file", "same")))
	s.wantRefused(errdefs.ErrFailedPrecondition, s.annotate(listing{"/model", d, []string{"same"}}),
		[]*api.Mount{s.mountOf("/model/file", "same")}, `the directory "one" or "two" of artifact `+d.Digest.String())
}

func TestMountsThatAreNotExactlyAnArtifactAreRefused(t *testing.T) {
	s := newStore(t)
	d := s.add(artifactOf(raw("config.json", "c"), raw("weights", "w")))
	inner := s.add(artifactOf(raw("weights", "w")))

	titled := func(title, data string) pack.Layer {
		l := raw("path of "+data, data)
		l.Annotations[ocispec.AnnotationTitle] = title
		return l
	}
	onVolume := s.add(artifactOf(titled(".", "c"), raw("weights", "w")))
	long := s.add(artifactOf(titled(strings.Repeat("a/", 2048)+"a", "l"), raw("weights", "w")))
	all := []*api.Mount{s.mountOf("/model/config.json", "c"), s.mountOf("/model/weights", "w")}
	annotated := s.annotate(listing{"/model", d, []string{"c", "w"}})
	elsewhere := s.annotate(listing{"/elsewhere", d, []string{"c", "w"}})
	unknown := s.annotate(listing{"/model", ocispec.Descriptor{Digest: digest.FromString("unknown")}, []string{"c", "w"}})
	other := &api.Mount{Type: "bind", Destination: "/model/x", Source: "/other/artifacts/blobs/sha256/" + d.Digest.Encoded()}
	for name, tt := range map[string]struct {
		kind        error
		annotations map[string]string
		mounts      []*api.Mount
		text        string
	}{
		"a layer is missing":          {errdefs.ErrNotFound, annotated, all[:1], "not exactly the named layers"},
		"a layer too many":            {errdefs.ErrNotFound, annotated, append(slices.Clone(all), s.mountOf("/model/more", "c")), "CRI-O mounts a layer at /model/more"},
		"a layer too many, listed":    {errdefs.ErrNotFound, s.annotate(listing{"/model", d, []string{"c", "w", "c"}}), append(slices.Clone(all), s.mountOf("/model/more", "c")), "not exactly"},
		"a layer at another place":    {errdefs.ErrNotFound, annotated, []*api.Mount{all[0], s.mountOf("/model/weight", "w")}, "not exactly"},
		"a layer of another content":  {errdefs.ErrNotFound, annotated, []*api.Mount{all[0], s.mountOf("/model/weights", "x")}, "not exactly"},
		"at another path than listed": {errdefs.ErrNotFound, elsewhere, all, "not exactly"},
		"a layer over the volume":     {errdefs.ErrInvalidArgument, s.annotate(listing{"/model", onVolume, []string{"c", "w"}}), []*api.Mount{s.mountOf("/model", "c"), all[1]}, "something else is mounted at /model"},
		"a layer with a long name":    {errdefs.ErrInvalidArgument, s.annotate(listing{"/model", long, []string{"w"}}), all[1:], "has a name of 4097 bytes"},
		"the listed artifact is gone": {errdefs.ErrNotFound, unknown, all, "no blob sha256:"},
		"two layers with one name":    {errdefs.ErrInvalidArgument, s.annotate(listing{"/model", d, []string{"c", "w"}}), append(slices.Clone(all), s.mountOf("/model/weights", "c")), "2 mounts at /model/weights"},
		"hidden by another mount":     {errdefs.ErrInvalidArgument, annotated, append(slices.Clone(all), &api.Mount{Destination: "/model/weights/", Source: "/x"}), "2 mounts at /model/weights"},
		"something is at the path":    {errdefs.ErrInvalidArgument, annotated, append(slices.Clone(all), &api.Mount{Destination: "/model/", Source: "/x", Type: "bind"}), "something else is mounted at /model"},
		"two volumes at one path": {errdefs.ErrInvalidArgument, s.annotate(listing{"/model", d, []string{"c", "w"}}, listing{"/model", s.add(artifactOf(raw("more", "m"))), []string{"m"}}),
			append(slices.Clone(all), s.mountOf("/model/more", "m")), "something else is mounted at /model"},
		"a layer in two volumes": {errdefs.ErrFailedPrecondition, s.annotate(listing{"/", s.add(artifactOf(raw("model/weights", "w"))), []string{"w"}}, listing{"/model", inner, []string{"w"}}),
			all[1:], "belongs to two volumes"},
		"another store":                  {errdefs.ErrFailedPrecondition, annotated, []*api.Mount{other}, "blob_roots"},
		"another store, and a known one": {errdefs.ErrFailedPrecondition, annotated, append(slices.Clone(all), other), "blob_roots"},
	} {
		t.Run(name, func(t *testing.T) {
			s.t = t
			s.wantRefused(tt.kind, tt.annotations, tt.mounts, tt.text)
		})
	}
}

func TestTheErrorSaysWhyAnArtifactIsRefused(t *testing.T) {
	s := newStore(t)
	d := s.add(artifactOf(raw("../../etc/passwd", "p")))
	// CRI-O mounts such a name in the volume.
	s.wantRefused(errdefs.ErrInvalidArgument, s.annotate(listing{"/model", d, []string{"p"}}),
		[]*api.Mount{s.mountOf("/model/etc/passwd", "p")}, `contains ".."`)
}

func TestAnImageThatCRIOMountsAsAnArtifactIsLeftAlone(t *testing.T) {
	s := newStore(t)
	image := artifactOf(raw("file", "f"))
	image.ConfigType, image.ArtifactType, image.Config = ocispec.MediaTypeImageConfig, "application/example", []byte("{}")
	d := s.add(image)
	mounts := []*api.Mount{s.mountOf("/model/file", "f")}
	s.wantFound(s.annotate(listing{"/model", d, []string{"f"}}), mounts)
	// The same blob is in an artifact that is mounted beside it.
	other := s.add(artifactOf(raw("other", "o"), raw("same", "f")))
	mounts = append(mounts, s.mountOf("/other/other", "o"), s.mountOf("/other/same", "f"))
	s.wantFound(s.annotate(listing{"/model", d, []string{"f"}}, listing{"/other", other, []string{"o", "f"}}), mounts,
		wanted{path: "/other", of: other, remove: []string{"/other/other", "/other/same"}})
}

func TestABlobThatThePodMountsByAnotherVolumeIsLeftAlone(t *testing.T) {
	s := newStore(t)
	d := s.add(artifactOf(raw("file", "f"), raw("dir/more", "m")))
	none := ocispec.Descriptor{Digest: ":"} // encoded it is ""
	mounts := []*api.Mount{s.mountOf("/model/file", "f"), s.mountOf("/host/file", "f"), s.mountOf("/model/dir/more", "m")}
	s.wantFound(s.annotate(listing{"/host/file", none, []string{"f"}}, listing{"/model", d, []string{"f", "m"}}), mounts,
		wanted{path: "/model", of: d, remove: []string{"/model/dir/more", "/model/file"}})
	s.wantFound(s.annotate(listing{"/host/file", none, []string{"f"}}), mounts[1:2])
}

func TestAnIndexIsResolvedToTheManifestOfThisPlatform(t *testing.T) {
	s := newStore(t)
	a := artifactOf(raw("file", "f"))
	x := pack.Index{Manifests: []pack.IndexEntry{{Artifact: &a}}}
	d, err := x.WriteTo(string(s.dir))
	if err != nil {
		t.Fatal(err)
	}
	s.wantFound(s.annotate(listing{"/model", d, []string{"f"}}), []*api.Mount{s.mountOf("/model/file", "f")},
		wanted{path: "/model", of: s.add(a), remove: []string{"/model/file"}})
}

func TestMountsOfOtherFilesAreLeftAlone(t *testing.T) {
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

func TestAStoreMayBeReachedThroughASymbolicLink(t *testing.T) {
	s := newStore(t)
	d := s.add(artifactOf(raw("file", "f")))
	link := filepath.Join(t.TempDir(), "artifacts")
	if err := os.Symlink(string(s.dir), link); err != nil {
		t.Fatal(err)
	}
	s.dir = blobs.Dir(link)
	annotations, m := s.annotate(listing{"/model", d, []string{"f"}}), s.mountOf("/model/file", "f")
	target, err := os.Readlink(link)
	if err != nil {
		t.Fatal(err)
	}
	s.dir = blobs.Dir(target)
	s.wantFound(annotations, []*api.Mount{m}, wanted{path: "/model", of: d, remove: []string{"/model/file"}})
}

// The artifact's author chooses names and digests, and could try to make the match slow.
func TestAnArtifactWithManySubPathsIsMatchedInTime(t *testing.T) {
	s := newStore(t)
	var layers []pack.Layer
	var mounts []*api.Mount
	var data []string
	for i := range 2000 {
		name := fmt.Sprintf("%s%d", strings.Repeat("a/", 100), i)
		layers = append(layers, raw(name, "same"))
		mounts, data = append(mounts, s.mountOf("/m/"+name+"x", "same")), append(data, "same")
	}
	annotations := s.annotate(listing{"/m", s.add(artifactOf(layers...)), data})
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	find := func() error {
		got := s.plugin().find(ctx, crio, &api.PodSandbox{Id: "sandbox"}, &api.Container{Mounts: mounts, Annotations: annotations})
		if len(got) != 1 {
			t.Fatalf("found %+v, want one that is refused", got)
		}
		return got[0].Refused
	}
	if err := find(); !errdefs.IsNotFound(err) {
		t.Errorf("%v, want ErrNotFound", err)
	}
	cancel()
	if err := find(); !errors.Is(err, errBusy) {
		t.Errorf("%v, want the match to end with the request", err)
	}
}

func TestOnlyWhatCRIOMountsIsFound(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	found, refused := 0, 0
	for range 600 {
		data := make([]byte, 1+r.IntN(12))
		for i := range data {
			data[i] = byte(r.Uint32())
		}
		f, ok := matchRandom(t, data, byte(r.Uint32()), r.IntN(4) == 0)
		switch {
		case ok && f > 0:
			found++
		case !ok:
			refused++
		}
	}
	if found < 60 || refused < 60 {
		t.Errorf("volumes were found %d times and refused %d times, which tests too little", found, refused)
	}
}

func FuzzMatch(f *testing.F) {
	f.Add([]byte("\x01a\x02b\x00c"), byte(1), false)
	f.Fuzz(func(t *testing.T, data []byte, choice byte, forged bool) { matchRandom(t, data, choice, forged) })
}

// crioWould returns the mounts that CRI-O makes for a sub path of an artifact
// (server/container_create_linux.go); nil if it refuses.
func crioWould(a *artifact.Artifact, at, sub string) (mounts []place) {
	for _, l := range a.Layers {
		name := l.Descriptor.Annotations[ocispec.AnnotationTitle]
		if name == "" {
			continue
		}
		if sub != "" {
			if !strings.HasPrefix(name, sub+"/") {
				continue
			}
			name = strings.TrimPrefix(name, sub+"/")
		}
		// SecureJoin: these directories do not exist on the node, so it follows no symlink.
		mounts = append(mounts, place{path.Join(at, path.Join("/", name)), l.Descriptor.Digest})
	}
	return mounts
}

// matchRandom packs up to two artifacts of few names and blobs, mounts both as CRI-O would, and
// returns how many volumes are found, and false if they are refused. If forged, the annotation
// names the other artifact.
func matchRandom(t *testing.T, data []byte, choice byte, forged bool) (int, bool) {
	names := []string{"a", "b", "a/a", "a/b", "b/a", "b/a/a", "./a", "a//b", "c", ""}
	subs := []string{"", "", "", "a", "b", "b/a"}
	s := &layout{t: t, dir: blobs.Dir(t.TempDir())}
	var volumes []crioVolume
	var artifacts []*artifact.Artifact
	var wants [][]place
	var wantSubs []string
	c := &api.Container{}
	var entries []crioMount
	for i, part := range [][]byte{data[:len(data)/2], data[len(data)/2:]} {
		var layers []pack.Layer
		for n, b := range part {
			l := raw("", string('a'+rune(b/16%4)))
			l.Annotations = map[string]string{modelspec.AnnotationFilepath: fmt.Sprint(n)}
			l.Annotations[ocispec.AnnotationTitle] = names[int(b)%len(names)]
			layers = append(layers, l)
		}
		if len(layers) == 0 {
			continue
		}
		d := s.add(artifactOf(layers...))
		a, err := artifact.Read(t.Context(), s.dir, d)
		if err != nil {
			return 0, true // two files of one path, say
		}
		sub := subs[int(choice>>(4*i))%len(subs)]
		v := crioVolume{[]string{"/m", "/m/a"}[i], d.Digest.Encoded()}
		mounts := crioWould(a, v.path, sub)
		if len(mounts) == 0 {
			continue
		}
		volumes, artifacts, wants, wantSubs = append(volumes, v), append(artifacts, a), append(wants, mounts), append(wantSubs, sub)
		for _, m := range mounts {
			c.Mounts = append(c.Mounts, &api.Mount{Type: "bind", Source: s.dir.Path(m.blob), Destination: m.path})
		}
	}
	for i, v := range volumes {
		if forged {
			v.hex = volumes[len(volumes)-1-i].hex
		}
		for _, m := range wants[i] {
			e := crioMount{ContainerPath: v.path, HostPath: s.dir.Path(m.blob)}
			e.Image.Image = v.hex
			entries = append(entries, e)
		}
	}
	b, err := json.Marshal(entries)
	if err != nil {
		t.Fatal(err)
	}
	c.Annotations = map[string]string{volumesAnnotation: string(b)}
	found := s.plugin().find(t.Context(), crio, &api.PodSandbox{Id: "sandbox"}, c)
	replaced := map[string]bool{}
	for _, v := range found {
		if v.Refused != nil {
			return 0, false
		}
		i := slices.IndexFunc(volumes, func(w crioVolume) bool { return w.path == v.destination })
		if !forged && (v.Target.Digest != artifacts[i].Manifest.Digest || v.sub != wantSubs[i]) {
			t.Errorf("found the directory %q of %s, but CRI-O has mounted %q of %s", v.sub, v.Target.Digest, wantSubs[i], artifacts[i].Manifest.Digest)
		}
		// Even with a forged annotation: CRI-O has mounted every named layer in this container.
		for _, a := range artifacts {
			if a.Manifest.Digest != v.Target.Digest {
				continue
			}
			for _, l := range crioWould(a, v.destination, v.sub) {
				if !slices.Contains(slices.Concat(wants...), l) {
					t.Errorf("layer %v is in the volume, but CRI-O has mounted only %v", l, wants)
				}
			}
		}
		for _, at := range v.remove {
			if replaced[at] {
				t.Errorf("the mount at %s is removed twice", at)
			}
			replaced[at] = true
		}
	}
	if len(replaced) != len(c.Mounts) {
		t.Errorf("%d of %d mounts are replaced", len(replaced), len(c.Mounts))
	}
	return len(found), true
}
