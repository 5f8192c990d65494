// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package artifact

import (
	"path"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

// dirs is a path of n bytes in short names.
func dirs(n int) string {
	return strings.Repeat("d/", n/2)[:n-1] + "d"
}

func TestCleanPath(t *testing.T) {
	name255 := strings.Repeat("n", 255)
	for name, want := range map[string]string{
		"a":               "a",
		"a/b":             "a/b",
		"./a//b/":         "a/b",
		"a/./b/.":         "a/b",
		"...":             "...",
		"..a/b..":         "..a/b..",
		".hidden":         ".hidden",
		"with space":      "with space",
		"日本語/ü":           "日本語/ü",
		`back\slash\..\x`: `back\slash\..\x`,
		"C:/x":            "C:/x",
		"tab\tnew\nline":  "tab\tnew\nline",
		"\xff\xfe":        "\xff\xfe",
		name255:           name255,
		dirs(257):         dirs(257),
		strings.Repeat("./", 1<<16) + "a" + strings.Repeat("/", 1<<16): "a",
	} {
		got, err := CleanPath(name)
		if err != nil || got != want {
			t.Errorf("CleanPath(%.60q) = %.60q, %v; want %.60q", name, got, err, want)
		}
	}
}

func TestCleanPathRefuses(t *testing.T) {
	name251 := strings.Repeat("n", 251)
	for name, why := range map[string]string{
		"":                              "names no file",
		".":                             "names no file",
		"./":                            "names no file",
		"././/.":                        "names no file",
		"/":                             "absolute",
		"/etc/passwd":                   "absolute",
		"//a":                           "absolute",
		"..":                            `".."`,
		"../a":                          `".."`,
		"a/../b":                        `".."`,
		"a/..":                          `".."`,
		"./../a":                        `".."`,
		"a\x00b":                        "NUL",
		"a/\x00":                        "NUL",
		strings.Repeat("n", 256):        "256 bytes, over the limit of 255",
		dirs(259):                       "129 directories, over the limit of 128",
		strings.Repeat(name251+"/", 17): "over the limit of 4095",
		strings.Repeat("ü", 128):        "256 bytes",
		"evil\x1b[2J/..":                `"evil\x1b[2J/.."`,
		strings.Repeat("\x00", 1e6):     "NUL",
	} {
		got, err := CleanPath(name)
		if got != "" {
			t.Errorf("CleanPath(%.60q) = %.60q beside its error", name, got)
		}
		wantError(t, err, errdefs.ErrInvalidArgument, why)
	}
}

func FuzzCleanPath(f *testing.F) {
	for _, seed := range []string{"a", "./a//b/", "/a", "a/../b", "a\x00", ".", "...", "\xff", strings.Repeat("n", 256), dirs(4096)} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, name string) {
		got, err := CleanPath(name)
		if err != nil {
			wantError(t, err, errdefs.ErrInvalidArgument)
			return
		}
		checkPath(t, got)
		// This does not depend on how CleanPath works: cleaning does not change the
		// meaning.
		if want := path.Clean(name); got != want {
			t.Errorf("CleanPath(%q) = %q, path.Clean says %q", name, got, want)
		}
		again, err := CleanPath(got)
		if err != nil || again != got {
			t.Errorf("CleanPath(%q) = %q, %v; want no change", got, again, err)
		}
	})
}

// checkPath fails unless p can be joined to a directory and stay in it.
func checkPath(t *testing.T, p string) {
	t.Helper()
	if p == "" || len(p) > 4095 || strings.Contains(p, "\x00") {
		t.Fatalf("path %.100q of %d bytes", p, len(p))
	}
	for part := range strings.SplitSeq(p, "/") {
		if part == "" || part == "." || part == ".." || len(part) > 255 {
			t.Fatalf("path %.100q with the part %.100q", p, part)
		}
	}
}
