// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"

	"github.com/urfave/cli/v3"
)

func mountCommand() *cli.Command {
	return &cli.Command{
		Name:      "mount",
		Usage:     "show an artifact at a directory of the node, read-only",
		ArgsUsage: "REF TARGET",
		Description: "TARGET is an empty directory, or one that is not there yet. The artifact is kept until\n" +
			"`unmount`, also if its image is deleted. After a reboot the same command makes the mount\n" +
			"again, then, too; `ls --mounts` says where that is to be done.\n\n" +
			"Examples:\n\n" +
			"  artifact-snapshotter mount registry.example.com/models/llama:v1 /mnt/llama\n" +
			"  artifact-snapshotter mount -n k8s.io sha256:2474bb13… /mnt/llama",
		Flags:         clientFlags(),
		ArgValidator:  arguments("REF", "TARGET"),
		ShellComplete: completeReference,
		Action: func(ctx context.Context, command *cli.Command) error {
			json, err := wantsJSON(command)
			if err != nil {
				return err
			}
			c, err := connect(ctx, command)
			if err != nil {
				return err
			}
			defer func() { _ = c.Close() }()
			image, err := c.ImageAt(ctx, command.Args().First(), command.Args().Get(1))
			if err != nil {
				return err
			}
			target, err := c.Mount(ctx, image, command.Args().Get(1))
			if err != nil || !json {
				return err
			}
			return printJSON(command.Root().Writer, mountInfo{
				Target:     target,
				References: []string{image.Name},
				Manifest:   image.Manifest,
				Mounted:    true,
			})
		},
	}
}

func unmountCommand() *cli.Command {
	return &cli.Command{
		Name:      "unmount",
		Usage:     "take away what mount has made",
		ArgsUsage: "TARGET",
		Description: "It works after a reboot, too, when the mount has gone and the artifact is still kept for it.\n\n" +
			"Example:\n\n" +
			"  artifact-snapshotter unmount /mnt/llama",
		Flags:         clientFlags(),
		ArgValidator:  arguments("TARGET"),
		ShellComplete: completeTarget,
		Action: func(ctx context.Context, command *cli.Command) error {
			json, err := wantsJSON(command)
			if err != nil {
				return err
			}
			c, err := connect(ctx, command)
			if err != nil {
				return err
			}
			defer func() { _ = c.Close() }()
			target, err := c.Unmount(ctx, command.Args().First())
			if err != nil || !json {
				return err
			}
			return printJSON(command.Root().Writer, map[string]string{"target": target})
		},
	}
}
