// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

// Command artifact-snapshotter is the daemon, which mounts artifacts for containerd, CRI-O
// and kubelet, and the tools of whoever sets it up. It only parses flags and prints: what it
// does is in the packages of this module.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"

	"github.com/urfave/cli/v3"
	"golang.org/x/sys/unix"
)

const name = "artifact-snapshotter"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM, unix.SIGINT)
	// A second signal ends the process at once.
	context.AfterFunc(ctx, stop)
	if err := execute(ctx, os.Args); err != nil {
		// All errors are one line: they are read in logs and events.
		fmt.Fprintf(os.Stderr, "%s: %s\n", name, oneLine(err))
		os.Exit(1)
	}
}

func execute(ctx context.Context, args []string) error { return command().Run(ctx, args) }

func command() *cli.Command {
	root := &cli.Command{
		Name:            name,
		Usage:           "mount OCI model artifacts into pods as read-only volumes, without copying a byte",
		Description:     "The global options may precede or follow a command that has them.",
		HideHelpCommand: true,
		Flags:           append(globalFlags(), &cli.BoolFlag{Name: "version", Aliases: []string{"v"}, Usage: "print the version", Local: true, HideDefault: true}),
		Commands: []*cli.Command{
			serveCommand(), installCommand(), uninstallCommand(), configCommand(), doctorCommand(), healthCommand(),
			pullCommand(), unpackCommand(), mountCommand(), unmountCommand(), lsCommand(),
			inspectCommand(), verifyCommand(), rmCommand(), pruneCommand(), versionCommand(), helpCommand(), pauseCommand(),
		},
		EnableShellCompletion: true,
		// Errors are printed by main alone.
		ExitErrHandler: func(context.Context, *cli.Command, error) {},
		ArgValidator:   noArguments,
		Action:         versionOrHelp,
	}
	root.ConfigureShellCompletionCommand = func(command *cli.Command) {
		*command = *completionCommand()
		quietly(command)
		inherit(root.Flags, command)
	}
	quietly(root)
	inherit(root.Flags, root)
	completable(root)
	return root
}
