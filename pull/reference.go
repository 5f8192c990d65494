// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package pull

import (
	"fmt"
	"regexp"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// Reference is a full reference: registry, repository, and a tag or a digest.
type Reference struct {
	// Registry is the host, with a port if there is one, and Repository the path below it.
	Registry, Repository string
	// Tag is "" if Digest is set.
	Tag    string
	Digest digest.Digest
}

// referencePattern is a reference as in the OCI distribution specification
// (https://github.com/opencontainers/distribution-spec/blob/main/spec.md#pulling-manifests),
// with the registry before it.
var referencePattern = regexp.MustCompile(`^((?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9a-fA-F:]+\])(?::[0-9]{1,5})?)` +
	`/([a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*)` +
	`(?::([A-Za-z0-9_][A-Za-z0-9._-]{0,127}))?(?:@(.+))?$`)

const maxReference = 512 // bytes; more than any registry takes

// ParseReference parses a full reference such as registry.example.com/models/llama:v1. As in
// Kubernetes, the tag is "latest" if there is neither tag nor digest, and does not matter if
// there is a digest. Anything else, also a reference without a registry, is
// errdefs.ErrInvalidArgument.
func ParseReference(text string) (Reference, error) {
	m := referencePattern.FindStringSubmatch(text)
	if len(text) > maxReference || m == nil || !strings.ContainsAny(m[1], ".:") && m[1] != "localhost" {
		return Reference{}, fmt.Errorf("%.255q is not a full reference like registry.example.com/models/llama:v1: %w", text, errdefs.ErrInvalidArgument)
	}
	r := Reference{Registry: m[1], Repository: m[2], Tag: m[3], Digest: digest.Digest(m[4])}
	switch {
	case r.Digest != "":
		if err := r.Digest.Validate(); err != nil {
			return Reference{}, fmt.Errorf("%.255q: the digest is not valid: %v: %w", text, err, errdefs.ErrInvalidArgument)
		}
		r.Tag = ""
	case r.Tag == "":
		r.Tag = "latest"
	}
	return r, nil
}

// Name returns registry and repository.
func (r Reference) Name() string { return r.Registry + "/" + r.Repository }

// String returns the full reference.
func (r Reference) String() string {
	if r.Digest != "" {
		return r.Name() + "@" + r.Digest.String()
	}
	return r.Name() + ":" + r.Tag
}

// at returns the reference of that manifest in the same repository.
func (r Reference) at(d digest.Digest) Reference {
	return Reference{Registry: r.Registry, Repository: r.Repository, Digest: d}
}

// Policy says when the registry is asked, as imagePullPolicy of Kubernetes does.
type Policy string

// The policies of Kubernetes (https://kubernetes.io/docs/concepts/containers/images/#image-pull-policy).
const (
	Always       Policy = "Always"
	IfNotPresent Policy = "IfNotPresent"
	Never        Policy = "Never"
)

// ParsePolicy parses a policy. The default, "", is that of Kubernetes: Always for the tag
// "latest", and IfNotPresent otherwise.
func (r Reference) ParsePolicy(text string) (Policy, error) {
	switch p := Policy(text); {
	case p == "" && r.Tag == "latest":
		return Always, nil
	case p == "":
		return IfNotPresent, nil
	case p == Always, p == IfNotPresent, p == Never:
		return p, nil
	}
	return "", fmt.Errorf("the pull policy %.60q is none of %s, %s and %s: %w", text, Always, IfNotPresent, Never, errdefs.ErrInvalidArgument)
}
