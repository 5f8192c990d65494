// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package snapshot

import (
	"slices"
	"testing"
)

// This is as in containerd's own overlayfs, without "only-remap-ids" beside "remap-ids", which
// would mean nothing (resolveSnapshotOptions in client/snapshotter_opts_unix.go).
func TestContainerdIsToldWhatTheKernelCanDo(t *testing.T) {
	for _, test := range []struct {
		mapsOwners, slowChown bool
		want                  []string
	}{
		{true, false, []string{"remap-ids"}},
		{true, true, []string{"remap-ids"}},
		{false, false, []string{"only-remap-ids"}},
		{false, true, nil},
	} {
		if got := (Overlayfs{SlowChown: test.slowChown}).Capabilities(test.mapsOwners); !slices.Equal(got, test.want) {
			t.Errorf("%+v: told %q", test, got)
		}
	}
}
