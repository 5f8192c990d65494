// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package pull

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
	"github.com/artifact-snapshotter/artifact-snapshotter/internal/registrytest"
)

// hostsDir is a directory with a hosts.toml that puts mirrors before the registry.
func hostsDir(t *testing.T, registry string, mirrors ...string) string {
	t.Helper()
	dir := t.TempDir()
	host, port, _ := strings.Cut(registry, ":")
	own := filepath.Join(dir, host+"_"+port+"_")
	if err := os.MkdirAll(own, 0o755); err != nil {
		t.Fatal(err)
	}
	text := fmt.Sprintf("server = \"http://%s\"\n", registry)
	for _, m := range mirrors {
		text += fmt.Sprintf("[host.\"http://%s\"]\n  capabilities = [\"pull\"]\n", m)
	}
	if err := os.WriteFile(filepath.Join(own, "hosts.toml"), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return dir
}

// isBlob reports whether the request fetches one of the layers.
func isBlob(r *http.Request, layers []pack.Layer) bool {
	for _, l := range layers {
		if r.Method == http.MethodGet && strings.HasSuffix(r.URL.Path, digest.FromBytes(l.Data).Encoded()) {
			return true
		}
	}
	return false
}

// dropping passes so many bytes of an answer, and then drops the connection.
type dropping struct {
	http.ResponseWriter
	after int
}

func (d *dropping) Write(b []byte) (int, error) {
	if d.after -= len(b); d.after <= 0 {
		if rest := len(b) + d.after; rest > 0 {
			_, _ = d.ResponseWriter.Write(b[:rest])
		}
		_ = http.NewResponseController(d.ResponseWriter).Flush()
		panic(http.ErrAbortHandler)
	}
	return d.ResponseWriter.Write(b)
}

func TestARegistryThatFailsAtRandomIsAskedAgain(t *testing.T) {
	registry := registrytest.Start(t, t.TempDir(), false)
	layers := contents(t, 8<<20, 5<<20, 100_000, 3)
	push(t, registry, "v1", layers)
	random, mu := rand.New(rand.NewPCG(1, 2)), sync.Mutex{}
	var drops, refused atomic.Int32
	proxy := registrytest.NewProxy(t, registry, func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		mu.Lock()
		what, size := random.IntN(4), random.IntN(2<<20)
		mu.Unlock()
		switch what {
		case 0:
			refused.Add(1)
			w.Header().Set("Retry-After", "0")
			http.Error(w, "busy", []int{http.StatusServiceUnavailable, http.StatusTooManyRequests}[size%2])
		case 1, 2:
			if r.Method == http.MethodGet {
				drops.Add(1)
				w = &dropping{w, size}
			}
			fallthrough
		default:
			next.ServeHTTP(w, r)
		}
	})
	p := open(t, Config{})
	if _, err := pull(t, p, proxy.Host); err != nil {
		t.Fatal(err)
	}
	wantBlobs(t, p, layers)
	wantClean(t, p)
	if drops.Load() < 2 || refused.Load() == 0 {
		t.Errorf("the registry was not bad enough: %d drops, %d answers 503 and 429", drops.Load(), refused.Load())
	}
}

func TestRetryAfterIsObeyed(t *testing.T) {
	registry := registrytest.Start(t, t.TempDir(), false)
	layers := contents(t, 100_000)
	push(t, registry, "v1", layers)
	var first atomic.Int64
	var second atomic.Int64
	proxy := registrytest.NewProxy(t, registry, func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		if isBlob(r, layers) {
			if first.CompareAndSwap(0, time.Now().UnixNano()) {
				w.Header().Set("Retry-After", "2")
				http.Error(w, "later", http.StatusTooManyRequests)
				return
			}
			second.CompareAndSwap(0, time.Now().UnixNano())
		}
		next.ServeHTTP(w, r)
	})
	p := open(t, Config{})
	if _, err := pull(t, p, proxy.Host); err != nil {
		t.Fatal(err)
	}
	if waited := time.Duration(second.Load() - first.Load()); waited < 2*time.Second {
		t.Errorf("the registry asked for 2 s, and was asked again after %s", waited)
	}
	wantBlobs(t, p, layers)
}

func TestABadMirrorIsGivenUpForTheNextHost(t *testing.T) {
	registry := registrytest.Start(t, t.TempDir(), false)
	layers := contents(t, 3<<20, 2<<20)
	push(t, registry, "v1", layers)
	bomb, err := pack.Gzip(make([]byte, 64<<20))
	if err != nil {
		t.Fatal(err)
	}
	wait := make(chan struct{})
	t.Cleanup(func() { close(wait) })
	for _, test := range []struct {
		name    string
		disturb func(http.ResponseWriter, *http.Request)
	}{
		{"gives nothing", func(_ http.ResponseWriter, r *http.Request) {
			select {
			case <-r.Context().Done():
			case <-wait:
			}
		}},
		{"vanishes in the middle", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", fmt.Sprint(size(r, layers)))
			_, _ = w.Write(make([]byte, 100_000))
			_ = http.NewResponseController(w).Flush()
			select {
			case <-r.Context().Done():
			case <-wait:
			}
		}},
		{"drips", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", fmt.Sprint(size(r, layers)))
			for r.Context().Err() == nil {
				if _, err := w.Write([]byte{0}); err != nil {
					return
				}
				_ = http.NewResponseController(w).Flush()
				select {
				case <-wait:
					return
				case <-time.After(50 * time.Millisecond):
				}
			}
		}},
		{"sends other bytes", func(w http.ResponseWriter, r *http.Request) {
			_, _ = w.Write(make([]byte, size(r, layers)))
		}},
		{"sends more", func(w http.ResponseWriter, r *http.Request) {
			_, _ = w.Write(make([]byte, size(r, layers)+100_000))
		}},
		{"sends less", func(w http.ResponseWriter, r *http.Request) {
			_, _ = w.Write(make([]byte, size(r, layers)-100_000))
		}},
		{"is busy for an hour", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Retry-After", "3600")
			http.Error(w, "busy", http.StatusTooManyRequests)
		}},
		{"does not have it", func(w http.ResponseWriter, r *http.Request) { http.NotFound(w, r) }},
		{"is forbidden", func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "no", http.StatusForbidden) }},
		{"fails", func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "no", http.StatusInternalServerError) }},
		{"drops each connection", func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }},
		{"redirects in a circle", func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, r.URL.Path, http.StatusFound) }},
		{"compresses a bomb", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Encoding", "gzip")
			_, _ = w.Write(bomb)
		}},
		{"sends an endless header", func(w http.ResponseWriter, _ *http.Request) {
			for i := range 1000 {
				w.Header().Set(fmt.Sprint("X-", i), strings.Repeat("x", 1000))
			}
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			mirror := registrytest.NewProxy(t, registry, func(w http.ResponseWriter, r *http.Request, next http.Handler) {
				if isBlob(r, layers) {
					test.disturb(w, r)
					return
				}
				next.ServeHTTP(w, r)
			})
			p := open(t, Config{Hosts: hostsDir(t, registry, mirror.Host)})
			began := time.Now()
			if _, err := pull(t, p, registry); err != nil {
				t.Fatal(err)
			}
			wantBlobs(t, p, layers)
			wantClean(t, p)
			if len(mirror.Requests("GET .*/blobs/")) == 0 {
				t.Error("the mirror was not asked")
			}
			// A stall of the mirror, for each blob at once, and time for a busy machine.
			if took := time.Since(began); took > 40*time.Second {
				t.Errorf("it took %s", took)
			}
		})
	}
}

func size(r *http.Request, layers []pack.Layer) int {
	for _, l := range layers {
		if strings.HasSuffix(r.URL.Path, digest.FromBytes(l.Data).Encoded()) {
			return len(l.Data)
		}
	}
	return 0
}

func TestARegistryThatLiesIsAnError(t *testing.T) {
	registry := registrytest.Start(t, t.TempDir(), false)
	layers := contents(t, 1<<20)
	push(t, registry, "v1", layers)
	endless := func(w http.ResponseWriter) {
		chunk := make([]byte, 1<<20)
		for range 10 << 10 {
			if _, err := w.Write(chunk); err != nil {
				return
			}
		}
	}
	for _, test := range []struct {
		name, want string
		disturb    func(http.ResponseWriter, *http.Request) bool
	}{
		{"other bytes", "do not match the digest", func(w http.ResponseWriter, r *http.Request) bool {
			if !isBlob(r, layers) {
				return false
			}
			_, _ = w.Write(make([]byte, size(r, layers)))
			return true
		}},
		{"an endless manifest", "more than 8388608 bytes", func(w http.ResponseWriter, r *http.Request) bool {
			if r.Method != http.MethodGet || !strings.Contains(r.URL.Path, "/manifests/") {
				// Without a length the manifest is fetched to find its digest.
				w.Header().Set("Transfer-Encoding", "identity")
				return r.Method == http.MethodHead
			}
			endless(w)
			return true
		}},
		{"a manifest of 10 GB", "rejecting 10737418240 byte manifest", func(w http.ResponseWriter, r *http.Request) bool {
			if !strings.Contains(r.URL.Path, "/manifests/") {
				return false
			}
			w.Header().Set("Content-Length", "10737418240")
			w.Header().Set("Docker-Content-Digest", digest.FromString("x").String())
			return true
		}},
		{"a redirect in a circle", "stopped after 10 redirects", func(w http.ResponseWriter, r *http.Request) bool {
			http.Redirect(w, r, r.URL.Path, http.StatusFound)
			return true
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			proxy := registrytest.NewProxy(t, registry, func(w http.ResponseWriter, r *http.Request, next http.Handler) {
				if !test.disturb(w, r) {
					next.ServeHTTP(w, r)
				}
			})
			p := open(t, Config{})
			_, err := pull(t, p, proxy.Host)
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("error %v, want %q", err, test.want)
			}
			if _, unfinished := errors.AsType[*UnfinishedError](err); unfinished {
				t.Errorf("it goes on: %v", err)
			}
			if _, err := os.Lstat(p.Dir().Path(digest.FromBytes(layers[0].Data))); !os.IsNotExist(err) {
				t.Errorf("a blob of wrong bytes: %v", err)
			}
		})
	}
}

// The address is in the manifest, which anybody may have written.
func TestAddressesInDescriptorsAreNotAsked(t *testing.T) {
	asked := registrytest.NewProxy(t, "127.0.0.1:1", nil)
	registry := registrytest.Start(t, t.TempDir(), false)
	layers := contents(t, 100_000)
	push(t, registry, "v1", layers)
	p := open(t, Config{})
	target, err := pull(t, p, registry)
	if err != nil {
		t.Fatal(err)
	}
	d := &download{Puller: p, target: target}
	d.trust.lied = map[int]bool{}
	if d.session, err = p.session(in(t.Context()), ref(t, registry+"/"+repository+":v1"), Credential{}); err != nil {
		t.Fatal(err)
	}
	defer d.session.close()
	other := contents(t, 100)
	push(t, registry, "v2", other)
	desc := target
	desc.MediaType, desc.Digest, desc.Size = other[0].MediaType, digest.FromBytes(other[0].Data), 100
	desc.URLs = []string{"http://" + asked.Host + "/x"}
	desc.Data = make([]byte, 100)
	if err := d.get(in(t.Context()), desc); err != nil {
		t.Fatal(err)
	}
	wantBlobs(t, p, other)
	if got := asked.Requests(""); len(got) != 0 {
		t.Errorf("another host was asked: %q", got)
	}
}

func TestAPullGoesOnWhereItWasAfterARestart(t *testing.T) {
	registry := registrytest.Start(t, t.TempDir(), false)
	layers := contents(t, 6<<20)
	push(t, registry, "v1", layers)
	goOn := make(chan struct{})
	var once sync.Once
	t.Cleanup(func() { once.Do(func() { close(goOn) }) })
	var fetches atomic.Int32
	proxy := registrytest.NewProxy(t, registry, func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		if isBlob(r, layers) && fetches.Add(1) == 1 {
			w = &pausing{ResponseWriter: w, after: 4 << 20, goOn: goOn}
		}
		next.ServeHTTP(w, r)
	})
	limits := testLimits
	limits.Stall = time.Minute
	root := filepath.Join(t.TempDir(), "content")
	p, err := Open(t.Context(), Config{Root: root, Limits: limits})
	if err != nil {
		t.Fatal(err)
	}
	r := Request{Reference: ref(t, proxy.Host+"/"+repository+":v1"), Policy: IfNotPresent}
	waitForProgress(t, p, r, "pulling: 4.0 of 6.0 MiB")
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	once.Do(func() { close(goOn) })
	p = open(t, Config{Root: root})
	if err := p.CollectGarbage(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := p.Pull(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	wantBlobs(t, p, layers)
	wantClean(t, p)
	got := proxy.Requests("GET .*" + digest.FromBytes(layers[0].Data).Encoded())
	if len(got) != 2 || !strings.HasSuffix(got[1], fmt.Sprintf("bytes=%d-", 4<<20)) {
		t.Errorf("the requests are %q", got)
	}
}

// throttled passes so many bytes a second.
type throttled struct {
	http.ResponseWriter
	perSecond int
	began     time.Time
	sent      int
}

func (w *throttled) Write(b []byte) (n int, err error) {
	for n < len(b) && err == nil {
		var m int
		m, err = w.ResponseWriter.Write(b[n:min(n+64<<10, len(b))])
		n, w.sent = n+m, w.sent+m
		if ahead := time.Duration(float64(w.sent)/float64(w.perSecond)*1e9) - time.Since(w.began); ahead > 0 {
			time.Sleep(ahead)
		}
	}
	return n, err
}

func (w *throttled) ReadFrom(r io.Reader) (int64, error) {
	return io.Copy(struct{ io.Writer }{w}, r)
}

// The first connection gives 1 MB/s. Those after the next one give nothing before there are as many
// as one blob may have.
func TestALargeBlobIsFetchedBySeveralConnectionsIfOneIsSlow(t *testing.T) {
	registry := registrytest.Start(t, t.TempDir(), false)
	layers := contents(t, 24_000_000)
	push(t, registry, "v1", layers)
	var now atomic.Int32
	all := make(chan struct{})
	proxy := registrytest.NewProxy(t, registry, func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		switch {
		case !isBlob(r, layers):
		case r.Header.Get("Range") == "":
			w = &throttled{ResponseWriter: w, perSecond: 1_000_000, began: time.Now()}
		default:
			n := now.Add(1)
			if n == ways {
				close(all)
			}
			if n == 1 || n >= ways { // the first says how long the blob is
				break
			}
			select {
			case <-all:
			case <-r.Context().Done():
				return
			}
		}
		next.ServeHTTP(w, r)
	})
	limits := testLimits
	limits.Memory, limits.Stall = 32<<20, 30*time.Second // parts of 1.3 MiB
	p := open(t, Config{Limits: limits})
	if _, err := pull(t, p, proxy.Host); err != nil {
		t.Fatal(err)
	}
	wantBlobs(t, p, layers)
	select {
	case <-all:
	default:
		t.Errorf("%d connections, want %d at once", now.Load(), ways)
	}
}

// Here several connections share what one has: the rest, and the other blobs, come by one.
func TestSeveralConnectionsEndIfTheyAreNotFaster(t *testing.T) {
	registry := registrytest.Start(t, t.TempDir(), false)
	layers := contents(t, 24_000_000, 24_000_000)
	push(t, registry, "v1", layers)
	var shared sync.Mutex
	proxy := registrytest.NewProxy(t, registry, func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		if isBlob(r, layers) {
			w = &sharing{ResponseWriter: w, line: &shared}
		}
		next.ServeHTTP(w, r)
	})
	limits := testLimits
	limits.Blobs, limits.Memory, limits.Stall = 1, 10<<20, 30*time.Second // parts of 1.2 MiB
	p := open(t, Config{Limits: limits})
	if _, err := pull(t, p, proxy.Host); err != nil {
		t.Fatal(err)
	}
	wantBlobs(t, p, layers)
	second := proxy.Requests("GET .*" + digest.FromBytes(layers[1].Data).Encoded())
	if len(second) != 1 {
		t.Errorf("the second blob was fetched by %d requests", len(second))
	}
}

// sharing is one of the connections over a line of 8 MB/s.
type sharing struct {
	http.ResponseWriter
	line *sync.Mutex
}

func (w *sharing) Write(b []byte) (n int, err error) {
	for n < len(b) && err == nil {
		w.line.Lock()
		m := min(len(b)-n, 64<<10)
		time.Sleep(time.Duration(float64(m) / 8e6 * 1e9))
		m, err = w.ResponseWriter.Write(b[n : n+m])
		n += m
		w.line.Unlock()
	}
	return n, err
}
