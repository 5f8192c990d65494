// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package store

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
)

func TestThePathOfAnImageVolumeNamesItsSandboxAndItsImage(t *testing.T) {
	const dir = "/run/containerd/io.containerd.grpc.v1.cri/image-volumes/"
	hex, other := digest.FromString("x").Encoded(), digest.FromString("y").Encoded()
	for path, want := range map[string]struct {
		Volume
		sub string
	}{
		dir + "pod/" + hex:               {Volume{Sandbox: "pod", Hex: hex}, ""},
		"k8s.io/7/" + dir + "pod/" + hex: {Volume{Namespace: "k8s.io", Sandbox: "pod", Hex: hex}, ""},
		dir + "pod/" + hex + "/a/b":      {Volume{Sandbox: "pod", Hex: hex}, "a/b"},
		// The pod chooses the path below the volume.
		dir + "pod/" + hex + "/image-volumes/pod/" + other: {Volume{Sandbox: "pod", Hex: hex}, "image-volumes/pod/" + other},
		"/image-volumes/pod/" + hex + hex:                  {Volume{Sandbox: "pod", Hex: hex + hex}, ""},
		"image-volumes/pod/" + hex:                         {},
		"k8s.io/7/extract-1-x " + dir + "pod/" + hex:       {},
		dir + "pod/" + hex[1:]:                             {},
		dir + "pod/" + hex + "0":                           {},
		dir + "pod/" + strings.ToUpper(hex):                {},
		dir + "pod/x/" + hex:                               {},
		"/volumes/pod/" + hex:                              {},
	} {
		v, sub, ok := ParseVolume(path)
		if !reflect.DeepEqual(v, want.Volume) || sub != want.sub || ok != (want.Hex != "") {
			t.Errorf("%s: %+v, %q, %v; want %+v", path, v, sub, ok, want)
		}
	}
}

// knownImages are Images that answer as the test says.
type knownImages struct{ conflict error }

func (i *knownImages) Check(context.Context, string, digest.Digest) error { return i.conflict }
func (*knownImages) Name(string, digest.Digest) string                    { return "" }

// The answer to a request for an image volume is the artifact, an error that says why not, or
// artifact.ErrNotArtifact, which leaves the volume to the runtime.
func TestAnImageVolumeIsMountedRefusedOrTheRuntimes(t *testing.T) {
	s := newSite(t)
	s.Close()
	known := &knownImages{}
	var answers []error
	s.config.Images = known
	s.config.Observer.Answered = func(_ time.Duration, err error) { answers = append(answers, err) }
	s.open()
	write := func(a *pack.Artifact) string {
		t.Helper()
		d, err := a.WriteTo(s.config.Content.String())
		if err != nil {
			t.Fatal(err)
		}
		return d.Digest.Encoded()
	}
	model := s.pack("bytes").Digest.Encoded()
	plain, err := pack.Image(ocispec.ImageConfig{}, false)
	if err != nil {
		t.Fatal(err)
	}
	image := write(plain)
	hostile := write(pack.File("../escape", "x"))
	missing := digest.FromString("missing").Encoded()
	conflict, unmapped := errors.New("shares its config"), errors.New("owners cannot be mapped")
	there := fmt.Errorf("another front end has mounted it: %w", errdefs.ErrAlreadyExists)
	full := errors.New("cannot record it")
	for _, tt := range []struct {
		name             string
		v                Volume
		conflict, accept error
		want             error
		told             bool // the observer, and the log
	}{
		{"an artifact", Volume{Hex: model}, nil, nil, nil, true},
		{"an artifact of which layers are unpacked", Volume{Hex: model, Unpacked: IsUnpacked}, nil, nil, nil, true},
		{"an artifact that breaks a rule", Volume{Hex: hostile}, nil, nil, errdefs.ErrInvalidArgument, true},
		{"the same, of which layers are unpacked", Volume{Hex: hostile, Unpacked: IsUnpacked}, nil, nil, errdefs.ErrInvalidArgument, true},
		{"an artifact in conflict", Volume{Hex: model}, conflict, nil, conflict, true},
		{"an artifact in conflict of which layers are unpacked", Volume{Hex: model, Unpacked: IsUnpacked}, conflict, nil, conflict, true},
		{"a conflict of images that are not containerd's", Volume{Hex: model, Namespace: "none"}, conflict, nil, nil, true},
		{"an artifact for owners that are not known", Volume{Hex: model, Refused: unmapped}, nil, nil, unmapped, true},
		{"an image for owners that are not known", Volume{Hex: image, Refused: unmapped}, nil, nil, artifact.ErrNotArtifact, false},
		{"what has no name", Volume{Refused: unmapped}, nil, nil, unmapped, true},
		{"what has neither a name nor an error", Volume{}, nil, nil, errdefs.ErrInvalidArgument, true},
		{"an image", Volume{Hex: image, Unpacked: IsUnpacked}, conflict, nil, artifact.ErrNotArtifact, false},
		{"an image that may be unpacked", Volume{Hex: image, Unpacked: MaybeUnpacked}, conflict, nil, artifact.ErrNotArtifact, false},
		{"an image without layers", Volume{Hex: image}, nil, nil, artifact.ErrNotArtifact, false},
		{"an image without layers in the place of an artifact", Volume{Hex: image}, conflict, nil, conflict, true},
		{"an image whose manifest is elsewhere", Volume{Hex: missing, Unpacked: IsUnpacked}, nil, nil, artifact.ErrNotArtifact, false},
		{"an image whose manifest has gone meanwhile", Volume{Target: ocispec.Descriptor{Digest: digest.NewDigestFromEncoded(digest.SHA256, missing)}, Unpacked: IsUnpacked}, nil, nil, artifact.ErrNotArtifact, false},
		{"an artifact whose manifest is elsewhere", Volume{Hex: missing}, nil, nil, errdefs.ErrNotFound, true},
		{"what is elsewhere and may be unpacked", Volume{Hex: missing, Unpacked: MaybeUnpacked}, nil, nil, errdefs.ErrNotFound, true},
		{"what another front end has mounted", Volume{Hex: model}, nil, there, there, false},
		{"what cannot be recorded", Volume{Hex: model}, nil, full, full, true},
	} {
		answers, known.conflict = nil, tt.conflict
		if tt.v.Namespace = "k8s.io"; strings.HasSuffix(tt.name, "not containerd's") {
			tt.v.Namespace = ""
		}
		accepted := 0
		ref, err := s.MountVolume(t.Context(), &tt.v, func(context.Context, *Reference) error { accepted++; return tt.accept })
		if !errors.Is(err, tt.want) || (err == nil) != (ref != nil) {
			t.Errorf("%s: %v, %v; want %v", tt.name, ref, err, tt.want)
		}
		if _, check := errors.AsType[*CheckError](err); check != (tt.want != nil && errors.Is(tt.conflict, tt.want)) {
			t.Errorf("%s: %v is an error of Images: %v", tt.name, err, check)
		}
		if want := tt.want == nil || tt.accept != nil; (accepted == 1) != want {
			t.Errorf("%s: accepted %d times", tt.name, accepted)
		}
		if told := len(answers) == 1 && errors.Is(answers[0], tt.want); told != tt.told || len(answers) > 1 {
			t.Errorf("%s: the observer is told %v", tt.name, answers)
		}
		if ref != nil {
			ref.Release()
		}
		if n := s.held(); n > 0 {
			t.Errorf("%s: held: %d", tt.name, n)
		}
	}
}
