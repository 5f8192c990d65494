// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

// Package registrytest starts real registries for tests, and proxies before them that count
// requests and disturb answers.
package registrytest

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/artifact-snapshotter/artifact-snapshotter/internal/containerdtest"
)

// User and Password are the only ones of a private registry.
const (
	User     = "reader"
	Password = "secret"
	// htpasswd is a file of htpasswd(1).
	htpasswd = User + ":$2y$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a\n"
)

var listening = regexp.MustCompile(`listening on (127\.0\.0\.1:\d+)`)

// Start starts a registry, which ends with the test, and returns its host. It keeps its content
// in data, which may be another registry's, and is read then. It needs User and Password for
// everything if it is private.
func Start(t *testing.T, data string, private bool) string {
	t.Helper()
	dir := t.TempDir()
	config := fmt.Sprintf(`version: 0.1
log: {level: info, accesslog: {disabled: true}}
storage: {filesystem: {rootdirectory: %q}, delete: {enabled: true}}
http: {addr: "127.0.0.1:0"}
`, data)
	if private {
		passwords := filepath.Join(dir, "htpasswd")
		write(t, passwords, htpasswd)
		config += fmt.Sprintf("auth: {htpasswd: {realm: test, path: %q}}\n", passwords)
	}
	write(t, filepath.Join(dir, "config.yaml"), config)
	logPath := filepath.Join(dir, "log")
	output, err := os.Create(logPath)
	if err != nil {
		t.Fatal(err)
	}
	defer output.Close()
	cmd := exec.Command(containerdtest.Tool(t, "registry"), "serve", filepath.Join(dir, "config.yaml"))
	cmd.Stdout, cmd.Stderr = output, output
	cmd.Env = append(os.Environ(), "OTEL_TRACES_EXPORTER=none")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		text, err := os.ReadFile(logPath)
		if err != nil {
			t.Fatal(err)
		}
		if found := listening.FindSubmatch(text); found != nil {
			return string(found[1])
		}
		if time.Now().After(deadline) {
			t.Fatalf("the registry does not listen:\n%s", text)
		}
	}
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// Proxy is a host that passes requests to a registry, and notes them.
type Proxy struct {
	// Host is the address of the proxy.
	Host string

	mu       sync.Mutex
	requests []string
}

// NewProxy starts a proxy before the registry. disturb is called for each request: it may
// answer it by itself, or pass it on to next.
func NewProxy(t *testing.T, registry string, disturb func(w http.ResponseWriter, r *http.Request, next http.Handler)) *Proxy {
	t.Helper()
	p := &Proxy{}
	next := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: registry})
	next.ErrorLog = nil
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p.mu.Lock()
		p.requests = append(p.requests, strings.TrimSpace(r.Method+" "+r.URL.Path+" "+r.Header.Get("Range")))
		p.mu.Unlock()
		if disturb == nil {
			next.ServeHTTP(w, r)
			return
		}
		disturb(w, r, next)
	}))
	t.Cleanup(func() {
		server.CloseClientConnections()
		server.Close()
	})
	p.Host = server.Listener.Addr().String()
	return p
}

// Requests returns the requests of that kind so far: "GET /v2/models/x/blobs/ bytes=0-", for
// example. kind is a regular expression.
func (p *Proxy) Requests(kind string) (found []string) {
	pattern := regexp.MustCompile(kind)
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, r := range p.requests {
		if pattern.MatchString(r) {
			found = append(found, r)
		}
	}
	return found
}

// Reset forgets the requests so far.
func (p *Proxy) Reset() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.requests = nil
}
