// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package install

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/artifact-snapshotter/artifact-snapshotter/daemon"
	"github.com/artifact-snapshotter/artifact-snapshotter/snapshot"
)

// Only a CSI driver pulls from registries.
func TestTheUnitHasTheNetworkForCSIAlone(t *testing.T) {
	for _, csi := range []bool{false, true} {
		cfg := daemon.Default()
		cfg.CSI.Enabled = csi
		r := run{Options: Options{Daemon: cfg, Binary: "/usr/local/bin/artifact-snapshotter"}, configFile: filepath.Join(t.TempDir(), "config.toml")}
		changes, err := r.serviceChanges(snapshot.Overlayfs{})
		if err != nil {
			t.Fatal(err)
		}
		unit := string(changes[1].after)
		for line, want := range map[string]bool{"\nIPAddressDeny=any\n": true, "\nIPAddressAllow=any\n": csi, "\nIPAddressAllow=localhost\n": !csi} {
			if strings.Contains(unit, line) != want {
				t.Errorf("CSI %t: %q is in the unit: %t, want %t", csi, line, !want, want)
			}
		}
	}
}
