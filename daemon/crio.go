// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/containerd/log"
	"github.com/pelletier/go-toml/v2"
)

// crioStorage is where CRI-O's storage is if no file says so (containers-storage.conf(5)).
const crioStorage = "/var/lib/containers/storage"

// crioStores are the artifact stores of a CRI-O whose configuration is below dir, which
// is "/": the one in its storage, and the additional ones. There are none without a
// configuration of CRI-O.
//
// CRI-O reads crio.conf and then what is in crio.conf.d, by name; the last one wins
// (crio.conf(5), crio.conf.d(5)). What they do not say of the storage is in storage.conf,
// the administrator's or else the distribution's.
func crioStores(dir string) ([]string, error) {
	files := []string{filepath.Join(dir, "etc/crio/crio.conf")}
	err := filepath.WalkDir(filepath.Join(dir, "etc/crio/crio.conf.d"), func(path string, e fs.DirEntry, err error) error {
		if err == nil && !e.IsDir() {
			files = append(files, path)
		}
		return err
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	root, additional, there := "", []string(nil), false
	for _, file := range files {
		var config struct {
			CRIO struct {
				Root    string `toml:"root"`
				Runtime struct {
					Additional []string `toml:"additional_artifact_stores"`
				} `toml:"runtime"`
			} `toml:"crio"`
		}
		read, err := readTOML(file, &config)
		if err != nil {
			return nil, err
		}
		there = there || read
		root = cmp.Or(config.CRIO.Root, root)
		if config.CRIO.Runtime.Additional != nil {
			additional = config.CRIO.Runtime.Additional
		}
	}
	if !there {
		return nil, nil
	}
	if root == "" {
		if root, err = graphRoot(dir); err != nil {
			return nil, err
		}
	}
	var stores []string
	for _, storage := range append([]string{root}, additional...) {
		stores = append(stores, filepath.Join(storage, "artifacts"))
	}
	return stores, nil
}

// graphRoot is where storage.conf puts the storage.
func graphRoot(dir string) (string, error) {
	for _, file := range []string{"etc/containers/storage.conf", "usr/share/containers/storage.conf"} {
		var config struct {
			Storage struct {
				GraphRoot string `toml:"graphroot"`
			} `toml:"storage"`
		}
		if read, err := readTOML(filepath.Join(dir, file), &config); read || err != nil {
			return cmp.Or(config.Storage.GraphRoot, crioStorage), err
		}
	}
	return crioStorage, nil
}

// readTOML reads what is known of a file into v; false if there is none.
func readTOML(name string, v any) (bool, error) {
	text, err := os.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	if err := toml.Unmarshal(text, v); err != nil {
		return false, fmt.Errorf("%s: %w", name, readable(err))
	}
	return true, nil
}

// Discover completes the configuration of a plugin of NRI with CRI-O's artifact stores, if
// it names none. What cannot be read is not found.
func (c Config) Discover(ctx context.Context) Config {
	if !c.NRI.Enabled || len(c.BlobRoots) > 0 {
		return c
	}
	stores, err := crioStores("/")
	if err != nil {
		log.G(ctx).WithError(err).Warn("Cannot tell from CRI-O's configuration where its artifacts are: set blob_roots")
	}
	c.BlobRoots = stores
	return c
}
