// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package plugin

import (
	"bytes"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/pkg/identifiers"
	"github.com/containerd/nri/pkg/api"
	"github.com/pelletier/go-toml/v2"

	"github.com/artifact-snapshotter/artifact-snapshotter/blobs"
	"github.com/artifact-snapshotter/artifact-snapshotter/unpack"
)

// DefaultFile is the commented configuration file that says what Default says.
//
//go:embed default.toml
var DefaultFile string

// modeAuto lets the snapshotter choose a mode by trying real mounts.
const modeAuto = "auto"

// maxMemory, in MiB, is more than any machine has.
const maxMemory = 1 << 40

// maxSocketPath is the longest path of a Unix socket in bytes: sun_path of
// unix(7) holds 108 with the terminating NUL.
const maxSocketPath = 107

// Config says where the snapshotter keeps its things and where containerd
// keeps the blobs. The daemon reads it from a TOML file of its own, a
// containerd with the snapshotter compiled in from the table
// [plugins.'io.containerd.snapshotter.v1.artifact'].
type Config struct {
	// Root is the directory of everything that outlives a reboot.
	Root string `toml:"root"`
	// State is the directory of mounts and the socket; it need not outlive a reboot.
	State string `toml:"state"`
	// Address is the Unix socket that the daemon serves on; empty is
	// artifact-snapshotter.sock in State. Not for a compiled-in snapshotter,
	// hence omitempty: `containerd config default` must not show it.
	Address string `toml:"address,omitempty"`
	// ContentRoot is the root of containerd's content store, the directory with blobs/.
	ContentRoot string `toml:"content_root"`
	// BlobRoots are more such directories: CRI-O's artifact stores. If there are none, NRI
	// looks for them in CRI-O's configuration.
	BlobRoots []string `toml:"blob_roots"`
	// ContainerdAddress is the Unix socket of containerd's API.
	ContainerdAddress string `toml:"containerd_address"`
	// Overlayfs is of the snapshots of images and containers.
	Overlayfs Overlayfs `toml:"overlayfs"`
	// NRI is how to be a plugin of NRI. Only for the daemon, like Address.
	NRI NRI `toml:"nri,omitempty"`
	// LogLevel is a level of github.com/containerd/log. Only for the daemon, too.
	LogLevel string `toml:"log_level,omitempty"`
	// MetricsAddress is where the daemon serves its metrics: unix:///path or a port of
	// a loopback address; "" for nowhere. Only for the daemon, too.
	MetricsAddress string `toml:"metrics_address,omitempty"`
	// RawMode and TarMode are modes of package unpack, or "auto".
	RawMode string `toml:"raw_mode"`
	TarMode string `toml:"tar_mode"`
	// DirectIO is whether modes must let files be read with O_DIRECT: "optional" or
	// "required".
	DirectIO string `toml:"direct_io"`
	// DecompressOnPull decompresses layers while containerd pulls them.
	DecompressOnPull bool `toml:"decompress_on_pull"`
	// DecompressionMemory, MaxExpansion and ReservedSpace are unpack.Limits, the
	// memory in MiB.
	DecompressionMemory int64 `toml:"decompression_memory"`
	MaxExpansion        int64 `toml:"max_expansion"`
	ReservedSpace       int   `toml:"reserved_space"`
	// Namespaces are the containerd namespaces that get the empty blob.
	Namespaces []string `toml:"namespaces"`
}

// NRI is the configuration of the plugin of NRI, which shows artifacts where a runtime asks
// no snapshotter of ours.
type NRI struct {
	Enabled bool `toml:"enabled"`
	// Socket is NRI's own.
	Socket string `toml:"socket"`
	// Index is where in the order of all plugins this one is, two digits; Name its name.
	Index string `toml:"index"`
	Name  string `toml:"name"`
	// OnError is what happens to a container whose artifact cannot be shown: "fail", or
	// "passthrough" for the runtime's own mount.
	OnError string `toml:"on_error"`
}

const (
	directIOOptional = "optional"
	directIORequired = "required"
)

const (
	onErrorFail        = "fail"
	onErrorPassthrough = "passthrough"
)

// Default returns the configuration of a daemon beside a containerd with
// default directories.
func Default() Config {
	return Config{
		Root:                "/var/lib/artifact-snapshotter",
		State:               "/run/artifact-snapshotter",
		ContentRoot:         "/var/lib/containerd/io.containerd.content.v1.content",
		BlobRoots:           []string{},
		ContainerdAddress:   "/run/containerd/containerd.sock",
		LogLevel:            "info",
		RawMode:             modeAuto,
		TarMode:             modeAuto,
		DirectIO:            directIOOptional,
		DecompressOnPull:    true,
		DecompressionMemory: unpack.DefaultLimits.Memory >> 20,
		MaxExpansion:        unpack.DefaultLimits.Expansion,
		ReservedSpace:       unpack.DefaultLimits.Reserve,
		Namespaces:          []string{"k8s.io"},
		Overlayfs:           Overlayfs{MountOptions: []string{}},
		NRI:                 NRI{Socket: api.DefaultSocketPath, Index: "50", Name: "artifact-snapshotter", OnError: onErrorFail},
	}
}

// Load reads the TOML file at path; what it leaves out is as in Default. The
// result is not validated yet, since flags may still change it. A missing file
// is fs.ErrNotExist; a key that Config does not have is an error.
func Load(path string) (Config, error) {
	cfg := Default()
	text, err := os.ReadFile(path)
	if err != nil {
		return Config{}, fmt.Errorf("read configuration: %w", err)
	}
	if err := toml.NewDecoder(bytes.NewReader(text)).DisallowUnknownFields().Decode(&cfg); err != nil {
		return Config{}, fmt.Errorf("configuration file %s: %w", path, readable(err))
	}
	return cfg, nil
}

// readable turns go-toml's errors into one line with key and line number.
func readable(err error) error {
	if strict, ok := errors.AsType[*toml.StrictMissingError](err); ok {
		var keys []string
		for _, missing := range strict.Errors {
			line, _ := missing.Position()
			keys = append(keys, fmt.Sprintf("%s (line %d)", strings.Join(missing.Key(), "."), line))
		}
		return fmt.Errorf("unknown key: %s", strings.Join(keys, ", "))
	}
	if decode, ok := errors.AsType[*toml.DecodeError](err); ok {
		line, _ := decode.Position()
		return fmt.Errorf("line %d: %w", line, err)
	}
	return err
}

// Network is whether a daemon with this configuration and environment needs other sockets
// than Unix sockets: for metrics on a port, or to send spans.
func (c Config) Network() bool {
	return c.MetricsAddress != "" && !strings.HasPrefix(c.MetricsAddress, unixScheme) || tracing()
}

// SocketAddress is the path of the socket that the daemon serves on.
func (c Config) SocketAddress() string {
	if c.Address != "" {
		return c.Address
	}
	return filepath.Join(c.State, "artifact-snapshotter.sock")
}

// Validate says everything that is wrong with the configuration of a daemon.
// It looks at no file.
func (c Config) Validate() error {
	levels := []string{"trace", "debug", "info", "warn", "error", "fatal", "panic"}
	var level error
	if !slices.Contains(levels, c.LogLevel) {
		level = fmt.Errorf("log_level %q is none of %s", c.LogLevel, strings.Join(levels, ", "))
	}
	return errors.Join(c.validateSnapshotter(), validateSocket("address", c.SocketAddress()), validateMetrics(c.MetricsAddress), c.NRI.validate(), level)
}

func (c NRI) validate() error {
	errs := []error{validateSocket("nri.socket", c.Socket)}
	if err := api.CheckPluginIndex(c.Index); err != nil {
		errs = append(errs, fmt.Errorf("nri.index %q is not two digits", c.Index))
	}
	if err := api.CheckPluginName(c.Name); err != nil {
		errs = append(errs, fmt.Errorf("nri.name: %w", err))
	}
	if c.OnError != onErrorFail && c.OnError != onErrorPassthrough {
		errs = append(errs, fmt.Errorf("nri.on_error %q is neither %q nor %q", c.OnError, onErrorFail, onErrorPassthrough))
	}
	return errors.Join(errs...)
}

// validateSnapshotter checks what a compiled-in snapshotter needs, too.
func (c Config) validateSnapshotter() error {
	var errs []error
	for _, dir := range []struct{ key, path string }{
		{"root", c.Root}, {"state", c.State},
	} {
		if !filepath.IsAbs(dir.path) {
			errs = append(errs, fmt.Errorf("%s %q is not an absolute path", dir.key, dir.path))
		}
	}
	errs = append(errs, c.validateBlobs("content_root", c.ContentRoot))
	for _, dir := range c.BlobRoots {
		errs = append(errs, c.validateBlobs("blob_roots", dir))
	}
	errs = append(errs, validateSocket("containerd_address", c.ContainerdAddress))
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

// validateBlobs checks a directory of blobs.
func (c Config) validateBlobs(key, dir string) error {
	if !filepath.IsAbs(dir) {
		return fmt.Errorf("%s %q is not an absolute path", key, dir)
	}
	// The sweep of one and the garbage collector of the other would delete
	// what they do not know.
	if within(c.Root, dir) || within(dir, c.Root) {
		return fmt.Errorf("root %s and %s %s must not lie within each other", c.Root, key, dir)
	}
	return nil
}

// Blobs are the directories of blobs: containerd's, and CRI-O's behind it.
func (c Config) Blobs() blobs.Dirs {
	dirs := blobs.Dirs{blobs.Dir(c.ContentRoot)}
	for _, dir := range c.BlobRoots {
		dirs = append(dirs, blobs.Dir(dir))
	}
	return dirs
}

// modes translates the configured modes to those of package unpack, where an
// empty one means to choose.
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

// NeedsDirectIO is whether only modes are taken whose files can be read with O_DIRECT.
func (c Config) NeedsDirectIO() bool { return c.DirectIO == directIORequired }

// Limits are what unpacking may take of the node.
func (c Config) Limits() unpack.Limits {
	return unpack.Limits{Memory: c.DecompressionMemory << 20, Expansion: c.MaxExpansion, Reserve: c.ReservedSpace}
}

func validateSocket(key, path string) error {
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
