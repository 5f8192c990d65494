// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package nri

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/containerd/nri/pkg/api"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func TestMountsThatAreNotOfAnArtifactAreLeftAlone(t *testing.T) {
	s := newSite(t)
	image := artifactOf(raw("file", "f"))
	image.ConfigType, image.Config = ocispec.MediaTypeImageConfig, []byte("{}")
	d, err := image.WriteTo(string(s.content))
	if err != nil {
		t.Fatal(err)
	}
	model := s.model(s.content)
	other := volumeOf("/other", model)
	other.Source = strings.Replace(other.Source, sandbox, "another-sandbox", 1)
	tmpfs := volumeOf("/tmp", model)
	tmpfs.Type, tmpfs.Options = "tmpfs", nil
	for name, m := range map[string]*api.Mount{"an image": volumeOf("/image", d), "of another sandbox": other, "not a bind": tmpfs, "no mount": nil} {
		if got, err := s.ask("one", m); got != nil || err != nil {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
	}
	s.wantRecords()
	if len(s.answers) > 0 {
		t.Errorf("the answers are %v", s.answers)
	}
}

// The store asks which images containerd has only for artifacts. A volume is that of an image if
// the manifest says so, or if containerd has unpacked files.
func TestAVolumeOfAnImageNeedsNoListOfImages(t *testing.T) {
	s := newSite(t)
	image := artifactOf(raw("file", "f"))
	image.ConfigType, image.Config = ocispec.MediaTypeImageConfig, []byte("{}")
	ordinary, err := image.WriteTo(string(s.content))
	if err != nil {
		t.Fatal(err)
	}
	model := s.model(s.content)
	elsewhere := ocispec.Descriptor{Digest: digest.FromString("in another content root")}
	unknown := fmt.Errorf("containerd's images are unknown: %w", errdefs.ErrUnavailable)
	const left, mounted, missing = "left alone", "mounted", "check that these are the runtime's directories"
	for _, tt := range []struct {
		name  string
		of    ocispec.Descriptor
		sub   string
		files bool // in containerd's own directory
		want  string
		known string // want, if containerd's images are known
	}{
		{"an image", ordinary, "", true, left, left},
		{"a sub path of an image", ordinary, "file", true, left, left},
		{"an image without files, which may be in the place of an artifact", ordinary, "", false, unknown.Error(), left},
		{"an artifact", model, "", false, unknown.Error(), mounted},
		{"an artifact that containerd has unpacked in part", model, "", true, unknown.Error(), mounted},
		{"an image in another content root", elsewhere, "", true, left, left},
		{"a sub path of an image in another content root", elsewhere, "file", true, left, left},
		{"an artifact in another content root", elsewhere, "", false, missing, missing},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := volumeOf("/model", tt.of)
			m.Source = filepath.Join(t.TempDir(), m.Source)
			dir := m.Source
			if tt.files {
				dir = filepath.Join(m.Source, "file")
			}
			if err := os.MkdirAll(dir, 0o755); err != nil {
				t.Fatal(err)
			}
			m.Source = filepath.Join(m.Source, tt.sub)
			for conflict, want := range map[error]string{unknown: tt.want, nil: tt.known} {
				s.conflict = conflict
				got, err := s.ask("one", m)
				switch {
				case want == left && (got != nil || err != nil):
					t.Errorf("%v: %+v, %v; want it left alone", conflict, got, err)
				case want == mounted && (err != nil || len(got.GetMounts()) != 1):
					t.Errorf("%v: %+v, %v; want it mounted", conflict, got, err)
				case want != left && want != mounted && (err == nil || !strings.Contains(err.Error(), want)):
					t.Errorf("%v: %+v, %v; want %q", conflict, got, err, want)
				}
			}
		})
	}
}
