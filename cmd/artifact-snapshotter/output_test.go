// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"
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
