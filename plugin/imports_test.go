// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package plugin

import (
	"os/exec"
	"strings"
	"testing"
)

// A containerd that imports this package must not get a second metrics registry, exporters of
// traces, or a client of systemd, NRI and kubelet with it. What remains of OpenTelemetry and go-toml is
// imported by containerd's own client and configuration packages.
func TestThePluginImportsNothingOfTheDaemon(t *testing.T) {
	output, err := exec.Command("go", "list", "-deps", ".").Output()
	if err != nil {
		t.Fatal(err)
	}
	imports := strings.Fields(string(output))
	if len(imports) < 100 {
		t.Fatalf("go list knows only %d packages: %q", len(imports), imports)
	}
	const module = "github.com/artifact-snapshotter/artifact-snapshotter/"
	for _, path := range imports {
		for _, prefix := range []string{
			module + "daemon", module + "nri", module + "csi", module + "pull", module + "cmd",
			"github.com/prometheus/", "go.opentelemetry.io/otel/sdk", "go.opentelemetry.io/otel/exporters/",
			"go.opentelemetry.io/contrib/instrumentation/google.golang.org/",
			"github.com/coreos/go-systemd", "github.com/containerd/nri", "github.com/urfave/cli",
			"github.com/container-storage-interface/", "k8s.io/kubelet",
		} {
			if strings.HasPrefix(path, prefix) {
				t.Errorf("the plugin imports %s", path)
			}
		}
	}
}
