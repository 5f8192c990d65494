// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package client

import (
	"testing"
	"time"

	coreimages "github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"

	"github.com/artifact-snapshotter/artifact-snapshotter/images"
)

func TestFilters(t *testing.T) {
	now := time.Date(2026, 3, 4, 5, 6, 7, 0, time.UTC)
	image := images.Image{Image: coreimages.Image{
		Name:      "registry.example.com/models/llama:v1",
		Labels:    map[string]string{"team": "a"},
		UpdatedAt: now.Add(-2 * time.Hour),
	}}
	for text, want := range map[string]bool{
		"until=1h": true, "until=3h": false, "until=2026-03-04T04:00:00Z": true, "until=2026-03-04T03:00:00Z": false,
		"label=team": true, "label=team=a": true, "label=team=b": false, "label=other": false, "label=team=": false,
		"reference=*/models/llama:*": true, "reference=*/models/*": true, "reference=*/other/*": false, "reference=*": false,
	} {
		for filters, want := range map[*[]string]bool{{text}: want, {text, "label=team"}: want, {"label=other", text}: false} {
			if f, err := ParseFilters(*filters, now); err != nil || f(image) != want {
				t.Errorf("%q lets the image pass: %t (%v), want %t", *filters, !want, err, want)
			}
		}
	}
	if f, err := ParseFilters(nil, now); err != nil || !f(image) {
		t.Errorf("without filters the image does not pass (%v)", err)
	}
	for _, bad := range []string{"", "until", "until=", "until=yesterday", "before=1h", "reference=[", "team=a"} {
		if _, err := ParseFilters([]string{bad}, now); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}
