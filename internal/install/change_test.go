// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package install

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
)

func TestUndoneChangesLeaveNoFolder(t *testing.T) {
	dir := t.TempDir()
	var changes []change
	for _, name := range []string{"containerd/conf.d/ours.toml", "containerd/config.toml", "theirs"} {
		c, err := changed(filepath.Join(dir, name), []byte("# ours\n"), 0o644)
		if err != nil {
			t.Fatal(err)
		}
		changes = append(changes, c)
	}
	theirs := changes[2].path // somebody else makes it in the meantime
	if err := os.WriteFile(theirs, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := applyAll(changes); !errdefs.IsAborted(err) {
		t.Errorf("got %v, want that a file has changed in the meantime", err)
	}
	left, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil || len(left) != 1 || left[0] != theirs {
		t.Errorf("left are %q, %v; want %s alone", left, err, theirs)
	}
}
