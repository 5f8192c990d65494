// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"context"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	modelspec "github.com/modelpack/model-spec/specs-go/v1"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
)

// metered starts a node whose daemon serves metrics on a Unix socket.
func metered(t *testing.T, o node.Options) (n *node.Node, socket string) {
	t.Helper()
	socket = filepath.Join(shortDir(t), "metrics.sock")
	o.DaemonConfig += fmt.Sprintf("metrics_address = 'unix://%s'\n", socket)
	return node.ForTest(t, o), socket
}

// families returns the metrics of the daemon.
func families(t *testing.T, socket string) map[string]*dto.MetricFamily {
	t.Helper()
	client := http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", socket)
		},
	}}
	request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://daemon/metrics", nil)
	check(t, err)
	answer, err := client.Do(request)
	check(t, err)
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(answer.Body)
		t.Fatalf("the metrics: %s: %s", answer.Status, text)
	}
	parser := expfmt.NewTextParser(model.UTF8Validation)
	found, err := parser.TextToMetricFamilies(answer.Body)
	check(t, err)
	return found
}

// series returns the values of the daemon's own metrics by `name{label="value",…}`, without
// their common prefix. The value of a histogram is its number of observations.
func series(t *testing.T, socket string) map[string]float64 {
	t.Helper()
	values := map[string]float64{}
	for name, family := range families(t, socket) {
		short, ours := strings.CutPrefix(name, "artifact_snapshotter_")
		if !ours {
			continue
		}
		for _, m := range family.GetMetric() {
			var labels []string
			for _, l := range m.GetLabel() {
				labels = append(labels, fmt.Sprintf("%s=%q", l.GetName(), l.GetValue()))
			}
			key := short
			if len(labels) > 0 {
				key += "{" + strings.Join(labels, ",") + "}"
			}
			switch {
			case m.Counter != nil:
				values[key] = m.Counter.GetValue()
			case m.Gauge != nil:
				values[key] = m.Gauge.GetValue()
			case m.Histogram != nil:
				values[key] = float64(m.Histogram.GetSampleCount())
			default:
				t.Errorf("%s is neither a counter, nor a gauge, nor a histogram", name)
			}
		}
	}
	return values
}

// wantSeries waits until the series have these values.
func wantSeries(t *testing.T, socket string, want map[string]float64) {
	t.Helper()
	var got map[string]float64
	ok := func() bool {
		got = series(t, socket)
		for key, value := range want {
			if there, ok := got[key]; !ok || there != value {
				return false
			}
		}
		return true
	}
	defer func() {
		if t.Failed() {
			for _, key := range slices.Sorted(maps.Keys(want)) {
				t.Logf("%s is %v, want %v", key, got[key], want[key])
			}
		}
	}()
	waitFor(t, "the metrics to have the expected values", ok)
}

func TestMetricsCountWhatTheDaemonDoes(t *testing.T) {
	n, socket := metered(t, node.Options{})
	src := writeModel(t)
	const (
		modes   = `raw="overlay",tar="erofs"`
		byPod   = `tree_build_duration_seconds{` + modes + `,trigger="pod"}`
		byPull  = `tree_build_duration_seconds{` + modes + `,trigger="pull"}`
		trees   = `trees{` + modes + `}`
		linked  = `content_bytes_total{method="link"}`
		copied  = `content_bytes_total{method="copy"}`
		inflate = `content_bytes_total{method="decompress"}`
	)
	if fi, err := os.Stat(socket); err != nil || fi.Mode() != fs.ModeSocket|0o600 {
		t.Errorf("the metrics socket is %v (%v), want access for its owner only", fi.Mode(), err)
	}
	wantSeries(t, socket, map[string]float64{
		"containerd_connected": 1, "artifacts": 0, "image_conflicts": 0, "references": 0, "mounts": 0, "tree_disk_bytes": 0, trees: 0,
		byPod: 0, byPull: 0, linked: 0, copied: 0, inflate: 0, "gc_removed_trees_total": 0, "image_volume_duration_seconds": 0,
	})

	ref := pulled(t, n, src, pack.Raw)
	manifest, _ := pulledManifest(t, n, ref)
	blobs := map[string]int64{}
	for _, l := range manifest.Layers {
		blobs[l.Digest.String()] = l.Size
	}
	var bytes int64
	for _, size := range blobs {
		bytes += size
	}
	wantSeries(t, socket, map[string]float64{"artifacts": 1, "references": 0})
	pod, err := n.RunPod(node.PodSpec{
		Volumes:    []node.Volume{{Image: ref, Path: "/model"}},
		Containers: []node.Container{{Name: "one"}, {Name: "two"}},
	})
	check(t, err)
	wantSeries(t, socket, map[string]float64{
		"artifacts": 1, "references": 1, "mounts": 1, trees: 1, byPod: 1, byPull: 0,
		linked: float64(bytes), copied: 0, inflate: 0, "image_volume_duration_seconds": 1,
		`prepare_failures_total{kind="other"}`: 0, // the second container uses the snapshot of the first
	})
	if size := series(t, socket)["tree_disk_bytes"]; size == 0 || size > 256<<10 {
		t.Errorf("a tree of a few files uses %v bytes", size)
	}

	zipped := pulled(t, n, src, pack.TarGzip)
	wantSeries(t, socket, map[string]float64{"artifacts": 2, trees: 2, byPull: 1, byPod: 1, "references": 1, copied: 0})
	if got := series(t, socket)[inflate]; got <= float64(bytes) {
		t.Errorf("%v bytes were decompressed, want more than the %v bytes of the files", got, bytes)
	}

	check(t, pod.Remove())
	wantSeries(t, socket, map[string]float64{"references": 0, "mounts": 0, trees: 2})
	for _, ref := range []string{ref, zipped} {
		_, err = n.Crictl("rmi", ref)
		check(t, err)
	}
	wantSeries(t, socket, map[string]float64{"artifacts": 0, trees: 0, "gc_removed_trees_total": 2, "tree_disk_bytes": 0, "gc_failures_total": 0})
	// containerd's garbage collector has deleted the blobs, so the trees had the last
	// links.
	if got := series(t, socket); got["gc_freed_bytes_total"] < float64(bytes) || got["gc_duration_seconds"] < 2 {
		t.Errorf("%v bytes freed, want at least %v; %v garbage collections, want at least 2", got["gc_freed_bytes_total"], bytes, got["gc_duration_seconds"])
	}
}

// If blobs cannot be linked into root, each is copied once and counted once, even if
// several pods use it.
func TestMetricsCountCopiesOnce(t *testing.T) {
	n, socket := metered(t, node.Options{DaemonRoot: tmpfs.mounted(t)})
	layer := pack.Layer{
		MediaType: modelspec.MediaTypeModelWeightRaw, Data: random(8<<20, "copied"),
		Annotations: map[string]string{modelspec.AnnotationFilepath: "weights"},
	}
	c := connect(t, n)
	views := c.SnapshotService("artifact")
	size := func() float64 { return series(t, socket)["tree_disk_bytes"] }
	var pods []*node.Pod
	for i, name := range []string{"first", "second"} {
		pod, err := n.RunPod(node.PodSpec{Volumes: []node.Volume{{Image: push(t, n, name, layer), Path: "/model"}}})
		check(t, err)
		if got, want := size(), float64(len(layer.Data)); got < want || got > want+256<<10 {
			t.Errorf("after %d pods the trees use %v bytes, want %v and a little more", i+1, got, want)
		}
		var used int64 // as kubelet gets it
		for _, key := range daemonVolumes(t, n) {
			usage, err := views.Usage(c.Context(t.Context()), strings.SplitN(key, "/", 3)[2]) // without namespace and number
			check(t, err)
			used += usage.Size
		}
		if want := int64(len(layer.Data)); used < want || used > want+256<<10 {
			t.Errorf("after %d pods the snapshots use %d bytes, want %d and a little more", i+1, used, want)
		}
		pods = append(pods, pod)
	}
	for _, pod := range pods {
		check(t, pod.Remove())
	}
}

func TestMetricsCountRefusalsByReason(t *testing.T) {
	n, socket := metered(t, node.Options{})
	pod, err := n.RunSandbox(node.PodSpec{})
	check(t, err)
	refused := func(ref string) {
		t.Helper()
		err := pod.Start(node.Container{Volumes: []node.Volume{{Image: ref, Path: "/model"}}})
		if err == nil {
			t.Fatalf("%s was mounted", ref)
		}
	}
	// An artifact must not choose a label, neither by names in it nor by its error.
	evil := goodLayer()
	evil.Annotations["org.cncf.model.filepath"] = "../reason=\"evil\"\nlevel=info msg=evil"
	bad := push(t, n, "models/bad", evil)
	_, err = n.Pull(bad)
	check(t, err)
	refused(bad)
	wantSeries(t, socket, map[string]float64{
		`image_volume_refusals_total{reason="invalid_artifact"}`: 1, `prepare_failures_total{kind="invalid_argument"}`: 1,
	})

	one, _ := pulledPlain(t, n, "one", "one")
	two, _ := pulledPlain(t, n, "two", "two")
	wantSeries(t, socket, map[string]float64{"image_conflicts": 2})
	refused(one)
	refused(two)
	wantSeries(t, socket, map[string]float64{
		`image_volume_refusals_total{reason="conflict"}`: 2, `prepare_failures_total{kind="failed_precondition"}`: 2,
	})

	for name, family := range families(t, socket) {
		for _, m := range family.GetMetric() {
			for _, l := range m.GetLabel() {
				if strings.Contains(l.GetValue(), "evil") || strings.Contains(l.GetValue(), "models") {
					t.Errorf("%s has a label that an artifact chose: %v", name, l)
				}
			}
		}
	}
	// The log has more details, each line once, and quotes text of the artifact.
	log := daemonLog(t, n)
	wantLine(t, log, 1, "level=warning", "refused an image volume", "sandbox="+pod.ID, "namespace=k8s.io", `image="`+bad+`"`, `\\\"evil\\\"`)
	wantLine(t, log, 1, "level=warning", "is in conflict with others", one, two)
	wantLine(t, log, 2, "level=warning", "refused an image volume", "sandbox="+pod.ID, "has the same config")
	if strings.Contains(log, "\nlevel=info msg=evil") {
		t.Error("an artifact wrote a line of the log")
	}
	check(t, pod.Remove())

	check(t, n.StopContainerd())
	wantSeries(t, socket, map[string]float64{"containerd_connected": 0, "artifacts": 0})
	check(t, n.StartContainerd())
	wantSeries(t, socket, map[string]float64{"containerd_connected": 1, "artifacts": 3})
	log = daemonLog(t, n)
	wantLine(t, log, 1, "level=info", "lost containerd")
	wantLine(t, log, 2, "level=info", "watching containerd's images")
}

// wantLine checks the number of lines in the log that contain all words.
func wantLine(t *testing.T, log string, count int, words ...string) {
	t.Helper()
	var found []string
	for line := range strings.Lines(log) {
		if !slices.ContainsFunc(words, func(word string) bool { return !strings.Contains(line, word) }) {
			found = append(found, line)
		}
	}
	if len(found) != count {
		t.Errorf("the log has %d lines with %q, want %d: %q", len(found), words, count, found)
	}
}

func TestTheLogHasEachImageVolume(t *testing.T) {
	n := node.ForTest(t, node.Options{})
	src := writeModel(t)
	ref, zipped := pulled(t, n, src, pack.Raw), pulled(t, n, src, pack.TarGzip)
	_, artifact := pulledManifest(t, n, ref)
	waitFor(t, "decompression of the other artifact", func() bool {
		return strings.Contains(daemonLog(t, n), "on_pull=true")
	})
	spec := node.PodSpec{
		Volumes:    []node.Volume{{Image: ref, Path: "/model"}, {Image: zipped, Path: "/zipped"}},
		Containers: []node.Container{{Name: "one"}, {Name: "two"}},
	}
	pod, err := n.RunPod(spec)
	check(t, err)
	next, err := n.RunPod(spec)
	check(t, err)
	check(t, pod.Remove())
	check(t, next.Remove())
	for _, ref := range []string{ref, zipped} {
		_, err = n.Crictl("rmi", ref)
		check(t, err)
	}
	waitFor(t, "removal of the trees", func() bool { return strings.Count(daemonLog(t, n), "removed a tree") == 2 })
	log := daemonLog(t, n)
	of := "artifact=\"" + artifact.String() + "\""
	wantLine(t, log, 1, "level=info", "built the tree of an artifact", of, "sandbox="+pod.ID, "on_pull=false", "raw=overlay", "tar=erofs", "linked=", "duration=")
	wantLine(t, log, 1, "level=info", `msg="mounted an image volume"`, of, "sandbox="+pod.ID, "namespace=k8s.io", `image="`+ref+`"`, "linked=", "raw=overlay", "duration=")
	// The tree existed already, so nothing was linked.
	wantLine(t, log, 1, "level=info", `msg="mounted an image volume"`, of, "sandbox="+next.ID, `image="`+ref+`"`, "raw=overlay", "duration=")
	wantLine(t, log, 0, `msg="mounted an image volume"`, "sandbox="+next.ID, "linked=")
	wantLine(t, log, 1, "level=info", "built the tree of an artifact", "on_pull=true", "decompressed=")
	wantLine(t, log, 1, "level=info", "unmounted an image volume", of, "sandbox="+pod.ID)
	wantLine(t, log, 1, "level=info", "unmounted an image volume", of, "sandbox="+next.ID)
	wantLine(t, log, 4, "level=info", `msg="mounted an image volume"`)
	wantLine(t, log, 4, "level=info", "unmounted an image volume")
	wantLine(t, log, 1, "level=info", "removed a tree", of)
	if layers := strings.Count(log, "decompressed a layer"); layers == 0 {
		t.Error("the log has no line about decompressed layers")
	}
	wantLine(t, log, 0, "level=info", "decompressed a layer") // small layers are logged at debug
	// At info nothing is logged about container images.
	for line := range strings.Lines(log) {
		if strings.Contains(line, "level=info") && strings.Contains(line, "guest") {
			t.Errorf("a line about an image at info: %s", line)
		}
	}
}

var tableRow = regexp.MustCompile("(?m)^\\| `(artifact_snapshotter_[a-z_]+)` \\| ([a-z]+) \\| ([^|]*) \\|")

func TestOperationsDocumentsEveryMetric(t *testing.T) {
	_, socket := metered(t, node.Options{})
	exported := map[string]string{}
	for name, family := range families(t, socket) {
		if !strings.HasPrefix(name, "artifact_snapshotter_") {
			continue
		}
		labels := map[string]bool{}
		for _, m := range family.GetMetric() {
			for _, l := range m.GetLabel() {
				labels["`"+l.GetName()+"`"] = true
			}
		}
		exported[name] = strings.ToLower(family.GetType().String()) + " " + strings.Join(slices.Sorted(maps.Keys(labels)), ", ")
	}
	text, err := os.ReadFile("../docs/operations.md")
	check(t, err)
	documented := map[string]string{}
	for _, row := range tableRow.FindAllStringSubmatch(string(text), -1) {
		documented[row[1]] = row[2] + " " + strings.TrimSpace(row[3])
	}
	if !maps.Equal(documented, exported) {
		t.Errorf("docs/operations.md lists\n%s\nbut the daemon exports\n%s", lines(documented), lines(exported))
	}
}

func lines(m map[string]string) string {
	var out strings.Builder
	for _, key := range slices.Sorted(maps.Keys(m)) {
		fmt.Fprintf(&out, "  %s %s\n", key, m[key])
	}
	return out.String()
}

func TestHealthReportsWhetherTheDaemonServes(t *testing.T) {
	n := node.ForTest(t, node.Options{})
	out, errs, err := n.Artifact("health", "--config", n.ConfigFile())
	if err != nil || out != "ok\n" || errs != "" {
		t.Errorf("health of a running daemon printed %q, %q (%v)", out, errs, err)
	}
	out, _, err = n.Artifact("health", "--address", filepath.Join(n.Dir, "daemon.sock"), "--timeout", "2m")
	if err != nil || out != "ok\n" {
		t.Errorf("health with an address: %q (%v)", out, err)
	}
	check(t, n.StopDaemon())
	wantSick := func(why string, args ...string) {
		t.Helper()
		out, errs, err := n.Artifact(append([]string{"health"}, args...)...)
		if err == nil || out != "" || !strings.Contains(errs, why) || strings.Count(errs, "\n") != 1 {
			t.Errorf("health %q: %q, %q (%v), want an error of one line with %q", args, out, errs, err, why)
		}
	}
	wantSick("does not answer", "--config", n.ConfigFile())
	// Nothing accepts connections on this socket.
	mute, err := net.Listen("unix", filepath.Join(t.TempDir(), "mute.sock"))
	check(t, err)
	defer mute.Close()
	wantSick("does not answer", "--address", mute.Addr().String(), "--timeout", "100ms")
	wantSick("does not answer", "--address", n.Address+"-none")
	check(t, n.StartDaemon())
	_, _, err = n.Artifact("health", "--config", n.ConfigFile())
	check(t, err)
}
