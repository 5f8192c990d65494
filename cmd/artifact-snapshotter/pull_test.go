// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
	"github.com/artifact-snapshotter/artifact-snapshotter/client"
)

// fetched is a layer of 100 bytes, of which some have arrived.
func fetched(index int, path string, bytes int64) client.Fetched {
	return client.Fetched{
		Layer: artifact.Layer{Index: index, Descriptor: ocispec.Descriptor{Size: 100}, File: artifact.File{Path: path}},
		Bytes: bytes,
		Done:  bytes == 100,
	}
}

// firstColumns are the first columns of the lines.
func firstColumns(t *testing.T, text string) (names []string) {
	t.Helper()
	for line := range strings.Lines(text) {
		if plain := strings.NewReplacer("\x1b[32m", "", "\x1b[0m", "").Replace(line); len(plain) > 80 {
			t.Errorf("a line has %d bytes: %q", len(plain), plain)
		}
		name, _, _ := strings.Cut(line, "|")
		names = append(names, strings.TrimSpace(name))
	}
	return names
}

func TestLayersInTransitGetTheBarsThatFit(t *testing.T) {
	layers := []client.Fetched{fetched(0, "done", 100), fetched(1, "waiting", 0), fetched(2, "half", 50)}
	for room, want := range map[int][]string{
		3: {"done", "waiting", "half", "1 of 3 layers"},
		2: {"half", "waiting", "1 of 3 layers"},
		1: {"half", "1 of 3 layers"},
	} {
		if got := firstColumns(t, bars(layers, room)); !slices.Equal(got, want) {
			t.Errorf("with room for %d the bars are %q, want %q", room, got, want)
		}
	}
}

// A terminal interprets control characters in names, and breaks lines that are too long.
func TestNamesOfBarsAreEscapedAndCut(t *testing.T) {
	for path, want := range map[string]string{
		"a\x1b[2Jb":                   `"a\x1b[2Jb"`,
		strings.Repeat("x", 200):      strings.Repeat("x", 25) + "...",
		strings.Repeat("模", 100):      strings.Repeat("模", 8) + "...",
		"exactly 28 bytes, no more..": "exactly 28 bytes, no more..",
	} {
		got := firstColumns(t, bars([]client.Fetched{fetched(0, path, 10)}, 9))[0]
		if got != want {
			t.Errorf("%q becomes %q, want %q", path, got, want)
		}
	}
}

func TestEachLayerThatArrivesIsOneLine(t *testing.T) {
	var out bytes.Buffer
	progressed := printLines(&out)
	progressed([]client.Fetched{fetched(0, "a", 50), fetched(1, "b", 100)})
	there := fetched(0, "a", 100)
	there.Present = true
	progressed([]client.Fetched{there})
	if want := fmt.Sprintln("b: pulled (100 B)\na: already present (100 B)"); out.String() != want {
		t.Errorf("got %q, want %q", out.String(), want)
	}
}

// Each reason to wait is printed once, escaped for the terminal.
func TestEachReasonToWaitIsPrintedOnce(t *testing.T) {
	var out bytes.Buffer
	waiting := printWaiting(&out)
	for _, why := range []string{"a\x1b[2J\u009b", "a\x1b[2J\u009b", "line 1\nline 2"} {
		waiting(errors.New(why))
	}
	if want := "waiting: a\\x1b[2J\\u009b\nwaiting: line 1; line 2\n"; out.String() != want {
		t.Errorf("got %q, want %q", out.String(), want)
	}
}

// An archive has no path, but may name that from which it was packed.
func TestLayerName(t *testing.T) {
	for want, annotations := range map[string]map[string]string{
		"tokenizer/vocab.json": {"org.cncf.model.filepath": "tokenizer/vocab.json"},
		`"a\nb"`:               {"org.opencontainers.image.title": "a\nb"},
		"-":                    nil, // not even a digest
	} {
		if got := layerName(artifact.Layer{Descriptor: ocispec.Descriptor{Annotations: annotations}}); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}
