// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package plugin

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"time"

	"github.com/containerd/log"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

const (
	// gatherTimeout bounds what is read for one request of the metrics.
	gatherTimeout = 10 * time.Second
	// unixScheme is how metrics_address names a Unix socket.
	unixScheme = "unix://"
)

// validateMetrics checks metrics_address. What a metric says is not for everybody
// who can reach the node, and there is neither TLS nor a password: so it is a socket
// that only root can connect to, or a port that only the node itself can.
func validateMetrics(address string) error {
	if address == "" {
		return nil
	}
	if path, ok := strings.CutPrefix(address, unixScheme); ok {
		return validateSocket("metrics_address", path)
	}
	port, err := netip.ParseAddrPort(address)
	if err != nil || !port.Addr().IsLoopback() || port.Port() == 0 {
		return fmt.Errorf("metrics_address %q is neither unix:///path nor a port of a loopback address, such as 127.0.0.1:9477 or [::1]:9477", address)
	}
	return nil
}

// serveMetrics serves /metrics on the address, until it is closed.
func (m *metrics) serve(ctx context.Context, address string) (*http.Server, error) {
	listener, err := listenMetrics(ctx, address)
	if err != nil {
		return nil, fmt.Errorf("metrics: %w", err)
	}
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
	go func() {
		if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
			log.G(ctx).WithError(err).Error("No metrics any more")
		}
	}()
	log.G(ctx).WithField("address", address).Info("Serving metrics")
	return server, nil
}

func listenMetrics(ctx context.Context, address string) (net.Listener, error) {
	if path, ok := strings.CutPrefix(address, unixScheme); ok {
		return listen(ctx, path)
	}
	return (&net.ListenConfig{}).Listen(ctx, "tcp", address)
}
