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
		Usage:  "do nothing until a signal, as the pod of a DaemonSet has to when all is done",
		Hidden: true,
		Action: func(ctx context.Context, _ *cli.Command) error {
			<-ctx.Done()
			return nil
		},
	}
}
