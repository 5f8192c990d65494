// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package pull

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
	"github.com/artifact-snapshotter/artifact-snapshotter/internal/registrytest"
)

// fill pushes and pulls a model of that size as each tag, as if each had been used an hour after
// the one before.
func fill(t *testing.T, p *Puller, registry string, size int, tags ...string) map[string][]pack.Layer {
	t.Helper()
	all := map[string][]pack.Layer{}
	for i, tag := range tags {
		all[tag] = contents(t, size)
		push(t, registry, tag, all[tag])
		r := Request{Reference: ref(t, registry+"/"+repository+":"+tag), Policy: IfNotPresent}
		if _, err := p.Pull(t.Context(), r); err != nil {
			t.Fatal(err)
		}
		label(t, p, r.Reference.String(), labelUsed, time.Now().Add(time.Duration(i-100)*time.Hour))
	}
	return all
}

func label(t *testing.T, p *Puller, name, key string, at time.Time) {
	t.Helper()
	image, err := p.images.Get(in(t.Context()), name)
	if err != nil {
		t.Fatal(err)
	}
	image.Labels[key] = strconv.FormatInt(at.Unix(), 10)
	if _, err := p.images.Update(in(t.Context()), image); err != nil {
		t.Fatal(err)
	}
}

// there returns the tags whose layers are on the node.
func there(p *Puller, all map[string][]pack.Layer) map[string]bool {
	found := map[string]bool{}
	for tag, layers := range all {
		if _, err := os.Lstat(p.Dir().Path(digest.FromBytes(layers[0].Data))); err == nil {
			found[tag] = true
		}
	}
	return found
}

func TestTheLongestUnusedGoWhenTheDiskIsFull(t *testing.T) {
	dir := t.TempDir()
	if err := (&mount.Mount{Type: "tmpfs", Source: "tmpfs", Options: []string{"size=20m"}}).Mount(dir); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := mount.UnmountAll(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	registry := registrytest.Start(t, t.TempDir(), false)
	p, err := Open(t.Context(), Config{Root: filepath.Join(dir, "content"), Limits: testLimits, Retention: Retention{High: 70, Low: 65}})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	}()
	p.Protect(func() []string { return []string{registry + "/" + repository + ":used"} })
	all := fill(t, p, registry, 4<<20, "used", "pinned", "old", "new")
	label(t, p, registry+"/"+repository+":pinned", labelPinned, time.Now())
	if err := p.retain(in(t.Context())); err != nil {
		t.Fatal(err)
	}
	if got := there(p, all); !got["used"] || !got["pinned"] || got["old"] || !got["new"] {
		t.Errorf("there are %v, want all but the oldest", got)
	}
	// Another artifact needs what a third one has.
	for tag, layers := range fill(t, p, registry, 9<<20, "large") {
		all[tag] = layers
	}
	if got := there(p, all); !got["used"] || !got["pinned"] || got["new"] || !got["large"] {
		t.Errorf("there are %v, want the used, the pinned and the large one", got)
	}
	// What is in use does not go, and the error says what is needed.
	label(t, p, registry+"/"+repository+":large", labelPinned, time.Now())
	push(t, registry, "more", contents(t, 8<<20))
	_, err = p.Pull(t.Context(), Request{Reference: ref(t, registry+"/"+repository+":more"), Policy: IfNotPresent})
	if !errdefs.IsResourceExhausted(err) || !strings.Contains(err.Error(), "needs 8.0 MiB, but of the 20.0 MiB") {
		t.Errorf("no room: %v", err)
	}
	wantClean(t, p)
}

func TestArtifactsGoAfterTheirAge(t *testing.T) {
	registry := registrytest.Start(t, t.TempDir(), false)
	p := open(t, Config{Retention: Retention{High: 100, Low: 100, MaxAge: 98*time.Hour + 30*time.Minute}})
	all := fill(t, p, registry, 1000, "a", "b", "c", "d") // 100, 99, 98 and 97 hours ago
	if err := p.retain(in(t.Context())); err != nil {
		t.Fatal(err)
	}
	if got := there(p, all); got["a"] || got["b"] || !got["c"] || !got["d"] {
		t.Errorf("there are %v", got)
	}
	// Being asked for again makes one young.
	if _, err := p.Pull(t.Context(), Request{Reference: ref(t, registry+"/"+repository+":c"), Policy: IfNotPresent}); err != nil {
		t.Fatal(err)
	}
	p.retention.MaxAge = time.Hour
	if err := p.retain(in(t.Context())); err != nil {
		t.Fatal(err)
	}
	if got := there(p, all); !got["c"] || got["d"] {
		t.Errorf("there are %v", got)
	}
}
