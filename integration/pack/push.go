// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package pack

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/url"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Push uploads the artifact over plain HTTP to the registry host ("127.0.0.1:5000"),
// repository repo ("models/tiny") and tag, and returns the manifest's digest. With an empty
// tag it can be pulled only by digest. See "Push" in the OCI distribution specification.
func (a *Artifact) Push(ctx context.Context, host, repo, tag string) (digest.Digest, error) {
	blobs, err := a.blobs()
	if err != nil {
		return "", err
	}
	return push(ctx, host, repo, tag, blobs)
}

// Push uploads the index and its artifacts like [Artifact.Push] and returns the digest of
// the index.
func (x *Index) Push(ctx context.Context, host, repo, tag string) (digest.Digest, error) {
	blobs, err := x.blobs()
	if err != nil {
		return "", err
	}
	return push(ctx, host, repo, tag, blobs)
}

// push uploads the blobs in order. The last one, a manifest or index, gets the tag.
func push(ctx context.Context, host, repo, tag string, blobs []blob) (digest.Digest, error) {
	base := &url.URL{Scheme: "http", Host: host, Path: "/v2/" + repo + "/"}
	last := len(blobs) - 1
	for i, b := range blobs {
		var err error
		switch {
		case b.absent:
		case i == last && tag != "":
			err = pushManifest(ctx, base, tag, b)
		case b.MediaType == ocispec.MediaTypeImageManifest, b.MediaType == ocispec.MediaTypeImageIndex:
			err = pushManifest(ctx, base, b.Digest.String(), b)
		default:
			err = pushBlob(ctx, base, b)
		}
		if err != nil {
			return "", fmt.Errorf("push %s to %s/%s: %w", b.Digest, host, repo, err)
		}
	}
	return blobs[last].Digest, nil
}

func pushManifest(ctx context.Context, base *url.URL, reference string, b blob) error {
	_, err := request(ctx, http.MethodPut, base.JoinPath("manifests", reference), b.MediaType, &b, http.StatusCreated)
	return err
}

func pushBlob(ctx context.Context, base *url.URL, b blob) error {
	if _, err := request(ctx, http.MethodHead, base.JoinPath("blobs", b.Digest.String()), "", nil, http.StatusOK); err == nil {
		return nil
	}
	header, err := request(ctx, http.MethodPost, base.JoinPath("blobs", "uploads/"), "", nil, http.StatusAccepted)
	if err != nil {
		return err
	}
	upload, err := base.Parse(header.Get("Location"))
	if err != nil {
		return err
	}
	query := upload.Query()
	query.Set("digest", b.Digest.String())
	upload.RawQuery = query.Encode()
	_, err = request(ctx, http.MethodPut, upload, "application/octet-stream", &b, http.StatusCreated)
	return err
}

// request sends b, if it is not nil, and fails unless the response has the status want.
func request(ctx context.Context, method string, to *url.URL, contentType string, b *blob, want int) (http.Header, error) {
	var body io.Reader = http.NoBody
	if b != nil && b.Size > 0 {
		f, err := b.open()
		if err != nil {
			return nil, err
		}
		defer f.Close()
		body = f
	}
	req, err := http.NewRequestWithContext(ctx, method, to.String(), body)
	if err != nil {
		return nil, err
	}
	if b != nil {
		req.ContentLength = b.Size
	}
	if contentType != "" {
		req.Header.Set("Content-Type", contentType)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != want {
		return nil, fmt.Errorf("%s %s: the registry answered %s: %s", method, to.Path, resp.Status, answer)
	}
	return resp.Header, nil
}
