// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/artifact-snapshotter/artifact-snapshotter/store"
)

func TestMetricsAddressesAreLocal(t *testing.T) {
	for address, ok := range map[string]bool{
		"":                                      true,
		"unix:///run/metrics.sock":              true,
		"127.0.0.1:9477":                        true,
		"127.8.9.1:9477":                        true,
		"[::1]:9477":                            true,
		"[::ffff:127.0.0.1]:9477":               true,
		"0.0.0.0:9477":                          false,
		"[::]:9477":                             false,
		":9477":                                 false,
		"10.0.0.1:9477":                         false,
		"localhost:9477":                        false, // a name may resolve to any address
		"node.example.com:9477":                 false,
		"127.0.0.1":                             false,
		"127.0.0.1:0":                           false,
		"127.0.0.1:http":                        false,
		"http://127.0.0.1:9477":                 false,
		"/run/metrics.sock":                     false,
		"unix://metrics.sock":                   false,
		"unix:/run/metrics.sock":                false,
		"unix:///" + strings.Repeat("long", 30): false,
	} {
		cfg := Default()
		cfg.MetricsAddress = address
		err := cfg.Validate()
		if ok && err != nil || !ok && (err == nil || !strings.Contains(err.Error(), "metrics_address")) {
			t.Errorf("%q: %v", address, err)
		}
	}
}

func get(t *testing.T, network, address, method, path string) (int, string) {
	t.Helper()
	client := http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, network, address)
		},
	}}
	request, err := http.NewRequestWithContext(t.Context(), method, "http://daemon"+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	answer, err := client.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(answer.Body)
	if err != nil {
		t.Fatal(err)
	}
	return answer.StatusCode, string(body)
}

func TestMetricsAreServedOnAPortAndOnASocket(t *testing.T) {
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := free.Addr().String()
	free.Close()
	socket := filepath.Join(t.TempDir(), "metrics.sock")
	for _, c := range []struct{ configured, network, address string }{
		{port, "tcp", port},
		{"unix://" + socket, "unix", socket},
		{"unix://" + socket, "unix", socket}, // the socket exists from the case before
	} {
		cfg := testConfig(t)
		cfg.MetricsAddress = c.configured
		stop := serve(t, cfg)
		status, body := get(t, c.network, c.address, http.MethodGet, "/metrics")
		if status != http.StatusOK || !strings.Contains(body, "\nartifact_snapshotter_build_info{") || !strings.Contains(body, `version="v0"`) {
			t.Errorf("%s: %d %.200q", c.configured, status, body)
		}
		for method, path := range map[string]string{http.MethodGet: "/", http.MethodPost: "/metrics"} {
			if status, _ := get(t, c.network, c.address, method, path); status < 400 {
				t.Errorf("%s %s: %d, want an error", method, path, status)
			}
		}
		if err := stop(); err != nil {
			t.Error(err)
		}
		if _, err := net.Dial(c.network, c.address); err == nil {
			t.Errorf("%s: a server answers after the daemon stopped", c.configured)
		}
	}
}

// An artifact must not choose the values of labels.
func TestErrorsMapToAFixedSetOfReasonsAndKinds(t *testing.T) {
	for reason, err := range map[string]error{
		reasonInvalid:  fmt.Errorf("layer 1: %w", errdefs.ErrInvalidArgument),
		reasonMissing:  fmt.Errorf("its blob: %w", errdefs.ErrNotFound),
		reasonConflict: fmt.Errorf("image volume: %w", &store.CheckError{Err: errdefs.ErrFailedPrecondition}),
		reasonUnknown:  fmt.Errorf("image volume: %w", &store.CheckError{Err: errdefs.ErrUnavailable}),
		reasonDiskFull: errdefs.ErrResourceExhausted,
		reasonOther:    errors.New("reason"),
	} {
		if got := reasonOf(err); got != reason || !slices.Contains(reasons, got) {
			t.Errorf("%v: %q, want %q", err, got, reason)
		}
	}
	if got := reasonOf(fmt.Errorf("image volume: %w", &store.UnfinishedError{})); got != reasonUnfinished {
		t.Errorf("an unfinished build: %q", got)
	}
	for kind, err := range map[string]error{
		"invalid_argument": fmt.Errorf("layer 1: %w", errdefs.ErrInvalidArgument),
		"unavailable":      &store.CheckError{Err: errdefs.ErrUnavailable},
		"canceled":         fmt.Errorf("call: %w", context.DeadlineExceeded),
		kindOther:          errors.New("kind"),
	} {
		if got := kindOf(err); got != kind {
			t.Errorf("%v: %q, want %q", err, got, kind)
		}
	}
}
