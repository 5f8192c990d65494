// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"maps"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

func TestArtifactStoresAreFoundInTheConfigurationOfCRIO(t *testing.T) {
	main := map[string]string{"etc/crio/crio.conf": "[crio]\n[crio.runtime]\nlog_level = 'info'\n"}
	with := func(more map[string]string) map[string]string {
		all := maps.Clone(main)
		maps.Copy(all, more)
		return all
	}
	for name, tt := range map[string]struct {
		files map[string]string
		want  []string
	}{
		"no CRI-O":                        {map[string]string{"etc/containers/storage.conf": "[storage]\ngraphroot = '/data'\n"}, nil},
		"its defaults":                    {main, []string{"/var/lib/containers/storage/artifacts"}},
		"only a drop-in":                  {map[string]string{"etc/crio/crio.conf.d/10-crio.conf": "[crio.image]\n"}, []string{"/var/lib/containers/storage/artifacts"}},
		"storage.conf":                    {with(map[string]string{"etc/containers/storage.conf": "[storage]\ndriver = 'overlay'\ngraphroot = '/data'\n"}), []string{"/data/artifacts"}},
		"storage.conf without graphroot":  {with(map[string]string{"etc/containers/storage.conf": "[storage]\ndriver = 'overlay'\n"}), []string{"/var/lib/containers/storage/artifacts"}},
		"the distribution's storage.conf": {with(map[string]string{"usr/share/containers/storage.conf": "[storage]\ngraphroot = '/dist'\n"}), []string{"/dist/artifacts"}},
		"crio.conf before storage.conf": {with(map[string]string{
			"etc/crio/crio.conf.d/20.conf": "[crio]\nroot = '/crio'\n", "etc/containers/storage.conf": "[storage]\ngraphroot = '/data'\n",
		}), []string{"/crio/artifacts"}},
		"the last value": {with(map[string]string{
			"etc/crio/crio.conf.d/10.conf": "[crio]\nroot = '/first'\n[crio.runtime]\nadditional_artifact_stores = ['/x']\n",
			"etc/crio/crio.conf.d/20.conf": "[crio]\nroot = '/last'\n[crio.runtime]\nadditional_artifact_stores = ['/a', '/b']\n",
			"etc/crio/crio.conf.d/30.conf": "[crio]\nroot = ''\n[crio.runtime]\n",
		}), []string{"/last/artifacts", "/a/artifacts", "/b/artifacts"}},
	} {
		t.Run(name, func(t *testing.T) {
			dir := writeFiles(t, tt.files)
			if got, err := crioStores(dir); err != nil || !slices.Equal(got, tt.want) {
				t.Errorf("%q, %v; want %q", got, err, tt.want)
			}
		})
	}
	for _, file := range []string{"etc/crio/crio.conf", "etc/containers/storage.conf"} {
		dir := writeFiles(t, with(map[string]string{file: "root = "}))
		if got, err := crioStores(dir); err == nil {
			t.Errorf("a broken %s: %q", file, got)
		}
	}
}

func writeFiles(t *testing.T, files map[string]string) (dir string) {
	t.Helper()
	dir = t.TempDir()
	for name, text := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestConfiguredBlobRootsAreNotReplaced(t *testing.T) {
	c := Default()
	c.BlobRoots = []string{"/mine"}
	c.NRI.Enabled = true
	if got := c.Discover(t.Context()); !slices.Equal(got.BlobRoots, c.BlobRoots) {
		t.Errorf("the stores are %q", got.BlobRoots)
	}
}
