// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package nri

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/containerd/nri/pkg/api"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/blobs"
	"github.com/artifact-snapshotter/artifact-snapshotter/store"
	"github.com/artifact-snapshotter/artifact-snapshotter/unpack"
)

// site is a plugin of both runtimes, without either.
type site struct {
	*Plugin
	t        *testing.T
	content  blobs.Dir // containerd's
	crio     *layout
	root     string
	conflict error  // of containerd's images
	named    func() // called when they are asked for a name
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
	views, err := store.Open(context.Background(), store.Config{Root: s.root, State: filepath.Join(s.root, "state"), Content: blobs, Limits: unpack.DefaultLimits, Images: s,
		Observer: store.Observer{Answered: func(_ time.Duration, err error) { s.answers = append(s.answers, err) }}})
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() {
		views.Close()
		if err := mount.UnmountRecursive(s.root, unix.MNT_DETACH); err != nil {
			s.t.Error(err)
		}
	})
	s.Plugin, err = New(context.Background(), Config{
		Name: "test", Index: "50", Root: s.root, Store: views, Blobs: blobs, Layouts: blobs[1:],
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

// sync is what containerd says when it has taken the plugin.
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
	got := s.records.containers("")
	slices.Sort(got)
	if !slices.Equal(got, containers) {
		s.t.Errorf("the records are of %q, want %q", got, containers)
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
		s.t.Errorf("the files are %q, want %q", files, containers)
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
	if ids, err := s.records.trees(t.Context()); err != nil || !slices.Equal(ids, []store.ID{{Manifest: d.Digest}}) {
		t.Errorf("shown are %v, %v", ids, err)
	}
	if len(s.answers) != 2 || errors.Join(s.answers...) != nil {
		t.Errorf("the answers are %v", s.answers)
	}
	s.unmount(t.Context(), "one", "unknown")
	s.wantRecords()
}

// A sub path that containerd has resolved in what is not empty.
func TestASubPathIsADirectoryOfTheArtifact(t *testing.T) {
	s := newSite(t)
	d := s.model(s.content)
	for sub, want := range map[string]string{"dir": "", "dir/weights": "no directory", "none": "no directory", "dir/../..": "no directory", "..": "no directory"} {
		m := volumeOf("/model", d)
		m.Source += "/" + sub
		got, err := s.ask("one", m)
		switch {
		case want == "" && (err != nil || filepath.Base(got.Mounts[0].Source) != "dir"):
			t.Errorf("%s: %+v, %v", sub, got, err)
		case want != "" && err == nil && len(got.GetMounts()) > 0: // what leaves the volume is none
			t.Errorf("%s: %+v, want %q", sub, got, want)
		}
	}
	// Symlinks are the artifact's.
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
	s.conflict = errors.New("of containerd's images") // which is not asked
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
		t.Errorf("removed are %q", removed)
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
			// Or else the runtime's own.
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

func TestWhatCannotBeRecordedIsRefused(t *testing.T) {
	s := newSite(t)
	d := s.model(s.content)
	if err := os.Remove(filepath.Join(s.root, "nri")); err != nil { // as if the disk were full
		t.Fatal(err)
	}
	for _, s.Passthrough = range []bool{false, true} {
		got, err := s.ask("one", volumeOf("/model", d))
		if got != nil || (err == nil) != s.Passthrough || err != nil && !strings.Contains(err.Error(), "cannot record what the container shows") {
			t.Errorf("passthrough: %v: %+v, %v", s.Passthrough, got, err)
		}
	}
}

// The images are told when it is too late for the runtime.
func TestAnAnswerThatIsTooLateSaysSo(t *testing.T) {
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

func TestAVolumeThatTheSnapshotterShowsIsLeftAlone(t *testing.T) {
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

func TestRecordsOutliveTheDaemonAndAreMadeTrue(t *testing.T) {
	s := newSite(t)
	d := s.model(s.content)
	containers := map[string]*api.Container{}
	for _, id := range []string{"ended", "given-up", "lost", "runs"} {
		got, err := s.ask(id, volumeOf("/model", d))
		if err != nil {
			t.Fatal(err)
		}
		containers[id] = &api.Container{Id: id, PodSandboxId: sandbox, Mounts: got.Mounts}
	}
	containers["given-up"].Mounts = []*api.Mount{volumeOf("/model", d)} // the answer came too late
	if err := os.Remove(filepath.Join(s.root, "nri/lost.json")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(s.root, "nri/torn.json"), []byte(`{"sand`), 0o600); err != nil {
		t.Fatal(err)
	}
	s.open()
	s.wantRecords("ended", "given-up", "runs") // nothing is dropped before the runtime has told
	// A container may be about to be created while its pod is there.
	s.sync(containers["given-up"], containers["lost"], containers["runs"])
	s.wantRecords("ended", "lost", "runs")
	of, _ := s.records.get("ended")
	s.records.mu.Lock()
	of.Uptime -= creationWindow
	s.records.byContainer["ended"] = of
	s.records.mu.Unlock()
	s.sync(containers["lost"], containers["runs"])
	s.wantRecords("lost", "runs")
	s.sync()
	s.wantRecords()
}

// A daemon that is no plugin any more sweeps nothing away from pods that run.
func TestRecordsAreKeptWithoutThePlugin(t *testing.T) {
	s := newSite(t)
	d := s.model(s.content)
	owners := unpack.IDMap{UID: "0:200000:65536", GID: "0:300000:65536"} // would go at once
	v, err := s.Store.Acquire(t.Context(), d, owners)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.records.set("containerd", "runs", sandbox, []store.ID{v.ID}); err != nil {
		t.Fatal(err)
	}
	v.Release()
	reopen := func() *store.Store {
		views, err := store.Open(t.Context(), store.Config{Root: s.root, State: filepath.Join(s.root, "state"), Content: s.Blobs, Limits: unpack.DefaultLimits})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { views.Close() })
		if err := ProtectRecorded(t.Context(), s.root, views); err != nil {
			t.Fatal(err)
		}
		if err := views.CollectGarbage(t.Context()); err != nil {
			t.Fatal(err)
		}
		return views
	}
	if _, err := reopen().Tree(v.ID); err != nil {
		t.Error(err)
	}
	s.wantRecords("runs")
	// Nothing of another boot runs.
	record := filepath.Join(s.root, "nri/runs.json")
	b, err := os.ReadFile(record)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(record, []byte(strings.Replace(string(b), s.records.boot, "another", 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := reopen().Tree(v.ID); !errdefs.IsNotFound(err) {
		t.Errorf("the tree of a container of another boot: %v", err)
	}
	if _, err := os.Stat(record); !errors.Is(err, os.ErrNotExist) {
		t.Error("the record of another boot is kept")
	}
	if err := os.Remove(filepath.Dir(record)); err != nil {
		t.Fatal(err)
	}
	reopen() // was never a plugin
	if _, err := os.Stat(filepath.Dir(record)); !errors.Is(err, os.ErrNotExist) {
		t.Error("there is a directory for records without a plugin")
	}
}

func TestARecordOutlivesAnotherState(t *testing.T) {
	s := newSite(t)
	d := s.model(s.content)
	got, err := s.ask("runs", volumeOf("/model", d))
	if err != nil {
		t.Fatal(err)
	}
	image := artifactOf(raw("file", "f"))
	image.ConfigType, image.Config = ocispec.MediaTypeImageConfig, []byte("{}")
	i, err := image.WriteTo(string(s.content))
	if err != nil {
		t.Fatal(err)
	}
	got.Mounts[0].Source = strings.Replace(got.Mounts[0].Source, "/state/", "/former/", 1)
	s.sync(&api.Container{Id: "runs", PodSandboxId: sandbox, Mounts: append(got.Mounts, volumeOf("/image", i))})
	s.wantRecords("runs")
}

func TestContainersWithoutThePluginAreWarnedOf(t *testing.T) {
	s := newSite(t)
	crio := s.model(s.crio.dir)
	image := artifactOf()
	image.ConfigType, image.Config = ocispec.MediaTypeImageConfig, []byte("{}")
	i, err := image.WriteTo(string(s.content))
	if err != nil {
		t.Fatal(err)
	}
	own := func(d ocispec.Descriptor) *api.Mount { // containerd's, of an artifact or of an image without files
		m := volumeOf("/model", d)
		m.Source = s.root + m.Source
		if err := os.MkdirAll(m.Source, 0o755); err != nil {
			t.Fatal(err)
		}
		return m
	}
	t.Cleanup(func() { log.L.Logger.SetOutput(os.Stderr) })
	of := &api.Mount{Type: "bind", Source: s.crio.mountOf("", "c").Source, Destination: "/model/config.json"}
	for name, tt := range map[string]struct {
		mount *api.Mount
		pass  bool
		want  bool
	}{
		"an artifact":                {own(s.model(s.content)), false, true},
		"an artifact, as configured": {own(s.model(s.content)), true, false},
		"an image":                   {own(i), false, false},
		"a blob of CRI-O's":          {of, false, true},
		"no image":                   {&api.Mount{Type: "bind", Source: "/etc", Destination: "/etc"}, false, false},
	} {
		var text strings.Builder
		log.L.Logger.SetOutput(&text)
		s.Passthrough = tt.pass
		s.synchronize(t.Context(), "containerd", nil, []*api.Container{{
			Id: "one", PodSandboxId: sandbox, Mounts: []*api.Mount{tt.mount},
			Annotations: s.crio.annotate(listing{"/model", crio, []string{"c"}}),
		}})
		if got := strings.Contains(text.String(), "without the plugin"); got != tt.want {
			t.Errorf("%s: warned: %v: %s", name, got, text.String())
		}
	}
}

// The wall clock may have been set since a record was made, and does not count.
func TestHowOldARecordIsIsToldByTheTimeSinceBoot(t *testing.T) {
	s := newSite(t)
	d := s.model(s.content)
	if err := s.records.set("containerd", "new", sandbox, []store.ID{{Manifest: d.Digest}}); err != nil {
		t.Fatal(err)
	}
	of, _ := s.records.get("new")
	if age := uptime() - of.Uptime; age < 0 || age > time.Minute {
		t.Errorf("a new record is %v old", age)
	}
	record := fmt.Sprintf(`{"boot": %q, "runtime": "containerd", "sandbox": %q, "created": %q, "uptime": %d, "trees": [{"manifest": %q}]}`,
		s.records.boot, sandbox, time.Now().AddDate(1, 0, 0).Format(time.RFC3339), uptime()-creationWindow, d.Digest)
	if err := os.WriteFile(filepath.Join(s.root, "nri/old.json"), []byte(record), 0o600); err != nil {
		t.Fatal(err)
	}
	s.open()
	s.wantRecords("new", "old")
	s.synchronize(t.Context(), "containerd", []*api.PodSandbox{{Id: sandbox}}, nil)
	s.wantRecords("new")
}

func TestRecordsOfAnotherRuntimeAreKept(t *testing.T) {
	s := newSite(t)
	ids := []store.ID{{Manifest: s.model(s.content).Digest}}
	for container, runtime := range map[string]string{"of-containerd": "containerd", "of-crio": crio, "of-nobody": ""} {
		if err := s.records.set(runtime, container, sandbox, ids); err != nil {
			t.Fatal(err)
		}
	}
	s.open()
	s.sync()
	s.wantRecords("of-crio")
	s.synchronize(t.Context(), crio, nil, nil)
	s.wantRecords()
}

func TestWhoseOwnersAreShownIsToldByTheRecord(t *testing.T) {
	s := newSite(t)
	d := s.model(s.content)
	owners := unpack.IDMap{UID: "0:200000:65536", GID: "0:300000:65536"}
	v, err := s.Store.Acquire(t.Context(), d, owners)
	if err != nil {
		t.Fatal(err)
	}
	v.Release()
	if err := s.records.set("containerd", "mapped", sandbox, []store.ID{v.ID}); err != nil {
		t.Fatal(err)
	}
	s.open()
	s.sync(&api.Container{Id: "mapped", PodSandboxId: sandbox, Mounts: []*api.Mount{{Source: v.Path}}})
	if ids, err := s.records.trees(t.Context()); err != nil || !slices.Equal(ids, []store.ID{v.ID}) {
		t.Errorf("shown are %v, %v; want %v", ids, err, v.ID)
	}
}

func TestAContainerIDThatIsNoFileNameIsRefused(t *testing.T) {
	s := newSite(t)
	d := s.model(s.content)
	for _, id := range []string{"", ".", "../../etc/x", "a/b", strings.Repeat("a", 300)} {
		if _, err := s.ask(id, volumeOf("/model", d)); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", id, err)
		}
	}
	s.wantRecords()
}

func TestTheMapOfAUserNamespaceIsRead(t *testing.T) {
	s := newSite(t)
	mapped := unpack.IDMap{UID: "0:200000:65536", GID: "0:300000:65536,65536:7:1"}
	saved := filepath.Join(filepath.Dir(string(s.crio.dir)), "overlay-containers", sandbox, "userdata")
	if err := os.MkdirAll(saved, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(saved, "config.json"), []byte(`{"linux": {
		"uidMappings": [{"containerID": 0, "hostID": 200000, "size": 65536}],
		"gidMappings": [{"containerID": 0, "hostID": 300000, "size": 65536}, {"containerID": 65536, "hostID": 7, "size": 1}]}}`), 0o644); err != nil {
		t.Fatal(err)
	}
	user := func(path string) *api.Container {
		return &api.Container{Linux: &api.LinuxContainer{Namespaces: []*api.LinuxNamespace{{Type: "mount"}, {Type: "user", Path: path}}}}
	}
	self := fmt.Sprintf("/proc/%d/ns/user", os.Getpid())
	for name, tt := range map[string]struct {
		pod  *api.PodSandbox
		c    *api.Container
		want unpack.IDMap
		err  string
	}{
		"none":                         {&api.PodSandbox{Id: sandbox}, &api.Container{}, unpack.IDMap{}, ""},
		"a process of the host":        {&api.PodSandbox{Id: sandbox}, user(self), unpack.IDMap{}, ""},
		"the pod's process":            {&api.PodSandbox{Id: sandbox, Pid: uint32(os.Getpid())}, user(""), unpack.IDMap{}, ""},
		"a sandbox without a process":  {&api.PodSandbox{Id: sandbox}, user("/run/userns/x"), mapped, ""},
		"a process of another one":     {&api.PodSandbox{Id: sandbox, Pid: uint32(os.Getpid())}, user("/proc/self/ns/mnt"), mapped, ""},
		"a sandbox that nobody knows":  {&api.PodSandbox{Id: "unknown"}, user(""), unpack.IDMap{}, "no configuration of sandbox unknown"},
		"a sandbox with an odd name":   {&api.PodSandbox{Id: "../*"}, user(""), unpack.IDMap{}, "is not the ID of a sandbox"},
		"a process that is not there":  {&api.PodSandbox{Id: "unknown"}, user("/proc/4194999/ns/user"), unpack.IDMap{}, "whose map cannot be read"},
		"a namespace that is not read": {&api.PodSandbox{Id: "unknown", Pid: 1 << 30}, user(""), unpack.IDMap{}, "whose map cannot be read"},
	} {
		got, err := s.owners(tt.pod, tt.c)
		if got != tt.want || (err == nil) != (tt.err == "") || err != nil && !strings.Contains(err.Error(), tt.err) {
			t.Errorf("%s: %+v, %v; want %+v, %q", name, got, err, tt.want, tt.err)
		}
	}
}
