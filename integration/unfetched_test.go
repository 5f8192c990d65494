// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
)

// pulledUnfetched pulls an artifact that has a layer with an image's media type but no
// image config, as `oras push` makes it. CRI does not fetch this layer.
func pulledUnfetched(t *testing.T, n *node.Node, name, config string) (ref string) {
	t.Helper()
	archive, err := pack.TarOf(file(name))
	check(t, err)
	compressed, err := pack.Gzip(archive)
	check(t, err)
	a := pack.Artifact{
		ArtifactType: "application/vnd.acme.docs.v1", ConfigType: config, Config: []byte(`{"name":"` + name + `"}`),
		Layers: []pack.Layer{{MediaType: ocispec.MediaTypeImageLayerGzip, Data: compressed}},
	}
	_, err = a.Push(t.Context(), n.Registry, "docs/"+name, "v1")
	check(t, err)
	ref = n.Registry + "/docs/" + name + ":v1"
	_, err = n.Pull(ref)
	check(t, err)
	return ref
}

func TestLayersThatCRIDoesNotFetch(t *testing.T) {
	n := node.ForTest(t, node.Options{})
	ref := pulledUnfetched(t, n, "docs", "application/vnd.acme.config.v1+json")
	target := filepath.Join(t.TempDir(), "mounted")
	advice := []string{"layer 0 (" + ocispec.MediaTypeImageLayerGzip, "its blob is not in " + n.ContentRoot, "unless the config is an image's", "`artifact-snapshotter pull`", "other layer types"}
	wantUnpackFails(t, n, []string{ref}, advice...)
	for _, args := range [][]string{{"mount", ref, target}, {"verify", ref}} {
		_, errs, err := n.Artifact(args...)
		if err == nil || strings.Contains(errs, "delete the image") {
			t.Errorf("%s: %v, %s", args[0], err, errs)
		}
		for _, want := range advice[2:] {
			if !strings.Contains(errs, want) {
				t.Errorf("the error of %s does not contain %q: %s", args[0], want, errs)
			}
		}
	}

	// The first recommendation of the error.
	tool(t, n, "pull", ref)
	tool(t, n, "mount", ref, target)
	if b, err := os.ReadFile(filepath.Join(target, "docs")); err != nil || string(b) != "docs" {
		t.Errorf("%q, %v", b, err)
	}
	tool(t, n, "verify", ref)
	tool(t, n, "unmount", target)
}
