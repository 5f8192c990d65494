// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"cmp"
	"context"
	"errors"
	"io/fs"
	"path/filepath"

	"github.com/containerd/log"

	"github.com/artifact-snapshotter/artifact-snapshotter/internal/tomlfile"
)

// crioStorage is the default directory of CRI-O's storage (containers-storage.conf(5)).
const crioStorage = "/var/lib/containers/storage"

// Discover sets BlobRoots to CRI-O's artifact stores if NRI or CSI is enabled and BlobRoots is empty.
// If CRI-O's configuration cannot be read, that is logged and BlobRoots stays empty.
func (c Config) Discover(ctx context.Context) Config {
	if !c.NRI.Enabled && !c.CSI.Enabled || len(c.BlobRoots) > 0 {
		return c
	}
	stores, err := crioStores("/")
	if err != nil {
		log.G(ctx).WithError(err).Warn("cannot find CRI-O's artifact stores in its configuration: set blob_roots")
	}
	c.BlobRoots = stores
	return c
}

// crioStores returns the artifact stores of the CRI-O whose configuration is below dir: the
// one in its storage, and the additional ones. Without a configuration of CRI-O there are
// none. Except in tests, dir is "/".
//
// CRI-O reads crio.conf and then the files in crio.conf.d in the order of their names; the
// last value of a key wins (crio.conf(5), crio.conf.d(5)).
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
	root, additional, installed := "", []string(nil), false
	for _, file := range files {
		var config struct {
			CRIO struct {
				Root    string `toml:"root"`
				Runtime struct {
					Additional []string `toml:"additional_artifact_stores"`
				} `toml:"runtime"`
			} `toml:"crio"`
		}
		exists, err := tomlfile.Read(file, &config)
		if err != nil {
			return nil, err
		}
		installed = installed || exists
		root = cmp.Or(config.CRIO.Root, root)
		if config.CRIO.Runtime.Additional != nil {
			additional = config.CRIO.Runtime.Additional
		}
	}
	if !installed {
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

// graphRoot returns the storage directory of storage.conf: the administrator's file or, if
// there is none, the distribution's.
func graphRoot(dir string) (string, error) {
	for _, file := range []string{"etc/containers/storage.conf", "usr/share/containers/storage.conf"} {
		var config struct {
			Storage struct {
				GraphRoot string `toml:"graphroot"`
			} `toml:"storage"`
		}
		if exists, err := tomlfile.Read(filepath.Join(dir, file), &config); exists || err != nil {
			return cmp.Or(config.Storage.GraphRoot, crioStorage), err
		}
	}
	return crioStorage, nil
}
