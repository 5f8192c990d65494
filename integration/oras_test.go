// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/treelist"
)

// The media types of the real `oras` say almost nothing about the bytes. The volume must
// equal the output of `oras pull`.

// orasIn runs oras in a directory, because oras uses the relative paths as titles.
func orasIn(t *testing.T, n *node.Node, dir string, args ...string) string {
	t.Helper()
	out, err := n.Tool("env", append([]string{"-C", dir, "oras"}, args...)...)
	check(t, err)
	return out
}

// orasSource returns a directory of files to push.
func orasSource(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	var gz bytes.Buffer
	w := gzip.NewWriter(&gz)
	_, err := w.Write([]byte("text, and no archive\n"))
	check(t, err)
	check(t, w.Close())
	for name, text := range map[string]string{
		"hi.txt": "hi\n", "zeros.bin": strings.Repeat("\x00", 10240), "empty": "", "text.gz": gz.String(), "config.json": `{"a": "config of its own"}`,
		"docs/a.md": "a\n", "docs/deep/b.md": strings.Repeat("b", 1<<20), "docs/deep/run.sh": "#!/bin/sh\n", "none": "",
	} {
		writeFile(t, filepath.Join(dir, name), text, 0o644)
	}
	check(t, os.Chmod(filepath.Join(dir, "docs/deep/run.sh"), 0o755))
	check(t, os.Symlink("deep/b.md", filepath.Join(dir, "docs/link")))
	return dir
}

// orasPulls returns the output of `oras pull`, without the attributes that ORAS does not
// transport.
func orasPulls(t *testing.T, n *node.Node, ref string) []treelist.Entry {
	t.Helper()
	dir := t.TempDir()
	orasIn(t, n, dir, "pull", "--plain-http", "--no-tty", ref)
	entries, err := treelist.List(dir)
	check(t, err)
	return asORASWrites(entries)
}

func asORASWrites(entries []treelist.Entry) []treelist.Entry {
	entries = slices.Clone(entries)
	for i := range entries {
		e := &entries[i]
		executable := e.Mode & 0o100
		if e.Type != "file" {
			executable = 0
		}
		*e = treelist.Entry{Path: e.Path, Type: e.Type, Mode: executable, Size: e.Size, SHA256: e.SHA256, Target: e.Target}
	}
	return entries
}

// mountedAt mounts an artifact with `mount` and lists it.
func mountedAt(t *testing.T, n *node.Node, ref string) []treelist.Entry {
	t.Helper()
	target := filepath.Join(t.TempDir(), "volume")
	tool(t, n, "mount", ref, target)
	entries, err := treelist.List(target)
	check(t, err)
	tool(t, n, "unmount", target)
	return entries
}

// orasPushes are the ways to use `oras push`, by name.
var orasPushes = map[string][]string{
	"file":              {"hi.txt"},
	"files":             {"hi.txt", "zeros.bin", "empty", "text.gz", "docs/a.md"},
	"directory":         {"docs"},
	"typed-directory":   {"docs/:application/vnd.acme.docs.layer.v1+tar"},
	"untyped-directory": {"docs/:application/vnd.acme.docs"},
	"mixture":           {"docs/", "hi.txt:text/plain", "text.gz"},
}

func TestORASArtifactsAreMountedAsORASPullsThem(t *testing.T) {
	t.Parallel()
	n := node.ForTest(t, node.Options{})
	src := orasSource(t)
	for name, args := range orasPushes {
		t.Run(name, func(t *testing.T) {
			ref := n.Registry + "/oras/" + name + ":v1"
			orasIn(t, n, src, append([]string{"push", "--plain-http", "--no-tty", ref}, args...)...)
			want := orasPulls(t, n, ref)
			tool(t, n, "pull", "--plain-http", ref)
			if diff := treelist.Diff(want, asORASWrites(mountedAt(t, n, ref))); diff != "" {
				t.Errorf("the volume differs from the output of `oras pull`:\n%s", diff)
			}
			if v := toolJSON[jsonVerified](t, n, "verify", ref); !v.OK {
				t.Errorf("verify: %+v", v)
			}
			for _, l := range toolJSON[jsonInspected](t, n, "inspect", ref).Layers {
				archive := l.Format == "tar" && l.Compression == "gzip" && l.File == nil && l.DiffID != ""
				file := l.Format == "raw" && l.Compression == "" && l.File != nil
				if !archive && !file {
					t.Errorf("inspect: %+v", l)
				}
			}
		})
	}
}

// With media types and a config of its own, CRI accepts an ORAS artifact as a volume.
func TestAPodMountsADirectoryOfORAS(t *testing.T) {
	for what, o := range map[string]node.Options{"snapshotter": {}, "NRI": {NRI: true}} {
		t.Run(what, func(t *testing.T) {
			n := node.ForTest(t, o)
			src := orasSource(t)
			ref := n.Registry + "/oras/docs:v1"
			orasIn(t, n, src, "push", "--plain-http", "--no-tty", "--config", "config.json:application/vnd.acme.config+json", ref,
				"docs/:application/vnd.acme.docs.layer.v1+tar", "hi.txt:text/plain")
			_, err := n.Pull(ref)
			check(t, err)
			wantORASVolume(t, n, ref)
		})
	}
}

func wantORASVolume(t *testing.T, n *node.Node, ref string) {
	t.Helper()
	pod, err := n.RunPod(node.PodSpec{Volumes: []node.Volume{{Image: ref, Path: "/docs"}}})
	check(t, err)
	got, err := pod.Tree("main", "/docs")
	check(t, err)
	if diff := treelist.Diff(orasPulls(t, n, ref), asORASWrites(got)); diff != "" {
		t.Errorf("the volume differs from the output of `oras pull`:\n%s", diff)
	}
	check(t, pod.Remove())
}

// CRI-O also accepts the default media types of ORAS.
func TestCRIOMountsORASArtifacts(t *testing.T) {
	n := crioNode(t, node.Options{})
	src := orasSource(t)
	for name, args := range orasPushes {
		t.Run(name, func(t *testing.T) {
			ref := n.Registry + "/oras/" + name + ":v1"
			orasIn(t, n, src, append([]string{"push", "--plain-http", "--no-tty", ref}, args...)...)
			_, err := n.Pull(ref)
			check(t, err)
			wantORASVolume(t, n, ref)
			_, err = n.Crictl("rmi", ref)
			check(t, err)
		})
	}
}

// The legacy ModelPack path has precedence over the title, but CRI-O's mounts have the
// titles.
func TestCRIOMountsFilesWithALegacyPathBesideTheirTitle(t *testing.T) {
	n := crioNode(t, node.Options{})
	src := t.TempDir()
	want := []string{}
	manifest := ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, ArtifactType: "application/vnd.acme.pipeline"}
	manifest.SchemaVersion = 2
	push := func(mediaType, content string) ocispec.Descriptor {
		writeFile(t, filepath.Join(src, "blob"), content, 0o644)
		var desc ocispec.Descriptor
		out := orasIn(t, n, src, "blob", "push", "--plain-http", "--no-tty", "--media-type", mediaType, "--descriptor", n.Registry+"/pipeline", "blob")
		check(t, json.Unmarshal([]byte(out), &desc))
		return desc
	}
	manifest.Config = push("application/vnd.acme.config+json", `{"pipeline": 1}`)
	for _, part := range []string{"unet", "vae"} {
		l := push("application/octet-stream", part)
		l.Annotations = map[string]string{ocispec.AnnotationTitle: part + ".safetensors", "org.cnai.model.filepath": part + "/model.safetensors"}
		manifest.Layers = append(manifest.Layers, l)
		want = append(want, part, part+"/model.safetensors")
	}
	text, err := json.Marshal(manifest)
	check(t, err)
	writeFile(t, filepath.Join(src, "manifest.json"), string(text), 0o644)
	ref := n.Registry + "/pipeline:v1"
	orasIn(t, n, src, "manifest", "push", "--plain-http", ref, "manifest.json")
	_, err = n.Pull(ref)
	check(t, err)
	pod, err := n.RunPod(node.PodSpec{Volumes: []node.Volume{{Image: ref, Path: "/model"}}})
	check(t, err)
	got, err := pod.Tree("main", "/model")
	check(t, err)
	var paths []string
	for _, e := range got {
		paths = append(paths, e.Path)
	}
	if !slices.Equal(paths, want) {
		t.Errorf("the volume has %q, want %q", paths, want)
	}
	wantMounts(t, pod, "main", "/model")
	check(t, pod.Remove())
}

func TestAnORASAttachmentWithoutFilesIsAnEmptyVolume(t *testing.T) {
	n := node.ForTest(t, node.Options{})
	src := orasSource(t)
	subject := n.Registry + "/oras/subject:v1"
	orasIn(t, n, src, "push", "--plain-http", "--no-tty", subject, "hi.txt")
	var attached struct {
		Reference string `json:"reference"`
	}
	out := orasIn(t, n, src, "attach", "--plain-http", "--no-tty", "--format", "json", "--artifact-type", "application/vnd.acme.note", "--annotation", "a=b", subject)
	check(t, json.Unmarshal([]byte(out), &attached))
	tool(t, n, "pull", "--plain-http", attached.Reference)
	if got := mountedAt(t, n, attached.Reference); len(got) != 0 {
		t.Errorf("the volume has %v", got)
	}
	if log := n.Logs(); !strings.Contains(log, "its volume is empty") {
		t.Errorf("the log does not report the empty volume:\n%s", log)
	}
	if layers := toolJSON[jsonInspected](t, n, "inspect", attached.Reference).Layers; len(layers) != 1 || layers[0].Format != "empty" || layers[0].File != nil {
		t.Errorf("inspect: %+v", layers)
	}
	if v := toolJSON[jsonVerified](t, n, "verify", attached.Reference); !v.OK {
		t.Errorf("verify: %+v", v)
	}
}

// containerd does not fetch a blob of no bytes. The daemon pre-creates the empty blob only
// in its configured namespaces; `pull` does so in any namespace.
func TestAnArtifactWithAnEmptyConfigIsPulledIntoAnyNamespace(t *testing.T) {
	n := node.ForTest(t, node.Options{})
	src := orasSource(t)
	ref := n.Registry + "/oras/sif:v1"
	orasIn(t, n, src, "push", "--plain-http", "--no-tty", "--config", "none:application/vnd.sylabs.sif.config.v1+json", ref, "hi.txt:application/vnd.sylabs.sif.layer.v1.sif")
	tool(t, n, "pull", "--plain-http", "-n", "elsewhere", ref)
	target := filepath.Join(t.TempDir(), "volume")
	tool(t, n, "mount", "-n", "elsewhere", ref, target)
	text, err := os.ReadFile(filepath.Join(target, "hi.txt"))
	if err != nil || string(text) != "hi\n" {
		t.Errorf("hi.txt is %q, %v", text, err)
	}
	tool(t, n, "unmount", "-n", "elsewhere", target)
}
