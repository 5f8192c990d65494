// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"

	"github.com/containerd/log"
	"github.com/urfave/cli/v3"

	"github.com/artifact-snapshotter/artifact-snapshotter/deploy"
	"github.com/artifact-snapshotter/artifact-snapshotter/internal/install"
)

// installFlags are those of install and uninstall.
func installFlags() []cli.Flag {
	return append(scopeFlags(),
		&cli.StringFlag{Name: "containerd-config", Usage: "containerd's main configuration file", TakesFile: true, DefaultText: "that of containerd, k3s or RKE2, whichever exists"},
		&cli.StringFlag{Name: "binary", Usage: "path to install the program at", Value: deploy.UnitBinary},
		&cli.BoolFlag{Name: "no-service", Usage: "do not install the program and its systemd service: something else runs the daemon"},
		&cli.BoolFlag{Name: "no-restart", Usage: "do not restart containerd, only say that it must be restarted"},
		&cli.BoolFlag{Name: "dry-run", Usage: "change nothing, print what would change, files as diffs"},
		&cli.StringFlag{Name: "host", Usage: "directory that has the host's files, when run in a container"},
		configFlag(),
	)
}

func installCommand() *cli.Command {
	return &cli.Command{
		Name:  "install",
		Usage: "install this program as the node's snapshotter for artifacts: its service, and containerd's configuration",
		Description: "What is already installed is left alone, and containerd is restarted only if it has not read\n" +
			"its current configuration. If anything prevents the installation, nothing is written.\n\n" +
			"Examples:\n\n" +
			"  artifact-snapshotter install --dry-run\n" +
			"  artifact-snapshotter install\n" +
			"  artifact-snapshotter install --scope node",
		Flags:  installFlags(),
		Action: installAction(install.Install),
	}
}

func uninstallCommand() *cli.Command {
	return &cli.Command{
		Name:  "uninstall",
		Usage: "undo what install has done",
		Description: "It removes the service, the program and what install has added to containerd's configuration,\n" +
			"and restarts containerd. The daemon's own directories stay. Containers that use the snapshotter\n" +
			"could not be removed without it: while there are any, new ones get the snapshotter that the node\n" +
			"had before, and the rest waits for the last one.\n\n" +
			"Examples:\n\n" +
			"  artifact-snapshotter uninstall --dry-run\n" +
			"  artifact-snapshotter uninstall",
		Flags: append(installFlags(),
			&cli.BoolFlag{Name: "wait", Usage: "wait until no container uses the snapshotter, and say which do"},
			&cli.StringFlag{Name: "pod-uid", Usage: "the UID of the pod in which this runs, with --wait: it starts again if it uses the snapshotter itself", Sources: cli.EnvVars("POD_UID"), Hidden: true}),
		Action: installAction(install.Uninstall),
	}
}

func installAction(do func(context.Context, install.Options) error) cli.ActionFunc {
	return func(ctx context.Context, command *cli.Command) error {
		// containerd's code logs while it reads files; its errors say what matters.
		if err := log.SetLevel("fatal"); err != nil {
			return err
		}
		cfg, err := loadConfig(command)
		if err != nil {
			return err
		}
		if err := cfg.Validate(); err != nil {
			return err
		}
		handler, err := handlerOf(command)
		if err != nil {
			return err
		}
		return do(ctx, install.Options{
			Daemon:           cfg,
			Config:           command.String("config"),
			ConfigRequired:   command.IsSet("config"),
			ContainerdConfig: command.String("containerd-config"),
			Handler:          handler,
			Service:          !command.Bool("no-service"),
			Binary:           command.String("binary"),
			Host:             command.String("host"),
			Restart:          !command.Bool("no-restart"),
			Wait:             command.Bool("wait"),
			PodUID:           command.String("pod-uid"),
			DryRun:           command.Bool("dry-run"),
			Report:           func(text string) { _, _ = fmt.Fprintln(command.Root().Writer, text) },
		})
	}
}
