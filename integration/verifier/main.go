// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

// Command verifier is an image verifier for containerd's bindir verifier plugin: it allows
// the pull of an artifact that is signed with the key of -key. The signature is where
// cosign stores it: in the same repository under the tag sha256-<hex>.sig. Each layer of
// that manifest is a payload that names the digest, and an annotation has the signature of
// the payload (ECDSA, SHA-256).
//
// The tests run it, and it is an example. It supports no other kinds of signature.
package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/pkg/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// signatureAnnotation is defined in cosign's signature specification.
const signatureAnnotation = "dev.cosignproject.cosign/signature"

// maxBlob limits the bytes that are read of a manifest or payload.
const maxBlob = 1 << 20

func main() {
	name := flag.String("name", "", "the image's reference, from containerd")
	target := flag.String("digest", "", "the resolved digest, from containerd")
	flag.String("stdin-media-type", "", "from containerd: the media type of standard input; not used")
	keyFile := flag.String("key", "", "file with a public key in PEM")
	flag.Parse()
	if err := verify(context.Background(), *keyFile, *name, digest.Digest(*target)); err != nil {
		// The pod's event shows this output.
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Println("signed by", *keyFile)
}

func verify(ctx context.Context, keyFile, name string, target digest.Digest) error {
	key, err := readKey(keyFile)
	if err != nil {
		return fmt.Errorf("public key: %w", err)
	}
	if err := target.Validate(); err != nil {
		return fmt.Errorf("digest %q: %w", target, err)
	}
	spec, err := reference.Parse(name)
	if err != nil {
		return fmt.Errorf("reference %q: %w", name, err)
	}
	signatures := spec.Locator + ":" + strings.ReplaceAll(target.String(), ":", "-") + ".sig"
	// Like containerd, use plain HTTP only for loopback addresses.
	resolver := docker.NewResolver(docker.ResolverOptions{
		Hosts: docker.ConfigureDefaultRegistries(docker.WithPlainHTTP(docker.MatchLocalhost)),
	})
	signatures, manifest, err := resolver.Resolve(ctx, signatures)
	if err != nil {
		return fmt.Errorf("no signature: %w", err)
	}
	fetcher, err := resolver.Fetcher(ctx, signatures)
	if err != nil {
		return err
	}
	text, err := fetch(ctx, fetcher, manifest)
	if err != nil {
		return fmt.Errorf("signatures: %w", err)
	}
	var list ocispec.Manifest
	if err := json.Unmarshal(text, &list); err != nil {
		return fmt.Errorf("signatures: %w", err)
	}
	for _, layer := range list.Layers {
		payload, err := fetch(ctx, fetcher, layer)
		if err != nil {
			return fmt.Errorf("signature: %w", err)
		}
		if signed(key, payload, layer.Annotations[signatureAnnotation], target) {
			return nil
		}
	}
	return errors.New("no signature was made with the key " + keyFile)
}

func readKey(file string) (*ecdsa.PublicKey, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(text)
	if block == nil {
		return nil, fmt.Errorf("%s is not PEM", file)
	}
	parsed, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		return nil, err
	}
	key, ok := parsed.(*ecdsa.PublicKey)
	if !ok {
		return nil, fmt.Errorf("%s is a %T, not an ECDSA key", file, parsed)
	}
	return key, nil
}

// fetch returns a blob after it has checked the digest.
func fetch(ctx context.Context, from remotes.Fetcher, blob ocispec.Descriptor) ([]byte, error) {
	r, err := from.Fetch(ctx, blob)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	data, err := io.ReadAll(io.LimitReader(r, maxBlob))
	if err != nil {
		return nil, err
	}
	if digest.FromBytes(data) != blob.Digest {
		return nil, fmt.Errorf("the registry sent other bytes than %s", blob.Digest)
	}
	return data, nil
}

// signed reports whether the payload names target and has a valid signature by key.
func signed(key *ecdsa.PublicKey, payload []byte, signature string, target digest.Digest) bool {
	raw, err := base64.StdEncoding.DecodeString(signature)
	if err != nil {
		return false
	}
	sum := sha256.Sum256(payload)
	if !ecdsa.VerifyASN1(key, sum[:], raw) {
		return false
	}
	var about struct {
		Critical struct {
			Image struct {
				Digest digest.Digest `json:"docker-manifest-digest"`
			} `json:"image"`
		} `json:"critical"`
	}
	return json.Unmarshal(payload, &about) == nil && about.Critical.Image.Digest == target
}
