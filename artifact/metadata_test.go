// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package artifact

import (
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	modelspec "github.com/modelpack/model-spec/specs-go/v1"
)

const legacyMetadata = "org.cnai.model.file.metadata+json"

func TestFileMetadata(t *testing.T) {
	defaults := File{Mode: 0o644, ModTime: created}
	with := func(change func(*File)) File {
		f := defaults
		change(&f)
		return f
	}
	for _, test := range []struct {
		name, value string
		want        File
	}{
		{"the annotation is empty", "", defaults},
		{"no key", `{}`, defaults},
		{"unknown keys", `{"uname":"root","nested":{"mode":7}}`, defaults},
		{"null keeps the default", `{"mode":null,"uid":null,"mtime":null}`, defaults},
		{"mode is decimal", `{"mode":493}`, with(func(f *File) { f.Mode = 0o755 })},
		{"mode 0", `{"mode":0}`, with(func(f *File) { f.Mode = 0 })},
		{"mode with the type of a regular file", `{"mode":33152}`, with(func(f *File) { f.Mode = 0o600 })},
		{"setuid, setgid and sticky are cleared", `{"mode":4095}`, with(func(f *File) { f.Mode = 0o777 })},
		{"the highest mode", `{"mode":65535}`, with(func(f *File) { f.Mode = 0o777 })},
		{"owner", `{"uid":1000,"gid":100}`, with(func(f *File) { f.UID, f.GID = 1000, 100 })},
		{"the highest owner", `{"uid":4294967294,"gid":4294967294}`, with(func(f *File) { f.UID, f.GID = 4294967294, 4294967294 })},
		{"mtime", `{"mtime":"2021-02-03T04:05:06.123456789+01:00"}`, with(func(f *File) {
			f.ModTime = time.Date(2021, 2, 3, 3, 5, 6, 123456789, time.UTC)
		})},
		{"mtime before the epoch", `{"mtime":"1903-01-01T00:00:00Z"}`, with(func(f *File) {
			f.ModTime = time.Date(1903, 1, 1, 0, 0, 0, 0, time.UTC)
		})},
		{"the zero mtime", `{"mtime":"0001-01-01T00:00:00Z"}`, defaults},
		{"type flag 0", `{"typeflag":0}`, defaults},
		{"type flag '0'", `{"typeflag":48}`, defaults},
		{"name and size are for information", `{"name":"../../etc/passwd","size":12345}`, defaults},
		{"white space around", " {\"mode\":420}\n", defaults},
	} {
		for _, key := range []string{modelspec.AnnotationFileMetadata, legacyMetadata} {
			var got File
			if err := got.setAttributes(map[string]string{key: test.value}, created); err != nil {
				t.Errorf("%s: %v", test.name, err)
				continue
			}
			if !got.ModTime.Equal(test.want.ModTime) {
				t.Errorf("%s: mtime %v, want %v", test.name, got.ModTime, test.want.ModTime)
			}
			got.ModTime = test.want.ModTime
			if got != test.want {
				t.Errorf("%s: %+v, want %+v", test.name, got, test.want)
			}
		}
	}
}

func TestFileMetadataPrefersTheCurrentAnnotation(t *testing.T) {
	for _, test := range []struct {
		current, legacy string
		uid, gid        uint32
	}{
		{`{"uid":1}`, `{"uid":2,"gid":2}`, 1, 0},
		{`{"uid":1}`, `malformed`, 1, 0},
		{``, `{"uid":2,"gid":2}`, 2, 2},
	} {
		var got File
		err := got.setAttributes(map[string]string{modelspec.AnnotationFileMetadata: test.current, legacyMetadata: test.legacy}, created)
		if err != nil || got.UID != test.uid || got.GID != test.gid {
			t.Errorf("%q before %q: %d:%d, %v; want %d:%d", test.current, test.legacy, got.UID, got.GID, err, test.uid, test.gid)
		}
	}
}

func TestFileMetadataRefuses(t *testing.T) {
	for value, why := range map[string]string{
		`{`:                               "malformed",
		`x`:                               "malformed",
		`null`:                            "malformed",
		`[]`:                              "malformed",
		`"{}"`:                            "malformed",
		`{} {}`:                           "malformed",
		`{},`:                             "malformed",
		" ":                               "malformed",
		`{"mode":"0644"}`:                 "malformed",
		`{"mode":0644}`:                   "malformed",
		`{"mode":-1}`:                     "malformed",
		`{"mode":4.5}`:                    "malformed",
		`{"mode":4294967296}`:             "malformed",
		`{"mode":65536}`:                  "mode 65536 is not a Unix file mode",
		`{"mode":4294967295}`:             "mode 4294967295",
		`{"uid":-1}`:                      "malformed",
		`{"uid":4294967296}`:              "malformed",
		`{"uid":4294967295}`:              "4294967295 is no user or group",
		`{"gid":4294967295}`:              "4294967295 is no user or group",
		`{"uid":"root"}`:                  "malformed",
		`{"size":-1}`:                     "negative size -1",
		`{"size":9223372036854775808}`:    "malformed",
		`{"size":1e3}`:                    "malformed",
		`{"name":7}`:                      "malformed",
		`{"mtime":1612325106}`:            "malformed",
		`{"mtime":"2021-02-03"}`:          "malformed",
		`{"mtime":"2021-02-30T00:00:00"}`: "malformed",
		`{"mtime":"` + strings.Repeat("9", 1<<20) + `"}`: "malformed",
		`{"typeflag":"0"}`: "malformed",
		`{"typeflag":256}`: "malformed",
		`{"typeflag":-1}`:  "malformed",
		`{"typeflag":49}`:  "type flag 49 is not a regular file",
		`{"typeflag":50}`:  "type flag 50 is not a regular file",
		`{"typeflag":53}`:  "type flag 53 is not a regular file",
		`{"typeflag":5}`:   "type flag 5 is not a regular file",
	} {
		for _, key := range []string{modelspec.AnnotationFileMetadata, legacyMetadata} {
			var f File
			err := f.setAttributes(map[string]string{key: value}, created)
			wantError(t, err, errdefs.ErrInvalidArgument, "annotation "+key, why)
		}
	}
}

func FuzzFileMetadata(f *testing.F) {
	for _, seed := range []string{
		``, `{}`, `null`, `{"mode":420,"uid":0,"gid":0,"size":1,"mtime":"2021-02-03T04:05:06.7Z","typeflag":0,"name":"x"}`,
		`{"mode":65536}`, `{"uid":4294967295}`, `{"typeflag":53}`, `{"size":-1}`, `{"mtime":"0001-01-01T00:00:00Z"}`, `{"Mode":1,"mode":null}`,
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, value string) {
		var file File
		if err := file.setAttributes(map[string]string{modelspec.AnnotationFileMetadata: value}, created); err != nil {
			wantError(t, err, errdefs.ErrInvalidArgument, modelspec.AnnotationFileMetadata)
			return
		}
		checkAttributes(t, file)
	})
}

// checkAttributes fails unless the attributes are ones a file can have.
func checkAttributes(t *testing.T, f File) {
	t.Helper()
	if f.Mode&^0o777 != 0 || f.UID == 1<<32-1 || f.GID == 1<<32-1 || f.ModTime.IsZero() {
		t.Errorf("attributes %+v", f)
	}
}
