// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

// Command artifact-snapshotter is the daemon that containerd's proxy plugin
// "artifact" talks to, and the tools of whoever sets it up. It only parses
// flags and prints: what it does is in the packages of this module.
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
	if err := command().Run(ctx, os.Args); err != nil {
		// All errors are one line: they are read in logs and events.
		fmt.Fprintf(os.Stderr, "%s: %s\n", name, oneLine(err))
		os.Exit(1)
	}
}

func command() *cli.Command {
	root := &cli.Command{
		Name:            name,
		Usage:           "mount OCI model artifacts into pods as read-only volumes, without copying a byte",
		Description:     "--namespace, --address and --output may precede or follow a command that has them.",
		HideHelpCommand: true,
		Flags:           globalFlags(),
		Commands: []*cli.Command{
			serveCommand(), installCommand(), uninstallCommand(), configCommand(), doctorCommand(), healthCommand(),
			pullCommand(), unpackCommand(), mountCommand(), unmountCommand(), lsCommand(),
			inspectCommand(), verifyCommand(), pruneCommand(), versionCommand(), pauseCommand(),
		},
		EnableShellCompletion: true,
		// Errors are printed by main alone.
		ExitErrHandler: func(context.Context, *cli.Command, error) {},
		ArgValidator:   noArguments,
	}
	root.ConfigureShellCompletionCommand = func(command *cli.Command) {
		*command = *completionCommand()
		inherit(root.Flags, command)
	}
	quietly(root)
	inherit(root.Flags, root)
	completable(root)
	return root
}

// quietly makes the library return usage errors like others and not print the usage.
func quietly(command *cli.Command) {
	command.OnUsageError = func(_ context.Context, command *cli.Command, err error, _ bool) error {
		return fmt.Errorf("%w (see %s --help)", err, command.FullName())
	}
	for _, sub := range command.Commands {
		quietly(sub)
	}
}

// noArguments refuses arguments.
func noArguments(_ context.Context, command *cli.Command) error {
	if !command.Args().Present() {
		return nil
	}
	if len(command.Commands) > 0 {
		return fmt.Errorf("no such command: %s %s (see %[1]s --help)", command.FullName(), command.Args().First())
	}
	return fmt.Errorf("%s takes no argument, but got %q", command.Name, command.Args().First())
}
