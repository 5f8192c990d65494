// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package images

import (
	"slices"
	"testing"

	"github.com/opencontainers/go-digest"
)

func TestNamedPrefersNamesForPeople(t *testing.T) {
	config, other := digest.FromString("config"), digest.FromString("other config")
	target, second := digest.FromString("target"), digest.FromString("second target")
	image := func(name string, target, config digest.Digest) (i Image) {
		i.Name, i.Target.Digest = name, target
		i.Config = config
		return i
	}
	all := []Image{
		image("r/a:v1", target, config),
		image("r/a:v2", target, config),
		image("r/a@"+target.String(), target, config),
		image(config.String(), target, config),
		image("r/b@"+second.String(), second, other),
		image("r/c@"+target.String(), second, other), // no digest of its own
		image(other.String(), second, other),
	}
	var got []string
	for _, i := range Named(all) {
		got = append(got, i.Name)
	}
	if want := []string{"r/a:v1", "r/a:v2", "r/c@" + target.String()}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	if got := Named(all[6:]); len(got) != 1 {
		t.Errorf("an artifact that has only an ID has the names %v", got)
	}
}
