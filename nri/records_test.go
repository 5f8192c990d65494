// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package nri

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/containerd/nri/pkg/api"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/artifact-snapshotter/artifact-snapshotter/store"
	"github.com/artifact-snapshotter/artifact-snapshotter/unpack"
)

func TestRecordsSurviveTheDaemonAndAreSynchronized(t *testing.T) {
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
	s.wantRecords("ended", "given-up", "runs") // no record is removed before the runtime has listed its containers
	// A container that is not listed may still be created while its pod exists.
	s.sync(containers["given-up"], containers["lost"], containers["runs"])
	s.wantRecords("ended", "lost", "runs")
	of, _ := s.records.Get("ended")
	of.Uptime -= creationWindow
	if err := s.records.Put("ended", of); err != nil {
		t.Fatal(err)
	}
	s.sync(containers["lost"], containers["runs"])
	s.wantRecords("lost", "runs")
	s.sync()
	s.wantRecords()
}

// Containers with artifacts may run when NRI is disabled.
func TestRecordsProtectTreesWhileThePluginIsDisabled(t *testing.T) {
	s := newSite(t)
	d := s.model(s.content)
	owners := unpack.IDMap{UID: "0:200000:65536", GID: "0:300000:65536"} // such a tree is removed at once when it is unused
	v, err := s.Store.Acquire(t.Context(), d, owners)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.records.set("containerd", "runs", sandbox, []store.ID{v.ID}); err != nil {
		t.Fatal(err)
	}
	v.Release()
	reopen := func() *store.Store {
		st, err := store.Open(t.Context(), store.Config{Root: s.root, State: filepath.Join(s.root, "state"), Content: s.Blobs, Limits: unpack.DefaultLimits})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { st.Close() })
		if err := ProtectRecorded(t.Context(), s.root, st); err != nil {
			t.Fatal(err)
		}
		if err := st.CollectGarbage(t.Context()); err != nil {
			t.Fatal(err)
		}
		return st
	}
	if _, err := reopen().Tree(v.ID); err != nil {
		t.Error(err)
	}
	s.wantRecords("runs")
	// No container of another boot runs.
	record := filepath.Join(s.root, "nri/runs.json")
	b, err := os.ReadFile(record)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(record, []byte(strings.Replace(string(b), s.records.Boot, "another", 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := reopen().Tree(v.ID); !errdefs.IsNotFound(err) {
		t.Errorf("the tree of a container of another boot: %v", err)
	}
	if _, err := os.Stat(record); !errors.Is(err, os.ErrNotExist) {
		t.Error("the record of another boot is not removed")
	}
	if err := os.Remove(filepath.Dir(record)); err != nil {
		t.Fatal(err)
	}
	reopen() // as if the plugin had never been enabled
	if _, err := os.Stat(filepath.Dir(record)); !errors.Is(err, os.ErrNotExist) {
		t.Error("the directory for records was made")
	}
}

func TestAChangeOfStateRemovesNoRecord(t *testing.T) {
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

func TestAContainerThatWasCreatedWithoutThePluginIsLogged(t *testing.T) {
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
		"an artifact":                   {own(s.model(s.content)), false, true},
		"an artifact, with passthrough": {own(s.model(s.content)), true, false},
		"an image":                      {own(i), false, false},
		"a blob of CRI-O's":             {of, false, true},
		"no image":                      {&api.Mount{Type: "bind", Source: "/etc", Destination: "/etc"}, false, false},
	} {
		var text strings.Builder
		log.L.Logger.SetOutput(&text)
		s.Passthrough = tt.pass
		s.synchronize(t.Context(), "containerd", nil, []*api.Container{{
			Id: "one", PodSandboxId: sandbox, Mounts: []*api.Mount{tt.mount},
			Annotations: s.crio.annotate(listing{"/model", crio, []string{"c"}}),
		}})
		if got := strings.Contains(text.String(), "without the NRI plugin"); got != tt.want {
			t.Errorf("%s: warned: %v: %s", name, got, text.String())
		}
	}
}

// The wall clock may have been set since the record was written.
func TestTheAgeOfARecordIsMeasuredByTheUptime(t *testing.T) {
	s := newSite(t)
	d := s.model(s.content)
	if err := s.records.set("containerd", "new", sandbox, []store.ID{{Manifest: d.Digest}}); err != nil {
		t.Fatal(err)
	}
	of, _ := s.records.Get("new")
	if age := uptime() - of.Uptime; age < 0 || age > time.Minute {
		t.Errorf("a new record is %v old", age)
	}
	record := fmt.Sprintf(`{"boot": %q, "runtime": "containerd", "sandbox": %q, "created": %q, "uptime": %d, "trees": [{"manifest": %q}]}`,
		s.records.Boot, sandbox, time.Now().AddDate(1, 0, 0).Format(time.RFC3339), uptime()-creationWindow, d.Digest)
	if err := os.WriteFile(filepath.Join(s.root, "nri/old.json"), []byte(record), 0o600); err != nil {
		t.Fatal(err)
	}
	s.open()
	s.wantRecords("new", "old")
	s.synchronize(t.Context(), "containerd", []*api.PodSandbox{{Id: sandbox}}, nil)
	s.wantRecords("new")
}

func TestSynchronizingLeavesTheRecordsOfAnotherRuntimeAlone(t *testing.T) {
	s := newSite(t)
	ids := []store.ID{{Manifest: s.model(s.content).Digest}}
	for container, runtime := range map[string]string{"of-containerd": "containerd", "of-crio": crio} {
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

func TestTheRecordSaysForWhichOwnersATreeIs(t *testing.T) {
	s := newSite(t)
	d := s.model(s.content)
	owners := unpack.IDMap{UID: "0:200000:65536", GID: "0:300000:65536"}
	v, err := s.Store.Acquire(t.Context(), d, owners)
	if err != nil {
		t.Fatal(err)
	}
	v.Release()
	record := fmt.Sprintf(`{"boot": %q, "runtime": "containerd", "sandbox": %q, "uptime": 1, "trees": [{"Manifest": %q, "Owners": {"UID": %q, "GID": %q}}]}`,
		s.records.Boot, sandbox, d.Digest, owners.UID, owners.GID)
	if err := os.WriteFile(filepath.Join(s.root, "nri/mapped.json"), []byte(record), 0o600); err != nil {
		t.Fatal(err)
	}
	s.open()
	s.sync(&api.Container{Id: "mapped", PodSandboxId: sandbox, Mounts: []*api.Mount{{Source: v.Path}}})
	if ids, err := s.records.Trees(t.Context()); err != nil || !slices.Equal(ids, []store.ID{v.ID}) {
		t.Errorf("the recorded trees are %v, %v; want %v", ids, err, v.ID)
	}
}

func TestAContainerIDThatIsNotASafeFileNameIsRefused(t *testing.T) {
	s := newSite(t)
	d := s.model(s.content)
	for _, id := range []string{"", ".", "../../etc/x", "a/b", strings.Repeat("a", 300)} {
		if _, err := s.ask(id, volumeOf("/model", d)); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", id, err)
		}
	}
	s.wantRecords()
}
