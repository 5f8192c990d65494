// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"

	"github.com/urfave/cli/v3"

	"github.com/artifact-snapshotter/artifact-snapshotter/client"
)

func mountCommand() *cli.Command {
	return &cli.Command{
		Name:      "mount",
		Usage:     "mount an artifact at a directory of the node, read-only",
		ArgsUsage: "REF TARGET",
		Description: "TARGET is an empty directory, or does not exist yet. The artifact stays until `unmount`, even\n" +
			"if its image is deleted. A reboot undoes the mount, and the same command makes it again;\n" +
			"`ls --mounts` lists the mounts that are missing.\n\n" +
			"Examples:\n\n" +
			"  artifact-snapshotter mount registry.example.com/models/llama:v1 /mnt/llama\n" +
			"  artifact-snapshotter mount -n k8s.io sha256:2474bb13… /mnt/llama",
		Flags:         clientFlags(),
		ArgValidator:  arguments("REF", "TARGET"),
		ShellComplete: completeReference,
		Action: clientAction(func(ctx context.Context, command *cli.Command, c *client.Client, asJSON bool) error {
			image, err := c.ImageAt(ctx, command.Args().First(), command.Args().Get(1))
			if err != nil {
				return err
			}
			target, err := c.Mount(ctx, image, command.Args().Get(1))
			if err != nil || !asJSON {
				return err
			}
			return printJSON(command.Root().Writer, mountInfo{
				Target:     target,
				References: []string{image.Name},
				Manifest:   image.Manifest,
				Mounted:    true,
			})
		}),
	}
}

func unmountCommand() *cli.Command {
	return &cli.Command{
		Name:      "unmount",
		Aliases:   []string{"umount"},
		Usage:     "undo mount",
		ArgsUsage: "TARGET",
		Description: "After a reboot, too, when the mount is gone but the artifact still stays for it.\n\n" +
			"Example:\n\n" +
			"  artifact-snapshotter unmount /mnt/llama",
		Flags:         clientFlags(),
		ArgValidator:  arguments("TARGET"),
		ShellComplete: completeTarget,
		Action: clientAction(func(ctx context.Context, command *cli.Command, c *client.Client, asJSON bool) error {
			target, err := c.Unmount(ctx, command.Args().First())
			if err != nil || !asJSON {
				return err
			}
			return printJSON(command.Root().Writer, map[string]string{"target": target})
		}),
	}
}
