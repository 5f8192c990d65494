// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/urfave/cli/v3"

	"github.com/artifact-snapshotter/artifact-snapshotter/daemon"
	"github.com/artifact-snapshotter/artifact-snapshotter/internal/containerdconfig"
)

func healthCommand() *cli.Command {
	return &cli.Command{
		Name:  "health",
		Usage: "report whether the daemon serves: exit status 0, or 1 and the reason",
		Description: "For probes and scripts. `doctor` says more about the node and containerd.\n\n" +
			"Examples:\n\n" +
			"  artifact-snapshotter health\n" +
			"  artifact-snapshotter health --address /run/artifact-snapshotter/artifact-snapshotter.sock --timeout 1s",
		Flags: []cli.Flag{
			configFlag(),
			&cli.StringFlag{Name: "address", Usage: "the daemon's Unix socket", DefaultText: "address of the configuration file"},
			&cli.BoolFlag{Name: "nri", Usage: "ask whether the daemon's NRI plugin is connected to a runtime"},
			&cli.BoolFlag{Name: "csi", Usage: "ask whether kubelet has registered the daemon's CSI driver"},
			&cli.DurationFlag{Name: "timeout", Usage: "how long to wait for an answer", Value: 5 * time.Second},
		},
		Action: health,
	}
}

func health(ctx context.Context, command *cli.Command) error {
	timeout := command.Duration("timeout")
	if timeout <= 0 {
		return errors.New("--timeout must be more than 0")
	}
	address := command.String("address")
	if address == "" {
		cfg, err := loadConfig(command)
		if err != nil {
			return err
		}
		address = cfg.SocketAddress()
	}
	if !filepath.IsAbs(containerdconfig.Socket(address)) {
		return fmt.Errorf("--address %q is not the absolute path of a Unix socket", address)
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	ask := daemon.Health
	switch nri, csi := command.Bool("nri"), command.Bool("csi"); {
	case nri && csi:
		return errors.New("--nri and --csi exclude each other")
	case nri:
		ask = daemon.HealthOfNRI
	case csi:
		ask = daemon.HealthOfCSI
	}
	if err := ask(ctx, address); err != nil {
		return err
	}
	_, err := fmt.Fprintln(command.Root().Writer, "ok")
	return err
}
