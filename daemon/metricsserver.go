// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"errors"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/containerd/log"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// gatherTimeout bounds the time to collect the metrics for one request.
const gatherTimeout = 10 * time.Second

// metricsRetry is how long to wait for an address that something else has.
const metricsRetry = 10 * time.Second

// serve serves /metrics on the address until it is told to stop. That the address cannot
// be had is no reason to leave pods without their volumes: it is tried again.
func (m *metrics) serve(ctx context.Context, address string, retry time.Duration) (stop func()) {
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
	ctx, cancel := context.WithCancel(ctx)
	listener, err := listenMetrics(ctx, address) // before the daemon says that it is ready
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		logger := log.G(ctx).WithField("address", address)
		for failures := 0; ; failures++ {
			if err == nil {
				logger.Info("Serving metrics")
				if err = server.Serve(listener); errors.Is(err, http.ErrServerClosed) {
					return
				}
			}
			if failures == 0 {
				logger.WithError(err).Error("No metrics; trying again")
			}
			select {
			case <-ctx.Done():
				return
			case <-time.After(retry):
			}
			listener, err = listenMetrics(ctx, address)
		}
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
