// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
)

var (
	commandBlock = regexp.MustCompile("(?ms)^```\n(.*?)^```")
	pushCommand  = regexp.MustCompile(`(?m)^(modctl|kit|oras) push\b`)
	packer       = regexp.MustCompile(`(?m)^(modctl|docker|kit|oras)\b`)
)

// The commands of docs/packing.md are run as they are, with the node's registry, and pods read
// what they have packed. Of the programs only oras is on the Go module
// proxy; the others are used if they are on PATH.
func TestPodsReadWhatTheDocumentedCommandsPack(t *testing.T) {
	t.Parallel()
	n := node.ForTest(t, node.Options{})
	doc, err := os.ReadFile("../docs/packing.md")
	check(t, err)
	src := t.TempDir()
	files := map[string]string{"model.safetensors": "weights", "tokenizer.json": "{}", "model/weights.bin": "more weights"}
	for name, text := range files {
		check(t, os.MkdirAll(filepath.Dir(filepath.Join(src, name)), 0o755))
		writeFile(t, filepath.Join(src, name), text, 0o644)
	}
	tried := map[string]int{}
	for _, block := range commandBlock.FindAllStringSubmatch(string(doc), -1) {
		commands := block[1]
		tool := packer.FindString(commands)
		if tool == "" {
			continue // it packs nothing
		}
		tried[tool]++
		t.Run(tool, func(t *testing.T) {
			version := tool + " version"
			if tool == "docker" {
				version = "docker model version" // a plugin
			}
			if _, err := n.Tool("sh", "-c", version); err != nil {
				t.Skipf("NOT TESTED: `%s` does not run here", version)
			}
			ref := n.Registry + "/models/llama:v1"
			text := strings.ReplaceAll(commands, "registry.example.com/models/llama:v1", ref)
			text = pushCommand.ReplaceAllString(text, "$0 --plain-http") // the registry of the tests has no TLS
			home := t.TempDir()
			_, err := n.Tool("env", "-C", src, "HOME="+home, "TMPDIR="+home, "bash", "-e", "-c", text)
			check(t, err)
			_, err = n.Pull(ref)
			check(t, err)
			pod, err := n.RunPod(node.PodSpec{Volumes: []node.Volume{{Image: ref, Path: "/model"}}})
			check(t, err)
			entries, err := pod.Tree("main", "/model")
			check(t, err)
			found := false
			for _, e := range entries {
				if want, ok := files[e.Path]; ok {
					found = true
					if sum := digest.FromString(want).Encoded(); e.SHA256 != sum {
						t.Errorf("%s has the SHA-256 %s, want %s", e.Path, e.SHA256, sum)
					}
				}
			}
			if !found {
				t.Errorf("the volume has none of the files that were packed: %+v", entries)
			}
			check(t, pod.Remove())
			_, err = n.Crictl("rmi", ref)
			check(t, err)
		})
	}
	if tried["oras"] != 2 || tried["modctl"] != 1 || tried["docker"] != 1 || tried["kit"] != 1 {
		t.Errorf("docs/packing.md has these commands that pack: %v", tried)
	}
}
