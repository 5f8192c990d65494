// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"encoding/hex"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"

	collector "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	trace "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
)

// sentSpan is a span that the OTLP receiver got.
type sentSpan struct {
	*trace.Span
	service string
}

// receiver receives spans with OTLP over HTTP.
type receiver struct {
	*httptest.Server
	mu    sync.Mutex
	spans map[string]sentSpan // by ID
}

func newReceiver(t *testing.T) *receiver {
	t.Helper()
	r := &receiver{spans: map[string]sentSpan{}}
	r.Server = httptest.NewServer(r)
	t.Cleanup(r.Close)
	return r
}

func (r *receiver) ServeHTTP(w http.ResponseWriter, request *http.Request) {
	var sent collector.ExportTraceServiceRequest
	body, err := io.ReadAll(request.Body)
	if err == nil {
		err = proto.Unmarshal(body, &sent)
	}
	if err != nil || request.URL.Path != "/v1/traces" {
		http.Error(w, "not an OTLP request with spans", http.StatusBadRequest)
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, resource := range sent.GetResourceSpans() {
		service := ""
		for _, a := range resource.GetResource().GetAttributes() {
			if a.GetKey() == "service.name" {
				service = a.GetValue().GetStringValue()
			}
		}
		for _, scope := range resource.GetScopeSpans() {
			for _, s := range scope.GetSpans() {
				r.spans[hex.EncodeToString(s.GetSpanId())] = sentSpan{s, service}
			}
		}
	}
}

// count returns the number of spans of a service so far.
func (r *receiver) count(service string) (n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, s := range r.spans {
		if s.service == service {
			n++
		}
	}
	return n
}

// path returns the names of a span of the daemon and of its ancestors, the root first. It
// returns "" if the span or an ancestor has not arrived yet.
func (r *receiver) path(name string) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, s := range r.spans {
		if s.GetName() != name || s.service != "artifact-snapshotter" {
			continue
		}
		path := s.service + ":" + name
		for len(s.GetParentSpanId()) > 0 {
			above, ok := r.spans[hex.EncodeToString(s.GetParentSpanId())]
			if !ok || string(above.GetTraceId()) != string(s.GetTraceId()) {
				return ""
			}
			s = above
			path = s.service + ":" + s.GetName() + " > " + path
		}
		return path
	}
	return ""
}

func TestSpansOfTheDaemonAreInTheTracesOfContainerd(t *testing.T) {
	spans := newReceiver(t)
	n := node.ForTest(t, node.Options{Traces: spans.URL})
	ref := pulled(t, n, writeModel(t), pack.Raw)
	pod, err := n.RunPod(node.PodSpec{Volumes: []node.Volume{{Image: ref, Path: "/model"}}})
	check(t, err)
	if older(t, n, 3, "no traces: proxy plugins do not get the trace context") {
		check(t, pod.Remove())
		check(t, n.StopDaemon()) // stopping flushes the spans
		check(t, n.StopContainerd())
		waitFor(t, "the spans of containerd", func() bool { return spans.count("containerd") > 0 })
		if spans.count("artifact-snapshotter") > 0 {
			t.Error("the daemon started its own trace")
		}
		return
	}
	const (
		call    = "artifact-snapshotter:containerd.services.snapshots.v1.Snapshots/Prepare"
		prepare = call + " > artifact-snapshotter:volume.mount"
		wait    = prepare + " > artifact-snapshotter:tree.wait"
	)
	for name, want := range map[string]string{
		"volume.mount":  prepare,
		"artifact.read": prepare + " > artifact-snapshotter:artifact.read",
		"tree.wait":     wait,
		"tree.build":    wait + " > artifact-snapshotter:tree.build",
		"tree.mount":    wait + " > artifact-snapshotter:tree.mount",
	} {
		waitFor(t, "the span "+name, func() bool { return spans.path(name) != "" })
		got := spans.path(name)
		if !strings.HasPrefix(got, "containerd:runtime.v1.RuntimeService/CreateContainer > ") || !strings.HasSuffix(got, " > "+want) {
			t.Errorf("the span %s has the path %s", name, got)
		}
	}
	check(t, pod.Remove())
	check(t, n.StopDaemon()) // stopping flushes the spans
	check(t, n.StopContainerd())
	spans.mu.Lock()
	defer spans.mu.Unlock()
	for _, s := range spans.spans {
		if s.service == "artifact-snapshotter" && len(s.GetParentSpanId()) == 0 {
			t.Errorf("the daemon started its own trace: %s", s.GetName())
		}
	}
	if log := daemonLog(t, n); strings.Contains(log, "cannot export") {
		t.Errorf("spans could not be sent: %s", log)
	}
}
