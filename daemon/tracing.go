// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"go.opentelemetry.io/contrib/instrumentation/google.golang.org/grpc/otelgrpc"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/sdk/resource"
	"go.opentelemetry.io/otel/sdk/trace"
	semconv "go.opentelemetry.io/otel/semconv/v1.37.0"
	"google.golang.org/grpc"
)

// tracing reports whether the environment enables tracing and names a receiver of spans.
func tracing() bool {
	disabled, _ := strconv.ParseBool(os.Getenv("OTEL_SDK_DISABLED"))
	return !disabled && os.Getenv("OTEL_TRACES_EXPORTER") != "none" &&
		os.Getenv("OTEL_EXPORTER_OTLP_ENDPOINT")+os.Getenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") != ""
}

// startTracing exports spans to the receiver in the environment, which has the variables of
// OpenTelemetry that containerd is configured with, too (its pkg/tracing/plugin). By default
// only traces that containerd started are exported. Without a receiver there are no options.
func startTracing(ctx context.Context, version string) (options []grpc.ServerOption, stop func(), err error) {
	stop = func() {}
	if !tracing() {
		return nil, stop, nil
	}
	exporter, err := newExporter(ctx)
	if err != nil {
		return nil, stop, fmt.Errorf("tracing: %w", err)
	}
	// WithFromEnv comes last, so that the environment overrides name and version.
	service, err := resource.New(ctx, resource.WithAttributes(semconv.ServiceName("artifact-snapshotter"), semconv.ServiceVersion(version)),
		resource.WithTelemetrySDK(), resource.WithFromEnv())
	if err != nil && !errors.Is(err, resource.ErrPartialResource) {
		return nil, stop, fmt.Errorf("tracing: %w", err)
	}
	with := []trace.TracerProviderOption{trace.WithBatcher(exporter), trace.WithResource(service)}
	if os.Getenv("OTEL_TRACES_SAMPLER") == "" {
		// Most calls and all garbage collections belong to no trace of containerd. To
		// start traces for them would flood the receiver.
		with = append(with, trace.WithSampler(trace.ParentBased(trace.NeverSample())))
	}
	provider := trace.NewTracerProvider(with...)
	otel.SetTracerProvider(provider)
	otel.SetTextMapPropagator(propagation.NewCompositeTextMapPropagator(propagation.TraceContext{}, propagation.Baggage{}))
	otel.SetErrorHandler(otel.ErrorHandlerFunc(func(err error) {
		log.G(ctx).WithError(err).Warn("cannot export spans")
	}))
	log.G(ctx).Info("exporting the spans of containerd's traces")
	stop = func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), flushTimeout)
		defer cancel()
		if err := provider.Shutdown(ctx); err != nil {
			log.G(ctx).WithError(err).Warn("cannot export the last spans")
		}
	}
	return []grpc.ServerOption{grpc.StatsHandler(otelgrpc.NewServerHandler())}, stop, nil
}

// newExporter returns an exporter for the protocol that the environment names.
func newExporter(ctx context.Context) (*otlptrace.Exporter, error) {
	protocol := os.Getenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL")
	if protocol == "" {
		protocol = os.Getenv("OTEL_EXPORTER_OTLP_PROTOCOL")
	}
	switch protocol {
	case "", "http/protobuf":
		return otlptracehttp.New(ctx)
	case "grpc":
		return otlptracegrpc.New(ctx)
	default:
		return nil, fmt.Errorf("OTEL_EXPORTER_OTLP_PROTOCOL is %q, and only http/protobuf and grpc are supported: %w", protocol, errdefs.ErrNotImplemented)
	}
}
