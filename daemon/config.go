// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"bytes"
	_ "embed"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/nri/pkg/api"
	"github.com/pelletier/go-toml/v2"

	"github.com/artifact-snapshotter/artifact-snapshotter/internal/tomlfile"
	"github.com/artifact-snapshotter/artifact-snapshotter/service"
)

// DefaultFile is a configuration file with the values of Default and an explanation of
// every key.
//
//go:embed default.toml
var DefaultFile string

const (
	onErrorFail        = "fail"
	onErrorPassthrough = "passthrough"

	// unixScheme is the prefix of a metrics_address that is a Unix socket.
	unixScheme = "unix://"
)

// Config is the daemon's configuration.
type Config struct {
	service.Config
	// Address is the Unix socket that the daemon serves on; if empty,
	// artifact-snapshotter.sock in State.
	Address string `toml:"address"`
	// LogLevel is a level of github.com/containerd/log.
	LogLevel string `toml:"log_level"`
	// MetricsAddress is where the daemon serves its metrics: unix:///path, a port of a
	// loopback address, or "" for nowhere.
	MetricsAddress string `toml:"metrics_address"`
	// NRI configures the NRI plugin.
	NRI NRI `toml:"nri"`
	// CSI configures the CSI driver.
	CSI CSI `toml:"csi"`
}

// NRI is the configuration of the NRI plugin, which mounts artifacts for runtimes that do
// not use the snapshotter.
type NRI struct {
	Enabled bool `toml:"enabled"`
	// Socket is the runtime's NRI socket.
	Socket string `toml:"socket"`
	// Index orders the plugins of one runtime; it has two digits. Name is the plugin's name.
	Index string `toml:"index"`
	Name  string `toml:"name"`
	// OnError says what happens to a container whose artifact cannot be mounted: "fail",
	// or "passthrough" for the runtime's own mount.
	OnError string `toml:"on_error"`
}

// Default returns the configuration of a daemon for a containerd with its default
// directories.
func Default() Config {
	return Config{
		Config:   service.Default(),
		LogLevel: "info",
		NRI:      NRI{Socket: api.DefaultSocketPath, Index: "50", Name: "artifact-snapshotter", OnError: onErrorFail},
		CSI:      defaultCSI(),
	}
}

// Load reads the TOML file at path. Keys that it leaves out have the values of Default; an
// unknown key is an error, and a missing file is fs.ErrNotExist. Load does not call
// Validate, since flags may still change the result.
func Load(path string) (Config, error) {
	cfg := Default()
	text, err := os.ReadFile(path)
	if err != nil {
		return Config{}, fmt.Errorf("read configuration: %w", err)
	}
	if err := toml.NewDecoder(bytes.NewReader(text)).DisallowUnknownFields().Decode(&cfg); err != nil {
		return Config{}, fmt.Errorf("configuration file %s: %w", path, tomlfile.OneLine(err))
	}
	return cfg, nil
}

// Network reports whether a daemon with this configuration and environment needs other than
// Unix sockets: to pull artifacts, for metrics on a port, or to export spans.
func (c Config) Network() bool {
	return c.CSI.Enabled || c.MetricsAddress != "" && !strings.HasPrefix(c.MetricsAddress, unixScheme) || tracing()
}

// SocketAddress is the path of the socket that the daemon serves on.
func (c Config) SocketAddress() string {
	if c.Address != "" {
		return c.Address
	}
	return filepath.Join(c.State, "artifact-snapshotter.sock")
}

// Validate returns an error that names everything that is wrong with the configuration.
// It does not look at the file system.
func (c Config) Validate() error {
	levels := []string{"trace", "debug", "info", "warn", "error", "fatal", "panic"}
	var level error
	if !slices.Contains(levels, c.LogLevel) {
		level = fmt.Errorf("log_level %q is none of %s", c.LogLevel, strings.Join(levels, ", "))
	}
	return errors.Join(c.Config.Validate(), service.ValidateSocket("address", c.SocketAddress()),
		validateMetrics(c.MetricsAddress), c.NRI.validate(), c.CSI.validate(), level)
}

func (c NRI) validate() error {
	errs := []error{service.ValidateSocket("nri.socket", c.Socket)}
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

// validateMetrics checks metrics_address. Metrics are served without TLS and password and
// are not meant for everybody who can reach the node. So the address is a socket that only
// root can connect to, or a port that only processes of the node can reach.
func validateMetrics(address string) error {
	if address == "" {
		return nil
	}
	if path, ok := strings.CutPrefix(address, unixScheme); ok {
		return service.ValidateSocket("metrics_address", path)
	}
	port, err := netip.ParseAddrPort(address)
	if err != nil || !port.Addr().IsLoopback() || port.Port() == 0 {
		return fmt.Errorf("metrics_address %q is neither unix:///path nor a port of a loopback address, such as 127.0.0.1:9477 or [::1]:9477", address)
	}
	return nil
}
