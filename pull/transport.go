// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package pull

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/artifact-snapshotter/artifact-snapshotter/internal/retry"
)

var (
	errStalled = fmt.Errorf("the host sends nothing, or next to nothing: %w", errdefs.ErrUnavailable)
	errBusy    = fmt.Errorf("the host is busy: %w", errdefs.ErrUnavailable)
)

// transport bounds what a registry, which may be hostile, can do with a request: say nothing,
// send a byte a minute, an endless header or an endless manifest. It also obeys Retry-After,
// which containerd's resolver does not.
type transport struct {
	base  http.RoundTripper
	stall time.Duration
	// more is set if there are other hosts to ask when this one is busy.
	more bool
}

// bound makes the client use a transport. It is a config.UpdateClientFunc, and may be called
// twice for one client.
func bound(stall time.Duration) func(*http.Client) error {
	return func(c *http.Client) error {
		if t, ok := c.Transport.(*http.Transport); ok {
			t.MaxResponseHeaderBytes = maxHeader
			t.ResponseHeaderTimeout = stall
			c.Transport = &transport{base: t, stall: stall}
		}
		return nil
	}
}

// RoundTrip implements http.RoundTripper.
func (t *transport) RoundTrip(req *http.Request) (*http.Response, error) {
	ctx, cancel := context.WithCancelCause(req.Context())
	resp, err := t.base.RoundTrip(req.WithContext(ctx))
	if err != nil {
		cancel(nil)
		return nil, err
	}
	if wait, busy := retryAfter(resp, time.Now()); busy {
		if t.more {
			cancel(nil)
			resp.Body.Close()
			return nil, fmt.Errorf("%s answers %s: %w", req.URL.Host, resp.Status, errBusy)
		}
		if err := retry.Sleep(ctx, wait); err != nil {
			cancel(nil)
			resp.Body.Close()
			return nil, err
		}
	}
	b := &body{ReadCloser: resp.Body, ctx: ctx, cancel: cancel, host: req.URL.Host, stall: t.stall, left: t.stall, room: -1}
	if !ofBlob(req) {
		b.room = maxDocument
	}
	resp.Body = b
	return resp, nil
}

// ofBlob reports whether the request is for a blob, perhaps after a redirect to another host.
func ofBlob(req *http.Request) bool {
	for req.Response != nil && req.Response.Request != nil {
		req = req.Response.Request
	}
	return strings.Contains(req.URL.Path, "/blobs/")
}

// retryAfter reports whether the host is busy, and how long it asks to wait (RFC 9110,
// section 10.2.3): seconds, or a date.
func retryAfter(resp *http.Response, now time.Time) (wait time.Duration, busy bool) {
	switch resp.StatusCode {
	case http.StatusTooManyRequests, http.StatusServiceUnavailable:
	default:
		return 0, false
	}
	header := resp.Header.Get("Retry-After")
	if seconds, err := strconv.ParseUint(header, 10, 31); err == nil {
		wait = time.Duration(seconds) * time.Second
	} else if date, err := http.ParseTime(header); err == nil {
		wait = date.Sub(now)
	}
	return min(max(wait, minBackoff), maxRetryAfter), true
}

// body is the body of an answer. Only the time in Read counts, because whoever reads may be
// slow, too.
type body struct {
	io.ReadCloser
	ctx    context.Context
	cancel context.CancelCauseFunc
	host   string
	// left is how much of stall is left for the rest of trickle, of which got has arrived.
	stall, left time.Duration
	got         int
	room        int // how many bytes more may come; negative if that is not limited
}

// Read implements io.Reader.
func (b *body) Read(p []byte) (int, error) {
	if b.room == 0 {
		return 0, fmt.Errorf("the answer of %s has more than %d bytes: %w", b.host, maxDocument, errdefs.ErrOutOfRange)
	}
	if b.room > 0 {
		p = p[:min(len(p), b.room)]
	}
	timer := time.AfterFunc(b.left, func() { b.cancel(errStalled) })
	began := time.Now()
	n, err := b.ReadCloser.Read(p)
	timer.Stop()
	b.left -= time.Since(began)
	if b.got += n; b.got >= trickle {
		b.left, b.got = b.stall, 0
	}
	if b.room > 0 {
		b.room -= n
	}
	if err != nil && !errors.Is(err, io.EOF) && errors.Is(context.Cause(b.ctx), errStalled) {
		err = fmt.Errorf("%s: less than %d bytes in %s: %w", b.host, trickle, b.stall, errStalled)
	}
	return n, err
}

// Close implements io.Closer.
func (b *body) Close() error {
	b.cancel(nil)
	return b.ReadCloser.Close()
}
