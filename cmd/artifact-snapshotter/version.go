// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"runtime"
	"runtime/debug"

	"github.com/urfave/cli/v3"
)

// version is set by the release build: -ldflags "-X main.version=v1.2.3".
// Otherwise it is that of the module, which `go install` sets.
var version string

func versionCommand() *cli.Command {
	return &cli.Command{
		Name:  "version",
		Usage: "print the version",
		Description: "Examples:\n\n" +
			"  artifact-snapshotter version",
		Action: func(_ context.Context, command *cli.Command) error { return printVersion(command) },
	}
}

// versionOrHelp is what the program does without a command.
func versionOrHelp(_ context.Context, command *cli.Command) error {
	if command.Bool("version") {
		return printVersion(command)
	}
	return cli.ShowAppHelp(command)
}

func printVersion(command *cli.Command) error {
	_, err := fmt.Fprintf(command.Root().Writer, "%s %s %s %s/%s\n",
		name, buildVersion(), runtime.Version(), runtime.GOOS, runtime.GOARCH)
	return err
}

func buildVersion() string {
	if version != "" {
		return version
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "(devel)"
}
