// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"

	"github.com/opencontainers/go-digest"
	"github.com/urfave/cli/v3"

	"github.com/artifact-snapshotter/artifact-snapshotter/client"
)

func unpackCommand() *cli.Command {
	return &cli.Command{
		Name:      "unpack",
		Usage:     "create the snapshot of an artifact that containerd has, and print its name",
		ArgsUsage: "REF",
		Description: "containerd deletes the snapshot together with the image. To see its files:\n\n" +
			"  ctr snapshots --snapshotter artifact view KEY $(artifact-snapshotter unpack REF)\n\n" +
			"Examples:\n\n" +
			"  artifact-snapshotter unpack registry.example.com/models/llama:v1\n" +
			"  artifact-snapshotter unpack -n k8s.io --output json registry.example.com/models/llama:v1",
		Flags:         clientFlags(),
		ArgValidator:  arguments("REF"),
		ShellComplete: completeReference,
		Action:        clientAction(unpackImage),
	}
}

// unpacked is what unpack prints as JSON.
type unpacked struct {
	Reference string        `json:"reference"`
	Manifest  digest.Digest `json:"manifest"`
	Snapshot  string        `json:"snapshot"`
}

func unpackImage(ctx context.Context, command *cli.Command, c *client.Client, asJSON bool) error {
	image, err := c.Image(ctx, command.Args().First())
	if err != nil {
		return err
	}
	snapshot, err := c.Unpack(ctx, image)
	if err != nil {
		return err
	}
	if asJSON {
		return printJSON(command.Root().Writer, unpacked{image.Name, image.Manifest, snapshot})
	}
	_, err = fmt.Fprintln(command.Root().Writer, snapshot)
	return err
}
