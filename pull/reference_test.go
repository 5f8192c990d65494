// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package pull

import (
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

func TestReferencesAndTheirPolicies(t *testing.T) {
	d := "sha256:" + strings.Repeat("a", 64)
	for text, want := range map[string]struct {
		full   string
		policy Policy
	}{
		"registry.test/models/llama:v1":      {"registry.test/models/llama:v1", IfNotPresent},
		"registry.test/llama":                {"registry.test/llama:latest", Always},
		"registry.test/llama:latest":         {"registry.test/llama:latest", Always},
		"localhost/llama:v1":                 {"localhost/llama:v1", IfNotPresent},
		"127.0.0.1:5000/a/b/c:v1":            {"127.0.0.1:5000/a/b/c:v1", IfNotPresent},
		"[::1]:5000/a:v1":                    {"[::1]:5000/a:v1", IfNotPresent},
		"registry.test/llama@" + d:           {"registry.test/llama@" + d, IfNotPresent},
		"registry.test/llama:latest@" + d:    {"registry.test/llama@" + d, IfNotPresent},
		"registry.test/a_b/c--d.e__f:V1.2-x": {"registry.test/a_b/c--d.e__f:V1.2-x", IfNotPresent},
	} {
		r, err := ParseReference(text)
		if err != nil || r.String() != want.full {
			t.Errorf("%s: %s, %v; want %s", text, r, err, want.full)
			continue
		}
		if p, err := r.ParsePolicy(""); err != nil || p != want.policy {
			t.Errorf("%s: %s, %v; want %s", text, p, err, want.policy)
		}
	}
	for _, bad := range []string{
		"", "llama", "llama:v1", "library/llama:v1", "registry.test", "registry.test/", "registry.test/Llama:v1", "registry.test/../x:v1",
		"registry.test/a//b:v1", "registry.test/a:v1/b", "http://registry.test/a:v1", "user@registry.test/a:v1", "registry.test/a?x:v1",
		"registry.test/a@sha256:abc", "registry.test/a@" + d + "0", "registry.test/a:" + strings.Repeat("x", 129), ".test/a:v1", "../a.b/c:v1",
		"registry.test/a:v1\n", "registry.test/" + strings.Repeat("a", maxReference), "registry.test:port/a:v1", "registry.test/a#b:v1",
	} {
		if r, err := ParseReference(bad); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q is %s, %v", bad, r, err)
		}
	}
	if _, err := (Reference{}).ParsePolicy("always"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a policy in lower case: %v", err)
	}
}

func TestProgressIsReadable(t *testing.T) {
	now := time.Unix(1000, 0)
	for _, test := range []struct {
		done, fetched, total int64
		want                 string
	}{
		{0, 0, 0, "pulling: the manifest has not arrived"},
		{0, 0, 1 << 30, "pulling: 0.0 of 1.0 GiB (0 %), nothing has arrived yet"},
		{3436 << 20, 2140 << 20, 16486 << 20, "pulling: 3.4 of 16.1 GiB (20 %), 214 MiB/s, about 1m left"},
		{1 << 20, 1 << 20, 4 << 20, "pulling: 1.0 of 4.0 MiB (25 %), 102 KiB/s, about 30s left"},
		{5, 5, 1 << 50, "pulling: 0.0 of 1.0 PiB (0 %), nothing has arrived yet"},
		{1 << 40, 1 << 30, 1 << 50, "pulling: 0.0 of 1.0 PiB (0 %), 102 MiB/s, about 2909h52m left"},
	} {
		p := &progress{}
		p.done.Store(test.done)
		p.fetched.Store(test.fetched)
		p.total.Store(test.total)
		p.began.Store(now.Add(-10 * time.Second).UnixNano())
		if got := p.text(now); got != test.want {
			t.Errorf("%q, want %q", got, test.want)
		}
	}
}
