// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

// Command benchnri measures how long CreateContainer takes with an image volume of 200
// files, as crictl sees it: on containerd with stock overlayfs, with the daemon as a plugin
// of NRI and without; or, with -crictl, on a runtime that is there, as it is. On CRI-O run
// it with the daemon and again without: there the runtime makes 200 mounts.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	modelspec "github.com/modelpack/model-spec/specs-go/v1"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/measure"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
)

var (
	config   = flag.String("crictl", "", "crictl's configuration `file`, of a runtime that is there; \"\" starts containerd")
	artifact = flag.String("artifact", "", "with -crictl: `reference` of the artifact, which must have been pulled")
	image    = flag.String("image", "", "with -crictl: `reference` of the container's image, whose program waits")
	files    = flag.Int("files", 200, "without -crictl: how many files the artifact has")
	rounds   = flag.Int("rounds", 21, "how many containers are created")
)

func main() {
	flag.Parse()
	measure.Main("benchnri", run)
}

func run(ctx context.Context) {
	fmt.Printf("| runtime | CreateContainer, median | slowest of %d |\n| --- | --- | --- |\n", *rounds)
	if *config != "" {
		crictl := func(args ...string) (string, error) {
			out, err := exec.CommandContext(ctx, "crictl", append([]string{"--config", *config}, args...)...).Output()
			var failed *exec.ExitError
			if errors.As(err, &failed) {
				err = fmt.Errorf("%w: %s", err, failed.Stderr)
			}
			return string(out), err
		}
		row("as it is", create(crictl, *artifact, *image))
		return
	}
	for _, o := range []struct {
		name string
		node.Options
	}{{"containerd, its own empty volume", node.Options{Stock: true}}, {"containerd and the plugin", node.Options{NRI: true}}} {
		n := measure.Must(node.Start(ctx, o.Options))
		took := create(n.Crictl, pushed(ctx, n), n.GuestImage)
		measure.Check(n.Stop())
		row(o.name, took)
	}
}

func row(name string, took measure.Sample) {
	fmt.Printf("| %s | %s | %s |\n", name, took.Format("%.0f", " ms"), fmt.Sprintf("%.0f ms", took.Quantile(1)))
}

// pushed is the reference of an artifact of so many files, which has been pulled.
func pushed(ctx context.Context, n *node.Node) string {
	var a pack.Artifact
	for i := range *files {
		a.Layers = append(a.Layers, pack.Layer{
			MediaType: modelspec.MediaTypeModelWeightRaw, Data: fmt.Appendf(nil, "file %d", i),
			Annotations: map[string]string{modelspec.AnnotationFilepath: fmt.Sprintf("dir-%d/file-%d", i%10, i)},
		})
	}
	measure.Must(a.Push(ctx, n.Registry, "bench/nri", "latest"))
	ref := n.Registry + "/bench/nri:latest"
	measure.Must(n.Pull(ref))
	return ref
}

// create creates containers in a pod, one after the other.
func create(crictl func(...string) (string, error), artifact, image string) (took measure.Sample) {
	dir := measure.Must(os.MkdirTemp("", "benchnri-"))
	defer measure.Tidy(func() error { return os.RemoveAll(dir) })
	write := func(name string, v any) string {
		path := filepath.Join(dir, name+".json")
		measure.Check(os.WriteFile(path, measure.Must(json.Marshal(v)), 0o600))
		return path
	}
	// The host's network, which needs no plugin of CNI.
	security := map[string]any{"security_context": map[string]any{"namespace_options": map[string]any{"network": 2, "pid": 1}}}
	name := fmt.Sprint("benchnri-", os.Getpid())
	sandbox := write("sandbox", map[string]any{"metadata": map[string]any{"name": name, "namespace": "default", "uid": name}, "linux": security})
	pod := strings.TrimSpace(measure.Must(crictl("runp", sandbox)))
	defer measure.Tidy(func() error { _, err := crictl("rmp", "--force", pod); return err })
	for i := range *rounds + 1 {
		container := write("container", map[string]any{
			"metadata": map[string]any{"name": fmt.Sprint("c", i)},
			"image":    map[string]any{"image": image},
			"mounts":   []map[string]any{{"container_path": "/model", "readonly": true, "image": map[string]any{"image": artifact}}},
			"linux":    security,
		})
		began := time.Now()
		measure.Must(crictl("create", pod, container, sandbox))
		if i > 0 { // the first one makes the Tree
			took = append(took, measure.Milliseconds(time.Since(began)))
		}
	}
	return took
}
