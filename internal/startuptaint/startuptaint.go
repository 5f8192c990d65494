// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

// Package startuptaint removes the taint that keeps pods off a new node until the daemon
// serves there.
//
// Two requests to the API server do not earn client-go with its dependencies; net/http, which
// the program has anyway, makes them.
package startuptaint

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
)

// Key is the taint's key. Its value and effect may be any.
const Key = "artifact-snapshotter.dev/agent-not-ready"

// serviceAccount is where kubelet puts a container's service account.
const serviceAccount = "/var/run/secrets/kubernetes.io/serviceaccount"

const (
	requestTimeout = 10 * time.Second
	maxAnswer      = 8 << 20 // a node lists its images
)

// Remove removes the taint from the node as the service account of this pod, and reports
// whether the node had it.
func Remove(ctx context.Context, node string) (removed bool, err error) {
	s, err := connect()
	if err != nil {
		return false, err
	}
	path := "/api/v1/nodes/" + url.PathEscape(node)
	for {
		answer, err := s.request(ctx, http.MethodGet, path, nil)
		if err != nil {
			return removed, err
		}
		var n struct {
			Spec struct{ Taints []map[string]any }
		}
		if err := json.Unmarshal(answer, &n); err != nil {
			return removed, fmt.Errorf("the API server's answer about node %s: %w", node, err)
		}
		i := slices.IndexFunc(n.Spec.Taints, func(taint map[string]any) bool { return taint["key"] == Key })
		if i < 0 {
			return removed, nil
		}
		// Others change taints, too, so the patch applies only to the one that was read.
		at := fmt.Sprintf("/spec/taints/%d", i)
		patch, err := json.Marshal([]map[string]any{
			{"op": "test", "path": at, "value": n.Spec.Taints[i]},
			{"op": "remove", "path": at},
		})
		if err != nil {
			return removed, err
		}
		if _, err := s.request(ctx, http.MethodPatch, path, patch); err != nil {
			return removed, err
		}
		removed = true
	}
}

// server is the API server of the pod's cluster.
type server struct {
	address, token string
	client         *http.Client
}

// connect reads the files anew each time: kubelet renews the token.
func connect() (*server, error) {
	host, port := os.Getenv("KUBERNETES_SERVICE_HOST"), os.Getenv("KUBERNETES_SERVICE_PORT")
	if host == "" || port == "" {
		return nil, fmt.Errorf("KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are not set: this is no pod: %w", errdefs.ErrFailedPrecondition)
	}
	token, err := os.ReadFile(filepath.Join(serviceAccount, "token"))
	if err != nil {
		return nil, fmt.Errorf("read the pod's service account: %w", err)
	}
	ca, err := os.ReadFile(filepath.Join(serviceAccount, "ca.crt"))
	if err != nil {
		return nil, fmt.Errorf("read the pod's service account: %w", err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(ca) {
		return nil, errors.New("ca.crt of the pod's service account has no certificate")
	}
	return &server{
		address: "https://" + net.JoinHostPort(host, port),
		token:   strings.TrimSpace(string(token)),
		client: &http.Client{
			Timeout: requestTimeout,
			Transport: &http.Transport{
				TLSClientConfig:   &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12},
				DisableKeepAlives: true,
			},
		},
	}, nil
}

func (s *server) request(ctx context.Context, method, path string, body []byte) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, method, s.address+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Authorization", "Bearer "+s.token)
	req.Header.Set("Accept", "application/json")
	if method == http.MethodPatch {
		req.Header.Set("Content-Type", "application/json-patch+json")
	}
	resp, err := s.client.Do(req)
	if err != nil {
		return nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w", method, path, err)
	}
	if resp.StatusCode != http.StatusOK {
		var status struct{ Message string }
		_ = json.Unmarshal(answer, &status) // the code says enough
		return nil, fmt.Errorf("%s %s: the API server answers %s: %s", method, path, resp.Status, status.Message)
	}
	return answer, nil
}
