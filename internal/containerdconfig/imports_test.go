// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package containerdconfig

import "testing"

const ownPattern = "/etc/containerd/conf.d/*.toml"

func TestAnImportIsAddedAndRemoved(t *testing.T) {
	for name, c := range map[string]struct{ before, after string }{
		"nothing":         {"", "imports = [\"/etc/containerd/conf.d/*.toml\"]\n"},
		"no version":      {"# mine\n[debug]\nlevel = 'info'\n", "imports = [\"/etc/containerd/conf.d/*.toml\"]\n# mine\n[debug]\nlevel = 'info'\n"},
		"a version":       {"# mine\nversion = 3 # three\nroot = '/data'\n[debug]\n", "imports = [\"/etc/containerd/conf.d/*.toml\"]\n# mine\nversion = 3 # three\nroot = '/data'\n[debug]\n"},
		"no last newline": {"version = 2", "imports = [\"/etc/containerd/conf.d/*.toml\"]\nversion = 2"},
		"CRLF":            {"version = 3\r\n[debug]\r\n", "imports = [\"/etc/containerd/conf.d/*.toml\"]\nversion = 3\r\n[debug]\r\n"},
		"an empty list":   {"version = 3\nimports = [ ]\n", "version = 3\nimports = [ \"/etc/containerd/conf.d/*.toml\"]\n"},
		"a list":          {"imports = ['/a/*.toml']\nversion = 3\n", "imports = ['/a/*.toml', \"/etc/containerd/conf.d/*.toml\"]\nversion = 3\n"},
		"a list of lines": {
			"imports = [\n  \"/a/*.toml\", # [first]\n  '/b.toml', # second\n]\nversion = 3\n",
			"imports = [\n  \"/a/*.toml\", # [first]\n  '/b.toml', # second\n\"/etc/containerd/conf.d/*.toml\"]\nversion = 3\n",
		},
		"a comment and no comma": {"imports = ['/a' # ]\n]\n", "imports = ['/a' # ]\n, \"/etc/containerd/conf.d/*.toml\"]\n"},
		"a quoted key":           {"\"imports\"  =  []\n", "\"imports\"  =  [\"/etc/containerd/conf.d/*.toml\"]\n"},
		"words that look so": {
			"root = '''\nimports = [\"/x\"]\n'''\nversion = 3\n[plugins.x]\nimports = ['/y']\n",
			"imports = [\"/etc/containerd/conf.d/*.toml\"]\nroot = '''\nimports = [\"/x\"]\n'''\nversion = 3\n[plugins.x]\nimports = ['/y']\n",
		},
		"a dotted key": {"imports.x = 1\n", ""},
		"no list":      {"imports = '/a'\n", ""},
		"no strings":   {"imports = [1]\n", ""},
		"broken":       {"imports = [\n", ""},
	} {
		t.Run(name, func(t *testing.T) {
			after, err := AddImport([]byte(c.before), ownPattern)
			if c.after == "" {
				if err == nil {
					t.Fatalf("made %q of it", after)
				}
				return
			}
			if err != nil || string(after) != c.after {
				t.Fatalf("got %q, %v\nwant %q", after, err, c.after)
			}
			back, err := RemoveImport(after, ownPattern)
			if err != nil {
				t.Fatal(err)
			}
			if string(back) != c.before {
				t.Errorf("removed again: %q, want %q", back, c.before)
			}
		})
	}
}

// What others have changed since stays.
func TestAnImportIsRemovedFromAnEditedFile(t *testing.T) {
	for before, want := range map[string]string{
		"imports = [\"/etc/containerd/conf.d/*.toml\", '/b.toml'] # b\n": "imports = ['/b.toml'] # b\n",
		"imports = ['/a.toml', \"/etc/containerd/conf.d/*.toml\", ]\n":   "imports = ['/a.toml', ]\n",
		"version = 3\nimports = ['/a.toml']\n":                           "version = 3\nimports = ['/a.toml']\n",
		"imports = ['/etc/containerd/conf.d/*.toml']\n":                  "", // not as we write it
	} {
		got, err := RemoveImport([]byte(before), ownPattern)
		if want == "" && err == nil || want != "" && (err != nil || string(got) != want) {
			t.Errorf("%q becomes %q, %v; want %q", before, got, err, want)
		}
	}
}
