// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/platforms"
	modelspec "github.com/modelpack/model-spec/specs-go/v1"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
)

// publishedTable is the file with the table of TestWhichArtifactsCanBeVolumes.
const publishedTable = "../docs/kubernetes.md"

// The ends of containerd's errors for artifacts that it does not accept, and their cells in
// the table.
const (
	mismatched   = "mismatched image rootfs and manifest layers"
	noPlatform   = "no match for platform in manifest"
	sharedConfig = "has the same config"

	noPull = "no, the pull fails: `" + noPlatform + "`"
)

// published is an artifact that is pushed with a tool's usual command.
type published struct {
	call string
	push func(t *testing.T, n *node.Node, ref string)
}

func publishedCalls() []published {
	oras := func(args ...string) func(*testing.T, *node.Node, string) {
		return func(t *testing.T, n *node.Node, ref string) {
			dir := t.TempDir()
			check(t, os.Mkdir(filepath.Join(dir, "docs"), 0o755))
			for name, text := range map[string]string{"hi.txt": ref, "docs/hi.txt": ref, "config.json": fmt.Sprintf(`{"name": %q}`, ref)} {
				check(t, os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600))
			}
			push := []string{"-C", dir, "oras", "push", "--plain-http"} // the command is env: oras uses relative paths as titles
			for _, a := range args {
				push = append(push, strings.ReplaceAll(a, "REF", ref))
			}
			_, err := n.Tool("env", push...)
			check(t, err)
		}
	}
	model := func(text string) *pack.Artifact {
		return &pack.Artifact{Layers: []pack.Layer{{
			MediaType:   modelspec.MediaTypeModelWeightRaw,
			Data:        []byte(text),
			Annotations: map[string]string{modelspec.AnnotationFilepath: "model.gguf"},
		}}}
	}
	emptyConfig := func(text string) *pack.Artifact {
		a := model(text)
		a.Config = []byte("{}")
		return a
	}
	docker := func(text string) *pack.Artifact {
		return &pack.Artifact{ConfigType: pack.DockerConfigType, Layers: []pack.Layer{{
			MediaType: "application/vnd.docker.ai.gguf.v3", Data: []byte(text),
		}}}
	}
	packed := func(a func(text string) *pack.Artifact) func(*testing.T, *node.Node, string) {
		return func(t *testing.T, n *node.Node, ref string) {
			_, err := a(ref).Push(t.Context(), n.Registry, repositoryOf(ref), "v1")
			check(t, err)
		}
	}
	index := func(p *ocispec.Platform) func(*testing.T, *node.Node, string) {
		return func(t *testing.T, n *node.Node, ref string) {
			x := &pack.Index{Manifests: []pack.IndexEntry{{Artifact: model(ref), Platform: p}}}
			_, err := x.Push(t.Context(), n.Registry, repositoryOf(ref), "v1")
			check(t, err)
		}
	}
	here, elsewhere := platforms.DefaultSpec(), ocispec.Platform{OS: "plan9", Architecture: "mips"}
	return []published{
		{"`oras push REF FILE`", oras("REF", "hi.txt")},
		{"`oras push REF DIRECTORY`", oras("REF", "docs/")},
		{"`oras push --config CONFIG:TYPE REF FILE`", oras("--config", "config.json:application/vnd.example.config", "REF", "hi.txt")},
		{"`oras push REF FILE:TYPE`", oras("REF", "hi.txt:text/plain")},
		{"`oras push --config CONFIG:TYPE REF FILE:TYPE`", oras("--config", "config.json:application/vnd.example.config", "REF", "hi.txt:text/plain")},
		{"`oras push --config CONFIG:TYPE REF DIRECTORY:TYPE.tar+gzip`", oras("--config", "config.json:application/vnd.example.config", "REF", "docs/:application/vnd.example.docs.tar+gzip")},
		{"ModelPack with its own config: modctl, `docker model package --format cncf`, KitOps", packed(model)},
		{"ModelPack with the config `{}`: AIKit, KAITO", packed(emptyConfig)},
		{"Docker's own model format", packed(docker)},
		{"an index with a manifest for the node's platform", index(&here)},
		{"an index whose only manifest names no platform", index(nil)},
		{"an index whose only manifest is for another platform", index(&elsewhere)},
	}
}

// repositoryOf returns the repository of a reference HOST/REPOSITORY:v1.
func repositoryOf(ref string) string {
	_, repository, _ := strings.Cut(ref, "/")
	return strings.TrimSuffix(repository, ":v1")
}

// The table of docs/kubernetes.md is generated here: which artifacts of common tools
// containerd's CRI accepts as volumes, alone on the node and together with another one of
// the same kind.
func TestWhichArtifactsCanBeVolumes(t *testing.T) {
	t.Parallel()
	n := node.ForTest(t, node.Options{})
	// containerd mounts a volume once for all containers of a pod, so the second case needs
	// its own pod.
	first, err := n.RunSandbox(node.PodSpec{})
	check(t, err)
	second, err := n.RunSandbox(node.PodSpec{})
	check(t, err)
	var table strings.Builder
	fmt.Fprint(&table, "| packed by | volume on containerd | with another one of the same kind |\n|---|---|---|\n")
	for i, p := range publishedCalls() {
		refs := []string{fmt.Sprintf("%s/published/%d:v1", n.Registry, i), fmt.Sprintf("%s/published/%d-more:v1", n.Registry, i)}
		p.push(t, n, refs[0])
		alone := volumeOf(t, first, refs[0])
		beside := "the same"
		if alone == "yes" {
			p.push(t, n, refs[1])
			_, err := n.Pull(refs[1])
			check(t, err)
			beside = volumeOf(t, second, refs[0])
		}
		fmt.Fprintf(&table, "| %s | %s | %s |\n", p.call, alone, beside)
		if alone != noPull { // the next one must be alone on the node
			_, err := n.Crictl("rmi", refs[0])
			check(t, err)
		}
		if alone == "yes" {
			_, _ = n.Crictl("rmi", refs[1]) // deleted together with the first, if CRI has only one image for both
		}
	}
	t.Logf("measured:\n%s", &table)
	doc, err := os.ReadFile(publishedTable)
	check(t, err)
	if !strings.Contains(string(doc), "\n"+table.String()) {
		t.Errorf("the table in %s differs", publishedTable)
	}
}

// volumeOf returns the cell for the volume ref in a new container of the pod.
func volumeOf(t *testing.T, pod *node.Pod, ref string) string {
	t.Helper()
	_, err := pod.Node().Pull(ref)
	if err == nil {
		c := node.Container{Name: path.Base(strings.TrimSuffix(ref, ":v1")), Volumes: []node.Volume{{Image: ref, Path: "/model"}}}
		if err = pod.Start(c); err == nil {
			entries, err := pod.Tree(c.Name, "/model")
			check(t, err)
			if len(entries) == 0 {
				return "empty"
			}
			return "yes"
		}
	}
	t.Logf("%s: %v", ref, err)
	for text, cell := range map[string]string{
		mismatched:   "no: `" + mismatched + "`",
		noPlatform:   noPull,
		sharedConfig: "no: `" + sharedConfig + "`",
	} {
		if strings.Contains(err.Error(), text) {
			return cell
		}
	}
	return fmt.Sprintf("no: %v", err)
}
