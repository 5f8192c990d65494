// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package credentials

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/artifact-snapshotter/artifact-snapshotter/pull"
)

func parse(t *testing.T, text string) Config {
	t.Helper()
	c, err := Parse([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// names are the user names of the credentials for a reference, in their order.
func names(t *testing.T, c Config, reference string) (found []string) {
	t.Helper()
	r, err := pull.ParseReference(reference)
	if err != nil {
		t.Fatal(err)
	}
	for _, cred := range c.For(r) {
		found = append(found, cred.Username)
	}
	return found
}

func TestTheLongestPrefixComesFirst(t *testing.T) {
	c := parse(t, `{"auths": {
		"registry.test": {"username": "host", "password": "p"},
		"https://registry.test/team": {"username": "team", "password": "p"},
		"registry.test/team/llama": {"username": "repository", "password": "p"},
		"registry.test:5000": {"username": "port", "password": "p"},
		"*.example.com": {"username": "glob", "password": "p"},
		"https://index.docker.io/v1/": {"username": "hub", "password": "p"},
		"empty.test": {}
	}}`)
	for reference, want := range map[string][]string{
		"registry.test/team/llama:v1":  {"repository", "team", "host"},
		"registry.test/team/other":     {"team", "host"},
		"registry.test/other:v1":       {"host"},
		"registry.test:5000/team/x":    {"port"},
		"registry.test:5001/team/x":    nil,
		"eu.example.com/x":             {"glob"},
		"example.com/x":                nil,
		"a.eu.example.com/x":           nil,
		"docker.io/library/x":          {"hub"},
		"empty.test/x":                 nil,
		"notregistry.test/team/llama":  nil,
		"registry.test.evil.example/x": nil,
	} {
		if got := names(t, c, reference); !slices.Equal(got, want) {
			t.Errorf("%s: %q, want %q", reference, got, want)
		}
	}
}

func TestAllFormsOfASecretAreRead(t *testing.T) {
	c := parse(t, `{"auths": {
		"a.test": {"auth": "dXNlcjpwYXNzOndvcmQ="},
		"b.test": {"username": "user", "password": "pass:word"},
		"c.test": {"auth": "PHRva2VuPjo=", "identitytoken": "token"}
	}, "credHelpers": {"d.test": "helper"}}`)
	for host, want := range map[string]pull.Credential{
		"a.test": {Username: "user", Secret: "pass:word"}, "b.test": {Username: "user", Secret: "pass:word"}, "c.test": {Secret: "token"},
	} {
		r, err := pull.ParseReference(host + "/x")
		if err != nil {
			t.Fatal(err)
		}
		if got := c.For(r); len(got) != 1 || got[0] != want {
			t.Errorf("%s: %d credentials, or another one", host, len(got))
		}
	}
}

func TestErrorsHaveNoPartOfASecret(t *testing.T) {
	for _, text := range []string{
		`{"auths": {"a.test": {"auth": "s3cr3t!"}}}`, `{"auths": {"a.test": {"auth": "czNjcjN0"}}}`, `{"auths": {"a.test": {"password": 53cr3t}}}`,
		`s3cr3t`, `{"auths": {"a.test": "s3cr3t"}}`, `{"auths": {"": {"username": "u", "password": "s3cr3t"}}}`, strings.Repeat("s3cr3t", maxFile),
	} {
		_, err := Parse([]byte(text))
		if !errdefs.IsInvalidArgument(err) || strings.Contains(err.Error(), "3cr3t") || strings.Contains(err.Error(), "czNj") {
			t.Errorf("%.60s: %v", text, err)
		}
	}
}

func TestAFileThatIsNotThereHasNoCredentials(t *testing.T) {
	dir := t.TempDir()
	for _, path := range []string{"", filepath.Join(dir, "none")} {
		if c, err := Read(path); err != nil || len(c.entries) > 0 {
			t.Errorf("%q: %v", path, err)
		}
	}
	path := filepath.Join(dir, "config.json")
	if err := os.WriteFile(path, []byte(`{"auths": {"a.test": {"username": "u", "password": "p"}}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := Read(path)
	if err != nil {
		t.Fatal(err)
	}
	if got := names(t, c, "a.test/x"); !slices.Equal(got, []string{"u"}) {
		t.Errorf("got %q", got)
	}
}

func FuzzParse(f *testing.F) {
	f.Add(`{"auths": {"https://a.test/v1/": {"auth": "dTpw"}, "*.b": {"username": "u"}}}`)
	f.Fuzz(func(t *testing.T, text string) {
		c, err := Parse([]byte(text))
		if err != nil {
			return
		}
		r, err := pull.ParseReference("a.test/team/x:v1")
		if err != nil {
			t.Fatal(err)
		}
		for _, cred := range c.For(r) {
			if cred == (pull.Credential{}) {
				t.Error("an anonymous credential")
			}
		}
	})
}
