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

// tampering is a change to a blob in containerd's content store.
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
		replacement := filepath.Join(filepath.Dir(blob), "replacement")
		return errors.Join(os.WriteFile(replacement, other, 0o444), os.Rename(replacement, blob))
	}},
	{"gone", func(blob string, _ []byte) error { return os.Remove(blob) }},
}

// store is one way in which the daemon obtains the content of the weights.
type store struct {
	*scenario
	of, other *model
	// linked means that the tree hard-links the file of the content store.
	linked bool
}

// Decompressed and copied content is verified, and refused if it is wrong. A hard link is
// not verified again, because containerd verified the file when it stored it: if the file
// is replaced, the tree keeps the old file; if its bytes change, the volume changes too.
func TestATamperedBlobIsNotMountedSilently(t *testing.T) {
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
		t.Errorf("%v: want at least one volume that is right and one that is refused", total)
	}
	t.Logf("%v in %v", total, time.Since(began).Round(time.Second))
}

// tampered changes the weights' blob at an operation of a build. It returns the content of
// the volume: "right", "refused", or "as the store has it".
func (l *life) tampered(s store, at Op, how tampering) (mounted string, err error) {
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
	if s.linked && int64(len(other)) != s.of.layers[weights].Size { // the daemon compares the size first
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
		return "", fmt.Errorf("an error although the blob was not changed: %w", err)
	case err != nil && !strings.Contains(err.Error(), "layer "):
		return "", fmt.Errorf("the error does not name the layer: %w", err)
	case err != nil:
		mounted = "refused"
	default:
		if mounted, err = s.compare(h, mounts); err != nil {
			return "", err
		}
		if hit == 0 {
			mounted = "not met"
		}
	}
	// The error tells the user to delete the image and to pull it again.
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
			return mounted, fmt.Errorf("after pulling again (the volume was %q): %w", mounted, err)
		}
	}
	clear(h.may)
	return mounted, nil
}

// compare compares a volume with the model or, where a hard link allows it, with the
// content store.
func (s store) compare(h *host, mounts []mount.Mount) (string, error) {
	err := h.compare(mounts, s.of)
	if err == nil {
		return "right", nil
	}
	if !s.linked {
		return "", err
	}
	target := filepath.Join(h.dir, "mounted")
	if err := mount.All(mounts, target); err != nil {
		return "", err
	}
	defer func() { _ = mount.UnmountAll(target, unix.MNT_DETACH) }()
	got, rerr := os.ReadFile(filepath.Join(target, weightsFile))
	if errors.Is(rerr, unix.EIO) { // pages beyond the end of the truncated blob cannot be read
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

// blob returns the path of the weights' packed blob.
func (m *model) blob() string {
	return filepath.Join(m.blobs, "blobs", "sha256", m.layers[weights].Digest.Encoded())
}
