// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package client

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/artifact-snapshotter/artifact-snapshotter/images"
)

// Filter selects images. All images pass a nil one.
type Filter func(images.Image) bool

// ParseFilters returns the filter that images pass if they pass all of these, which are
// those of `docker image prune` and `docker image ls`:
//
//   - until=24h or until=2026-01-02T15:04:05Z: pulled before that time
//   - label=KEY or label=KEY=VALUE: containerd's record of the image has the label
//   - reference=PATTERN: the name matches, see [path.Match]
func ParseFilters(texts []string, now time.Time) (Filter, error) {
	var all []Filter
	for _, text := range texts {
		f, err := parseFilter(text, now)
		if err != nil {
			return nil, fmt.Errorf("filter %q: %v: %w", text, err, errdefs.ErrInvalidArgument)
		}
		all = append(all, f)
	}
	return func(i images.Image) bool {
		return !slices.ContainsFunc(all, func(f Filter) bool { return !f(i) })
	}, nil
}

func parseFilter(text string, now time.Time) (Filter, error) {
	key, value, _ := strings.Cut(text, "=")
	switch {
	case value == "":
		return nil, errors.New("it is not like until=24h, label=KEY or reference=PATTERN")
	case key == "until":
		then, err := time.Parse(time.RFC3339, value)
		if ago, odd := time.ParseDuration(value); odd == nil {
			then, err = now.Add(-ago), nil
		}
		if err != nil {
			return nil, fmt.Errorf("%q is neither a duration like 24h nor a time like 2026-01-02T15:04:05Z", value)
		}
		return func(i images.Image) bool { return i.UpdatedAt.Before(then) }, nil
	case key == "label":
		label, want, exact := strings.Cut(value, "=")
		return func(i images.Image) bool {
			got, ok := i.Labels[label]
			return ok && (!exact || got == want)
		}, nil
	case key == "reference":
		if _, err := path.Match(value, ""); err != nil {
			return nil, err
		}
		return func(i images.Image) bool {
			ok, _ := path.Match(value, i.Name)
			return ok
		}, nil
	}
	return nil, fmt.Errorf("there are until, label and reference, and not %q", key)
}
