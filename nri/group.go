// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package nri

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/containerd/nri/pkg/api"
	modelspec "github.com/modelpack/model-spec/specs-go/v1"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
	"github.com/artifact-snapshotter/artifact-snapshotter/blobs"
	"github.com/artifact-snapshotter/artifact-snapshotter/store"
)

// CRI-O makes one mount for each layer of an artifact that has a name, at
// <path of the volume>/<name>. Its artifact is found again in two steps: which ones may
// it be, and which of them explain every mount, each once.

// bind is the mount of a blob.
type bind struct {
	destination, source string // as the runtime has them
	blob                digest.Digest
	options             []string
	known               bool // it is from a store in the configuration
}

// named is a layer of an artifact as CRI-O mounts it.
type named struct {
	name string
	blob digest.Digest
}

// candidate is an artifact that may be mounted.
type candidate struct {
	artifact *artifact.Artifact
	layers   []named
	// paths are where it may be; nil is anywhere.
	paths map[string]bool
}

// newCandidate gives the layers the names of CRI-O, which leaves out those without one
// (internal/ociartifact/store.go, artifactName).
func newCandidate(a *artifact.Artifact, paths map[string]bool) candidate {
	c := candidate{artifact: a, paths: paths}
	for _, l := range a.Layers {
		name, ok := l.Descriptor.Annotations[ocispec.AnnotationTitle]
		if !ok {
			name = l.Descriptor.Annotations[modelspec.AnnotationFilepath]
		}
		if name != "" {
			c.layers = append(c.layers, named{name, l.Descriptor.Digest})
		}
	}
	return c
}

// under are the layers that CRI-O mounts for the sub path, with what is left of their
// names (server/container_create_linux.go, FilterMountPathsBySubPath).
func (c candidate) under(sub string) (layers []named) {
	for _, l := range c.layers {
		name, ok := l.name, true
		if sub != "" {
			name, ok = strings.CutPrefix(l.name, sub+"/")
		}
		if ok {
			layers = append(layers, named{clean(name), l.blob})
		}
	}
	return layers
}

// clean is a name as CRI-O joins it to the path of a volume: it cannot leave that.
func clean(name string) string { return strings.TrimPrefix(path.Join("/", name), "/") }

// same tells artifacts apart that show something else: what is in it is all that a Tree
// depends on.
func (c candidate) same() string {
	h := digest.SHA256.Digester()
	e := json.NewEncoder(h.Hash())
	err := e.Encode(c.artifact.Created)
	for _, l := range c.artifact.Layers {
		err = errors.Join(err, e.Encode([]any{l.Descriptor.Digest, l.Descriptor.Size, l.Format, l.Compression, l.DiffID, l.File}))
	}
	if err != nil { // a time beyond the years of RFC 3339: it is like no other
		return c.artifact.Manifest.Digest.String()
	}
	return h.Digest().String()
}

// group is a volume: the binds that are one artifact, or one directory of it.
type group struct {
	candidate
	path, sub string
	binds     []int
}

// outcome is what a container sees of it.
func (g group) outcome() string { return g.path + "\x00" + g.sub + "\x00" + g.same() }

func (g group) volume(binds []bind, mounts []*api.Mount) volume {
	v := volume{
		Volume:      store.Volume{Hex: g.artifact.Manifest.Digest.Encoded(), Target: g.artifact.Manifest},
		destination: g.path,
		options:     binds[g.binds[0]].options,
		sub:         g.sub,
	}
	for _, i := range g.binds {
		v.remove = append(v.remove, binds[i].destination)
	}
	for _, m := range mounts {
		if path.Clean(m.GetDestination()) == g.path {
			v.Refused = fmt.Errorf("something else is mounted at %s, too: %w", g.path, errdefs.ErrInvalidArgument)
		}
	}
	return v
}

// maxSteps bounds the search. A step looks for one layer.
const maxSteps = 1 << 20

// lookEvery is how many steps the search goes before it looks whether anybody waits for it.
const lookEvery = 1 << 10

var errTooManySteps = fmt.Errorf("there are too many ways in which CRI-O's mounts may be artifacts: %w", errdefs.ErrInvalidArgument)

// search looks for groups in which every bind is once.
type search struct {
	ctx        context.Context // of the request: nobody waits for the search after it
	binds      []bind
	at         map[named]int // binds by destination and blob
	candidates []candidate

	steps     int
	covered   []bool
	chosen    []group
	found     []group
	outcomes  map[string]bool
	ambiguous []group // of another outcome than found
}

// resolve says which of the candidates the binds are, at which path, and what of them.
// It never guesses: where the container would see something else with another choice, it
// is errdefs.ErrFailedPrecondition.
func resolve(ctx context.Context, binds []bind, candidates []candidate) ([]group, error) {
	return newSearch(ctx, binds, candidates).resolve()
}

func newSearch(ctx context.Context, binds []bind, candidates []candidate) *search {
	s := &search{ctx: ctx, binds: binds, at: map[named]int{}, candidates: candidates, covered: make([]bool, len(binds))}
	for i, b := range binds {
		s.at[named{path.Clean(b.destination), b.blob}] = i
	}
	return s
}

func (s *search) resolve() ([]group, error) {
	if err := s.cover(0); err != nil {
		return nil, err
	}
	if s.ambiguous != nil {
		return nil, fmt.Errorf("CRI-O's mounts may be %s, or %s: %w", describe(s.found), describe(s.ambiguous), errdefs.ErrFailedPrecondition)
	}
	if s.found == nil {
		return nil, fmt.Errorf("no artifact in CRI-O's store has exactly the layers that CRI-O mounts (%d, of which one at %.255s); remove the artifact and pull it again: %w",
			len(s.binds), s.binds[0].destination, errdefs.ErrNotFound)
	}
	return s.found, nil
}

func describe(groups []group) string {
	var all []string
	for _, g := range groups {
		what := fmt.Sprintf("artifact %s at %.255s", g.artifact.Manifest.Digest, g.path)
		if g.sub != "" {
			what = fmt.Sprintf("the directory %.255s of %s", g.sub, what)
		}
		all = append(all, what)
	}
	return strings.Join(all, " and ")
}

// cover finds groups for all binds from the first on that is not covered.
func (s *search) cover(first int) error {
	for first < len(s.binds) && s.covered[first] {
		first++
	}
	if first == len(s.binds) {
		s.end()
		return nil
	}
	type choice struct {
		candidate int
		path, sub string
	}
	tried := map[choice]bool{}
	destination := path.Clean(s.binds[first].destination)
	for n, c := range s.candidates {
		for _, l := range c.layers {
			if err := s.step(1); err != nil {
				return err
			}
			if l.blob != s.binds[first].blob {
				continue
			}
			for sub, rest := range splits(l.name) {
				if err := s.step(1); err != nil {
					return err
				}
				at, ok := strings.CutSuffix(destination, rest)
				if !ok {
					break // nor is it below a directory further up
				}
				at, ok = strings.CutSuffix(at, "/")
				choice := choice{n, at, sub}
				if !ok || at == "" || tried[choice] || c.paths != nil && !c.paths[at] {
					continue
				}
				tried[choice] = true
				if err := s.try(c, at, sub, first); err != nil || s.ambiguous != nil {
					return err
				}
			}
		}
	}
	return nil
}

// step counts n steps of the search.
func (s *search) step(n int) error {
	before := s.steps / lookEvery
	s.steps += n
	switch {
	case s.steps > maxSteps:
		return errTooManySteps
	case s.steps/lookEvery > before && s.ctx.Err() != nil:
		return errBusy
	}
	return nil
}

// splits are the ways in which a name may be a sub path and what is below it: every
// directory above, the lowest first, and none. A name that is not clean is no sub path's.
func splits(name string) func(yield func(sub, rest string) bool) {
	return func(yield func(sub, rest string) bool) {
		cleaned := clean(name)
		if cleaned == "" {
			return
		}
		if cleaned == name {
			for i := strings.LastIndexByte(name, '/'); i > 0; i = strings.LastIndexByte(name[:i], '/') {
				if !yield(name[:i], name[i+1:]) {
					return
				}
			}
		}
		yield("", cleaned)
	}
}

// try goes on with the group, if all that it needs is there and in no other one.
func (s *search) try(c candidate, at, sub string, first int) error {
	g := group{candidate: c, path: at, sub: sub}
	defer func() {
		for _, i := range g.binds {
			s.covered[i] = false
		}
	}()
	if err := s.step(len(c.layers)); err != nil {
		return err
	}
	for _, l := range c.under(sub) {
		i, ok := s.at[named{path.Join(at, l.name), l.blob}]
		if !ok || s.covered[i] {
			return nil
		}
		s.covered[i] = true
		g.binds = append(g.binds, i)
	}
	s.chosen = append(s.chosen, g)
	err := s.cover(first)
	s.chosen = s.chosen[:len(s.chosen)-1]
	return err
}

// end takes note of what is chosen: all binds are covered.
func (s *search) end() {
	outcomes := map[string]bool{}
	for _, g := range s.chosen {
		outcomes[g.outcome()] = true
	}
	switch {
	case s.found == nil:
		s.found, s.outcomes = slices.Clone(s.chosen), outcomes
	case !maps.Equal(s.outcomes, outcomes):
		s.ambiguous = slices.Clone(s.chosen)
	}
}

// volumesAnnotation is where CRI-O says what it mounts for a container
// (internal/annotations), one entry for each mount. Since it mounts artifacts at all,
// those have the path of the volume and the digest of the manifest.
const volumesAnnotation = "io.kubernetes.cri-o.Volumes"

// candidates are the artifacts that the binds may be: those that CRI-O names, if it names
// one for each, else all in the stores. What it names must explain the mounts, for a pod may
// have the annotation, too. CRI-O does not mount layers without a name, so they cannot be
// checked: a pod with a forged annotation might get those of an artifact whose other layers
// it mounts. This is accepted, since to refuse what another artifact explains as well would
// refuse two versions of a model that differ in such layers alone.
func (p *Plugin) candidates(ctx context.Context, annotations map[string]string, binds []bind) ([]candidate, error) {
	if said := namedBy(annotations[volumesAnnotation], binds); said != nil {
		return p.read(ctx, said)
	}
	return p.all(ctx)
}

// crioVolume is an entry of volumesAnnotation.
type crioVolume struct {
	ContainerPath string `json:"container_path"`
	HostPath      string `json:"host_path"`
	Image         struct {
		Image string `json:"image"` // digest of the manifest in hex; "" if it is of no image
	} `json:"image"`
}

// volumesOf is what CRI-O says of what it mounts; nothing if that cannot be read.
func volumesOf(annotation string) (volumes []crioVolume) {
	if json.Unmarshal([]byte(annotation), &volumes) != nil {
		return nil
	}
	return volumes
}

// ofArtifacts leaves out the binds that are none of an artifact's by what CRI-O says: those of
// an image that it takes for an artifact, and a pod's own of a blob, by a volume of another
// kind.
func (p *Plugin) ofArtifacts(ctx context.Context, annotation string, binds []bind) []bind {
	volumes := volumesOf(annotation)
	images := map[string]bool{}
	isImage := func(hex string) bool {
		is, known := images[hex]
		if !known {
			is = !p.isArtifact(ctx, hex)
			images[hex] = is
		}
		return is
	}
	return slices.DeleteFunc(slices.Clone(binds), func(b bind) bool {
		at, others := path.Clean(b.destination), false
		for _, v := range volumes {
			volume := path.Clean(v.ContainerPath)
			switch {
			case v.HostPath != b.source:
			case v.Image.Image == "":
				others = others || at == volume
			case volume != "/" && !strings.HasPrefix(at, volume+"/"):
			case isImage(v.Image.Image):
				others = true
			default:
				return false
			}
		}
		return others
	})
}

// isArtifact reports whether the manifest or index is an artifact's, or may be one for all
// that is known.
func (p *Plugin) isArtifact(ctx context.Context, hex string) bool {
	desc, err := p.Blobs.Find(hex)
	if err == nil {
		_, err = artifact.Read(ctx, p.Blobs, desc)
	}
	return !errors.Is(err, artifact.ErrNotArtifact)
}

// namedBy are the paths by the digests of the manifests in hex; nil if a bind is of none.
func namedBy(annotation string, binds []bind) map[string]map[string]bool {
	wanted, sources := map[string]bool{}, map[string]bool{}
	for _, b := range binds {
		wanted[b.source] = true
	}
	said := map[string]map[string]bool{}
	for _, v := range volumesOf(annotation) {
		if v.Image.Image == "" || !wanted[v.HostPath] {
			continue
		}
		sources[v.HostPath] = true
		if said[v.Image.Image] == nil {
			said[v.Image.Image] = map[string]bool{}
		}
		said[v.Image.Image][path.Clean(v.ContainerPath)] = true
	}
	if len(sources) < len(wanted) {
		return nil
	}
	return said
}

func (p *Plugin) read(ctx context.Context, said map[string]map[string]bool) (candidates []candidate, err error) {
	for _, hex := range slices.Sorted(maps.Keys(said)) {
		desc, err := p.Blobs.Find(hex)
		if err != nil {
			return nil, err
		}
		a, err := artifact.Read(ctx, p.Blobs, desc)
		if errors.Is(err, artifact.ErrNotArtifact) {
			continue // an image with a blob that an artifact has, too
		}
		if err != nil {
			return nil, err
		}
		candidates = append(candidates, newCandidate(a, said[hex]))
	}
	return candidates, nil
}

const (
	// maxIndex is the largest index.json that is read, and maxManifests how many
	// artifacts of it.
	maxIndex     = 8 << 20
	maxManifests = 4096
)

// all are the artifacts in the stores. What cannot be read is none of them: what CRI-O
// mounts of it is then not found.
func (p *Plugin) all(ctx context.Context) (candidates []candidate, err error) {
	seen := map[digest.Digest]bool{}
	for _, layout := range p.Layouts {
		manifests, err := index(layout)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		for _, desc := range manifests {
			if ctx.Err() != nil {
				return nil, fmt.Errorf("reading the artifacts in %s takes too long: %w", layout, errdefs.ErrUnavailable)
			}
			a, err := artifact.Read(ctx, layout, ocispec.Descriptor{Digest: desc.Digest})
			if err != nil || seen[a.Manifest.Digest] {
				continue
			}
			seen[a.Manifest.Digest] = true
			candidates = append(candidates, newCandidate(a, nil))
		}
	}
	return candidates, nil
}

// index is what the index.json of an OCI layout lists.
func index(layout blobs.Dir) ([]ocispec.Descriptor, error) {
	name := filepath.Join(string(layout), ocispec.ImageIndexFile)
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxIndex+1))
	if err != nil {
		return nil, err
	}
	if len(b) > maxIndex {
		return nil, fmt.Errorf("%s has more than %d bytes: %w", name, maxIndex, errdefs.ErrInvalidArgument)
	}
	var list struct {
		Manifests []ocispec.Descriptor `json:"manifests"`
	}
	if err := json.Unmarshal(b, &list); err != nil {
		return nil, fmt.Errorf("%s: %.300v: %w", name, err, errdefs.ErrInvalidArgument)
	}
	if len(list.Manifests) > maxManifests {
		return nil, fmt.Errorf("%s lists %d artifacts, more than %d: %w", name, len(list.Manifests), maxManifests, errdefs.ErrInvalidArgument)
	}
	return list.Manifests, nil
}
