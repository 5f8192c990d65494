// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package service

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"

	"github.com/containerd/containerd/v2/pkg/identifiers"

	"github.com/artifact-snapshotter/artifact-snapshotter/blobs"
	"github.com/artifact-snapshotter/artifact-snapshotter/snapshot"
	"github.com/artifact-snapshotter/artifact-snapshotter/unpack"
)

const (
	// modeAuto chooses a mode by trying real mounts.
	modeAuto = "auto"

	directIOOptional = "optional"
	directIORequired = "required"

	// maxMemory, in MiB, is more than any machine has.
	maxMemory = 1 << 40

	// maxSocketPath is the maximum length in bytes of the path of a Unix socket:
	// sun_path of unix(7) holds 108 bytes including the terminating NUL.
	maxSocketPath = 107
)

// Config is the configuration that the daemon and a compiled-in snapshotter share. The
// daemon reads it from its TOML file, beside the keys of its own (package daemon). A
// containerd with the snapshotter compiled in reads it from the table
// [plugins.'io.containerd.snapshotter.v1.artifact'] of its configuration file.
// daemon/default.toml explains every key to administrators.
type Config struct {
	// Root is the directory for everything that must survive a reboot.
	Root string `toml:"root"`
	// State is the directory for mounts. It does not have to survive a reboot.
	State string `toml:"state"`
	// ContentRoot is the root of containerd's content store: the directory that has
	// blobs/ in it.
	ContentRoot string `toml:"content_root"`
	// BlobRoots are further directories with blobs/ in them: CRI-O's artifact stores.
	BlobRoots []string `toml:"blob_roots"`
	// Pulled is the directory of the artifacts that the daemon pulls by itself, below Root; ""
	// if it pulls none.
	Pulled blobs.Dir `toml:"-"`
	// ContainerdAddress is the Unix socket of containerd's API.
	ContainerdAddress string `toml:"containerd_address"`
	// Overlayfs has the options of the snapshotter for images and containers.
	Overlayfs snapshot.Overlayfs `toml:"overlayfs"`
	// RawMode and TarMode are modes of package unpack, or "auto".
	RawMode string `toml:"raw_mode"`
	TarMode string `toml:"tar_mode"`
	// DirectIO is "required" if only modes may be used whose files can be read with
	// O_DIRECT, or "optional".
	DirectIO string `toml:"direct_io"`
	// DecompressOnPull decompresses layers while containerd pulls them.
	DecompressOnPull bool `toml:"decompress_on_pull"`
	// DecompressionMemory (in MiB), MaxExpansion (a factor) and ReservedSpace (in
	// percent) are the limits of unpacking: see unpack.Limits.
	DecompressionMemory int64 `toml:"decompression_memory"`
	MaxExpansion        int64 `toml:"max_expansion"`
	ReservedSpace       int   `toml:"reserved_space"`
	// Namespaces are the containerd namespaces in which the empty blob is pre-created.
	Namespaces []string `toml:"namespaces"`
}

// Default returns the configuration for a containerd with its default directories.
func Default() Config {
	return Config{
		Root:                "/var/lib/artifact-snapshotter",
		State:               "/run/artifact-snapshotter",
		ContentRoot:         "/var/lib/containerd/io.containerd.content.v1.content",
		BlobRoots:           []string{},
		ContainerdAddress:   "/run/containerd/containerd.sock",
		RawMode:             modeAuto,
		TarMode:             modeAuto,
		DirectIO:            directIOOptional,
		DecompressOnPull:    true,
		DecompressionMemory: unpack.DefaultLimits.Memory >> 20,
		MaxExpansion:        unpack.DefaultLimits.Expansion,
		ReservedSpace:       unpack.DefaultLimits.Reserve,
		Namespaces:          []string{"k8s.io"},
		Overlayfs:           snapshot.Overlayfs{MountOptions: []string{}},
	}
}

// Validate returns an error that names everything that is wrong with the configuration.
// It does not look at the file system.
func (c Config) Validate() error {
	var errs []error
	for _, dir := range []struct{ key, path string }{
		{"root", c.Root}, {"state", c.State},
	} {
		if !filepath.IsAbs(dir.path) {
			errs = append(errs, fmt.Errorf("%s %q is not an absolute path", dir.key, dir.path))
		}
	}
	if filepath.Clean(c.Root) == filepath.Clean(c.State) {
		errs = append(errs, fmt.Errorf("root and state are both %q, but a reboot may empty state, and must not empty root", c.Root))
	}
	errs = append(errs, c.validateBlobs("content_root", c.ContentRoot))
	for _, dir := range c.BlobRoots {
		errs = append(errs, c.validateBlobs("blob_roots", dir))
	}
	errs = append(errs, ValidateSocket("containerd_address", c.ContainerdAddress))
	if _, err := c.modes(); err != nil {
		errs = append(errs, err)
	}
	if c.DirectIO != directIOOptional && c.DirectIO != directIORequired {
		errs = append(errs, fmt.Errorf("direct_io %q is neither %q nor %q", c.DirectIO, directIOOptional, directIORequired))
	}
	if c.DecompressionMemory < 1 || c.DecompressionMemory > maxMemory {
		errs = append(errs, fmt.Errorf("decompression_memory %d is not 1 to %d MiB", c.DecompressionMemory, maxMemory))
	}
	if c.MaxExpansion < 1 {
		errs = append(errs, fmt.Errorf("max_expansion %d is less than 1", c.MaxExpansion))
	}
	if c.ReservedSpace < 0 || c.ReservedSpace > 99 {
		errs = append(errs, fmt.Errorf("reserved_space %d is not 0 to 99 percent", c.ReservedSpace))
	}
	for _, namespace := range c.Namespaces {
		if err := identifiers.Validate(namespace); err != nil {
			errs = append(errs, fmt.Errorf("namespaces: %w", err))
		}
	}
	return errors.Join(errs...)
}

// validateBlobs checks the directory of blobs that key names.
func (c Config) validateBlobs(key, dir string) error {
	if !filepath.IsAbs(dir) {
		return fmt.Errorf("%s %q is not an absolute path", key, dir)
	}
	// The garbage collection of each would delete the files of the other, which it
	// does not know.
	if within(c.Root, dir) || within(dir, c.Root) {
		return fmt.Errorf("root %s and %s %s must not lie within each other", c.Root, key, dir)
	}
	return nil
}

// ValidateSocket returns an error unless path, the value of key, can be the path of a
// Unix socket.
func ValidateSocket(key, path string) error {
	if !filepath.IsAbs(path) {
		return fmt.Errorf("%s %q is not an absolute path", key, path)
	}
	if len(path) > maxSocketPath {
		return fmt.Errorf("%s %s has %d bytes, but the path of a Unix socket has at most %d: choose a shorter one",
			key, path, len(path), maxSocketPath)
	}
	return nil
}

// within reports whether path is dir or lies below it.
func within(path, dir string) bool {
	rel, err := filepath.Rel(dir, path)
	return err == nil && filepath.IsLocal(rel)
}

// Blobs returns all directories of blobs: containerd's first, then CRI-O's.
func (c Config) Blobs() blobs.Dirs {
	dirs := blobs.Dirs{blobs.Dir(c.ContentRoot)}
	for _, dir := range c.BlobRoots {
		dirs = append(dirs, blobs.Dir(dir))
	}
	return dirs
}

// modes returns the configured modes. For package unpack the empty mode means "auto".
func (c Config) modes() (unpack.Modes, error) {
	raw, rerr := mode("raw_mode", c.RawMode, unpack.RawModes)
	tar, terr := mode("tar_mode", c.TarMode, unpack.TarModes)
	return unpack.Modes{Raw: raw, Tar: tar}, errors.Join(rerr, terr)
}

func mode(key, value string, all []unpack.Mode) (unpack.Mode, error) {
	if value == modeAuto {
		return "", nil
	}
	if mode := unpack.Mode(value); slices.Contains(all, mode) {
		return mode, nil
	}
	return "", fmt.Errorf("%s %q is neither %q nor one of %q", key, value, modeAuto, all)
}

// NeedsDirectIO reports whether only modes may be used whose files can be read with
// O_DIRECT.
func (c Config) NeedsDirectIO() bool { return c.DirectIO == directIORequired }

// Limits returns the limits of unpacking.
func (c Config) Limits() unpack.Limits {
	return unpack.Limits{Memory: c.DecompressionMemory << 20, Expansion: c.MaxExpansion, Reserve: c.ReservedSpace}
}
