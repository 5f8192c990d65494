// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"net"
	"slices"
	"sync"
	"testing"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"
	"go.opentelemetry.io/otel/trace/noop"
	collector "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	"google.golang.org/grpc"
)

const otlpEndpoint, otlpTracesEndpoint = "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"

func TestTracingIsOffUnlessTheEnvironmentNamesAReceiver(t *testing.T) {
	for name, env := range map[string]map[string]string{
		"nothing is set":       {},
		"it is disabled":       {otlpEndpoint: "http://127.0.0.1:1", "OTEL_SDK_DISABLED": "true"},
		"there is no exporter": {otlpTracesEndpoint: "http://127.0.0.1:1", "OTEL_TRACES_EXPORTER": "none"},
	} {
		t.Run(name, func(t *testing.T) {
			set(t, env)
			options, stop, err := startTracing(t.Context(), "v0")
			if err != nil || options != nil {
				t.Errorf("%v, %v", options, err)
			}
			stop()
		})
	}
	t.Run("an unknown protocol", func(t *testing.T) {
		set(t, map[string]string{otlpEndpoint: "http://127.0.0.1:1", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/json"})
		_, stop, err := startTracing(t.Context(), "v0")
		wantError(t, err, "OTEL_EXPORTER_OTLP_PROTOCOL", "http/json", "http/protobuf and grpc")
		stop()
	})
}

// set sets the variables that startTracing reads to those of env, and unsets the others.
func set(t *testing.T, env map[string]string) {
	t.Helper()
	for _, name := range []string{
		"OTEL_SDK_DISABLED", "OTEL_TRACES_EXPORTER", otlpEndpoint, otlpTracesEndpoint,
		"OTEL_EXPORTER_OTLP_PROTOCOL", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_TRACES_SAMPLER",
	} {
		t.Setenv(name, env[name])
	}
	t.Cleanup(func() { // startTracing sets them globally
		otel.SetTracerProvider(noop.NewTracerProvider())
		otel.SetTextMapPropagator(propagation.NewCompositeTextMapPropagator())
	})
}

// traces receives spans with OTLP over gRPC; package integration has a receiver over HTTP.
type traces struct {
	collector.UnimplementedTraceServiceServer
	mu    sync.Mutex
	names []string
}

func (r *traces) Export(_ context.Context, sent *collector.ExportTraceServiceRequest) (*collector.ExportTraceServiceResponse, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, resource := range sent.GetResourceSpans() {
		for _, scope := range resource.GetScopeSpans() {
			for _, s := range scope.GetSpans() {
				r.names = append(r.names, s.GetName())
			}
		}
	}
	return &collector.ExportTraceServiceResponse{}, nil
}

func TestOnlySpansOfExistingTracesAreExported(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	receiver, server := &traces{}, grpc.NewServer()
	collector.RegisterTraceServiceServer(server, receiver)
	go func() { _ = server.Serve(listener) }()
	defer server.Stop()
	set(t, map[string]string{otlpEndpoint: "http://" + listener.Addr().String(), "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"})
	options, stop, err := startTracing(t.Context(), "v0")
	if err != nil || len(options) != 1 {
		t.Fatalf("%v, %v", options, err)
	}
	traced := trace.ContextWithRemoteSpanContext(t.Context(), trace.NewSpanContext(trace.SpanContextConfig{
		TraceID: trace.TraceID{1}, SpanID: trace.SpanID{2}, TraceFlags: trace.FlagsSampled, Remote: true,
	}))
	for name, ctx := range map[string]context.Context{"in a trace": traced, "without a trace": t.Context()} {
		_, span := otel.Tracer("test").Start(ctx, name)
		span.End()
	}
	stop()
	if want := []string{"in a trace"}; !slices.Equal(receiver.names, want) {
		t.Errorf("%q were exported, want %q", receiver.names, want)
	}
}
