// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/urfave/cli/v3"
)

// Names that others have chosen reach terminals escaped, and programs unchanged.
func TestWhatATerminalInterpretsIsEscaped(t *testing.T) {
	rude := "a\x1b[2J\u009b31m\u202e\U000e0001 \x00语"
	if got, want := oneLine(errors.New("1\n2\t"+rude)), "1; 2\t"+`a\x1b[2J\u009b31m\u202e\U000e0001 \x00语`; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	var text strings.Builder
	if err := printJSON(&text, []string{rude, "<&>"}); err != nil {
		t.Fatal(err)
	}
	if got := text.String(); harmless(got) != got || !strings.Contains(got, "语") || !strings.Contains(got, "<&>") {
		t.Errorf("the JSON is %q", got)
	}
	var back []string
	if err := json.Unmarshal([]byte(text.String()), &back); err != nil || back[0] != rude || back[1] != "<&>" {
		t.Errorf("got %q (%v), want %q", back, err, rude)
	}
}

func TestTablesFitALine(t *testing.T) {
	long := "registry.example.com/" + strings.Repeat("models/", 12) + "llama:v1"
	rows := [][]string{
		{"REFERENCE", "DIGEST", "SIZE", "MODE", "PODS"},
		{long, "2474bb134cd4", "1023.9 MiB", "overlay erofs", "default/a-deployment-6d4cf56db6-x9wq2, default/another"},
		{"r/语:v1", "2474bb134cd4", "3.0 MiB", "erofs", "-"},
	}
	fit(rows, flexible{4, 20, cutEnd}, flexible{0, 24, cutMiddle})
	var text strings.Builder
	if err := printRows(&text, rows); err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(text.String()) {
		if width := utf8.RuneCountInString(strings.TrimSuffix(line, "\n")); width > lineWidth {
			t.Errorf("%d columns: %s", width, line)
		}
	}
	if row := rows[1]; row[4] != "default/a-deploymen…" || !strings.HasPrefix(row[0], "registry.exa…") || !strings.HasSuffix(row[0], "models/llama:v1") || row[1] != "2474bb134cd4" {
		t.Errorf("the row is %q", row)
	}
	if rows[2][0] != "r/语:v1" {
		t.Errorf("a short name is cut: %q", rows[2])
	}
	short := [][]string{{"registry.example.com/models/llama:v1", "2474bb134cd4", "3.0 MiB", "overlay", "default/server-6d4cf56db6-x9wq"}}
	fit(short, flexible{4, 20, cutEnd}, flexible{0, 24, cutMiddle})
	if short[0][4] != "default/server-6d4cf56db6-x9wq" {
		t.Errorf("what fits is cut: %q", short)
	}
}

func TestLsSaysWhyAnArtifactHasNoMode(t *testing.T) {
	var text, hint strings.Builder
	command := &cli.Command{Writer: &text, ErrWriter: &hint}
	if err := printArtifacts(command, []listed{
		{Reference: "r/nothing:v1", Layout: &layout{}},
		{Reference: "r/later:v1", Conflicts: []string{"r/other:v1"}},
	}); err != nil {
		t.Fatal(err)
	}
	if got := strings.Fields(text.String()); !slices.Equal(got[5:], []string{"r/nothing:v1", "-", "0", "B", "empty", "-", "r/later:v1", "-", "0", "B", "-", "-"}) {
		t.Errorf("it prints\n%s", &text)
	}
	if got := hint.String(); got != "1 with the config of another: pods with them are refused, see --wide\n" {
		t.Errorf("the hint is %q", got)
	}
}
