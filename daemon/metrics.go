// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"errors"
	"runtime"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/log"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"google.golang.org/grpc"

	"github.com/artifact-snapshotter/artifact-snapshotter/images"
	"github.com/artifact-snapshotter/artifact-snapshotter/store"
	"github.com/artifact-snapshotter/artifact-snapshotter/unpack"
)

// The values of the label begun: what a build of a Tree began with.
const (
	begunByPull = "pull"
	begunByPod  = "pod"
)

// kinds are the values of the label kind, with the errdefs kind that each stands for;
// an error of none of them is kindOther. That a snapshot is there already is no
// failure but an answer. What the caller gave up, or what took too long for it, is one
// kind: it depends on who was quicker.
var kinds = []struct {
	name string
	is   func(error) bool
}{
	{"invalid_argument", errdefs.IsInvalidArgument},
	{"not_found", errdefs.IsNotFound},
	{"permission_denied", errdefs.IsPermissionDenied},
	{"resource_exhausted", errdefs.IsResourceExhausted},
	{"failed_precondition", errdefs.IsFailedPrecondition},
	{"not_implemented", errdefs.IsNotImplemented},
	{"internal", errdefs.IsInternal},
	{"unavailable", errdefs.IsUnavailable},
	{"canceled", func(err error) bool { return errdefs.IsCanceled(err) || errdefs.IsDeadlineExceeded(err) }},
}

const kindOther = "other"

func kindOf(err error) string {
	for _, kind := range kinds {
		if kind.is(err) {
			return kind.name
		}
	}
	return kindOther
}

// The values of the label reason.
const (
	reasonInvalid    = "invalid_artifact" // it breaks a rule, and will do so the next time
	reasonMissing    = "blob_missing"
	reasonConflict   = "conflict"       // with another image that has its config
	reasonUnknown    = "images_unknown" // containerd does not tell which images it has
	reasonUnfinished = "unfinished"     // it takes longer than a request may wait
	reasonDiskFull   = "disk_full"
	reasonOther      = "other"
)

// reasons are all values of the label reason.
var reasons = []string{
	reasonInvalid, reasonMissing, reasonConflict, reasonUnknown, reasonUnfinished, reasonDiskFull, reasonOther,
}

// reasonOf is why an image volume was refused: one of few words, whatever is in the
// error, which may have been written by the artifact.
func reasonOf(err error) string {
	_, unfinished := errors.AsType[*store.UnfinishedError](err)
	_, unsure := errors.AsType[*store.CheckError](err)
	switch {
	case unfinished:
		return reasonUnfinished
	case unsure && errdefs.IsFailedPrecondition(err):
		return reasonConflict
	case unsure:
		return reasonUnknown
	case errdefs.IsInvalidArgument(err), errdefs.IsNotImplemented(err):
		return reasonInvalid
	case errdefs.IsNotFound(err):
		return reasonMissing
	case errdefs.IsResourceExhausted(err):
		return reasonDiskFull
	default:
		return reasonOther
	}
}

// metrics count what the snapshotter does. Every series is there from the beginning,
// so that a query for one finds 0 and not nothing. docs/operations.md says what each
// means.
type metrics struct {
	registry *prometheus.Registry

	bytes    map[unpack.Retention]prometheus.Counter
	builds   *prometheus.HistogramVec
	unbuilt  *prometheus.CounterVec
	volumes  prometheus.Histogram
	refusals *prometheus.CounterVec
	failures *prometheus.CounterVec
	sweeps   prometheus.Histogram
	unswept  prometheus.Counter
	removed  prometheus.Counter
	freed    prometheus.Counter
}

// prefix is that of all names of ours.
const prefix = "artifact_snapshotter"

func counter(name, help string) prometheus.CounterOpts {
	return prometheus.CounterOpts{Namespace: prefix, Name: name, Help: help}
}

func newMetrics(version string) *metrics {
	bytes := prometheus.NewCounterVec(counter("content_bytes_total",
		"Bytes of the contents of artifacts that were linked, reflinked, copied or decompressed."), []string{"by"})
	m := &metrics{
		registry: prometheus.NewRegistry(),
		bytes:    map[unpack.Retention]prometheus.Counter{},
		builds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Namespace: prefix, Name: "tree_build_duration_seconds",
			Help:    "Time that it took to build the tree of an artifact; one that was begun by a pull waits for that.",
			Buckets: []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 300, 1800},
		}, []string{"raw", "tar", "begun"}),
		unbuilt: prometheus.NewCounterVec(counter("tree_build_failures_total",
			"Builds of trees that failed, those of pulls that were given up included."), []string{"begun"}),
		volumes: prometheus.NewHistogram(prometheus.HistogramOpts{
			Namespace: prefix, Name: "image_volume_duration_seconds",
			Help:    "Time that it took to answer a request for an image volume that was shown.",
			Buckets: []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 20},
		}),
		refusals: prometheus.NewCounterVec(counter("image_volume_refusals_total",
			"Requests for an image volume that were refused, each try of kubelet's, by reason."), []string{"reason"}),
		failures: prometheus.NewCounterVec(counter("prepare_failures_total",
			"Requests for a snapshot of any image that failed, by the kind of the error."), []string{"kind"}),
		sweeps: prometheus.NewHistogram(prometheus.HistogramOpts{
			Namespace: prefix, Name: "gc_duration_seconds",
			Help:    "Time that the sweeps of what nobody uses took.",
			Buckets: []float64{.001, .01, .1, 1, 10, 60},
		}),
		unswept: prometheus.NewCounter(counter("gc_failures_total", "Sweeps that could not remove all that nobody uses.")),
		removed: prometheus.NewCounter(counter("removed_trees_total", "Trees that sweeps have removed.")),
		freed:   prometheus.NewCounter(counter("freed_bytes_total", "Bytes of the disk that sweeps have freed.")),
	}
	for _, how := range unpack.Retentions {
		m.bytes[how] = bytes.WithLabelValues(string(how))
	}
	for _, begun := range []string{begunByPull, begunByPod} {
		m.unbuilt.WithLabelValues(begun)
	}
	for _, reason := range reasons {
		m.refusals.WithLabelValues(reason)
	}
	for _, kind := range kinds {
		m.failures.WithLabelValues(kind.name)
	}
	m.failures.WithLabelValues(kindOther)
	info := prometheus.NewGauge(prometheus.GaugeOpts{
		Namespace: prefix, Name: "build_info", Help: "The version of the daemon; always 1.",
		ConstLabels: prometheus.Labels{"version": version, "goversion": runtime.Version()},
	})
	info.Set(1)
	m.registry.MustRegister(bytes, m.builds, m.unbuilt, m.volumes, m.refusals, m.failures,
		m.sweeps, m.unswept, m.removed, m.freed, info,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

// observer counts what a store does.
func (m *metrics) observer() store.Observer {
	return store.Observer{
		Answered: m.answered,
		Counted:  func(how unpack.Retention, n int64) { m.bytes[how].Add(float64(n)) },
		Built: func(b store.Build) {
			begun := begunByPod
			if b.OnPull {
				begun = begunByPull
			}
			if b.Err != nil {
				m.unbuilt.WithLabelValues(begun).Inc()
				return
			}
			m.builds.WithLabelValues(string(b.Modes.Raw), string(b.Modes.Tar), begun).Observe(b.Duration.Seconds())
		},
		Collected: func(s store.Collection) {
			m.sweeps.Observe(s.Duration.Seconds())
			m.removed.Add(float64(s.Trees))
			m.freed.Add(float64(s.Freed))
			if s.Err != nil {
				m.unswept.Inc()
			}
		},
	}
}

// watch exports what the store and the watcher have, when somebody asks.
func (m *metrics) watch(views *store.Store, watcher *images.Watcher) {
	m.registry.MustRegister(&gauges{views, watcher})
	modes := views.Modes()
	for _, begun := range []string{begunByPull, begunByPod} {
		m.builds.WithLabelValues(string(modes.Raw), string(modes.Tar), begun)
	}
}

// answered counts the answer to a request for the image volume of an artifact.
func (m *metrics) answered(took time.Duration, err error) {
	if err != nil {
		m.refusals.WithLabelValues(reasonOf(err)).Inc()
		return
	}
	m.volumes.Observe(took.Seconds())
}

// count is a grpc.UnaryServerInterceptor that counts failed requests for a snapshot. An
// errdefs.ErrAlreadyExists is not a failure: it is how a snapshotter tells containerd that it
// has the layers already.
func (m *metrics) count(ctx context.Context, request any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	response, err := handler(ctx, request)
	switch request.(type) {
	case *snapshotsapi.PrepareSnapshotRequest, *snapshotsapi.ViewSnapshotRequest:
		if err := errgrpc.ToNative(err); err != nil && !errdefs.IsAlreadyExists(err) {
			m.failures.WithLabelValues(kindOf(err)).Inc()
		}
	}
	return response, err
}

// gauges are read when somebody asks for them.
type gauges struct {
	views   *store.Store
	watcher *images.Watcher
}

func gauge(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc(prometheus.BuildFQName(prefix, "", name), help, labels, nil)
}

var (
	connectedGauge  = gauge("containerd_connected", "Whether the images of containerd are known: 1, or 0, and then volumes of artifacts are refused.")
	artifactsGauge  = gauge("artifacts", "Artifacts among the images of containerd, in all namespaces.")
	conflictsGauge  = gauge("image_conflicts", "Artifacts that are refused because they share their config with another image.")
	treesGauge      = gauge("trees", "Trees on the node: artifacts that are laid out, and those of pods with a user namespace again.", "raw", "tar")
	mountsGauge     = gauge("mounts", "Trees that are mounted.")
	referencesGauge = gauge("references", "Mounts of artifacts that somebody holds: one for each artifact and sandbox, and those of tools.")
	sizeGauge       = gauge("tree_disk_bytes", "What the trees add to the disk: metadata, decompressed and copied contents.")
)

// Describe implements prometheus.Collector.
func (g *gauges) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{connectedGauge, artifactsGauge, conflictsGauge, treesGauge, mountsGauge, referencesGauge, sizeGauge} {
		ch <- d
	}
}

// Collect implements prometheus.Collector. What cannot be read is left out, with the
// reason in the log.
func (g *gauges) Collect(ch chan<- prometheus.Metric) {
	set := func(d *prometheus.Desc, n int64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, float64(n), labels...)
	}
	known := g.watcher.Stats()
	connected := int64(0)
	if known.Connected {
		connected = 1
	}
	if g.watcher.Running() { // else there is no containerd, which is no failure
		set(connectedGauge, connected)
	}
	set(artifactsGauge, int64(known.Artifacts))
	set(conflictsGauge, int64(known.Conflicts))

	ctx, cancel := context.WithTimeout(context.Background(), gatherTimeout)
	defer cancel()
	stats, err := g.views.Stats(ctx)
	if err != nil {
		log.L.WithError(err).Warn("Cannot count the trees for the metrics")
		return
	}
	stats.Trees[g.views.Modes()] += 0 // there is a series before there is a tree
	for modes, n := range stats.Trees {
		set(treesGauge, int64(n), string(modes.Raw), string(modes.Tar))
	}
	set(mountsGauge, int64(stats.Mounts))
	set(referencesGauge, int64(stats.Views))
	set(sizeGauge, stats.Size)
}
