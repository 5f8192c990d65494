// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"errors"
	"runtime"
	"sync/atomic"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/log"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"google.golang.org/grpc"

	"github.com/artifact-snapshotter/artifact-snapshotter/images"
	"github.com/artifact-snapshotter/artifact-snapshotter/pull"
	"github.com/artifact-snapshotter/artifact-snapshotter/store"
	"github.com/artifact-snapshotter/artifact-snapshotter/unpack"
)

// prefix is the prefix of the names of all metrics.
const prefix = "artifact_snapshotter"

// The values of the label trigger: what started the build of a tree.
const (
	triggerPull = "pull"
	triggerPod  = "pod"
)

var triggers = []string{triggerPull, triggerPod}

// kinds are the values of the label kind, each with the kind of errdefs that it stands for;
// kindOther is an error of another kind. A request that the caller canceled and one that
// exceeded its deadline have one value, since it depends on timing which of them it is.
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
	reasonInvalid    = "invalid_artifact" // a rule is violated; further tries will fail, too
	reasonMissing    = "blob_missing"
	reasonConflict   = "conflict"       // another image has the same config
	reasonUnknown    = "images_unknown" // containerd's images are not known
	reasonUnfinished = "unfinished"     // the build takes longer than a request may wait
	reasonDiskFull   = "disk_full"
	reasonOther      = "other"
)

var reasons = []string{
	reasonInvalid, reasonMissing, reasonConflict, reasonUnknown, reasonUnfinished, reasonDiskFull, reasonOther,
}

// reasonOf returns why an image volume was refused. It is one of reasons whatever the error
// says, since an artifact may have chosen the words of the error.
func reasonOf(err error) string {
	_, unfinished := errors.AsType[*store.UnfinishedError](err)
	_, images := errors.AsType[*store.CheckError](err)
	switch {
	case unfinished:
		return reasonUnfinished
	case images && errdefs.IsFailedPrecondition(err):
		return reasonConflict
	case images:
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

// metrics counts what the daemon does. Every series exists from the beginning, so that a
// query finds 0 instead of nothing. docs/operations.md explains each metric.
type metrics struct {
	registry *prometheus.Registry
	// puller is that of the CSI driver, if there is one.
	puller atomic.Pointer[pull.Puller]

	bytes         map[unpack.Retention]prometheus.Counter
	builds        *prometheus.HistogramVec
	buildFailures *prometheus.CounterVec
	volumes       prometheus.Histogram
	refusals      *prometheus.CounterVec
	failures      *prometheus.CounterVec
	collections   prometheus.Histogram
	gcFailures    prometheus.Counter
	removed       prometheus.Counter
	freed         prometheus.Counter

	missed       prometheus.Gauge
	pulledBytes  *prometheus.CounterVec
	pulls        prometheus.Histogram
	pullFailures *prometheus.CounterVec
	evictions    prometheus.Counter
}

// The values of the label source.
const (
	sourceRegistry = "registry"
	sourceNode     = "node" // another directory of blobs
)

func newMetrics(version string) *metrics {
	counter := func(name, help string) prometheus.CounterOpts {
		return prometheus.CounterOpts{Namespace: prefix, Name: name, Help: help}
	}
	histogram := func(name, help string, buckets ...float64) prometheus.HistogramOpts {
		return prometheus.HistogramOpts{Namespace: prefix, Name: name, Help: help, Buckets: buckets}
	}
	bytes := prometheus.NewCounterVec(counter("content_bytes_total",
		"Bytes of artifact contents by how they were obtained: link, reflink, copy or decompress."), []string{"method"})
	m := &metrics{
		registry: prometheus.NewRegistry(),
		bytes:    map[unpack.Retention]prometheus.Counter{},
		builds: prometheus.NewHistogramVec(histogram("tree_build_duration_seconds",
			"Duration of the builds of trees. A build that a pull triggered waits for the pull.",
			.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 300, 1800), []string{"raw", "tar", "trigger"}),
		buildFailures: prometheus.NewCounterVec(counter("tree_build_failures_total",
			"Failed builds of trees, including those of aborted pulls."), []string{"trigger"}),
		volumes: prometheus.NewHistogram(histogram("image_volume_duration_seconds",
			"Duration of the requests that mounted an image volume.",
			.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 20)),
		refusals: prometheus.NewCounterVec(counter("image_volume_refusals_total",
			"Refused requests for an image volume by reason. Every retry of kubelet counts."), []string{"reason"}),
		failures: prometheus.NewCounterVec(counter("prepare_failures_total",
			"Failed requests for a snapshot, including those for container images, by the kind of the error."), []string{"kind"}),
		collections: prometheus.NewHistogram(histogram("gc_duration_seconds",
			"Duration of the garbage collections.", .001, .01, .1, 1, 10, 60)),
		gcFailures: prometheus.NewCounter(counter("gc_failures_total", "Garbage collections that could not remove everything that is unused.")),
		removed:    prometheus.NewCounter(counter("gc_removed_trees_total", "Trees that garbage collections removed.")),
		freed:      prometheus.NewCounter(counter("gc_freed_bytes_total", "Bytes of disk space that garbage collections freed.")),
		missed: prometheus.NewGauge(prometheus.GaugeOpts{Namespace: prefix, Name: "containers_without_artifact",
			Help: "Containers that were created without the NRI plugin, so that the runtime mounted their artifact by itself."}),
		pulledBytes: prometheus.NewCounterVec(counter("pulled_bytes_total",
			"Bytes of artifacts that the CSI driver obtained, by where from: a registry, or another content store of the node."), []string{"source"}),
		pulls: prometheus.NewHistogram(histogram("pull_duration_seconds",
			"Duration of the pulls that succeeded.", .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 300, 600, 1800, 3600)),
		pullFailures: prometheus.NewCounterVec(counter("pull_failures_total",
			"Volumes that were refused because the artifact could not be pulled, by the kind of the error. Every retry of kubelet counts."), []string{"kind"}),
		evictions: prometheus.NewCounter(counter("pull_evictions_total",
			"Artifacts of the CSI driver that were removed because nobody used them.")),
	}
	for _, method := range unpack.Retentions {
		m.bytes[method] = bytes.WithLabelValues(string(method))
	}
	for _, trigger := range triggers {
		m.buildFailures.WithLabelValues(trigger)
	}
	for _, reason := range reasons {
		m.refusals.WithLabelValues(reason)
	}
	for _, source := range []string{sourceRegistry, sourceNode} {
		m.pulledBytes.WithLabelValues(source)
	}
	for _, failures := range []*prometheus.CounterVec{m.failures, m.pullFailures} {
		for _, kind := range kinds {
			failures.WithLabelValues(kind.name)
		}
		failures.WithLabelValues(kindOther)
	}
	info := prometheus.NewGauge(prometheus.GaugeOpts{
		Namespace: prefix, Name: "build_info", Help: "The daemon's version; the value is always 1.",
		ConstLabels: prometheus.Labels{"version": version, "goversion": runtime.Version()},
	})
	info.Set(1)
	m.registry.MustRegister(bytes, m.builds, m.buildFailures, m.volumes, m.refusals, m.failures,
		m.collections, m.gcFailures, m.removed, m.freed, m.missed, m.pulledBytes, m.pulls, m.pullFailures, m.evictions, info,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

// observer returns an Observer that counts what a store does.
func (m *metrics) observer() store.Observer {
	return store.Observer{
		Answered: func(took time.Duration, err error) {
			if err != nil {
				m.refusals.WithLabelValues(reasonOf(err)).Inc()
				return
			}
			m.volumes.Observe(took.Seconds())
		},
		Counted: func(method unpack.Retention, n int64) { m.bytes[method].Add(float64(n)) },
		Built: func(b store.Build) {
			trigger := triggerPod
			if b.OnPull {
				trigger = triggerPull
			}
			if b.Err != nil {
				m.buildFailures.WithLabelValues(trigger).Inc()
				return
			}
			m.builds.WithLabelValues(string(b.Modes.Raw), string(b.Modes.Tar), trigger).Observe(b.Duration.Seconds())
		},
		Collected: func(c store.Collection) {
			m.collections.Observe(c.Duration.Seconds())
			m.removed.Add(float64(c.Trees))
			m.freed.Add(float64(c.Freed))
			if c.Err != nil {
				m.gcFailures.Inc()
			}
		},
	}
}

// pullObserver returns an Observer that counts what the CSI driver pulls.
func (m *metrics) pullObserver() pull.Observer {
	// Bytes are counted for each buffer, so their series are looked up here.
	registry, node := m.pulledBytes.WithLabelValues(sourceRegistry), m.pulledBytes.WithLabelValues(sourceNode)
	return pull.Observer{
		Fetched: func(n int64) { registry.Add(float64(n)) },
		Linked:  func(n int64) { node.Add(float64(n)) },
		Pulled:  func(took time.Duration) { m.pulls.Observe(took.Seconds()) },
		Failed:  func(err error) { m.pullFailures.WithLabelValues(kindOf(err)).Inc() },
		Removed: m.evictions.Inc,
	}
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

// watch exports the state of the store and the watcher, which is read for every scrape.
func (m *metrics) watch(s *store.Store, watcher *images.Watcher) {
	m.registry.MustRegister(&gauges{s, watcher, m.puller.Load})
	modes := s.Modes()
	for _, trigger := range triggers {
		m.builds.WithLabelValues(string(modes.Raw), string(modes.Tar), trigger)
	}
}

// gauges implements prometheus.Collector.
type gauges struct {
	store   *store.Store
	watcher *images.Watcher
	puller  func() *pull.Puller // nil without CSI
}

func gauge(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc(prometheus.BuildFQName(prefix, "", name), help, labels, nil)
}

var (
	connectedGauge  = gauge("containerd_connected", "Whether containerd's images are known: 1, or 0, and then image volumes of artifacts are refused.")
	artifactsGauge  = gauge("artifacts", "Artifacts among containerd's images, in all namespaces.")
	conflictsGauge  = gauge("image_conflicts", "Artifacts that are refused because they share their config with another image.")
	treesGauge      = gauge("trees", "Trees on the node: one for each prepared artifact, and another one for each user namespace that uses it.", "raw", "tar")
	mountsGauge     = gauge("mounts", "Trees that are mounted.")
	referencesGauge = gauge("references", "References to trees: one for each artifact and pod, and those of tools.")
	pulledGauge     = gauge("pulled_artifacts", "References of artifacts that the CSI driver has pulled.")
	pullsGauge      = gauge("pulls", "Pulls of the CSI driver that are under way.")
	sizeGauge       = gauge("tree_disk_bytes", "Disk usage of the trees: metadata, and decompressed and copied contents.")
)

// Describe implements prometheus.Collector.
func (g *gauges) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{connectedGauge, artifactsGauge, conflictsGauge, treesGauge, mountsGauge, referencesGauge, sizeGauge, pulledGauge, pullsGauge} {
		ch <- d
	}
}

// Collect implements prometheus.Collector. It leaves out what cannot be read, and logs why.
func (g *gauges) Collect(ch chan<- prometheus.Metric) {
	set := func(d *prometheus.Desc, n int64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, float64(n), labels...)
	}
	known := g.watcher.Stats()
	connected := int64(0)
	if known.Connected {
		connected = 1
	}
	if g.watcher.Running() { // otherwise the node has no containerd, which is no failure
		set(connectedGauge, connected)
	}
	set(artifactsGauge, int64(known.Artifacts))
	set(conflictsGauge, int64(known.Conflicts))

	ctx, cancel := context.WithTimeout(context.Background(), gatherTimeout)
	defer cancel()
	stats, err := g.store.Stats(ctx)
	if err != nil {
		log.L.WithError(err).Warn("cannot count the trees for the metrics")
		return
	}
	stats.Trees[g.store.Modes()] += 0 // so that the series exists before the first tree
	for modes, n := range stats.Trees {
		set(treesGauge, int64(n), string(modes.Raw), string(modes.Tar))
	}
	set(mountsGauge, int64(stats.Mounts))
	set(referencesGauge, int64(stats.References))
	set(sizeGauge, stats.Size)

	var pulled pull.Stats
	if p := g.puller(); p != nil {
		if pulled, err = p.Stats(ctx); err != nil {
			log.L.WithError(err).Warn("cannot count the pulled artifacts for the metrics")
			return
		}
	}
	set(pulledGauge, int64(pulled.Artifacts))
	set(pullsGauge, int64(pulled.Pulls))
}
