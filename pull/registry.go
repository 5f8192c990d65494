// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package pull

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"syscall"

	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/remotes/docker/config"
	remoteserrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/containerd/containerd/v2/core/transfer"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Credential is what a registry is asked with: a name and a password or, if the name is "", an
// identity token. The zero value is anonymous.
type Credential struct{ Username, Secret string }

// session asks the hosts that serve the registry of one reference, mirrors first, with one
// credential.
type session struct {
	ref   Reference
	cred  Credential
	hosts []docker.RegistryHost
	// limit and part are for fetching one blob by several connections.
	limit transfer.ImageResolverOption
	part  int
}

// session reads hosts.toml of the reference's registry.
func (p *Puller) session(ctx context.Context, ref Reference, cred Credential) (*session, error) {
	own := ref.Registry
	if h, err := docker.DefaultHost(own); err == nil {
		own = h
	}
	options := config.HostOptions{
		UpdateClient: bound(p.limits.Stall),
		Credentials: func(host string) (string, string, error) {
			// Neither a mirror nor whoever a registry redirects to is to know the secret.
			if host != own {
				return "", "", nil
			}
			return cred.Username, cred.Secret, nil
		},
	}
	if p.hosts != "" {
		options.HostDir = config.HostDirFromRoot(p.hosts)
	}
	hosts, err := config.ConfigureHosts(ctx, options)(ref.Registry)
	if err != nil {
		return nil, fmt.Errorf("the hosts of %s in %s: %w", ref.Registry, p.hosts, err)
	}
	s := &session{ref: ref, cred: cred, limit: transfer.WithDownloadLimiter(p.connections), part: p.part}
	for _, h := range hosts {
		if h.Capabilities.Has(docker.HostCapabilityPull) {
			s.hosts = append(s.hosts, h)
		}
	}
	if len(s.hosts) == 0 {
		return nil, fmt.Errorf("%s has no host to pull from in %s: %w", ref.Registry, p.hosts, errdefs.ErrNotFound)
	}
	for i := range s.hosts[:len(s.hosts)-1] {
		client := *s.hosts[i].Client
		client.Transport = busyAtOnce(client.Transport, p)
		s.hosts[i].Client = &client
	}
	return s, nil
}

// busyAtOnce makes a busy host an error at once, because there is another.
func busyAtOnce(base http.RoundTripper, p *Puller) http.RoundTripper {
	if t, ok := base.(*transport); ok {
		base = t.base
	}
	return &transport{base: base, stall: p.limits.Stall, more: true}
}

// close closes the idle connections.
func (s *session) close() {
	for _, h := range s.hosts {
		t := h.Client.Transport
		if bounded, ok := t.(*transport); ok {
			t = bounded.base
		}
		if idle, ok := t.(interface{ CloseIdleConnections() }); ok {
			idle.CloseIdleConnections()
		}
	}
}

// resolver asks these hosts, each blob by that many connections.
func (s *session) resolver(hosts []docker.RegistryHost, connections int) remotes.Resolver {
	r := docker.NewResolver(docker.ResolverOptions{Hosts: func(string) ([]docker.RegistryHost, error) { return hosts, nil }})
	if o, ok := r.(remotes.ResolverWithOptions); ok {
		o.SetOptions(s.limit, transfer.WithMaxConcurrentDownloads(connections), transfer.WithConcurrentLayerFetchBuffer(s.part))
	}
	return r
}

// resolve asks for the manifest or index that the reference stands for now.
func (s *session) resolve(ctx context.Context, ref Reference) (ocispec.Descriptor, error) {
	_, desc, err := s.resolver(s.hosts, 1).Resolve(ctx, ref.String())
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	if desc.Size > maxDocument {
		return ocispec.Descriptor{}, fmt.Errorf("the manifest of %s has %d bytes, over the limit of %d: %w", ref, desc.Size, maxDocument, errdefs.ErrOutOfRange)
	}
	return ocispec.Descriptor{MediaType: desc.MediaType, Digest: desc.Digest, Size: desc.Size}, nil
}

// open returns a reader of the blob from one host, which can seek.
func (s *session) open(ctx context.Context, host docker.RegistryHost, connections int, desc ocispec.Descriptor) (io.ReadCloser, error) {
	f, err := s.resolver([]docker.RegistryHost{host}, connections).Fetcher(ctx, s.ref.String())
	if err != nil {
		return nil, err
	}
	return f.Fetch(ctx, desc)
}

// confirm asks whether the repository has the blob, for these credentials.
func (s *session) confirm(ctx context.Context, desc ocispec.Descriptor) error {
	f, err := s.resolver(s.hosts, 1).Fetcher(ctx, s.ref.String())
	if err != nil {
		return err
	}
	byDigest, ok := f.(remotes.FetcherByDigest)
	if !ok {
		return fmt.Errorf("blobs cannot be looked for: %w", errdefs.ErrNotImplemented)
	}
	rc, _, err := byDigest.FetchByDigest(ctx, desc.Digest) // HEAD, and nothing else before a Read
	if err == nil {
		return rc.Close()
	}
	// Its error does not have the status, and not every registry knows HEAD.
	if rc, err = f.Fetch(ctx, desc); err != nil {
		return err
	}
	defer func() { _ = rc.Close() }()
	_, err = rc.Read(make([]byte, 1))
	return ignore(err, func(err error) bool { return errors.Is(err, io.EOF) })
}

// isDenied reports whether other credentials may do what these may not.
func isDenied(err error) bool {
	if errors.Is(err, docker.ErrInvalidAuthorization) {
		return true
	}
	status, ok := errors.AsType[remoteserrors.ErrUnexpectedStatus](err)
	// Registries answer 404 to hide what one may not read.
	return ok && (status.StatusCode == http.StatusUnauthorized || status.StatusCode == http.StatusForbidden) || errdefs.IsNotFound(err)
}

// mayPass reports whether an error of a host is one that may be gone at the next try.
func mayPass(err error) bool {
	if errors.Is(err, errStalled) || errors.Is(err, errBusy) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) {
		return true
	}
	if status, ok := errors.AsType[remoteserrors.ErrUnexpectedStatus](err); ok {
		return status.StatusCode >= http.StatusInternalServerError || status.StatusCode == http.StatusTooManyRequests || status.StatusCode == http.StatusRequestTimeout
	}
	if dns, ok := errors.AsType[*net.DNSError](err); ok && dns.IsTemporary {
		return true
	}
	if network, ok := errors.AsType[net.Error](err); ok && network.Timeout() {
		return true
	}
	for _, errno := range []syscall.Errno{syscall.ECONNRESET, syscall.ECONNREFUSED, syscall.ECONNABORTED, syscall.EPIPE, syscall.ENETUNREACH, syscall.EHOSTUNREACH} {
		if errors.Is(err, errno) {
			return true
		}
	}
	return false
}
