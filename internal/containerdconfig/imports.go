// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package containerdconfig

import (
	"bytes"
	"errors"
	"fmt"
	"reflect"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/pelletier/go-toml/v2"
)

// AddImport adds path at the end of the imports of the main file, and changes nothing
// else. It tries to insert it before each bracket, and lets the TOML parser decide: no
// comment or string can mislead it.
func AddImport(text []byte, path string) ([]byte, error) {
	all, imports, err := splitImports(text)
	if err != nil {
		return nil, err
	}
	if imports == nil { // keys before all tables are those of the file
		return changeImports(text, 0, 0, importLine(path), all, []string{path})
	}
	want := append(slices.Clone(imports), path)
	for at := range text {
		if text[at] != ']' {
			continue
		}
		for _, insert := range []string{fmt.Sprintf(", %q", path), fmt.Sprintf("%q", path)} {
			if after, err := changeImports(text, at, at, insert, all, want); err == nil {
				return after, nil
			}
		}
	}
	return nil, fmt.Errorf("its imports cannot be extended: %w", errdefs.ErrFailedPrecondition)
}

// RemoveImport removes what AddImport has inserted.
func RemoveImport(text []byte, path string) ([]byte, error) {
	all, imports, err := splitImports(text)
	at := slices.Index(imports, path)
	if err != nil || at < 0 {
		return text, err
	}
	want := slices.Delete(slices.Clone(imports), at, at+1)
	for _, remove := range []string{importLine(path), fmt.Sprintf(", %q", path), fmt.Sprintf("%q, ", path), fmt.Sprintf("%q", path)} {
		if start := bytes.Index(text, []byte(remove)); start >= 0 {
			if after, err := changeImports(text, start, start+len(remove), "", all, want); err == nil {
				return after, nil
			}
		}
	}
	return nil, fmt.Errorf("its imports cannot be reduced: %w", errdefs.ErrFailedPrecondition)
}

func importLine(path string) string { return fmt.Sprintf("imports = [%q]\n", path) }

// changeImports replaces a part of the text. It is an error if that changes anything but
// the imports, or makes them anything but want.
func changeImports(text []byte, start, end int, part string, all map[string]any, want []string) ([]byte, error) {
	after := slices.Concat(text[:start], []byte(part), text[end:])
	got, imports, err := splitImports(after)
	if err == nil && (!slices.Equal(imports, want) || !reflect.DeepEqual(got, all)) {
		err = fmt.Errorf("something else would change: %w", errdefs.ErrFailedPrecondition)
	}
	return after, err
}

// splitImports returns what the text says without its imports, and these: nil if it has
// no list of them.
func splitImports(text []byte) (all map[string]any, imports []string, err error) {
	var main Main
	err = errors.Join(toml.Unmarshal(text, &all), toml.Unmarshal(text, &main))
	delete(all, "imports")
	return all, main.Imports, err
}

// WithoutImports returns a file that says the same but imports nothing.
func WithoutImports(text []byte) ([]byte, error) {
	all, _, err := splitImports(text)
	if err != nil {
		return nil, err
	}
	return toml.Marshal(all)
}
