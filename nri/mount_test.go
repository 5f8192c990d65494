// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package nri

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"github.com/containerd/nri/pkg/api"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/blobs"
	"github.com/artifact-snapshotter/artifact-snapshotter/store"
	"github.com/artifact-snapshotter/artifact-snapshotter/unpack"
)

// site is a plugin with the blobs of both runtimes, but without a runtime.
type site struct {
	*Plugin
	t        *testing.T
	content  blobs.Dir // containerd's
	crio     *layout
	root     string
	conflict error  // what Check returns
	named    func() // called by Name
	answers  []error
	// annotations are those of all containers, as CRI-O writes them.
	annotations map[string]string
}

func newSite(t *testing.T) *site {
	t.Helper()
	s := &site{t: t, content: blobs.Dir(t.TempDir()), crio: newStore(t), root: t.TempDir()}
	s.open()
	return s
}

// open opens the daemon's store and the plugin, as after a restart.
func (s *site) open() {
	s.t.Helper()
	blobs := blobs.Dirs{s.content, s.crio.dir}
	st, err := store.Open(context.Background(), store.Config{Root: s.root, State: filepath.Join(s.root, "state"), Content: blobs, Limits: unpack.DefaultLimits, Images: s,
		Observer: store.Observer{Answered: func(_ time.Duration, err error) { s.answers = append(s.answers, err) }}})
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() {
		st.Close()
		if err := mount.UnmountRecursive(s.root, unix.MNT_DETACH); err != nil {
			s.t.Error(err)
		}
	})
	s.Plugin, err = New(context.Background(), Config{
		Name: "test", Index: "50", Root: s.root, Store: st, Blobs: blobs, Layouts: blobs[1:],
	})
	if err != nil {
		s.t.Fatal(err)
	}
}

// Check and Name implement store.Images.
func (s *site) Check(context.Context, string, digest.Digest) error { return s.conflict }
func (s *site) Name(string, digest.Digest) string {
	if s.named != nil {
		s.named()
	}
	return ""
}

const sandbox = "0123456789abcdef"

// volumeOf is containerd's mount of an image volume.
func volumeOf(at string, d ocispec.Descriptor) *api.Mount {
	return &api.Mount{
		Type: "bind", Destination: at, Source: "/run/containerd/io.containerd.grpc.v1.cri/image-volumes/" + sandbox + "/" + d.Digest.Encoded(),
		Options: []string{"rbind", "rprivate", "ro"},
	}
}

func (s *site) ask(container string, mounts ...*api.Mount) (*api.ContainerAdjustment, error) {
	return s.mount(s.t.Context(), "containerd", &api.PodSandbox{Id: sandbox}, &api.Container{Id: container, Mounts: mounts, Annotations: s.annotations})
}

// sync is what containerd does when it has accepted the plugin.
func (s *site) sync(containers ...*api.Container) {
	s.t.Helper()
	var pods []*api.PodSandbox
	if len(containers) > 0 {
		pods = []*api.PodSandbox{{Id: sandbox}}
	}
	s.synchronize(s.t.Context(), "containerd", pods, containers)
}

func (s *site) wantRecords(containers ...string) {
	s.t.Helper()
	got := slices.Collect(maps.Keys(s.records.All()))
	slices.Sort(got)
	if !slices.Equal(got, containers) {
		s.t.Errorf("there are records of %q, want %q", got, containers)
	}
	var files []string
	entries, err := os.ReadDir(filepath.Join(s.root, "nri"))
	if err != nil {
		s.t.Fatal(err)
	}
	for _, e := range entries {
		files = append(files, strings.TrimSuffix(e.Name(), ".json"))
	}
	if !slices.Equal(files, containers) {
		s.t.Errorf("there are files of %q, want %q", files, containers)
	}
}

func (s *site) model(dir blobs.Dir) ocispec.Descriptor {
	s.t.Helper()
	a := artifactOf(raw("config.json", "c"), raw("dir/weights", "w"))
	d, err := a.WriteTo(string(dir))
	if err != nil {
		s.t.Fatal(err)
	}
	return d
}

// crioModel puts a model into CRI-O's store, and returns CRI-O's mounts of it at /model.
func (s *site) crioModel() []*api.Mount {
	s.t.Helper()
	s.annotations = s.crio.annotate(listing{"/model", s.model(s.crio.dir), []string{"c", "w"}})
	return []*api.Mount{s.crio.mountOf("/model/config.json", "c"), s.crio.mountOf("/model/dir/weights", "w")}
}

func TestAnImageVolumeOfContainerdIsReplaced(t *testing.T) {
	s := newSite(t)
	d := s.model(s.content)
	got, err := s.ask("one", &api.Mount{Type: "proc", Destination: "/proc"}, volumeOf("/model/", d), volumeOf("/again", d))
	if err != nil {
		t.Fatal(err)
	}
	if len(got.Mounts) != 2 {
		t.Fatalf("the adjustment is %+v", got)
	}
	for i, at := range []string{"/model/", "/again"} {
		m := got.Mounts[i]
		if m.Destination != at || m.Type != "bind" || !slices.Equal(m.Options, []string{"bind", "ro", "nosuid", "nodev", "rprivate"}) {
			t.Errorf("the mount is %+v", m)
		}
		if b, err := os.ReadFile(filepath.Join(m.Source, "dir/weights")); err != nil || string(b) != "w" {
			t.Errorf("weights: %q, %v", b, err)
		}
	}
	s.wantRecords("one")
	if ids, err := s.records.Trees(t.Context()); err != nil || !slices.Equal(ids, []store.ID{{Manifest: d.Digest}}) {
		t.Errorf("the recorded trees are %v, %v", ids, err)
	}
	if len(s.answers) != 2 || errors.Join(s.answers...) != nil {
		t.Errorf("the answers are %v", s.answers)
	}
	s.unmount(t.Context(), "one", "unknown")
	s.wantRecords()
}

// If containerd's own volume is not empty, containerd has resolved the sub path in it.
func TestASubPathIsADirectoryOfTheArtifact(t *testing.T) {
	s := newSite(t)
	d := s.model(s.content)
	for sub, want := range map[string]string{"dir": "", "dir/weights": "not a directory", "none": "not a directory", "dir/../..": "not a directory", "..": "not a directory"} {
		m := volumeOf("/model", d)
		m.Source += "/" + sub
		got, err := s.ask("one", m)
		switch {
		case want == "" && (err != nil || filepath.Base(got.Mounts[0].Source) != "dir"):
			t.Errorf("%s: %+v, %v", sub, got, err)
		case want != "" && err == nil && len(got.GetMounts()) > 0: // a path that leaves the volume is not an image volume
			t.Errorf("%s: %+v, want %q", sub, got, want)
		}
	}
	// The artifact's author chose the symbolic links.
	v, err := s.Store.Acquire(t.Context(), d, unpack.IDMap{})
	if err != nil {
		t.Fatal(err)
	}
	defer v.Release()
	dir := t.TempDir()
	if err := os.Symlink("/etc", filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	if got, err := directoryIn(dir, "link"); err == nil {
		t.Errorf("a symlink leads to %s", got)
	}
}

func TestMountsOfCRIOAreReplaced(t *testing.T) {
	s := newSite(t)
	s.conflict = errors.New("of containerd's images") // they are not asked
	got, err := s.ask("one", s.crioModel()...)
	if err != nil {
		t.Fatal(err)
	}
	var removed []string
	for _, m := range got.Mounts {
		if at, ok := m.IsMarkedForRemoval(); ok {
			removed = append(removed, at)
		} else if m.Destination != "/model" || !slices.Equal(m.Options, []string{"bind", "ro", "nosuid", "nodev"}) {
			t.Errorf("the mount is %+v", m)
		}
	}
	if !slices.Equal(removed, []string{"/model/config.json", "/model/dir/weights"}) {
		t.Errorf("the mounts at %q are removed", removed)
	}
	s.wantRecords("one")
}

func TestARefusalLeavesNothing(t *testing.T) {
	s := newSite(t)
	good := s.model(s.content)
	hostile := artifactOf(raw("../file", "f"))
	bad, err := hostile.WriteTo(string(s.content))
	if err != nil {
		t.Fatal(err)
	}
	missing := ocispec.Descriptor{Digest: digest.FromString("missing")}
	conflict := fmt.Errorf("has the same config: %w", errdefs.ErrFailedPrecondition)
	for _, tt := range []struct {
		name     string
		of       ocispec.Descriptor
		conflict error
		want     string
	}{
		{"hostile", bad, nil, `image volume /bad: manifest ` + bad.Digest.String()},
		{"missing", missing, nil, "image volume /bad: no blob " + missing.Digest.Encoded()},
		{"in conflict", good, conflict, "image volume /good: has the same config"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s.conflict = tt.conflict
			_, err := s.ask("one", volumeOf("/good", good), volumeOf("/bad", tt.of))
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v, want %q", err, tt.want)
			}
			s.wantRecords()
			// With passthrough the runtime's own mount stays.
			s.Passthrough = true
			got, err := s.ask("two", volumeOf("/good", good), volumeOf("/bad", tt.of))
			s.Passthrough = false
			if err != nil || tt.conflict == nil && (len(got.Mounts) != 1 || got.Mounts[0].Destination != "/good") || tt.conflict != nil && got != nil {
				t.Errorf("%+v, %v; want the good one", got, err)
			}
			s.unmount(t.Context(), "two")
		})
	}
}

func TestAContainerThatCannotBeRecordedIsRefused(t *testing.T) {
	s := newSite(t)
	d := s.model(s.content)
	if err := os.Remove(filepath.Join(s.root, "nri")); err != nil { // as if the disk were full
		t.Fatal(err)
	}
	for _, s.Passthrough = range []bool{false, true} {
		got, err := s.ask("one", volumeOf("/model", d))
		if got != nil || (err == nil) != s.Passthrough || err != nil && !strings.Contains(err.Error(), "cannot record the artifacts of the container") {
			t.Errorf("passthrough: %v: %+v, %v", s.Passthrough, got, err)
		}
	}
}

// The request ends while the image's name is looked up.
func TestAfterTheEndOfTheRequestNothingIsRecorded(t *testing.T) {
	s := newSite(t)
	d := s.model(s.content)
	for _, s.Passthrough = range []bool{false, true} {
		ctx, cancel := context.WithCancel(t.Context())
		s.named = cancel
		got, err := s.mount(ctx, "containerd", &api.PodSandbox{Id: sandbox}, &api.Container{Id: "one", Mounts: []*api.Mount{volumeOf("/model", d)}})
		if got != nil || (err == nil) != s.Passthrough || err != nil && !errors.Is(err, errBusy) {
			t.Errorf("passthrough: %v: %+v, %v", s.Passthrough, got, err)
		}
	}
	s.wantRecords()
}

func TestAVolumeThatTheSnapshotterHasMountedIsLeftAlone(t *testing.T) {
	s := newSite(t)
	d := s.model(s.content)
	v, err := s.Store.Acquire(t.Context(), d, unpack.IDMap{})
	if err != nil {
		t.Fatal(err)
	}
	defer v.Release()
	m := volumeOf("/model", d)
	m.Source = filepath.Join(t.TempDir(), m.Source)
	if err := os.MkdirAll(m.Source, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(v.Path, m.Source, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(m.Source, unix.MNT_DETACH)
	if got, err := s.ask("one", m); got != nil || err != nil {
		t.Errorf("%+v, %v; want nothing", got, err)
	}
	s.wantRecords()
}
