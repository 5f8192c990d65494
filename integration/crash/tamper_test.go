// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

//go:build amd64

package crash

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
)

// tampering is what somebody does to a blob in containerd's content store.
type tampering struct {
	name string
	do   func(blob string, other []byte) error
}

var tamperings = []tampering{
	{"cut short", func(blob string, other []byte) error { return os.Truncate(blob, int64(len(other)/2)) }},
	{"other bytes", func(blob string, other []byte) error {
		f, err := os.OpenFile(blob, os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		_, err = f.Write(other)
		return errors.Join(err, f.Close())
	}},
	{"another file", func(blob string, other []byte) error {
		aside := filepath.Join(filepath.Dir(blob), "aside")
		return errors.Join(os.WriteFile(aside, other, 0o444), os.Rename(aside, blob))
	}},
	{"gone", func(blob string, _ []byte) error { return os.Remove(blob) }},
}

// store is how the daemon comes by the content of the weights.
type store struct {
	*scenario
	of, other *model
	// linked is whether a tree has the very file of the content store.
	linked bool
}

// What has passed the daemon by is right or refused: what is decompressed or copied is
// checked. A file that is linked is the content store's, whose bytes containerd has
// checked when it stored them: whatever becomes of its name, the tree has the file; what
// is done to its bytes, or was done before it was linked, the volume shows as the store
// has it, and neither more nor anything else.
func TestABlobIsTamperedWithDuringABuild(t *testing.T) {
	program, err := node.Program()
	check(t, err)
	c := campaign{shortDir(t), program, startContainerd(t)}
	m, others := packModels(t), packModelsOf(t, 2)
	scenario := func(of *model, apart bool, toml string) *scenario {
		return &scenario{
			name: of.name, toml: toml, apart: apart, next: []*model{of},
			before: func(h *host) error { return h.pull(of) },
			act:    func(h *host) error { return h.run(of) },
		}
	}
	stores := []store{
		{scenario(m.raw, false, ""), m.raw, others.raw, true},
		{scenario(m.tar, false, ""), m.tar, others.tar, true},
		{scenario(m.gzip, false, ""), m.gzip, others.gzip, false},
		{scenario(m.zstd, false, ""), m.zstd, others.zstd, false},
		{scenario(m.raw, true, ""), m.raw, others.raw, false},
		{scenario(m.tar, true, ""), m.tar, others.tar, false},
	}
	began, each := time.Now(), 12
	if long {
		each = 1 << 20
	}
	total := map[string]int{}
	for _, s := range stores {
		l := life{campaign: c, scenario: s.scenario}
		done, err := l.meet(Fault{At: &Op{}})
		check(t, err)
		type instant struct {
			Op
			tampering
		}
		var all []instant
		for i, op := range done.ops {
			all = append(all, instant{op, tamperings[i%len(tamperings)]})
			if long {
				for j := range 3 {
					all = append(all, instant{op, tamperings[(i+j+1)%len(tamperings)]})
				}
			}
		}
		got := map[string]int{}
		for _, at := range spread(all, each) {
			how, err := l.tampered(s, at.Op, at.tampering)
			if err != nil {
				t.Errorf("%s (linked: %v), %s at %v: %v", s.name, s.linked, at.name, at.Op, err)
				check(t, l.end())
			}
			got[how]++
			total[how]++
		}
		check(t, l.end())
		t.Logf("%s, linked: %v, %d operations: %v", s.name, s.linked, len(done.ops), got)
	}
	if total["right"] == 0 || total["refused"] == 0 {
		t.Errorf("%v: too few are met", total)
	}
	t.Logf("%v in %v", total, time.Since(began).Round(time.Second))
}

// tampered tampers with the blob of the weights at an operation of a build and says what
// the volume shows: "right", "refused", or "as the store has it".
func (l *life) tampered(s store, at Op, how tampering) (shown string, err error) {
	if err := l.host(); err != nil {
		return "", err
	}
	h := l.h
	defer func() { err = h.withLog(err) }()
	if err := h.pull(s.of); err != nil {
		return "", err
	}
	blob := filepath.Join(h.content, "blobs", "sha256", s.of.layers[weights].Digest.Encoded())
	other, err := os.ReadFile(s.other.blob())
	if err != nil {
		return "", err
	}
	if s.linked && int64(len(other)) != s.of.layers[weights].Size { // whose size is the first thing that is compared
		return "", fmt.Errorf("the other blob has %d bytes", len(other))
	}
	var failed error
	h.daemon.traced.Inject(Fault{At: &at, Hook: func(*Process) { failed = how.do(blob, other) }})
	key := h.volumeKey(s.of)
	mounts, err := h.ask(key, s.of, func(ctx context.Context) ([]mount.Mount, error) { return h.Prepare(ctx, key, "") })
	_, hit := h.daemon.traced.Heal()
	if failed != nil {
		return "", failed
	}
	switch {
	case err != nil && hit == 0:
		return "", fmt.Errorf("with nothing that was done to the blob: %w", err)
	case err != nil && !strings.Contains(err.Error(), "layer "):
		return "", fmt.Errorf("it does not say where: %w", err)
	case err != nil:
		shown = "refused"
	default:
		if shown, err = s.compare(h, mounts); err != nil {
			return "", err
		}
		if hit == 0 {
			shown = "not met"
		}
	}
	// The advice is to delete the image and to pull it again.
	delete(h.must, key)
	h.may[key] = true
	steps := []func() error{
		func() error { return h.forget(key) },
		func() error { return h.remove(s.of) },
		h.cleanup,
		func() error { return h.pull(s.of) },
		func() error { return h.checkNext(s.next) },
		h.empty,
		h.awaitIdle,
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return shown, fmt.Errorf("pulled again after it was %s: %w", shown, err)
		}
	}
	clear(h.may)
	return shown, nil
}

// compare compares a volume with the model, and where that may be, with what the content
// store has.
func (s store) compare(h *host, mounts []mount.Mount) (string, error) {
	err := h.shows(mounts, s.of)
	if err == nil {
		return "right", nil
	}
	if !s.linked {
		return "", err
	}
	target := filepath.Join(h.dir, "shown")
	if err := mount.All(mounts, target); err != nil {
		return "", err
	}
	defer func() { _ = mount.UnmountAll(target, unix.MNT_DETACH) }()
	got, rerr := os.ReadFile(filepath.Join(target, weightsFile))
	if errors.Is(rerr, unix.EIO) { // the rest of what was cut cannot be read
		return "as the store has it", nil
	}
	for _, m := range []*model{s.of, s.other} {
		blob, berr := os.ReadFile(m.blob())
		if rerr = errors.Join(rerr, berr); rerr == nil && len(got) > 0 && bytes.Contains(blob, got) {
			return "as the store has it", nil
		}
	}
	return "", errors.Join(err, rerr)
}

// blob is that of the weights, as it was packed.
func (m *model) blob() string {
	return filepath.Join(m.blobs, "blobs", "sha256", m.layers[weights].Digest.Encoded())
}
