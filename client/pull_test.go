// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package client

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/transfer"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
)

func TestOnlyFullReferencesAreValid(t *testing.T) {
	d := digest.FromString("x").String()
	for ref, ok := range map[string]bool{
		"registry.example.com/models/llama:v1":  true,
		"127.0.0.1:5000/models/llama@" + d:      true,
		"127.0.0.1:5000/models/llama:v1@" + d:   true,
		"registry.example.com/models/llama":     false,
		"localhost:5000/llama":                  false,
		"llama:v1":                              false,
		"":                                      false,
		"http://registry.example.com/llama:v1":  false,
		"registry.example.com/models/\x1b[2J:v": false,
	} {
		if err := ValidReference(ref); (err == nil) != ok {
			t.Errorf("%q: %v, want that it is valid: %v", ref, err, ok)
		}
	}
}

func TestOnlyTheRegistryGetsThePassword(t *testing.T) {
	dir := t.TempDir()
	must(t, os.Mkdir(filepath.Join(dir, "mirrored.example.com"), 0o755))
	must(t, os.WriteFile(filepath.Join(dir, "mirrored.example.com", "hosts.toml"), []byte("server = 'https://real.example.com'\n[host.'http://mirror.example.com:5000']\n"), 0o600))
	r := Registry{HostsDir: dir, User: "me", Password: "secret"}
	for ref, want := range map[string][]string{
		"docker.io/library/llama:v1":   {"registry-1.docker.io"},
		"127.0.0.1:5000/llama:v1":      {"127.0.0.1:5000"},
		"plain.example.com/llama:v1":   {"plain.example.com"},
		"mirrored.example.com/llama:1": {"mirror.example.com:5000", "real.example.com"},
	} {
		l, err := r.login(t.Context(), ref)
		must(t, err)
		var got []string
		for _, host := range []string{"127.0.0.1:5000", "127.0.0.1:5001", "mirror.example.com:5000", "mirror.example.com", "plain.example.com", "real.example.com", "registry-1.docker.io"} {
			c, err := l.GetCredentials(t.Context(), ref, host)
			if must(t, err); c.Username == "me" && c.Secret == "secret" {
				got = append(got, host)
			} else if c.Username+c.Secret != "" {
				t.Errorf("%s gets %+v", host, c)
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("the password for %s is for %q, want %q", ref, got, want)
		}
	}
}

// Layers with the same blob progress together, and progress is never undone.
func TestTrackerFollowsTheEvents(t *testing.T) {
	one := ocispec.Descriptor{Digest: digest.FromString("one"), Size: 100}
	two := ocispec.Descriptor{Digest: digest.FromString("two"), Size: 10}
	var got []string
	tr := newTracker(&artifact.Artifact{Layers: []artifact.Layer{{Descriptor: one}, {Descriptor: two}, {Descriptor: one}}}, func(layers []Fetched) {
		line := ""
		for _, l := range layers {
			line += fmt.Sprintf("%d %t %t;", l.Bytes, l.Done, l.Present)
		}
		got = append(got, line)
	})
	for _, p := range []transfer.Progress{
		{Event: "Resolving"},
		{Event: "waiting", Desc: &one},
		{Event: "downloading", Desc: &one, Progress: 40},
		{Event: "downloading", Desc: &one, Progress: 30},
		{Event: "downloading", Desc: &two, Progress: 1000},
		{Event: "complete", Desc: &ocispec.Descriptor{Digest: digest.FromString("config"), Size: 5}},
		{Event: "already exists", Desc: &two},
		{Event: "complete", Desc: &two},
	} {
		tr.update(p)
	}
	tr.finish()
	tr.update(transfer.Progress{Event: "complete", Desc: &one})
	want := []string{
		"0 false false;0 false false;0 false false;",
		"40 false false;40 false false;",
		"10 false false;",
		"10 true true;",
		"100 true false;100 true false;",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestTheEmptyBlobIsCreatedForEveryAlgorithmThatNamesIt(t *testing.T) {
	some, sha256, sha512 := digest.FromString("x"), digest.FromString(""), digest.SHA512.FromString("")
	layer := func(d digest.Digest) artifact.Layer {
		return artifact.Layer{Descriptor: ocispec.Descriptor{Digest: d}}
	}
	for what, c := range map[string]struct {
		artifact artifact.Artifact
		want     []digest.Algorithm
	}{
		"none":           {artifact.Artifact{Config: some, Layers: []artifact.Layer{layer(some)}}, nil},
		"a config":       {artifact.Artifact{Config: sha256, Layers: []artifact.Layer{layer(some)}}, []digest.Algorithm{digest.SHA256}},
		"several layers": {artifact.Artifact{Config: some, Layers: []artifact.Layer{layer(sha512), layer(sha256), layer(sha512)}}, []digest.Algorithm{digest.SHA512, digest.SHA256}},
	} {
		if got := emptyBlobs(&c.artifact); !slices.Equal(got, c.want) {
			t.Errorf("%s: got %q, want %q", what, got, c.want)
		}
	}
}

// What net/http says is not for people.
func TestErrorsOfARegistryAreForPeople(t *testing.T) {
	secret, bare := httptest.NewTLSServer(http.NotFoundHandler()), httptest.NewServer(http.NotFoundHandler())
	defer secret.Close()
	defer bare.Close()
	gone := httptest.NewServer(http.NotFoundHandler())
	gone.Close()
	for url, want := range map[string]string{
		secret.URL: "does not trust the registry's certificate; name its CA in a hosts.toml (--hosts-dir): ",
		"https" + strings.TrimPrefix(bare.URL, "http"): "speaks HTTP and not HTTPS: use --plain-http",
		gone.URL:                 "the registry does not answer: connection refused",
		"http://nowhere.invalid": "there is no host nowhere.invalid: ",
	} {
		answer, err := http.Get(url)
		if err == nil {
			answer.Body.Close()
			t.Fatalf("%s has answered", url)
		}
		if got := ofRegistry(fmt.Errorf("failed to do request: %w", err)).Error(); !strings.Contains(got, want) || strings.Contains(got, "failed to do request") {
			t.Errorf("%s: %s", url, got)
		}
	}
}
