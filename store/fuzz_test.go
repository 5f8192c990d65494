// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package store

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
	"github.com/artifact-snapshotter/artifact-snapshotter/unpack"
)

// FuzzName makes names of trees from the labels of a snapshot: each is the name of one file,
// contains the manifest's digest, and belongs to one ID.
func FuzzName(f *testing.F) {
	for _, list := range []string{"", "0:1:2", "../../x", "/", "\x00", strings.Repeat("0:1:2,", 1000)} {
		f.Add("x", list, list)
	}
	f.Fuzz(func(t *testing.T, content, uid, gid string) {
		id := ID{Manifest: digest.FromString(content), Owners: unpack.IDMap{UID: uid, GID: gid}}
		name := id.name()
		if name != filepath.Base(name) || len(name) > 255 || strings.ContainsAny(name, "/\x00") || manifest(name) != id.Manifest || isShifted(name) != id.shifted() {
			t.Errorf("%+v has the name %q", id, name)
		}
		other := ID{Manifest: id.Manifest, Owners: unpack.IDMap{UID: gid, GID: uid}}
		maps := !strings.Contains(uid+gid, " ") // which no map has
		if maps && uid != gid && other.name() == name {
			t.Errorf("%+v and %+v have one name", id, other)
		}
	})
}

// FuzzArrival reads any file that arrives in the content store.
func FuzzArrival(f *testing.F) {
	d := digest.FromString("x").String()
	for _, text := range []string{
		"", "{", `{"schemaVersion":2}`, `{"schemaVersion":2,"config":{"mediaType":"x","digest":"` + d + `"}}`, `{"schemaVersion":2,"config":{"digest":"sha256:../x"}}`,
		`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","config":{"digest":"` + d + `"}}`, `{"schemaVersion":2,"config":[]}`,
		`{"schemaVersion":2,"config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"` + d + `"}}`, "{\"schemaVersion\":\x00}",
	} {
		f.Add([]byte(text))
	}
	file := filepath.Join(f.TempDir(), "blob")
	f.Fuzz(func(t *testing.T, b []byte) {
		if err := os.WriteFile(file, b, 0o600); err != nil {
			t.Fatal(err)
		}
		config, desc, ok := readManifest(file)
		switch {
		case !ok && (config != "" || desc.Digest != ""):
			t.Errorf("%q is no manifest, and yet %s, %+v", b, config, desc)
		case ok && (config.Validate() != nil || desc.Digest != digest.FromBytes(b) || desc.Size != int64(len(b)) || artifact.IsImageConfig(desc.MediaType)):
			t.Errorf("%q is the manifest %+v with the config %s", b, desc, config)
		}
	})
}
