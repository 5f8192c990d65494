// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"io/fs"

	"github.com/containerd/log"
	"github.com/urfave/cli/v3"

	"github.com/artifact-snapshotter/artifact-snapshotter/daemon"
	"github.com/artifact-snapshotter/artifact-snapshotter/internal/confine"
	"github.com/artifact-snapshotter/artifact-snapshotter/internal/install"
)

func configFlag() *cli.StringFlag {
	return &cli.StringFlag{
		Name:      "config",
		Usage:     "configuration file; the default one need not exist",
		Value:     install.ConfigFile,
		TakesFile: true,
	}
}

// daemonFlags are --config and the flags that override the file.
func daemonFlags() []cli.Flag {
	return []cli.Flag{
		configFlag(),
		&cli.StringFlag{Name: "root", Usage: "directory for what survives a reboot; overrides the file, as do all following flags"},
		&cli.StringFlag{Name: "state", Usage: "directory for mounts and the socket"},
		&cli.StringFlag{Name: "address", Usage: "Unix socket to serve on"},
		&cli.StringFlag{Name: "content-root", Usage: "root of containerd's content store"},
		&cli.StringFlag{Name: "containerd-address", Usage: "containerd's own Unix socket"},
		&cli.BoolFlag{Name: "nri", Usage: "mount artifacts through NRI, too: for CRI-O, and for a containerd with another snapshotter"},
		&cli.BoolFlag{Name: "csi", Usage: "serve the CSI driver, too: volumes of any artifact, which the daemon pulls by itself"},
	}
}

// daemonConfig is the daemon's configuration with daemonFlags.
func daemonConfig(command *cli.Command) (daemon.Config, error) {
	cfg, err := loadConfig(command)
	if err != nil {
		return daemon.Config{}, err
	}
	for flag, value := range map[string]*string{
		"root":               &cfg.Root,
		"state":              &cfg.State,
		"address":            &cfg.Address,
		"content-root":       &cfg.ContentRoot,
		"containerd-address": &cfg.ContainerdAddress,
		"log-level":          &cfg.LogLevel,
	} {
		if command.IsSet(flag) {
			*value = command.String(flag)
		}
	}
	for flag, value := range map[string]*bool{"nri": &cfg.NRI.Enabled, "csi": &cfg.CSI.Enabled} {
		if command.IsSet(flag) {
			*value = command.Bool(flag)
		}
	}
	return cfg, cfg.Validate()
}

func serveCommand() *cli.Command {
	return &cli.Command{
		Name:  "serve",
		Usage: "run the daemon that containerd's proxy plugin talks to",
		Description: "Examples:\n\n" +
			"  artifact-snapshotter serve\n" +
			"  artifact-snapshotter serve --nri\n" +
			"  artifact-snapshotter serve --csi\n" +
			"  artifact-snapshotter serve --content-root /data/containerd/io.containerd.content.v1.content",
		Flags: append(daemonFlags(),
			&cli.StringFlag{Name: "log-level", Usage: "trace, debug, info, warn, error, fatal or panic"}),
		Action: serve,
	}
}

func serve(ctx context.Context, command *cli.Command) error {
	cfg, err := daemonConfig(command)
	if err != nil {
		return err
	}
	if err := errors.Join(log.SetFormat(log.TextFormat), log.SetLevel(cfg.LogLevel)); err != nil {
		return err
	}
	if err := confine.Capabilities(); err != nil {
		log.G(ctx).WithError(err).Warn("cannot drop capabilities that the daemon does not need")
	}
	if err := confine.SystemCalls(cfg.Network()); err != nil {
		log.G(ctx).WithError(err).Warn("cannot forbid system calls that the daemon does not need")
	}
	return daemon.Serve(ctx, cfg, buildVersion())
}

// loadConfig loads the file of --config. The default file need not exist.
func loadConfig(command *cli.Command) (daemon.Config, error) {
	cfg, err := daemon.Load(command.String("config"))
	if errors.Is(err, fs.ErrNotExist) && !command.IsSet("config") {
		return daemon.Default(), nil
	}
	return cfg, err
}
