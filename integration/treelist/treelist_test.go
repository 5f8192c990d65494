// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package treelist

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func sample(t *testing.T) string {
	dir := t.TempDir()
	check(t, os.MkdirAll(filepath.Join(dir, "a b", "ü"), 0o755))
	file := filepath.Join(dir, "a b", "ü", "file")
	check(t, os.WriteFile(file, []byte("hello"), 0o600))
	check(t, os.Chmod(file, 0o600|os.ModeSetuid))
	check(t, os.Chtimes(file, time.Time{}, time.Unix(1600000000, 123456789)))
	check(t, os.Symlink("nowhere", filepath.Join(dir, "link")))
	check(t, unix.Mkfifo(filepath.Join(dir, "pipe"), 0o640))
	return dir
}

func TestListDescribesEveryEntry(t *testing.T) {
	entries, err := List(sample(t))
	check(t, err)
	text, err := json.Marshal(entries)
	check(t, err)
	var got []Entry
	check(t, json.Unmarshal(text, &got))
	if diff := Diff(entries, got); diff != "" {
		t.Errorf("JSON changes the list:\n%s", diff)
	}
	var paths []string
	for _, e := range got {
		paths = append(paths, e.Type+" "+e.Path)
	}
	if want := "dir a b,dir a b/ü,file a b/ü/file,symlink link,fifo pipe"; strings.Join(paths, ",") != want {
		t.Errorf("got %q, want %q", paths, want)
	}
	file := got[2]
	if file.Mode != 0o4600 || file.Size != 5 || file.ModTime != 1600000000123456789 ||
		file.SHA256 != "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824" {
		t.Errorf("file is %+v", file)
	}
	if got[3].Target != "nowhere" {
		t.Errorf("link points to %q", got[3].Target)
	}
}

func TestListOfEmptyDirectoryIsEmptyJSONArray(t *testing.T) {
	entries, err := List(t.TempDir())
	check(t, err)
	if text, _ := json.Marshal(entries); string(text) != "[]" {
		t.Errorf("got %s", text)
	}
}

func TestDiffNamesEveryDifference(t *testing.T) {
	base := Entry{Path: "f", Type: "file", Mode: 0o644, Size: 1, ModTime: 1, SHA256: "aa"}
	change := func(f func(*Entry)) []Entry { e := base; f(&e); return []Entry{e} }
	for _, tt := range []struct {
		name string
		got  []Entry
		want string
	}{
		{"same", []Entry{base}, ""},
		{"missing", nil, "f: missing\n"},
		{"unexpected", []Entry{base, {Path: "g", Type: "dir"}}, "g: unexpected dir\n"},
		{"type", change(func(e *Entry) { e.Type = "dir" }), "f: type is dir, want file\n"},
		{"mode", change(func(e *Entry) { e.Mode = 0o755 }), "f: mode is 0755, want 0644\n"},
		{"uid", change(func(e *Entry) { e.UID = 7 }), "f: uid is 7, want 0\n"},
		{"gid", change(func(e *Entry) { e.GID = 7 }), "f: gid is 7, want 0\n"},
		{"size", change(func(e *Entry) { e.Size = 2 }), "f: size is 2, want 1\n"},
		{"mtime", change(func(e *Entry) { e.ModTime = 2 }), "f: mtime is 1970-01-01 00:00:00.000000002 +0000 UTC, want 1970-01-01 00:00:00.000000001 +0000 UTC\n"},
		{"content", change(func(e *Entry) { e.SHA256 = "bb" }), "f: sha256 is bb, want aa\n"},
		{"target", change(func(e *Entry) { e.Target = "x" }), "f: symlink target is x, want \n"},
		{"xattrs", change(func(e *Entry) { e.Xattrs = map[string][]byte{"user.a": []byte("b")} }), "f: xattrs are map[\"user.a\":\"b\"], want map[]\n"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := Diff([]Entry{base}, tt.got); got != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
}
