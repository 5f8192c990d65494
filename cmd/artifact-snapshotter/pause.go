// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/urfave/cli/v3"

	"github.com/artifact-snapshotter/artifact-snapshotter/daemon"
	"github.com/artifact-snapshotter/artifact-snapshotter/internal/retry"
	"github.com/artifact-snapshotter/artifact-snapshotter/internal/startuptaint"
)

// untaintPolicy says when to try again. Pods wait for the node meanwhile.
var untaintPolicy = retry.Policy{Min: 500 * time.Millisecond, Max: 10 * time.Second, WarnAfter: 5}

func pauseCommand() *cli.Command {
	return &cli.Command{
		Name:   "pause",
		Usage:  "wait for a signal, for the container of a DaemonSet whose work is done",
		Hidden: true,
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "untaint", Usage: "the node from which to remove the startup taint as soon as the daemon is ready"},
			&cli.StringFlag{Name: "address", Usage: "the daemon's Unix socket"},
		},
		Action: func(ctx context.Context, command *cli.Command) error {
			if node := command.String("untaint"); node != "" {
				untaint(ctx, node, command.String("address"))
			}
			<-ctx.Done()
			return nil
		},
	}
}

// untaint removes the startup taint from the node when the daemon is ready. It tries until
// it succeeds or ctx ends.
func untaint(ctx context.Context, node, address string) {
	trying, done := context.WithCancel(ctx)
	defer done()
	ctx = log.WithLogger(ctx, log.G(ctx).WithField("node", node))
	untaintPolicy.Run(log.WithLogger(trying, log.G(ctx)), "cannot remove the taint "+startuptaint.Key+" yet; still trying", func() (time.Duration, error) {
		if err := ready(trying, address); err != nil {
			return 0, err
		}
		removed, err := startuptaint.Remove(trying, node)
		if err != nil {
			return 0, err
		}
		if removed {
			log.G(ctx).WithField("taint", startuptaint.Key).Info("removed the startup taint, since the daemon is ready")
		}
		done()
		return 0, nil
	})
}

// ready returns nil if the daemon serves, and so do NRI and CSI if it was started with them.
func ready(ctx context.Context, address string) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if err := daemon.Health(ctx, address); err != nil {
		return err
	}
	if err := daemon.HealthOfNRI(ctx, address); err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	if err := daemon.HealthOfCSI(ctx, address); err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	return nil
}
