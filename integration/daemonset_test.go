// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"archive/tar"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"github.com/artifact-snapshotter/artifact-snapshotter/deploy"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
)

// The image contains only the binary, and building it twice gives the same image.
func TestTheImage(t *testing.T) {
	n := node.ForTest(t, node.Options{Stock: true})
	dir := t.TempDir()
	digest, err := n.BuildImage(dir + "/one")
	check(t, err)
	again, err := n.BuildImage(dir + "/two")
	check(t, err)
	if again != digest {
		t.Errorf("the first build has the digest %s, the second %s", digest, again)
	}
	ref, err := n.PushImage(dir + "/one")
	check(t, err)
	pushed, err := n.Tool("crane", "digest", "--full-ref=false", ref)
	check(t, err)
	if got := strings.TrimSpace(pushed); got != digest {
		t.Errorf("the registry has %s, want %s", got, digest)
	}
	_, err = n.Tool("crane", "validate", "--remote", ref)
	check(t, err)

	_, err = n.Tool("crane", "export", ref, dir+"/files.tar")
	check(t, err)
	f, err := os.Open(dir + "/files.tar")
	check(t, err)
	defer f.Close()
	var files []string
	for archive := tar.NewReader(f); ; {
		header, err := archive.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		check(t, err)
		if header.Typeflag != tar.TypeDir {
			files = append(files, header.Name)
		}
	}
	if want := []string{"usr/local/bin/artifact-snapshotter"}; !slices.Equal(files, want) {
		t.Errorf("the image has the files %q, want %q", files, want)
	}
}

// object is a Kubernetes object or a part of one.
type object = map[string]any

// objects decodes the manifests of a chart.
func objects(t *testing.T, text string) (all []object) {
	t.Helper()
	for decoder := yaml.NewDecoder(strings.NewReader(text)); ; {
		var o object
		err := decoder.Decode(&o)
		if errors.Is(err, io.EOF) {
			return all
		}
		check(t, err)
		if o != nil {
			all = append(all, o)
		}
	}
}

// daemonPod turns the DaemonSet in a chart's manifests into a static pod. Such a pod cannot
// have a ConfigMap, so it gets a directory below dir instead, and no service account. Nothing else
// is changed.
func daemonPod(t *testing.T, manifests, name, dir string) string {
	t.Helper()
	var pod object
	data := map[any]object{} // of ConfigMaps
	for _, o := range objects(t, manifests) {
		metadata, _ := o["metadata"].(object)
		switch o["kind"] {
		case "DaemonSet":
			pod, _ = o["spec"].(object)["template"].(object)
		case "ConfigMap":
			data[metadata["name"]], _ = o["data"].(object)
		}
	}
	if pod == nil {
		t.Fatalf("no DaemonSet in the chart:\n%s", manifests)
	}
	pod["apiVersion"], pod["kind"] = "v1", "Pod"
	pod["metadata"].(object)["name"] = name
	pod["metadata"].(object)["namespace"] = "kube-system"
	delete(pod["spec"].(object), "serviceAccountName")
	volumes, _ := pod["spec"].(object)["volumes"].([]any)
	for _, v := range volumes {
		volume, _ := v.(object)
		source, ok := volume["configMap"].(object)
		if !ok {
			continue
		}
		path := filepath.Join(dir, fmt.Sprint(source["name"]))
		for file, text := range data[source["name"]] {
			writeFile(t, filepath.Join(path, file), fmt.Sprint(text), 0o644)
		}
		delete(volume, "configMap")
		volume["hostPath"] = object{"path": path, "type": "Directory"}
	}
	text, err := json.MarshalIndent(pod, "", "  ")
	check(t, err)
	return string(text)
}

// chartPod returns the pod of the chart's DaemonSet. The values are JSON.
func chartPod(t *testing.T, n *node.Node, image string, values map[string]string) string {
	t.Helper()
	quoted := func(value any) string {
		text, err := json.Marshal(value)
		check(t, err)
		return string(text)
	}
	repository, tag, _ := cutLast(image, ":")
	all := map[string]string{
		"image.repository": quoted(repository), "image.tag": quoted(tag),
		"frontends": `{"csi":false,"nri":false,"snapshotter":true}`,
	}
	maps.Copy(all, values)
	manifests, err := n.Chart(all)
	check(t, err)
	return daemonPod(t, manifests, "daemon", n.Dir)
}

// daemonImage pushes the daemon's image to the node's registry and returns its reference.
func daemonImage(t *testing.T, n *node.Node) string {
	t.Helper()
	layout := t.TempDir()
	_, err := n.BuildImage(layout)
	check(t, err)
	image, err := n.PushImage(layout)
	check(t, err)
	return image
}

// kubelet runs the chart's pod, with the restrictions of the chart and the kernel, on a
// node without any configuration for the daemon.
func TestKubeletRunsTheDaemonSet(t *testing.T) {
	t.Parallel()
	n := node.ForTest(t, node.Options{Systemd: true, Kubelet: true})
	pod := chartPod(t, n, daemonImage(t, n), nil)
	// A runtime handler needs a cluster, so kubelet does not run the pods with models.
	// kubelet removes unknown pods only after it has read all its sources; the URL is a
	// source that never answers, so it leaves our pods alone.
	check(t, n.StartKubelet(map[string]any{"staticPodURL": "http://127.0.0.1:1/"}))
	check(t, n.RunStaticManifest("daemon", pod))
	waitForStatic(t, n, "daemon")
	waitForCRI(t, n)
	waitForEmptyBlob(t, n)

	src := writeModel(t)
	refs := map[pack.Form]string{}
	for _, form := range []pack.Form{pack.Raw, pack.TarGzip} {
		refs[form] = pulled(t, n, src, form)
	}
	wantServed := func(t *testing.T) {
		t.Helper()
		waitForDaemon(t, n)
		for form, ref := range refs {
			pod, err := n.RunPod(node.PodSpec{RuntimeHandler: node.ArtifactHandler, Volumes: []node.Volume{{Image: ref, Path: "/model"}}})
			check(t, err)
			wantVolume(t, pod, "main", "/model", wantTree(t, src, form))
			check(t, pod.Remove())
		}
	}
	wantServed(t)

	spec := reading(refs[pack.Raw])
	spec.RuntimeHandler = node.ArtifactHandler
	reader, err := n.RunPod(spec)
	check(t, err)
	t.Run("the daemon's container is killed", func(t *testing.T) {
		before := waitForStatic(t, n, "daemon")
		for name, id := range before.Containers {
			_, err := n.Crictl("stop", "--timeout", "0", id)
			check(t, err)
			waitForPod(t, n, "daemon", "start again", func(p node.StaticPod) bool {
				return p.Status[name].Running && p.Status[name].ID != id
			})
		}
		wantReading(t, reader)
		wantServed(t)
	})
	t.Run("the daemon's pod is replaced", func(t *testing.T) {
		before := waitForStatic(t, n, "daemon")
		pods, err := n.Crictl("pods", "--quiet", "--namespace", "kube-system")
		check(t, err)
		// kubelet may be removing the container that was killed before.
		waitFor(t, "removal of the daemon's pod", func() bool {
			_, err = n.Crictl("rmp", "--force", strings.TrimSpace(pods))
			return err == nil || !strings.Contains(err.Error(), "already in removing state")
		})
		check(t, err)
		wantReading(t, reader)
		for name, id := range before.Containers {
			waitForPod(t, n, "daemon", "start again", func(p node.StaticPod) bool {
				return p.Status[name].Running && p.Status[name].ID != id
			})
		}
		wantServed(t)
		wantReading(t, reader)
		wantVolume(t, reader, "main", "/model", wantTree(t, src, pack.Raw))
	})
	check(t, reader.Remove())
}

// The DaemonSet installs the daemon as a service of the host, which serves every pod,
// including the DaemonSet's own. It also removes everything.
func TestKubeletInstallsTheService(t *testing.T) {
	t.Parallel()
	n := node.ForTest(t, node.Options{Systemd: true, Kubelet: true})
	etc := filepath.Join(n.Dir, "machine", "etc")
	check(t, n.StartKubelet(nil))
	before := files(t, etc)
	image := daemonImage(t, n)
	values := map[string]string{"scope": `"node"`, "daemon": `"systemd"`}
	check(t, n.RunStaticManifest("daemon", chartPod(t, n, image, values)))
	waitForStatic(t, n, "daemon")
	waitForCRI(t, n)
	waitForEmptyBlob(t, n)
	if state := property(t, n, unitName, "ActiveState"); state != "active" {
		t.Errorf("the service is %s", state)
	}
	src := writeModel(t)
	ref := pulled(t, n, src, pack.Raw)
	check(t, n.RunStaticPod(node.PodSpec{Name: "model", Volumes: []node.Volume{{Image: ref, Path: "/model"}}}))
	model := waitForStatic(t, n, "model")
	wantVolume(t, &model.Pod, "main", "/model", wantTree(t, src, pack.Raw))

	// These are the steps for a cluster: `helm upgrade --set uninstall=true`, drain the
	// node, `kubectl rollout restart`.
	values["uninstall"] = "true"
	started := func() string { return property(t, n, "containerd", "ExecMainStartTimestampMonotonic") }
	at := started()
	pod := chartPod(t, n, image, values)
	check(t, n.RunStaticManifest("daemon", pod))
	waitFor(t, "the restart of containerd by uninstall", func() bool { return started() != at })
	waitForCRI(t, n)
	drop, err := os.ReadFile(filepath.Join(etc, "containerd", "conf.d", "artifact-snapshotter.toml"))
	check(t, err)
	if strings.Contains(string(drop), "\n    snapshotter = 'artifact'") {
		t.Errorf("the snapshotter is still configured for the node:\n%s", drop)
	}
	wantVolume(t, &model.Pod, "main", "/model", wantTree(t, src, pack.Raw))
	check(t, n.RemoveStaticPod("model"))
	check(t, n.RemoveStaticPod("daemon"))
	check(t, n.RunStaticManifest("daemon", pod))
	waitForStatic(t, n, "daemon")
	wantSame(t, etc, before)
	if _, err := os.Stat(machineFile(n, deploy.UnitBinary)); !os.IsNotExist(err) {
		t.Errorf("the program was not removed: %v", err)
	}
}

// cutLast is strings.Cut at the last separator.
func cutLast(s, separator string) (before, after string, found bool) {
	if i := strings.LastIndex(s, separator); i >= 0 {
		return s[:i], s[i+len(separator):], true
	}
	return s, "", false
}
