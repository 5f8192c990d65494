// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/containerd/containerd/v2/pkg/progress"
	"github.com/opencontainers/go-digest"
	"github.com/urfave/cli/v3"

	"github.com/artifact-snapshotter/artifact-snapshotter/client"
	"github.com/artifact-snapshotter/artifact-snapshotter/images"
)

func pruneCommand() *cli.Command {
	return &cli.Command{
		Name:  "prune",
		Usage: "delete the artifacts of a namespace that nothing uses",
		Description: "An artifact is in use if a pod has it as a volume, if `mount` has mounted it (even if a reboot\n" +
			"has undone the mount), if anything else has a View snapshot of it, if it is the image of a\n" +
			"container, or if one of its names is pinned. All names of the others are deleted.\n\n" +
			"Examples:\n\n" +
			"  artifact-snapshotter prune -n k8s.io --dry-run\n" +
			"  artifact-snapshotter prune -n k8s.io",
		Flags: append(clientFlags(),
			&cli.BoolFlag{Name: "dry-run", Usage: "only print what would be deleted"},
		),
		ArgValidator: arguments(),
		Action:       clientAction(prune),
	}
}

// prunedArtifact is an artifact that prune deletes, in JSON, and prunedAll are all of them.
type prunedArtifact struct {
	References []string      `json:"references"`
	Manifest   digest.Digest `json:"manifest"`
	Size       int64         `json:"size"`
}

type prunedAll struct {
	DryRun    bool             `json:"dry_run"`
	Artifacts []prunedArtifact `json:"artifacts"`
	// Freed is the size of the blobs that have left the namespace; 0 with --dry-run.
	Freed int64 `json:"freed"`
}

func prune(ctx context.Context, command *cli.Command, c *client.Client, asJSON bool) error {
	unused, err := c.Unused(ctx)
	if err != nil {
		return err
	}
	all := prunedAll{DryRun: command.Bool("dry-run"), Artifacts: []prunedArtifact{}}
	for _, u := range unused {
		p := prunedArtifact{[]string{}, u.Artifact.Manifest.Digest, client.Size(u.Artifact)}
		for _, image := range images.Named(u.Images) {
			p.References = append(p.References, image.Name)
		}
		all.Artifacts = append(all.Artifacts, p)
	}
	var left int64
	if !all.DryRun {
		if all.Freed, left, err = c.Remove(ctx, unused); err != nil {
			return err
		}
	}
	if asJSON {
		return printJSON(command.Root().Writer, all)
	}
	var text strings.Builder
	fmt.Fprintln(&text, "REFERENCE\tDIGEST\tSIZE")
	for _, p := range all.Artifacts {
		fmt.Fprintf(&text, "%s\t%s\t%s\n", printableList(p.References), short(p.Manifest), progress.Bytes(p.Size))
	}
	if err := printTable(command.Root().Writer, text.String()); err != nil {
		return err
	}
	hint := fmt.Sprintf("%s freed", progress.Bytes(all.Freed))
	switch {
	case left > 0:
		hint += fmt.Sprintf("; %s stays, since another image or a lease needs it (a killed pull leaves a lease of 24 hours)", progress.Bytes(left))
	case all.DryRun:
		hint = "nothing was deleted: this was a dry run"
	}
	_, err = fmt.Fprintln(command.Root().ErrWriter, hint)
	return err
}
