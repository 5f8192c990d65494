// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"

	"github.com/urfave/cli/v3"
)

func pauseCommand() *cli.Command {
	return &cli.Command{
		Name:   "pause",
		Usage:  "wait for a signal, for the container of a DaemonSet whose work is done",
		Hidden: true,
		Action: func(ctx context.Context, _ *cli.Command) error {
			<-ctx.Done()
			return nil
		},
	}
}
