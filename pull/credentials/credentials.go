// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

// Package credentials finds the credentials for a repository in the configuration files of
// Docker that Kubernetes uses: secrets of the type kubernetes.io/dockerconfigjson, and the
// config.json of a node. It matches as kubelet does
// (https://kubernetes.io/docs/concepts/containers/images/#config-json). No error of it has a
// part of a secret.
package credentials

import (
	"cmp"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path"
	"slices"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/artifact-snapshotter/artifact-snapshotter/pull"
)

// maxFile is the largest configuration that is read, in bytes: a secret of Kubernetes has at
// most 1 MiB.
const maxFile = 1 << 20

// dockerHub are the names of docker.io in such files.
var dockerHub = map[string]bool{"docker.io": true, "index.docker.io": true, "registry-1.docker.io": true}

// entry is what the file has for a prefix of names.
type entry struct {
	host, path string
	credential pull.Credential
}

// Config is a configuration file. The zero value has no credentials.
type Config struct{ entries []entry }

// Parse parses a configuration file. A malformed one is errdefs.ErrInvalidArgument.
func Parse(text []byte) (Config, error) {
	if len(text) > maxFile {
		return Config{}, fmt.Errorf("it has more than %d bytes: %w", maxFile, errdefs.ErrInvalidArgument)
	}
	var file struct {
		Auths map[string]struct {
			Username      string `json:"username"`
			Password      string `json:"password"`
			Auth          string `json:"auth"`
			IdentityToken string `json:"identitytoken"`
		} `json:"auths"`
	}
	if json.Unmarshal(text, &file) != nil { // its error may quote a secret
		return Config{}, fmt.Errorf("it is not the JSON of a .dockerconfigjson: %w", errdefs.ErrInvalidArgument)
	}
	var c Config
	for key, auth := range file.Auths {
		e, err := newEntry(key)
		if err != nil {
			return Config{}, err
		}
		e.credential = pull.Credential{Username: auth.Username, Secret: auth.Password}
		if auth.Auth != "" {
			decoded, err := base64.StdEncoding.DecodeString(auth.Auth)
			name, password, ok := strings.Cut(string(decoded), ":")
			if err != nil || !ok {
				return Config{}, fmt.Errorf("the value auth of %.255q is not the base64 of a name, a colon and a password: %w", key, errdefs.ErrInvalidArgument)
			}
			e.credential = pull.Credential{Username: name, Secret: strings.TrimRight(password, "\x00")}
		}
		if auth.IdentityToken != "" {
			e.credential = pull.Credential{Secret: auth.IdentityToken}
		}
		if e.credential != (pull.Credential{}) {
			c.entries = append(c.entries, e)
		}
	}
	// The longest prefix first, and always in the same order.
	slices.SortFunc(c.entries, func(a, b entry) int {
		return cmp.Or(cmp.Compare(len(b.path), len(a.path)), cmp.Compare(b.host, a.host), cmp.Compare(b.path, a.path))
	})
	return c, nil
}

// newEntry parses a key: a host, perhaps with a scheme before it and with a path behind it.
func newEntry(key string) (entry, error) {
	text := key
	if !strings.Contains(text, "://") {
		text = "https://" + text
	}
	u, err := url.Parse(text)
	if err != nil || u.Host == "" {
		return entry{}, fmt.Errorf("%.255q is not a registry: %w", key, errdefs.ErrInvalidArgument)
	}
	e := entry{host: u.Host, path: strings.Trim(u.Path, "/")}
	if dockerHub[e.host] {
		e.host = "docker.io"
	}
	if e.path == "v1" || e.path == "v2" { // the addresses of old APIs
		e.path = ""
	}
	return e, nil
}

// For returns the credentials for a repository, the longest matching prefix first.
func (c Config) For(r pull.Reference) (found []pull.Credential) {
	host := r.Registry
	if dockerHub[host] {
		host = "docker.io"
	}
	for _, e := range c.entries {
		if Matches(e.host, host) && strings.HasPrefix(r.Repository, e.path) && !slices.Contains(found, e.credential) {
			found = append(found, e.credential)
		}
	}
	return found
}

// Matches reports whether the host matches the pattern: "*" stands for any part of a name
// between two dots, and the ports must be the same.
func Matches(pattern, host string) bool {
	patternName, patternPort, _ := strings.Cut(pattern, ":")
	name, port, _ := strings.Cut(host, ":")
	patterns, parts := strings.Split(patternName, "."), strings.Split(name, ".")
	if patternPort != port || len(patterns) != len(parts) {
		return false
	}
	for i := range parts {
		if ok, err := path.Match(patterns[i], parts[i]); !ok || err != nil {
			return false
		}
	}
	return true
}

// Read reads the configuration file at path. A file that does not exist has no credentials.
func Read(path string) (Config, error) {
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) || path == "" {
		return Config{}, nil
	}
	if err != nil {
		return Config{}, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil || fi.Size() > maxFile {
		return Config{}, errors.Join(fmt.Errorf("%s cannot be read, or has more than %d bytes", path, maxFile), err)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return Config{}, err
	}
	c, err := Parse(text)
	if err != nil {
		return Config{}, fmt.Errorf("%s: %w", path, err)
	}
	return c, nil
}
