// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/containerd/log"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/artifact-snapshotter/artifact-snapshotter/internal/retry"
)

// serve serves /metrics on the address until stop is called. If it cannot listen on the
// address, it tries again: that is no reason to leave pods without their volumes.
func (m *metrics) serve(ctx context.Context, address string, again time.Duration) (stop func()) {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.InstrumentMetricHandler(m.registry, promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{
		ErrorHandling:       promhttp.ContinueOnError,
		ErrorLog:            log.L,
		MaxRequestsInFlight: 3,
		Timeout:             gatherTimeout,
	})))
	server := &http.Server{
		Handler:           mux,
		ReadHeaderTimeout: 10 * time.Second,
		ReadTimeout:       10 * time.Second,
		WriteTimeout:      2 * gatherTimeout,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    16 << 10,
	}
	ctx, cancel := context.WithCancel(log.WithLogger(ctx, log.G(ctx).WithField("address", address)))
	// The first try is before the daemon says that it is ready; its error comes again below.
	listener, _ := listenMetrics(ctx, address)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		policy := retry.Policy{Min: again, Max: again, WarnAfter: 1}
		policy.Run(ctx, "cannot serve metrics; still trying", func() (_ time.Duration, err error) {
			if listener == nil {
				if listener, err = listenMetrics(ctx, address); err != nil {
					return 0, err
				}
			}
			log.G(ctx).Info("serving metrics")
			err = server.Serve(listener)
			listener = nil
			return 0, err
		})
	}()
	return func() {
		cancel()
		_ = server.Close()
		<-ended
	}
}

func listenMetrics(ctx context.Context, address string) (net.Listener, error) {
	if path, ok := strings.CutPrefix(address, unixScheme); ok {
		return listen(ctx, path)
	}
	return (&net.ListenConfig{}).Listen(ctx, "tcp", address)
}
